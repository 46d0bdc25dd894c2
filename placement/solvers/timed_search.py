"""Compiled local search on seconds of a layer: swaps of replicas, and slots handed from one expert to another."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from placement.solvers.timed_state import (
    Move,
    State,
    Terms,
    after,
    apply,
    fill,
    new_move,
    new_state,
    replica,
    seconds,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEAST_GAIN = 1e-6
"""A move must lower the layer's seconds by this share: far below any figure that is printed."""

PASS_GAIN = 2e-4
"""A pass that gains less than this share ends the search."""

TRIED = 4
"""Experts that are tried for a slot, the most promising by their slopes first."""


@njit(cache=True)
def _swap(state: State, terms: Terms, move: Move, a: int, b: int, now: float) -> float:
    """Swap the replicas in two slots of two ranks if that lowers the layer's seconds; returns them."""
    room = len(state.table) // len(state.tokens)
    rank_a, rank_b = a // room, b // room
    one, two = state.table[a], state.table[b]
    move.size[0] = 2
    move.rank[0], move.rank[1] = rank_a, rank_b
    for s in range(len(state.weights)):
        first, second = state.each[one, s], state.each[two, s]
        for kind in range(2):
            move.change[0, s, kind] = second[kind] - first[kind]
            move.change[1, s, kind] = first[kind] - second[kind]
        move.change[0, s, 2], move.change[1, s, 2] = -first[2], first[2]
        move.change[0, s, 3], move.change[1, s, 3] = second[2], -second[2]
    then = after(state, terms, move, one, two, now)
    if then >= now * (1.0 - LEAST_GAIN):
        return now
    apply(state, terms, move, one, two)
    state.table[a], state.table[b] = two, one
    state.holds[rank_a, one] = False
    state.holds[rank_a, two] = True
    state.holds[rank_b, two] = False
    state.holds[rank_b, one] = True
    _rehome(state, one, rank_a, rank_b)
    _rehome(state, two, rank_b, rank_a)
    return float(then)


@njit(cache=True)
def _rehome(state: State, expert: int, old: int, new: int) -> None:
    at = 0
    while state.homes[expert, at] != old:
        at += 1
    state.homes[expert, at] = new


@njit(cache=True)
def _swaps(state: State, terms: Terms, move: Move, region: int, now: float) -> float:
    """Try every swap of two replicas on two ranks of a region once; returns the layer's seconds.

    The sums are convex, so a swap gains at most what the slopes promise; those that promise too little are not priced.
    (Visits of a rank are concave in its parts, where the promise may be a little short.)
    """
    ranks, scenarios = state.tokens.shape
    slots = len(state.table)
    room = slots // ranks
    size = len(state.counts) // state.node_part.shape[2]
    for a in range(slots):
        rank_a = a // room
        for b in range((rank_a + 1) * room, (rank_a // region + 1) * region * room):
            rank_b = b // room
            one, two = state.table[a], state.table[b]
            if one == two or state.holds[rank_b, one] or state.holds[rank_a, two]:
                continue
            promise = 0.0
            for s in range(scenarios):
                first, second = state.each[one, s], state.each[two, s]
                here, there = state.slope[rank_a, s], state.slope[rank_b, s]
                promise += (here[0] - there[0]) * (second[0] - first[0]) + (here[1] - there[1]) * (second[1] - first[1])
                if terms.by_visit:
                    part_here, part_there = state.slope_part[rank_a, s], state.slope_part[rank_b, s]
                    promise += (part_here[two // size] - part_there[two // size]) * second[2]
                    promise -= (part_here[one // size] - part_there[one // size]) * first[2]
            if promise < -LEAST_GAIN * now:
                now = _swap(state, terms, move, a, b, now)
    return now


@njit(cache=True)
def _hand(state: State, terms: Terms, move: Move, rank_a: int, old: int, new: int, scratch: Floats) -> None:
    """Fill the move that takes a replica of `old` from a rank and gives its slot to `new`."""
    move.size[0] = 0
    for turn in range(2):
        expert = old if turn == 0 else new
        for home in range(state.counts[expert] + turn):
            rank = rank_a if turn == 1 and home == state.counts[expert] else state.homes[expert, home]
            at = 0
            while at < move.size[0] and move.rank[at] != rank:
                at += 1
            if at == move.size[0]:
                move.rank[at] = rank
                move.change[at] = 0.0
                move.size[0] += 1
            held = state.holds[rank, expert]
            keeps = turn == 1 or rank != rank_a
            for s in range(len(state.weights)):
                replica(state, expert, state.counts[expert] + (1 if turn == 1 else -1), s, scratch)
                for kind in range(3):
                    column = kind if kind < 2 else 2 + turn
                    if held:
                        move.change[at, s, column] -= state.each[expert, s, kind]
                    if keeps:
                        move.change[at, s, column] += scratch[kind]


@njit(cache=True)
def _extra_costs(state: State, terms: Terms, more: Floats, relief: Floats) -> None:
    """What each expert's replicas get if it has one more: more [experts, s, 3]; and what its homes save: relief."""
    size = len(state.counts) // state.node_part.shape[2]
    for expert in range(len(state.counts)):
        relief[expert] = 0.0
        for s in range(len(state.weights)):
            replica(state, expert, state.counts[expert] + 1, s, more[expert, s])
            for home in range(state.counts[expert]):
                rank = state.homes[expert, home]
                for kind in range(2):
                    change = more[expert, s, kind] - state.each[expert, s, kind]
                    relief[expert] += state.slope[rank, s, kind] * change
                if terms.by_visit:
                    change = more[expert, s, 2] - state.each[expert, s, 2]
                    relief[expert] += state.slope_part[rank, s, expert // size] * change


@njit(cache=True)
def _handovers(state: State, terms: Terms, move: Move, region: int, now: float) -> float:
    """Give spare replicas' slots to the experts that gain most by them, where any do; returns the seconds."""
    ranks, scenarios = state.tokens.shape
    experts = len(state.counts)
    room = len(state.table) // ranks
    size = experts // state.node_part.shape[2]
    more, relief, scratch = np.empty((experts, scenarios, 3)), np.empty(experts), np.empty(3)
    promise = np.empty(experts)
    _extra_costs(state, terms, more, relief)
    for a in range(len(state.table)):
        old, rank_a = state.table[a], a // room
        if state.counts[old] < 2:
            continue
        first = rank_a // region * region
        gone = _loss(state, terms, rank_a, old, scratch)
        for new in range(experts):
            promise[new] = np.inf
            if new == old or state.holds[rank_a, new]:
                continue
            if region < ranks and not state.holds[first : first + region, new].any():
                continue
            promise[new] = gone + relief[new]
            for s in range(scenarios):
                for kind in range(2):
                    promise[new] += state.slope[rank_a, s, kind] * more[new, s, kind]
                if terms.by_visit:
                    promise[new] += state.slope_part[rank_a, s, new // size] * more[new, s, 2]
        for _ in range(TRIED):
            new = int(np.argmin(promise))
            if promise[new] >= -LEAST_GAIN * now:
                break
            promise[new] = np.inf
            _hand(state, terms, move, rank_a, old, new, scratch)
            then = after(state, terms, move, old, new, now)
            if then >= now * (1.0 - LEAST_GAIN):
                continue
            now = then
            apply(state, terms, move, old, new)
            state.table[a] = new
            _rehome(state, old, rank_a, state.homes[old, state.counts[old] - 1])
            state.counts[old] -= 1
            state.homes[new, state.counts[new]] = rank_a
            state.counts[new] += 1
            state.holds[rank_a, old] = False
            state.holds[rank_a, new] = True
            for s in range(scenarios):
                replica(state, old, state.counts[old], s, state.each[old, s])
                replica(state, new, state.counts[new], s, state.each[new, s])
            _extra_costs(state, terms, more, relief)
            break
    return now


@njit(cache=True)
def _loss(state: State, terms: Terms, rank_a: int, old: int, scratch: Floats) -> float:
    """To first order, what it costs to take an expert's replica from a rank: its other homes take over."""
    size = len(state.counts) // state.node_part.shape[2]
    total = 0.0
    for s in range(len(state.weights)):
        replica(state, old, state.counts[old] - 1, s, scratch)
        for home in range(state.counts[old]):
            rank = state.homes[old, home]
            keeps = 0.0 if rank == rank_a else 1.0
            for kind in range(2):
                total += state.slope[rank, s, kind] * (keeps * scratch[kind] - state.each[old, s, kind])
            if terms.by_visit:
                total += state.slope_part[rank, s, old // size] * (keeps * scratch[2] - state.each[old, s, 2])
    return total


@njit(cache=True)
def search_layers(
    tables: Ints, loads: Floats, parts: Floats, weights: Floats, odds: Floats, terms: Terms, ranks: int, nodes: int,
    region: int, passes: int, found: Floats,
) -> None:  # fmt: skip
    """Improve tables [layers, slots] in place; fills found [layers], seconds in the unit of `terms`.

    loads: [layers, experts, scenarios], tokens of a step for each expert; parts: the same as shares of each group's
    tokens; odds: [layers, scenarios, groups], for those of `terms`. region: ranks of a node where experts must stay on
    theirs, else all ranks. Ends after `passes`, or when a pass gains next to nothing.
    """
    move = new_move(ranks, len(weights))
    for layer in range(len(tables)):
        state = new_state(tables[layer], loads[layer], parts[layer], weights, ranks, nodes, odds.shape[2])
        for _ in range(passes):
            of_layer = Terms(
                terms.expert, terms.token, terms.copy, terms.node, terms.by_visit, odds[layer], terms.picks,
                terms.read_doublings, terms.doublings,
            )  # fmt: skip
            fill(state, of_layer)  # anew each pass, so that rounding does not add up
            before = seconds(state, of_layer)
            now = _swaps(state, of_layer, move, region, before)
            now = _handovers(state, of_layer, move, region, now)
            found[layer] = now
            if now >= before * (1.0 - PASS_GAIN):
                break
