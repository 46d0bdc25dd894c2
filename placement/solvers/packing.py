"""Compiled packing of one known load: replica counts, longest processing time first, swaps."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True)
def replica_counts(weight: NDArray[np.float64], slots: int, most: int) -> NDArray[np.int64]:
    """Replicas of each expert: spare slots go one by one to the largest load for a replica, at most `most` each.

    weight: [experts]. This greedy choice minimises the largest load of a replica (each step lowers the only maximum).
    """
    experts = len(weight)
    count = np.ones(experts, dtype=np.int64)
    share = weight.copy()
    for _ in range(slots - experts):
        hottest = -1
        for expert in range(experts):
            if count[expert] < most and (hottest < 0 or share[expert] > share[hottest]):
                hottest = expert
        count[hottest] += 1
        share[hottest] = weight[hottest] / count[hottest]
    return count


@njit(cache=True)
def pack_apart(weight: NDArray[np.float64], count: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """Longest processing time first, replicas of an expert on different ranks, as many slots on each rank.

    weight and count: [experts]; returns the expert of each slot, [slots]. Where every rank with room already holds the
    expert, a replica on a full rank makes way: a full rank without the expert has more kinds than the rank with room,
    so one of them can always move there.
    """
    experts = len(weight)
    slots = count.sum()
    room = slots // ranks
    item = np.empty(slots, dtype=np.int64)
    share = np.empty(slots, dtype=np.float64)
    filled = 0
    for expert in range(experts):
        for _ in range(count[expert]):
            item[filled] = expert
            share[filled] = weight[expert] / count[expert]
            filled += 1
    order = np.argsort(-share, kind="mergesort")
    table = np.full(slots, -1, dtype=np.int64)
    holds = np.zeros((ranks, experts), dtype=np.bool_)
    used = np.zeros(ranks, dtype=np.int64)
    load = np.zeros(ranks, dtype=np.float64)
    for position in order:
        expert = item[position]
        best, open_rank = -1, -1
        for rank in range(ranks):
            if used[rank] == room:
                continue
            if open_rank < 0 or load[rank] < load[open_rank]:
                open_rank = rank
            if not holds[rank, expert] and (best < 0 or load[rank] < load[best]):
                best = rank
        if best >= 0:
            table[best * room + used[best]] = expert
            used[best] += 1
            holds[best, expert] = True
            load[best] += share[position]
            continue
        moved = False
        for rank in range(ranks):
            if moved or holds[rank, expert]:
                continue
            for slot in range(rank * room, (rank + 1) * room):
                other = table[slot]
                if not holds[open_rank, other]:
                    other_share = weight[other] / count[other]
                    table[slot] = expert
                    holds[rank, other] = False
                    holds[rank, expert] = True
                    load[rank] += share[position] - other_share
                    table[open_rank * room + used[open_rank]] = other
                    used[open_rank] += 1
                    holds[open_rank, other] = True
                    load[open_rank] += other_share
                    moved = True
                    break
    return table


@njit(cache=True)
def swap_down(
    table: NDArray[np.int64], weight: NDArray[np.float64], count: NDArray[np.int64], ranks: int, tolerance: float
) -> None:
    """Swap replicas of the hottest rank with others, each time the swap that lowers the pair most, until none helps.

    table: [slots], changed in place. Ends when the hottest rank is within `tolerance` (relative) of the mean, too.
    """
    experts = len(weight)
    slots = len(table)
    room = slots // ranks
    share = weight / count
    load = np.zeros(ranks, dtype=np.float64)
    holds = np.zeros((ranks, experts), dtype=np.bool_)
    for slot in range(slots):
        load[slot // room] += share[table[slot]]
        holds[slot // room, table[slot]] = True
    mean = load.sum() / ranks
    for _ in range(slots * ranks):
        hot = np.argmax(load)
        if load[hot] <= mean * (1.0 + tolerance):
            return
        best, best_mine, best_theirs = load[hot] * (1.0 - 1e-12), -1, -1
        for mine in range(hot * room, (hot + 1) * room):
            give = table[mine]
            for theirs in range(slots):
                rank = theirs // room
                take = table[theirs]
                moved = share[give] - share[take]
                if rank == hot or moved <= 0.0:
                    continue
                after = max(load[hot] - moved, load[rank] + moved)
                if after < best and not holds[rank, give] and not holds[hot, take]:
                    best, best_mine, best_theirs = after, mine, theirs
        if best_mine < 0:
            return
        rank = best_theirs // room
        give, take = table[best_mine], table[best_theirs]
        table[best_mine], table[best_theirs] = take, give
        holds[hot, give] = False
        holds[hot, take] = True
        holds[rank, take] = False
        holds[rank, give] = True
        load[hot] -= share[give] - share[take]
        load[rank] += share[give] - share[take]


@njit(cache=True)
def pack_rows(weight: NDArray[np.float64], slots: int, ranks: int, tolerance: float) -> NDArray[np.int64]:
    """Replicate, pack and improve every row of [rows, experts]; returns [rows, slots]."""
    table = np.empty((weight.shape[0], slots), dtype=np.int64)
    for row in range(weight.shape[0]):
        count = replica_counts(weight[row], slots, ranks)
        table[row] = pack_apart(weight[row], count, ranks)
        swap_down(table[row], weight[row], count, ranks, tolerance)
    return table


@njit(cache=True)
def groups_to_nodes(weight: NDArray[np.float64], nodes: int) -> NDArray[np.int64]:
    """Pack the groups of every row to nodes, as many on each: [rows, groups] -> the group of each place."""
    ones = np.ones(weight.shape[1], dtype=np.int64)
    table = np.empty(weight.shape, dtype=np.int64)
    for row in range(weight.shape[0]):
        table[row] = pack_apart(weight[row], ones, nodes)
        swap_down(table[row], weight[row], ones, nodes, 0.0)
    return table


@njit(cache=True)
def row_max_over_mean(table: NDArray[np.int64], weight: NDArray[np.float64], ranks: int) -> NDArray[np.float64]:
    """Largest over mean rank load of each row: table [rows, slots], weight [rows, experts] -> [rows]."""
    rows, slots = table.shape
    found = np.ones(rows, dtype=np.float64)
    for row in range(rows):
        count = np.zeros(weight.shape[1], dtype=np.int64)
        for slot in range(slots):
            count[table[row, slot]] += 1
        load = np.zeros(ranks, dtype=np.float64)
        for slot in range(slots):
            expert = table[row, slot]
            load[slot * ranks // slots] += weight[row, expert] / count[expert]
        mean = load.sum() / ranks
        if mean > 0.0:
            found[row] = load.max() / mean
    return found
