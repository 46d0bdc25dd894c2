"""Replica choices that look at a batch's counts, compiled: the least busiest rank, and the fewest activated experts.

`least_busiest` is the linear program "split every expert's tokens over its replicas so that the busiest rank gets as
few as can be", solved exactly by augmenting paths. All ranks may hold T tokens, T starting at the bound that the mean
and the experts without a choice give. Each expert's tokens are pushed to its ranks, and where those are full, others'
tokens are moved on (breadth first). Where no path is left, the ranks reached are all full, and every token in them can
only be there: T rises by what is left over their number, which every solution needs. So T is never above the optimum,
and in the end all tokens have found a place. (The cut is that of max-flow min-cut: Ford and Fulkerson, Canadian Journal
of Mathematics 8, 1956; per-batch balancing over replicas by a linear program as in LPLB, deepseek-ai/LPLB.) With whole
counts T rises to the next whole number and no token is split: flows in such a network are whole (Dantzig).

`fewest_activated`: a decode step reads the weights of every expert that gets a token, so all tokens of an expert go to
one replica, and experts are dealt out so that the busiest rank reads as few as can be: those with fewest replicas
first, each to the rank with the fewest so far.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Tokens below this part of a batch's are rounding of sums, never tokens: counts that are not whole are shares of some.
ROUNDING = 1e-12


@njit(cache=True)
def least_busiest(counts: Floats, held: Ints, starts: Ints, ranks: int, whole: bool) -> tuple[Floats, float]:
    """Tokens by (expert, rank) that make the busiest rank least busy, and that rank's tokens.

    counts: [experts]; held: [pairs], ranks that hold expert e at starts[e] to starts[e + 1], each once. whole: no token
    is split. Returns [pairs].
    """
    experts = len(counts)
    flow = np.zeros(len(held))
    load = np.zeros(ranks)
    total = 0.0
    for expert in range(experts):
        total += counts[expert]
        if starts[expert + 1] - starts[expert] == 1:
            flow[starts[expert]] = counts[expert]
            load[held[starts[expert]]] += counts[expert]
    most = max(total / ranks, load.max())
    if whole:
        most = np.ceil(most - ROUNDING * max(total, 1.0))
    least = 0.5 if whole else ROUNDING * max(total, 1e-300)
    came_from = np.full(ranks, -1, dtype=np.int64)  # pair whose expert brought the search here
    moved = np.full(ranks, -1, dtype=np.int64)  # pair that gives its tokens up for it
    queue = np.zeros(ranks, dtype=np.int64)
    # Pairs by rank, experts with a choice only: what could leave a full rank.
    here, here_start = _by_rank(held, starts, ranks)
    expert_of = np.zeros(len(held), dtype=np.int64)
    for expert in range(experts):
        expert_of[starts[expert] : starts[expert + 1]] = expert
    for expert in range(experts):
        if starts[expert + 1] - starts[expert] < 2:
            continue
        left = counts[expert]
        while left > least:
            end, reached = _search(
                expert, held, starts, here, here_start, expert_of, flow, load, most, least, came_from, moved, queue
            )
            if end < 0:
                rise = left / reached
                most += np.ceil(rise - ROUNDING * max(total, 1.0)) if whole else rise
                continue
            step = min(left, most - load[end])
            rank = end
            while moved[rank] >= 0:
                step = min(step, flow[moved[rank]])
                rank = held[moved[rank]]
            if step <= 0.0:
                break
            load[end] += step
            rank = end
            while True:
                flow[came_from[rank]] += step
                if moved[rank] < 0:
                    break
                flow[moved[rank]] -= step
                rank = held[moved[rank]]
            left -= step
        if left > 0.0:  # rounding of sums
            flow[starts[expert]] += left
            load[held[starts[expert]]] += left
    return flow, load.max()


@njit(cache=True)
def _by_rank(held: Ints, starts: Ints, ranks: int) -> tuple[Ints, Ints]:
    start = np.zeros(ranks + 1, dtype=np.int64)
    for expert in range(len(starts) - 1):
        if starts[expert + 1] - starts[expert] > 1:
            for pair in range(starts[expert], starts[expert + 1]):
                start[held[pair] + 1] += 1
    for rank in range(ranks):
        start[rank + 1] += start[rank]
    here = np.zeros(start[ranks], dtype=np.int64)
    filled = start[:-1].copy()
    for expert in range(len(starts) - 1):
        if starts[expert + 1] - starts[expert] > 1:
            for pair in range(starts[expert], starts[expert + 1]):
                here[filled[held[pair]]] = pair
                filled[held[pair]] += 1
    return here, start


@njit(cache=True)
def _search(
    expert: int,
    held: Ints,
    starts: Ints,
    here: Ints,
    here_start: Ints,
    expert_of: Ints,
    flow: Floats,
    load: Floats,
    most: float,
    least: float,
    came_from: Ints,
    moved: Ints,
    queue: Ints,
) -> tuple[int, int]:
    """The nearest rank with room for one of the expert's tokens, others moving on; -1 and the ranks reached if none."""
    came_from[:] = -1
    first = last = 0
    for pair in range(starts[expert], starts[expert + 1]):
        rank = held[pair]
        came_from[rank] = pair
        moved[rank] = -1
        if most - load[rank] > least:
            return rank, 0
        queue[last] = rank
        last += 1
    while first < last:
        rank = queue[first]
        first += 1
        for place in range(here_start[rank], here_start[rank + 1]):
            given_up = here[place]
            if flow[given_up] <= least:
                continue
            other = expert_of[given_up]
            for pair in range(starts[other], starts[other + 1]):
                following = held[pair]
                if came_from[following] >= 0:
                    continue
                came_from[following] = pair
                moved[following] = given_up
                if most - load[following] > least:
                    return following, 0
                queue[last] = following
                last += 1
    return -1, last


@njit(cache=True)
def fewest_activated(counts: Floats, held: Ints, starts: Ints, ranks: int) -> Floats:
    """Tokens by (expert, rank), each expert whole on one rank: [pairs]; arguments as in `least_busiest`."""
    experts = len(counts)
    flow = np.zeros(len(held))
    active, load = np.zeros(ranks, dtype=np.int64), np.zeros(ranks)
    replicas = starts[1:] - starts[:-1]
    for choices in range(1, replicas.max() + 1):
        for expert in range(experts):
            if replicas[expert] != choices or counts[expert] <= 0.0:
                continue
            best = starts[expert]
            for pair in range(starts[expert] + 1, starts[expert + 1]):
                rank, chosen = held[pair], held[best]
                if active[rank] < active[chosen] or (active[rank] == active[chosen] and load[rank] < load[chosen]):
                    best = pair
            flow[best] = counts[expert]
            active[held[best]] += 1
            load[held[best]] += counts[expert]
    return flow


@njit(cache=True)
def in_turns(counts: Floats, held: Ints, starts: Ints, ranks: int) -> Floats:
    """Tokens by (expert, rank), dealt out one by one from a replica that differs by expert: [pairs].

    Of a count that is not whole, the last part of a token goes to the replica whose turn it is.
    """
    flow = np.zeros(len(held))
    for expert in range(len(counts)):
        replicas = starts[expert + 1] - starts[expert]
        each = np.floor(counts[expert] / replicas)
        left = counts[expert] - each * replicas
        for turn in range(replicas):
            extra = min(max(left - turn, 0.0), 1.0)
            flow[starts[expert] + (expert + turn) % replicas] = each + extra
    return flow


@njit(cache=True)
def spread(
    which: int,
    counts: Floats,
    held: Ints,
    starts: Ints,
    slot: Ints,
    ranks: int,
    whole: bool,
    found: Floats,
) -> None:
    """Fill `found` [steps, layers, slots] for counts [steps, layers, experts].

    held, slot: [layers, pairs], padded; starts: [layers, experts + 1]. A rank's tokens of an expert go to the first of
    its slots that hold it. which: 0 in turns, 1 fewest activated, 2 least busiest.
    """
    for step in range(counts.shape[0]):
        for layer in range(counts.shape[1]):
            size = starts[layer, -1]
            ranks_of = held[layer, :size]
            if which == 0:
                flow = in_turns(counts[step, layer], ranks_of, starts[layer], ranks)
            elif which == 1:
                flow = fewest_activated(counts[step, layer], ranks_of, starts[layer], ranks)
            else:
                flow, _ = least_busiest(counts[step, layer], ranks_of, starts[layer], ranks, whole)
            for pair in range(size):
                found[step, layer, slot[layer, pair]] = flow[pair]
