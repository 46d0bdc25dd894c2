"""A layer's placement priced in seconds while it changes: the compiled sums that a search on time keeps.

For each load the layer takes three power sums (`moesim.spec.layer_cost`): over ranks of the experts that they read,
over ranks of the tokens that they compute, over GPUs and nodes of what is copied into them. A rank's reading and
computing are summed apart, an upper bound, because a maximum of their sum would hide the one behind the other. A move
is a list of ranks whose experts change; `after` prices it, `apply` makes it, and `slopes` tells what a little more on a
rank costs, which bounds a move from below where the sums are convex.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from placement.solvers.search import power

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEAST_MISS = 1e-12
"""A chance to miss a rank or node is kept above this, so that a factor of it can be divided out."""


class Terms(NamedTuple):
    """What prices a layer, in seconds of any unit that keeps powers near 1, and the gate's groups.

    odds: [scenarios, groups], chance that a token opens a group; picks: of a token in an open group. copy, node:
    seconds of all tokens of a step if each visited a GPU or node; without by_visit both are 0, and token holds copies.
    read_doublings and doublings: of the exponents of the sum over ranks' reading, and of the other two. A sum whose
    power is less than a double holds vanishes: with 64 as exponent, one of less than 2e-5 units.
    """

    expert: float
    token: float
    copy: float
    node: float
    by_visit: bool
    odds: Floats
    picks: int
    read_doublings: int
    doublings: int


class State(NamedTuple):
    """A layer's placement and the sums that its price needs; s: scenarios, g: groups."""

    table: Ints  # [slots]
    counts: Ints  # [experts], replicas
    holds: NDArray[np.bool_]  # [ranks, experts]
    homes: Ints  # [experts, ranks], the ranks that hold an expert, in any order
    weights: Floats  # [s]
    loads: Floats  # [experts, s], tokens of each expert
    parts: Floats  # [experts, s], its share of its group's tokens
    each: Floats  # [experts, s, 3], tokens, chance to be read and part of each replica
    tokens: Floats  # [ranks, s]
    token_p: Floats  # [ranks, s], their seconds to the power p
    reads: Floats  # [ranks, s], experts that get a token
    read_p: Floats  # [ranks, s], their seconds to the power p
    gpu_part: Floats  # [ranks, s, g], share of a group's tokens
    gpu_miss: Floats  # [ranks, s], chance that a token visits none of its experts
    gpu_p: Floats  # [ranks, s]
    node_part: Floats  # [nodes, s, g]
    node_miss: Floats  # [nodes, s]
    node_p: Floats  # [nodes, s]
    sums: Floats  # [3, s], of read_p, of token_p, of gpu_p and node_p
    slope: Floats  # [ranks, s, 2], what one more token and one more expert that is read cost
    slope_part: Floats  # [ranks, s, g], what a little more of a group's part costs


class Move(NamedTuple):
    """Ranks whose experts change and by how much.

    rank: [most], of which the first size[0] count; change: [most, s, 4], of tokens, reads, and the part of the first
    and second expert's group; node: [most] and node_change [most, s, 2], of their nodes, the first size[1] count.
    """

    size: Ints
    rank: Ints
    change: Floats
    node: Ints
    node_change: Floats


@njit(cache=True)
def new_state(table: Ints, loads: Floats, parts: Floats, weights: Floats, ranks: int, nodes: int, groups: int) -> State:
    """A state of a table [slots] that it shares; `fill` makes its sums. Arguments as in `State`."""
    experts, scenarios = loads.shape
    return State(
        table,
        np.zeros(experts, dtype=np.int64),
        np.zeros((ranks, experts), dtype=np.bool_),
        np.zeros((experts, ranks), dtype=np.int64),
        weights,
        loads,
        parts,
        np.zeros((experts, scenarios, 3)),
        np.zeros((ranks, scenarios)),
        np.zeros((ranks, scenarios)),
        np.zeros((ranks, scenarios)),
        np.zeros((ranks, scenarios)),
        np.zeros((ranks, scenarios, groups)),
        np.ones((ranks, scenarios)),
        np.zeros((ranks, scenarios)),
        np.zeros((nodes, scenarios, groups)),
        np.ones((nodes, scenarios)),
        np.zeros((nodes, scenarios)),
        np.zeros((3, scenarios)),
        np.zeros((ranks, scenarios, 2)),
        np.zeros((ranks, scenarios, groups)),
    )


@njit(cache=True)
def new_move(ranks: int, scenarios: int) -> Move:
    """Room for the largest move."""
    return Move(
        np.zeros(2, dtype=np.int64),
        np.zeros(ranks, dtype=np.int64),
        np.zeros((ranks, scenarios, 4)),
        np.zeros(ranks, dtype=np.int64),
        np.zeros((ranks, scenarios, 2)),
    )


@njit(cache=True)
def root(value: float, doublings: int) -> float:
    """The 2**doublings-th root; of what rounding took below 0, it is 0."""
    if value <= 0.0:
        return 0.0
    for _ in range(doublings):
        value = np.sqrt(value)
    return value


@njit(cache=True)
def missed_of(part: float, odds: float, picks: int) -> float:
    """Chance that a token picks nothing of a `part` of a group."""
    missed = 1.0
    left = min(max(1.0 - part, 0.0), 1.0)
    for _ in range(picks):
        missed *= left
    return max(1.0 - odds * (1.0 - missed), LEAST_MISS)


@njit(cache=True)
def replica(state: State, expert: int, count: int, s: int, found: Floats) -> None:
    """Tokens, chance that any comes, and part of one of `count` replicas of an expert: fills [3]."""
    tokens = state.loads[expert, s] / count
    found[0] = tokens
    found[1] = 1.0 - np.exp(-tokens)
    found[2] = state.parts[expert, s] / count


@njit(cache=True)
def _missed(terms: Terms, parts: Floats, s: int) -> float:
    missed = 1.0
    for g in range(len(parts)):
        missed *= missed_of(parts[g], terms.odds[s, g], terms.picks)
    return missed


@njit(cache=True)
def fill(state: State, terms: Terms) -> None:
    """Everything of the state but the table and the loads, from these."""
    ranks, scenarios = state.tokens.shape
    room = len(state.table) // ranks
    experts = len(state.counts)
    nodes, _, groups = state.node_part.shape
    size = experts // groups
    state.counts[:] = 0
    state.holds[:] = False
    state.tokens[:] = 0.0
    state.reads[:] = 0.0
    state.gpu_part[:] = 0.0
    state.node_part[:] = 0.0
    for slot in range(len(state.table)):
        expert = state.table[slot]
        state.homes[expert, state.counts[expert]] = slot // room
        state.counts[expert] += 1
        state.holds[slot // room, expert] = True
    for expert in range(experts):
        for s in range(scenarios):
            replica(state, expert, state.counts[expert], s, state.each[expert, s])
    for slot in range(len(state.table)):
        rank, expert = slot // room, state.table[slot]
        for s in range(scenarios):
            state.tokens[rank, s] += state.each[expert, s, 0]
            state.reads[rank, s] += state.each[expert, s, 1]
            state.gpu_part[rank, s, expert // size] += state.each[expert, s, 2]
            state.node_part[rank * nodes // ranks, s, expert // size] += state.each[expert, s, 2]
    sum_up(state, terms)


@njit(cache=True)
def sum_up(state: State, terms: Terms) -> None:
    """The powers, their sums and the slopes, from what each rank and node has."""
    ranks, scenarios = state.tokens.shape
    state.sums[:] = 0.0
    for s in range(scenarios):
        for rank in range(ranks):
            state.read_p[rank, s] = power(terms.expert * state.reads[rank, s], terms.read_doublings)
            state.token_p[rank, s] = power(terms.token * state.tokens[rank, s], terms.doublings)
            state.sums[0, s] += state.read_p[rank, s]
            state.sums[1, s] += state.token_p[rank, s]
            if terms.by_visit:
                state.gpu_miss[rank, s] = _missed(terms, state.gpu_part[rank, s], s)
                state.gpu_p[rank, s] = power(terms.copy * (1.0 - state.gpu_miss[rank, s]), terms.doublings)
                state.sums[2, s] += state.gpu_p[rank, s]
        if terms.by_visit:
            for node in range(len(state.node_p)):
                state.node_miss[node, s] = _missed(terms, state.node_part[node, s], s)
                state.node_p[node, s] = power(terms.node * (1.0 - state.node_miss[node, s]), terms.doublings)
                state.sums[2, s] += state.node_p[node, s]
    slopes(state, terms)


@njit(cache=True)
def _of_sums(reads: float, tokens: float, copies: float, terms: Terms) -> float:
    """Seconds of one load from its three sums."""
    total = root(reads, terms.read_doublings) + root(tokens, terms.doublings)
    return float(total + root(copies, terms.doublings)) if terms.by_visit else float(total)


@njit(cache=True)
def seconds(state: State, terms: Terms) -> float:
    """Of the layer, the weighted mean over scenarios."""
    total = 0.0
    for s in range(len(state.weights)):
        total += state.weights[s] * _of_sums(state.sums[0, s], state.sums[1, s], state.sums[2, s], terms)
    return total


@njit(cache=True)
def slopes(state: State, terms: Terms) -> None:
    """Fill slope and slope_part, the derivatives of `seconds`."""
    ranks, scenarios = state.tokens.shape
    nodes, _, groups = state.node_part.shape
    for s in range(scenarios):
        weight, sums = state.weights[s], state.sums[:, s]
        of_reads = weight * root(sums[0], terms.read_doublings) / max(sums[0], 1e-300)
        of_tokens = weight * root(sums[1], terms.doublings) / max(sums[1], 1e-300)
        of_copies = weight * root(sums[2], terms.doublings) / max(sums[2], 1e-300)
        for rank in range(ranks):
            state.slope[rank, s, 0] = of_tokens * state.token_p[rank, s] / max(state.tokens[rank, s], 1e-300)
            state.slope[rank, s, 1] = of_reads * state.read_p[rank, s] / max(state.reads[rank, s], 1e-300)
            if not terms.by_visit:
                continue
            node = rank * nodes // ranks
            visit = max(1.0 - state.gpu_miss[rank, s], 1e-300)
            node_visit = max(1.0 - state.node_miss[node, s], 1e-300)
            of_gpu = of_copies * state.gpu_p[rank, s] / visit * state.gpu_miss[rank, s]
            of_node = of_copies * state.node_p[node, s] / node_visit * state.node_miss[node, s]
            for g in range(groups):
                state.slope_part[rank, s, g] = of_gpu * _slope(
                    state.gpu_part[rank, s, g], terms.odds[s, g], terms.picks
                ) + of_node * _slope(state.node_part[node, s, g], terms.odds[s, g], terms.picks)


@njit(cache=True)
def _slope(part: float, odds: float, picks: int) -> float:
    """Minus the derivative of the logarithm of `missed_of` by the part."""
    left = min(max(1.0 - part, 0.0), 1.0)
    power_of_left = 1.0
    for _ in range(picks - 1):
        power_of_left *= left
    return float(odds * picks * power_of_left / missed_of(part, odds, picks))


@njit(cache=True)
def _missed_after(
    terms: Terms, miss: float, parts: Floats, s: int, one: int, two: int, first: float, second: float
) -> float:
    """Chance to miss a rank or node after its parts of groups one and two change by first and second."""
    odds, picks = terms.odds[s], terms.picks
    if one == two:
        both = missed_of(parts[one] + first + second, odds[one], picks)
        return float(miss * both / missed_of(parts[one], odds[one], picks))
    before = missed_of(parts[one], odds[one], picks) * missed_of(parts[two], odds[two], picks)
    then = missed_of(parts[one] + first, odds[one], picks) * missed_of(parts[two] + second, odds[two], picks)
    return float(miss * then / before)


@njit(cache=True)
def _nodes_of(state: State, move: Move) -> None:
    """What a move changes on nodes, from what it changes on ranks."""
    ranks, scenarios = state.tokens.shape
    nodes = len(state.node_part)
    move.size[1] = 0
    for i in range(move.size[0]):
        node = move.rank[i] * nodes // ranks
        at = 0
        while at < move.size[1] and move.node[at] != node:
            at += 1
        if at == move.size[1]:
            move.node[at] = node
            move.node_change[at] = 0.0
            move.size[1] += 1
        for s in range(scenarios):
            move.node_change[at, s, 0] += move.change[i, s, 2]
            move.node_change[at, s, 1] += move.change[i, s, 3]


@njit(cache=True)
def after(state: State, terms: Terms, move: Move, one: int, two: int, limit: float) -> float:
    """Seconds of the layer after a move of experts one and two; above `limit` as soon as it is sure to be."""
    size = len(state.counts) // state.node_part.shape[2]
    g1, g2 = one // size, two // size
    visits = terms.by_visit
    if visits:
        _nodes_of(state, move)
    total = 0.0
    for s in range(len(state.weights)):
        reads, tokens, copies = state.sums[0, s], state.sums[1, s], state.sums[2, s]
        for i in range(move.size[0]):
            rank = move.rank[i]
            change = move.change[i, s]
            tokens_then = terms.token * (state.tokens[rank, s] + change[0])
            tokens += power(tokens_then, terms.doublings) - state.token_p[rank, s]
            reads_then = terms.expert * (state.reads[rank, s] + change[1])
            reads += power(reads_then, terms.read_doublings) - state.read_p[rank, s]
            if visits:
                miss, parts = state.gpu_miss[rank, s], state.gpu_part[rank, s]
                visit = 1.0 - _missed_after(terms, miss, parts, s, g1, g2, change[2], change[3])
                copies += power(terms.copy * visit, terms.doublings) - state.gpu_p[rank, s]
        if visits:
            for i in range(move.size[1]):
                node = move.node[i]
                change = move.node_change[i, s]
                miss, parts = state.node_miss[node, s], state.node_part[node, s]
                visit = 1.0 - _missed_after(terms, miss, parts, s, g1, g2, change[0], change[1])
                copies += power(terms.node * visit, terms.doublings) - state.node_p[node, s]
        total += state.weights[s] * _of_sums(reads, tokens, copies, terms)
        if total > limit:
            break
    return float(total)


@njit(cache=True)
def apply(state: State, terms: Terms, move: Move, one: int, two: int) -> None:
    """Make a move that `after` priced last; the table, counts, homes and replicas are the caller's to change."""
    size = len(state.counts) // state.node_part.shape[2]
    g1, g2 = one // size, two // size
    for s in range(len(state.weights)):
        for i in range(move.size[0]):
            rank = move.rank[i]
            state.tokens[rank, s] += move.change[i, s, 0]
            state.reads[rank, s] += move.change[i, s, 1]
            state.gpu_part[rank, s, g1] += move.change[i, s, 2]
            state.gpu_part[rank, s, g2] += move.change[i, s, 3]
            if terms.by_visit:
                node = rank * len(state.node_part) // len(state.tokens)
                state.node_part[node, s, g1] += move.change[i, s, 2]
                state.node_part[node, s, g2] += move.change[i, s, 3]
    sum_up(state, terms)
