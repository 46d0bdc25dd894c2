"""Compiled annealing over several loads at once: the two moves of `search`, drawn at random, at falling thresholds.

The cost is the sum over loads of weight x sum over ranks of (load over mean)**8: smooth, so that every move tells, and
led by the hottest ranks. The power is written out, so that the loop over the loads compiles to vector instructions;
sums may therefore be rounded otherwise on another kind of processor, and end in another placement of like cost.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from placement.solvers.layer_loads import layer_loads

HAND_OVER = 0.05
"""Share of the moves that hand a spare slot to another expert; the others swap two replicas."""


@njit(cache=True, fastmath=True, inline="always")
def eighth(value: float) -> float:
    """value to the eighth power."""
    square = value * value
    fourth = square * square
    return fourth * fourth


@njit(cache=True, fastmath=True)
def anneal_layer(
    table: NDArray[np.int64],
    loads: NDArray[np.float64],
    weights: NDArray[np.float64],
    ranks: int,
    node_ranks: int,
    moves: int,
    first: float,
    last: float,
    rng: np.random.Generator,
) -> float:
    """Lower the cost of one layer's table [slots], in place.

    loads: [scenarios, experts], each summing to 1; weights: [scenarios]. Replicas stay on their node of `node_ranks`
    ranks. A move is kept where it costs less than the threshold of its turn, which falls geometrically from `first` to
    `last` (threshold accepting: Dueck and Scheuer, Journal of Computational Physics 90(1), 1990). Leaves the best table
    of the last third, and returns its cost.
    """
    scenarios, experts = loads.shape
    slots = len(table)
    room = slots // ranks
    count, holds, homes, share, load = layer_loads(table, loads, ranks)  # the ranks in homes soon stand in no order
    cost = np.zeros(ranks, dtype=np.float64)
    for rank in range(ranks):
        for s in range(scenarios):
            cost[rank] += weights[s] * eighth(load[rank, s])
    total = cost.sum()
    best, best_table = total, table.copy()
    node_slots = node_ranks * room
    falls = (last / first) ** (1.0 / max(moves, 1))
    threshold = first
    touched = np.empty(2 * ranks, dtype=np.int64)
    new_load = np.empty((2 * ranks, scenarios), dtype=np.float64)
    new_cost = np.empty(2 * ranks, dtype=np.float64)
    for move in range(moves):
        threshold *= falls
        a = int(rng.random() * slots)
        rank_a, node = a // room, a // node_slots
        pick = rng.random()
        if pick >= HAND_OVER:
            b = node * node_slots + int((pick - HAND_OVER) / (1.0 - HAND_OVER) * node_slots)
            rank_b = b // room
            one, two = table[a], table[b]
            if rank_a == rank_b or one == two or holds[rank_b, one] or holds[rank_a, two]:
                continue
            most = cost[rank_a] + cost[rank_b] + threshold
            cost_a = cost_b = 0.0
            for s in range(scenarios):
                moved = share[two, s] - share[one, s]
                cost_a += weights[s] * eighth(load[rank_a, s] + moved)
                cost_b += weights[s] * eighth(load[rank_b, s] - moved)
            if cost_a + cost_b >= most:
                continue
            total += cost_a + cost_b - cost[rank_a] - cost[rank_b]
            cost[rank_a], cost[rank_b] = cost_a, cost_b
            table[a], table[b] = two, one
            holds[rank_a, one] = False
            holds[rank_a, two] = True
            holds[rank_b, two] = False
            holds[rank_b, one] = True
            _replace(homes[one], rank_a, rank_b)
            _replace(homes[two], rank_b, rank_a)
            for s in range(scenarios):
                moved = share[two, s] - share[one, s]
                load[rank_a, s] += moved
                load[rank_b, s] -= moved
        else:
            old, new = table[a], int(pick / HAND_OVER * experts)
            if count[old] < 2 or old == new or holds[rank_a, new] or count[new] >= node_ranks:
                continue
            if homes[new, 0] // node_ranks != node:
                continue
            size = 0
            for at in range(count[old]):
                touched[size] = homes[old, at]
                size += 1
            for at in range(count[new]):
                if not holds[homes[new, at], old]:
                    touched[size] = homes[new, at]
                    size += 1
            more, fewer = 1.0 / (count[old] - 1), 1.0 / (count[new] + 1)
            change = 0.0
            for at in range(size):
                rank = touched[at]
                new_cost[at] = 0.0
                for s in range(scenarios):
                    value = load[rank, s]
                    if rank == rank_a:
                        value += share[new, s] * count[new] * fewer - share[old, s]
                    elif holds[rank, old]:
                        value += share[old, s] * more
                    if holds[rank, new]:
                        value -= share[new, s] * fewer
                    new_load[at, s] = value
                    new_cost[at] += weights[s] * eighth(value)
                change += new_cost[at] - cost[rank]
            if change >= threshold:
                continue
            total += change
            for at in range(size):
                cost[touched[at]] = new_cost[at]
                load[touched[at]] = new_load[at]
            table[a] = new
            holds[rank_a, old] = False
            holds[rank_a, new] = True
            _replace(homes[old], rank_a, homes[old, count[old] - 1])
            homes[new, count[new]] = rank_a
            count[old] -= 1
            count[new] += 1
            for s in range(scenarios):
                share[old, s] = loads[s, old] * ranks / count[old]
                share[new, s] = loads[s, new] * ranks / count[new]
        if total < best and 3 * move > 2 * moves:
            best = total
            best_table[:] = table
    table[:] = best_table
    return float(best)


@njit(cache=True)
def _replace(homes: NDArray[np.int64], old: int, new: int) -> None:
    at = 0
    while homes[at] != old:
        at += 1
    homes[at] = new


def anneal_layers(
    table: NDArray[np.int64],
    loads: NDArray[np.float64],
    weights: NDArray[np.float64],
    ranks: int,
    node_ranks: int,
    moves: int,
    first: float,
    last: float,
    rng: np.random.Generator,
) -> None:
    """`anneal_layer` on every layer, each with its own random numbers: table [layers, slots], loads [layers, ...]."""
    for layer, own in enumerate(rng.spawn(len(table))):
        anneal_layer(table[layer], loads[layer], weights, ranks, node_ranks, moves, first, last, own)
