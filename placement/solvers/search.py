"""Compiled local search over several loads at once: swaps of replicas, and replicas handed to another expert."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from placement.solvers.layer_loads import layer_loads


@njit(cache=True)
def power(value: float, doublings: int) -> float:
    """value to the power 2**doublings."""
    for _ in range(doublings):
        value *= value
    return value


@njit(cache=True)
def _move(homes: NDArray[np.int64], count: int, old: int, new: int) -> None:
    """Replace one of `count` rising numbers by another, and keep them rising."""
    at = 0
    while homes[at] != old:
        at += 1
    while at > 0 and homes[at - 1] > new:
        homes[at] = homes[at - 1]
        at -= 1
    while at + 1 < count and homes[at + 1] < new:
        homes[at] = homes[at + 1]
        at += 1
    homes[at] = new


@njit(cache=True)
def search_layer(
    table: NDArray[np.int64],
    loads: NDArray[np.float64],
    weights: NDArray[np.float64],
    ranks: int,
    node_ranks: int,
    doublings: int,
    passes: int,
) -> None:
    """Lower sum over loads of weight x sum over ranks of (load over mean)**p, p = 2**doublings, in place.

    table: [slots]. loads: [scenarios, experts], each summing to 1. Replicas only move between ranks of one node of
    `node_ranks` ranks. Two moves: swap two replicas; give a spare replica's slot to another expert. First improvement,
    until a pass changes nothing or `passes` are done.
    """
    scenarios, experts = loads.shape
    slots = len(table)
    room = slots // ranks
    count, holds, homes, share, load = layer_loads(table, loads, ranks)
    cost = np.empty((ranks, scenarios), dtype=np.float64)
    for rank in range(ranks):
        for s in range(scenarios):
            cost[rank, s] = weights[s] * power(load[rank, s], doublings)
    rank_cost = cost.sum(axis=1)

    for _ in range(passes):
        changed = False
        for a in range(slots):
            rank_a = a // room
            node = rank_a // node_ranks
            for b in range((rank_a + 1) * room, (node + 1) * node_ranks * room):
                rank_b = b // room
                one, two = table[a], table[b]
                if one == two or holds[rank_b, one] or holds[rank_a, two]:
                    continue
                before = rank_cost[rank_a] + rank_cost[rank_b]
                after = 0.0
                for s in range(scenarios):
                    moved = share[two, s] - share[one, s]
                    after += weights[s] * (
                        power(load[rank_a, s] + moved, doublings) + power(load[rank_b, s] - moved, doublings)
                    )
                    if after >= before:
                        break
                if after >= before * (1.0 - 1e-9):
                    continue
                changed = True
                table[a], table[b] = two, one
                holds[rank_a, one] = False
                holds[rank_a, two] = True
                holds[rank_b, two] = False
                holds[rank_b, one] = True
                _move(homes[one], count[one], rank_a, rank_b)
                _move(homes[two], count[two], rank_b, rank_a)
                rank_cost[rank_a] = 0.0
                rank_cost[rank_b] = 0.0
                for s in range(scenarios):
                    moved = share[two, s] - share[one, s]
                    load[rank_a, s] += moved
                    load[rank_b, s] -= moved
                    rank_cost[rank_a] += weights[s] * power(load[rank_a, s], doublings)
                    rank_cost[rank_b] += weights[s] * power(load[rank_b, s], doublings)
        for a in range(slots):
            old = table[a]
            if count[old] < 2:
                continue
            rank_a = a // room
            node = rank_a // node_ranks
            best, best_delta = -1, -1e-9 * rank_cost.sum()
            for new in range(experts):
                if new == old or holds[rank_a, new] or count[new] >= node_ranks:
                    continue
                on_node = False
                delta = 0.0
                i = j = 0
                while i < count[old] or j < count[new]:
                    rank = homes[old, i] if i < count[old] else ranks
                    if j < count[new]:
                        rank = min(rank, homes[new, j])
                    has_old, has_new = holds[rank, old], holds[rank, new]
                    i += has_old
                    j += has_new
                    if rank // node_ranks != node:
                        continue
                    on_node = on_node or has_new
                    after = 0.0
                    for s in range(scenarios):
                        value = load[rank, s]
                        if has_old:
                            if rank == rank_a:
                                value -= share[old, s]
                            else:
                                value += share[old, s] / (count[old] - 1)
                        if has_new:
                            value -= share[new, s] / (count[new] + 1)
                        if rank == rank_a:
                            value += share[new, s] * count[new] / (count[new] + 1)
                        after += weights[s] * power(value, doublings)
                    delta += after - rank_cost[rank]
                if on_node and delta < best_delta:
                    best, best_delta = new, delta
            if best < 0:
                continue
            changed = True
            for rank in range(node * node_ranks, (node + 1) * node_ranks):
                has_old, has_new = holds[rank, old], holds[rank, best]
                rank_cost[rank] = 0.0
                for s in range(scenarios):
                    if has_old:
                        if rank == rank_a:
                            load[rank, s] -= share[old, s]
                        else:
                            load[rank, s] += share[old, s] / (count[old] - 1)
                    if has_new:
                        load[rank, s] -= share[best, s] / (count[best] + 1)
                    if rank == rank_a:
                        load[rank, s] += share[best, s] * count[best] / (count[best] + 1)
                    rank_cost[rank] += weights[s] * power(load[rank, s], doublings)
            table[a] = best
            holds[rank_a, old] = False
            holds[rank_a, best] = True
            _move(homes[old], count[old], rank_a, ranks)
            homes[best, count[best]] = ranks
            _move(homes[best], count[best] + 1, ranks, rank_a)
            count[old] -= 1
            count[best] += 1
            for s in range(scenarios):
                share[old, s] = loads[s, old] * ranks / count[old]
                share[best, s] = loads[s, best] * ranks / count[best]
        if not changed:
            return


@njit(cache=True)
def search_layers(
    table: NDArray[np.int64],
    loads: NDArray[np.float64],
    weights: NDArray[np.float64],
    ranks: int,
    node_ranks: int,
    doublings: int,
    passes: int,
) -> None:
    """`search_layer` on every layer: table [layers, slots], loads [layers, scenarios, experts], weights by both."""
    for layer in range(table.shape[0]):
        search_layer(table[layer], loads[layer], weights[layer], ranks, node_ranks, doublings, passes)
