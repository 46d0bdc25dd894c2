"""Compiled pieces of an incremental re-layout: a path of single changes from one layer's row, and what moving costs."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True)
def hottest(row: NDArray[np.int64], load: NDArray[np.float64], ranks: int) -> float:
    """Largest rank load of one layer: row [slots], load [experts], split evenly over replicas."""
    count = np.zeros(len(load), dtype=np.int64)
    for expert in row:
        count[expert] += 1
    room = len(row) // ranks
    most = 0.0
    for rank in range(ranks):
        total = 0.0
        for slot in range(rank * room, (rank + 1) * room):
            total += load[row[slot]] / count[row[slot]]
        most = max(most, total)
    return float(most)


@njit(cache=True)
def hottest_each(table: NDArray[np.int64], counts: NDArray[np.float64], ranks: int) -> NDArray[np.float64]:
    """Largest rank load of each layer at each step: table [layers, slots], counts [steps, layers, experts]."""
    steps, layers, experts = counts.shape
    slots = table.shape[1]
    room = slots // ranks
    found = np.empty((steps, layers))
    share = np.empty(experts)
    for layer in range(layers):
        count = np.zeros(experts, dtype=np.int64)
        for expert in table[layer]:
            count[expert] += 1
        for step in range(steps):
            for expert in range(experts):
                share[expert] = counts[step, layer, expert] / max(count[expert], 1)
            most = 0.0
            for rank in range(ranks):
                total = 0.0
                for slot in range(rank * room, (rank + 1) * room):
                    total += share[table[layer, slot]]
                most = max(most, total)
            found[step, layer] = most
    return found


@njit(cache=True)
def row_moves(
    old: NDArray[np.int64], new: NDArray[np.int64], domain: NDArray[np.int64], experts: int, near_s: float, far_s: float
) -> tuple[int, float]:
    """Experts that travel from one row to another, and the seconds of the busiest rank.

    An expert that a rank lacks comes from the holder in its own domain (domain: [ranks]) that has sent least so far,
    else from any. near_s, far_s: of one expert inside a domain and between two; a rank sends and receives at once, and
    both kinds of link work side by side.
    """
    ranks = len(domain)
    room = len(old) // ranks
    held = np.zeros((ranks, experts), dtype=np.bool_)
    for slot in range(len(old)):
        held[slot // room, old[slot]] = True
    sent = np.zeros((2, ranks), dtype=np.int64)
    got = np.zeros((2, ranks), dtype=np.int64)
    came = np.zeros(experts, dtype=np.int64)  # the last rank (from 1) to which an expert came: duplicates travel once
    moved = 0
    for slot in range(len(new)):
        rank, expert = slot // room, new[slot]
        if held[rank, expert] or came[expert] == rank + 1:
            continue
        came[expert] = rank + 1
        moved += 1
        near, far = -1, -1
        for other in range(ranks):
            if not held[other, expert]:
                continue
            if domain[other] == domain[rank]:
                if near < 0 or sent[0, other] < sent[0, near]:
                    near = other
            elif far < 0 or sent[1, other] < sent[1, far]:
                far = other
        if near >= 0:
            sent[0, near] += 1
            got[0, rank] += 1
        else:
            sent[1, far] += 1
            got[1, rank] += 1
    busiest_near = max(sent[0].max(), got[0].max())
    busiest_far = max(sent[1].max(), got[1].max())
    return moved, max(busiest_near * near_s, busiest_far * far_s)


@njit(cache=True)
def table_moves(
    old: NDArray[np.int64], new: NDArray[np.int64], domain: NDArray[np.int64], experts: int, near_s: float, far_s: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """`row_moves` of every layer: experts that travel [layers] and seconds [layers]."""
    layers = len(old)
    moved, seconds = np.zeros(layers, dtype=np.int64), np.zeros(layers)
    for layer in range(layers):
        moved[layer], seconds[layer] = row_moves(old[layer], new[layer], domain, experts, near_s, far_s)
    return moved, seconds


@njit(cache=True)
def descend(
    start: NDArray[np.int64], load: NDArray[np.float64], ranks: int, node_ranks: int, limit: int, tolerance: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A path of single changes from a row, each of which relieves the hottest rank most: rows [n + 1, slots], loads.

    A change swaps two replicas of two ranks, or gives a spare replica's slot to another expert; both stay within a node
    of `node_ranks` ranks, and none puts an expert on a rank twice. The first row is the start; loads [n + 1] are those
    of the hottest rank. Ends where no change helps, after `limit` changes, or within `tolerance` of the mean.
    """
    experts, slots = len(load), len(start)
    room = slots // ranks
    row = start.copy()
    rows = np.empty((limit + 1, slots), dtype=np.int64)
    most = np.empty(limit + 1)
    count = np.zeros(experts, dtype=np.int64)
    holds = np.zeros((ranks, experts), dtype=np.int64)
    on_node = np.zeros((ranks // node_ranks, experts), dtype=np.int64)
    for slot in range(slots):
        count[row[slot]] += 1
        holds[slot // room, row[slot]] += 1
        on_node[slot // room // node_ranks, row[slot]] += 1
    heat = np.zeros(ranks)
    for slot in range(slots):
        heat[slot // room] += load[row[slot]] / count[row[slot]]
    mean = heat.sum() / ranks
    rows[0], most[0] = row, heat.max()
    done = 0
    while done < limit:
        hot = np.argmax(heat)
        if heat[hot] <= mean * (1.0 + tolerance):
            break
        node = hot // node_ranks
        best = heat[hot] * (1.0 - 1e-9)
        kind, one, two = 0, -1, -1
        for mine in range(hot * room, (hot + 1) * room):
            give = row[mine]
            share = load[give] / count[give]
            for theirs in range(node * node_ranks * room, (node + 1) * node_ranks * room):
                rank, take = theirs // room, row[theirs]
                if rank == hot or take == give:
                    continue
                shift = share - load[take] / count[take]
                if shift > 0.0 and holds[rank, give] == 0 and holds[hot, take] == 0:
                    after = max(heat[hot] - shift, heat[rank] + shift)
                    if after < best:
                        best, kind, one, two = after, 1, mine, theirs
        # A spare replica elsewhere on the node makes way for one more of an expert of the hottest rank.
        for theirs in range(node * node_ranks * room, (node + 1) * node_ranks * room):
            rank, gone = theirs // room, row[theirs]
            if rank == hot or count[gone] < 2 or on_node[node, gone] < 2:
                continue
            rise = load[gone] / (count[gone] - 1) - load[gone] / count[gone]
            for mine in range(hot * room, (hot + 1) * room):
                more = row[mine]
                if more == gone or holds[rank, more] > 0:
                    continue
                after = _after(load, count, holds, heat, rank, gone, more, rise, best)
                if after < best:
                    best, kind, one, two = after, 2, more, theirs
        # A spare replica on the hottest rank makes way for one more of any other expert of the node.
        for mine in range(hot * room, (hot + 1) * room):
            gone = row[mine]
            if count[gone] < 2 or on_node[node, gone] < 2:
                continue
            rise = load[gone] / (count[gone] - 1) - load[gone] / count[gone]
            for more in range(experts):
                if more == gone or holds[hot, more] > 0 or on_node[node, more] == 0:
                    continue
                after = _after(load, count, holds, heat, hot, gone, more, rise, best)
                if after < best:
                    best, kind, one, two = after, 2, more, mine
        if kind == 0:
            break
        if kind == 1:
            rank_one, rank_two = one // room, two // room
            give, take = row[one], row[two]
            row[one], row[two] = take, give
            shift = load[give] / count[give] - load[take] / count[take]
            heat[rank_one] -= shift
            heat[rank_two] += shift
            holds[rank_one, give] -= 1
            holds[rank_one, take] += 1
            holds[rank_two, take] -= 1
            holds[rank_two, give] += 1
        else:
            rank, gone = two // room, row[two]
            row[two] = one
            for expert, change in ((gone, -1), (one, 1)):
                for other in range(ranks):
                    heat[other] -= holds[other, expert] * load[expert] / count[expert]
                count[expert] += change
                holds[rank, expert] += change
                on_node[node, expert] += change
                for other in range(ranks):
                    heat[other] += holds[other, expert] * load[expert] / count[expert]
        done += 1
        rows[done], most[done] = row, heat.max()
    return rows[: done + 1], most[: done + 1]


@njit(cache=True)
def _after(
    load: NDArray[np.float64],
    count: NDArray[np.int64],
    holds: NDArray[np.int64],
    heat: NDArray[np.float64],
    rank: int,
    gone: int,
    more: int,
    rise: float,
    bound: float,
) -> float:
    """Hottest of the ranks that change when `rank` gives up a replica of `gone` for one of `more`; or above bound."""
    fall = load[more] / count[more] - load[more] / (count[more] + 1)
    most = heat[rank] - load[gone] / count[gone] + load[more] / (count[more] + 1)
    if most >= bound:
        return float(most)
    for other in range(len(heat)):
        if other == rank or (holds[other, gone] == 0 and holds[other, more] == 0):
            continue
        value = heat[other] + holds[other, gone] * rise - holds[other, more] * fall
        if value > most:
            most = value
            if most >= bound:
                break
    return float(most)
