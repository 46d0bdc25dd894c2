"""Capacity on the picks of single tokens: exact, who is dropped and where the rest goes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import BadInput
from moesim.routing.capacity.rule import CapacityRule
from moesim.routing.gates.routed import NO_EXPERT, Floats, Ints, Routed


@dataclass(frozen=True)
class Kept:
    """What is left of a layer's picks.

    routed: ids and weights after capacity, NO_EXPERT where a pick was dropped (weights are not scaled up again).
    dropped, rerouted, padded: float64 [experts]; of the expert that was wanted, that was wanted, that has empty rows.
    capacity: int64 [sources], tokens of that source that each expert takes.
    """

    routed: Routed
    dropped: Floats
    rerouted: Floats
    padded: Floats
    capacity: Ints


@dataclass(frozen=True)
class Chance:
    """The random numbers of a layer's picks, int64 [tokens, slots], so that an executed layer can be given the same.

    turn: the order in which places are given out where drops are random, lowest first. second: the expert that a lost
    pick tries where backups are random.
    """

    turn: Ints
    second: Ints

    @classmethod
    def draw(cls, shape: tuple[int, int], experts: int, rng: np.random.Generator) -> Chance:
        """For picks of a shape [tokens, slots]."""
        turn = rng.permutation(shape[0] * shape[1]).reshape(shape)
        return cls(turn, rng.integers(experts, size=shape))


def keep_within(
    routed: Routed,
    rule: CapacityRule,
    rng: np.random.Generator | Chance,
    *,
    top_k: int,
    source: Ints | None = None,
    scores: Floats | None = None,
) -> Kept:
    """Apply a rule to picks [tokens, slots] of tokens in their order.

    rng: draws what is random, or the numbers themselves.
    source: int64 [tokens], 0 to sources - 1: each source has its own capacity at every expert (None: one source).
    scores: float64 [tokens, experts], the order of a token's next-best experts. Raises BadInput where next-best lacks
    them.
    """
    tokens = len(routed.ids)
    home = np.zeros(tokens, dtype=np.int64) if source is None else source
    sources = int(home.max(initial=0)) + 1
    nothing = np.zeros(routed.experts)
    if rule.dropless:
        return Kept(routed, nothing, nothing, nothing, np.bincount(home, minlength=sources))
    if rule.backup == "next_best" and scores is None:
        raise BadInput("next-best needs the scores of the tokens", where="capacity.backup", mend="give `scores`")
    chance = rng if isinstance(rng, Chance) else Chance.draw((tokens, routed.ids.shape[1]), routed.experts, rng)
    limit = rule.capacity(np.bincount(home, minlength=sources), routed.experts, top_k)
    room = np.repeat(limit[:, None], routed.experts, axis=1)
    token, slot = np.nonzero(routed.ids >= 0)
    wanted = routed.ids[token, slot]
    kept = _claim(home[token], wanted, _priority(routed, token, slot, rule, chance), room)
    ids = np.full(routed.ids.shape, NO_EXPERT)
    ids[token[kept], slot[kept]] = wanted[kept]
    lost = np.nonzero(~kept)[0]
    order = np.lexsort((token[lost], slot[lost]))  # backups are tried by position, first choices first
    lost = lost[order]
    if rule.backup == "random":
        _reroute_at_random(ids, token[lost], slot[lost], home, room, chance)
    elif rule.backup == "next_best":
        assert scores is not None
        _reroute_to_next(ids, token[lost], slot[lost], home, room, scores, routed.ids)
    found = ids[token, slot]
    gone, moved = found == NO_EXPERT, (found != wanted) & (found != NO_EXPERT)
    return Kept(
        Routed(ids, np.where(ids == NO_EXPERT, 0.0, routed.weights), routed.experts),
        dropped=np.bincount(wanted[gone], minlength=routed.experts).astype(np.float64),
        rerouted=np.bincount(wanted[moved], minlength=routed.experts).astype(np.float64),
        padded=room.sum(axis=0).astype(np.float64) if rule.pad else nothing,
        capacity=limit,
    )


def _priority(routed: Routed, token: Ints, slot: Ints, rule: CapacityRule, chance: Chance) -> Ints:
    """Rank of each pick [picks] in the order in which places are given out, lower first."""
    if rule.drop == "random":
        return np.asarray(chance.turn[token, slot])
    if rule.drop == "probability":
        order = np.lexsort((slot, token, -routed.weights[token, slot]))
    else:
        order = np.lexsort((token, slot)) if rule.by_choice else np.lexsort((slot, token))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _claim(home: Ints, expert: Ints, priority: Ints, room: Ints) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which claims [claims] get a place, by priority; takes the places out of `room` [sources, experts]."""
    experts = room.shape[1]
    cell = home * experts + expert
    order = np.lexsort((priority, cell))
    ordered = cell[order]
    first = np.searchsorted(ordered, ordered, side="left")
    got = np.empty(len(cell), dtype=bool)
    got[order] = np.arange(len(cell)) - first < room.ravel()[ordered]
    room -= np.bincount(cell[got], minlength=room.size).reshape(room.shape)
    return got


def _reroute_at_random(ids: Ints, token: Ints, slot: Ints, home: Ints, room: Ints, chance: Chance) -> None:
    """One try at a random expert for each lost pick; lost where it is full or the token's own already.

    Slot by slot, so that a token sees what its earlier picks found.
    """
    for at in np.unique(slot):
        rows = token[slot == at]
        chosen = chance.second[rows, at]
        new = ~(ids[rows] == chosen[:, None]).any(axis=1)
        rows, chosen = rows[new], chosen[new]
        got = _claim(home[rows], chosen, np.arange(len(rows)), room)
        ids[rows[got], at] = chosen[got]


def _reroute_to_next(ids: Ints, token: Ints, slot: Ints, home: Ints, room: Ints, scores: Floats, wanted: Ints) -> None:
    """Each lost pick goes down its token's order of experts until one has room that the token neither has nor wanted.

    Each pass offers the best expert that still has room; claims that lose it go on to the next pass.
    """
    for at in np.unique(slot):
        waiting = token[slot == at]
        while len(waiting):
            open_scores = np.where(room[home[waiting]] > 0, scores[waiting], -np.inf)
            for held in (ids, wanted):
                row, column = np.nonzero(held[waiting] >= 0)
                open_scores[row, held[waiting[row], column]] = -np.inf
            best = open_scores.argmax(axis=1)
            possible = np.isfinite(open_scores[np.arange(len(waiting)), best])
            waiting, best = waiting[possible], best[possible]
            got = _claim(home[waiting], best, np.arange(len(waiting)), room)
            ids[waiting[got], at] = best[got]
            waiting = waiting[~got]
