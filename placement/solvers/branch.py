"""Compiled branch and bound for small cases: the smallest possible load of the hottest rank, one load, no duplicates.

Experts are placed in falling order of load, all replicas of one at once: a set of ranks is its number of replicas and
their places. A branch ends where a rank would pass the limit, where slots could not be filled or the rest of the load
not be held, and where exchanging two ranks that are alike so far gives a branch that is searched anyway. What is asked
is only "is there a placement at or below this limit?"; `smallest` bisects between a bound and a placement in hand.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from placement.problem import FEW_EXPERTS
from placement.solvers.packing import replica_counts

MOST_EXPERTS = FEW_EXPERTS
"""More experts are refused: the branches grow exponentially."""

MOST_RANKS = 8
"""More ranks are refused: an expert has 2**ranks - 1 sets of ranks to try."""

ROUNDING = 1e-12
"""Loads are sums of shares: a limit is met within this part of it."""


@njit(cache=True)
def below(load: NDArray[np.float64], ranks: int, room: int, limit: float, nodes: int, chosen: NDArray[np.int64]) -> int:
    """Whether any placement's hottest rank stays at or below `limit`: 1 yes, 0 no, -1 not told within `nodes` branches.

    load: [experts], falling; room: slots of a rank. On 1, chosen [experts] holds each expert's ranks as bits.
    """
    experts = len(load)
    every = 1 << ranks
    size = np.zeros(every, dtype=np.int64)
    for ranks_of in range(1, every):
        size[ranks_of] = size[ranks_of >> 1] + (ranks_of & 1)
    rest = np.zeros(experts + 1)
    for expert in range(experts - 1, -1, -1):
        rest[expert] = rest[expert + 1] + load[expert]
    # What `free` slots of one rank will hold at least, by the next expert: the lightest, on all ranks.
    least = np.full((experts + 1, room + 1), np.inf)
    for expert in range(experts + 1):
        least[expert, 0] = 0.0
        for free in range(1, min(room, experts - expert) + 1):
            least[expert, free] = least[expert, free - 1] + load[experts - free] / ranks
    held = np.zeros((experts + 1, ranks))
    used = np.zeros((experts + 1, ranks), dtype=np.int64)
    at = np.full(experts, every, dtype=np.int64)
    most = limit * (1.0 + ROUNDING)
    expert = 0
    for _ in range(nodes):
        at[expert] -= 1
        while at[expert] == 0:
            expert -= 1
            if expert < 0:
                return 0
            at[expert] -= 1
        ranks_of = at[expert]
        share = load[expert] / size[ranks_of]
        left = experts - expert - 1
        free = open_ranks = 0
        spare = 0.0
        fits = True
        for rank in range(ranks):
            mine = (ranks_of >> rank) & 1
            now, taken = held[expert, rank] + mine * share, used[expert, rank] + mine
            if taken > room or room - taken > left or now + least[expert + 1, room - taken] > most:
                fits = False
                break
            held[expert + 1, rank], used[expert + 1, rank] = now, taken
            free += room - taken
            if taken < room:
                open_ranks += 1
                spare += most - now
        if not fits or free < left or free > left * open_ranks or spare < rest[expert + 1] - ROUNDING:
            continue
        if not _first_of_its_like(ranks_of, held[expert], used[expert]):
            continue
        chosen[expert] = ranks_of
        if left == 0:
            return 1
        expert += 1
        at[expert] = every
    return -1


@njit(cache=True)
def _first_of_its_like(ranks_of: int, held: NDArray[np.float64], used: NDArray[np.int64]) -> bool:
    """Of ranks that are alike, the set takes the first ones."""
    for rank in range(len(held)):
        if (ranks_of >> rank) & 1:
            for before in range(rank):
                if not (ranks_of >> before) & 1 and held[before] == held[rank] and used[before] == used[rank]:
                    return False
    return True


@njit(cache=True)
def smallest(
    table: NDArray[np.int64], weight: NDArray[np.float64], ranks: int, tolerance: float, nodes: int
) -> tuple[float, float]:
    """Replace table [slots] by a best one for weight [experts]; returns its hottest rank's load and a lower bound.

    Ends when nothing better by `tolerance` (relative) is left to find. A limit that `nodes` branches do not decide
    counts as too low for the search, and not for the bound: then the two may lie further apart.
    """
    experts, slots = len(weight), len(table)
    room = slots // ranks
    order = np.argsort(-weight, kind="mergesort")
    load = weight[order]
    count = np.zeros(experts, dtype=np.int64)
    for slot in range(slots):
        count[table[slot]] += 1
    held = np.zeros(ranks)
    for slot in range(slots):
        held[slot // room] += weight[table[slot]] / count[table[slot]]
    found = held.max()
    bound = max(weight.sum() / ranks, (weight / replica_counts(weight, slots, ranks)).max())
    chosen = np.zeros(experts, dtype=np.int64)
    too_low = bound
    while found > too_low * (1.0 + max(tolerance, 4.0 * ROUNDING)):
        limit = 0.5 * (found + too_low)
        if found < too_low * (1.0 + 1e-3):  # close: often there is nothing better
            limit = found * (1.0 - max(tolerance, 2.0 * ROUNDING))
        told = below(load, ranks, room, limit, nodes, chosen)
        if told == 0:
            bound = too_low = limit
        elif told == -1:
            too_low = limit
        else:
            held[:] = 0.0
            used = np.zeros(ranks, dtype=np.int64)
            for expert in range(experts):
                replicas = 0
                for rank in range(ranks):
                    replicas += (chosen[expert] >> rank) & 1
                for rank in range(ranks):
                    if (chosen[expert] >> rank) & 1:
                        table[rank * room + used[rank]] = order[expert]
                        used[rank] += 1
                        held[rank] += load[expert] / replicas
            found = held.max()
    return found, bound


@njit(cache=True)
def smallest_rows(
    table: NDArray[np.int64], weight: NDArray[np.float64], ranks: int, tolerance: float, nodes: int
) -> NDArray[np.float64]:
    """`smallest` on every row: table [rows, slots], weight [rows, experts]; returns load and bound, [rows, 2]."""
    found = np.empty((table.shape[0], 2))
    for row in range(table.shape[0]):
        found[row, 0], found[row, 1] = smallest(table[row], weight[row], ranks, tolerance, nodes)
    return found
