"""Compiled annealing: swap replicas so that experts that tokens pick together share a node, within a bound on load."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

COOLING = 1e-3
"""The last temperature over the first: what a swap may lose at the end is far below what one typically changes."""

EXCESS_SCALES = (0.01, 0.03, 0.1, 0.3)
"""At first, load above the bound by this share of a rank's mean costs what a typical swap changes; runs take turns.

At the last temperature a thousandth of it does. Few experts on a rank make every swap a step of many percent: a run
that asks for less cannot move."""

SAMPLE = 200
"""Swaps that are looked at to learn what a typical one changes."""


@njit(cache=True)
def gather(table: Ints, pair: Floats, attract: Floats, parts: int) -> Floats:
    """What an expert has in common with each part: float64 [parts, experts], replicas of its mates counted by share."""
    experts = pair.shape[0]
    per_part = len(table) // parts
    out = attract.copy()
    for slot in range(len(table)):
        part = slot // per_part
        mate = pair[table[slot]]
        for expert in range(experts):
            out[part, expert] += mate[expert]
    return out


@njit(cache=True)
def _excess(load: float, bound: float) -> float:
    return max(load - bound, 0.0)


@njit(cache=True)
def _apply(
    table: Ints, a: int, b: int, room: int, per_part: int, holds: NDArray[np.bool_], load: Floats, share: Floats,
    pair: Floats, common: Floats,
) -> None:  # fmt: skip
    """Swap the replicas in two slots, and keep who holds what, loads and `common` right."""
    one, two = table[a], table[b]
    rank_a, rank_b, part_a, part_b = a // room, b // room, a // per_part, b // per_part
    table[a], table[b] = two, one
    holds[rank_a, one] = False
    holds[rank_a, two] = True
    holds[rank_b, two] = False
    holds[rank_b, one] = True
    moved = share[two] - share[one]
    load[rank_a] += moved
    load[rank_b] -= moved
    if part_a != part_b:
        for expert in range(pair.shape[0]):
            change = pair[two, expert] - pair[one, expert]
            common[part_a, expert] += change
            common[part_b, expert] -= change


@njit(cache=True)
def regroup(
    table: Ints,
    weight: Floats,
    together: Floats,
    attract: Floats,
    ranks: int,
    parts: int,
    spans: int,
    bound: float,
    rounds: int,
    wanted: int,
    tries: int,
    rng: np.random.Generator,
) -> bool:
    """Raise what the replicas of a part have in common, in place, with no rank above `bound` x the mean load.

    table: [slots]. weight: [experts], load. together: [experts, experts], symmetric, 0 on the diagonal. attract:
    [parts, experts], what an expert gains by being in a part whatever else is there. spans: the ranks in as many equal
    runs, which no replica leaves. A pair of replicas counts by the shares of their experts' tokens that they serve.
    Runs `anneal` until `wanted` runs kept the bound, at most `tries` times, and takes the best; False, and the table as
    it was, where none did.
    """
    given = table.copy()
    best, found = 0.0, 0
    for run in range(tries):
        row = given.copy()
        scale = EXCESS_SCALES[run % len(EXCESS_SCALES)]
        value = anneal(row, weight, together, attract, ranks, parts, spans, bound, scale, rounds, rng)
        if value == -np.inf:
            continue
        if found == 0 or value > best:
            best = value
            table[:] = row
        found += 1
        if found == wanted:
            break
    return found > 0


@njit(cache=True)
def anneal(
    table: Ints,
    weight: Floats,
    together: Floats,
    attract: Floats,
    ranks: int,
    parts: int,
    spans: int,
    bound: float,
    scale: float,
    rounds: int,
    rng: np.random.Generator,
) -> float:
    """One run of `regroup`, in place: what the parts have in common at the end, or -inf with a rank above the bound.

    scale: of EXCESS_SCALES. Simulated annealing (Kirkpatrick, Gelatt and Vecchi, Science 220, 1983) over swaps of two
    replicas, `rounds` x slots of them, then the best swaps until none helps.
    """
    experts, slots = len(weight), len(table)
    room, per_part, per_span = slots // ranks, slots // parts, slots // spans
    count = np.zeros(experts, dtype=np.int64)
    holds = np.zeros((ranks, experts), dtype=np.bool_)
    for slot in range(slots):
        count[table[slot]] += 1
        holds[slot // room, table[slot]] = True
    share = weight * ranks / (max(weight.sum(), 1e-300) * count)
    load = np.zeros(ranks)
    for slot in range(slots):
        load[slot // room] += share[table[slot]]
    pair = np.empty((experts, experts))
    pull = np.empty((parts, experts))
    for one in range(experts):
        for two in range(experts):
            pair[one, two] = together[one, two] / (count[one] * count[two])
        for part in range(parts):
            pull[part, one] = attract[part, one] / count[one]
    common = gather(table, pair, pull, parts)

    typical, found = 0.0, 0
    for _ in range(20 * SAMPLE):
        a = int(rng.random() * slots)
        b = a // per_span * per_span + int(rng.random() * per_span)
        one, two, part_a, part_b = table[a], table[b], a // per_part, b // per_part
        if one == two or part_a == part_b:
            continue
        typical += abs(
            common[part_b, one] + common[part_a, two] - common[part_a, one] - common[part_b, two] - 2 * pair[one, two]
        )
        found += 1
        if found == SAMPLE:
            break
    if found == 0 or typical == 0.0:
        return -np.inf  # nothing to tell parts apart by
    typical /= found
    price = typical / scale

    swaps = rounds * slots
    cooling = COOLING ** (1.0 / swaps)
    heat = typical
    for _ in range(swaps):
        heat *= cooling
        a = int(rng.random() * slots)
        b = a // per_span * per_span + int(rng.random() * per_span)
        one, two, rank_a, rank_b = table[a], table[b], a // room, b // room
        if rank_a == rank_b or one == two or holds[rank_b, one] or holds[rank_a, two]:
            continue
        moved = share[two] - share[one]
        worse = (
            _excess(load[rank_a] + moved, bound)
            + _excess(load[rank_b] - moved, bound)
            - _excess(load[rank_a], bound)
            - _excess(load[rank_b], bound)
        ) * price
        part_a, part_b = a // per_part, b // per_part
        if part_a != part_b:
            worse -= (
                common[part_b, one]
                + common[part_a, two]
                - common[part_a, one]
                - common[part_b, two]
                - 2.0 * pair[one, two]
            )
        if worse > 0.0 and rng.random() >= np.exp(-worse / heat):
            continue
        _apply(table, a, b, room, per_part, holds, load, share, pair, common)

    if not _settle(table, room, per_part, per_span, bound, holds, load, share, pair, common):
        return -np.inf
    value = 0.0
    for slot in range(slots):
        value += 0.5 * (common[slot // per_part, table[slot]] + pull[slot // per_part, table[slot]])
    return value


@njit(cache=True)
def _settle(
    table: Ints, room: int, per_part: int, per_span: int, bound: float, holds: NDArray[np.bool_], load: Floats,
    share: Floats, pair: Floats, common: Floats,
) -> bool:  # fmt: skip
    """Swap while a rank is above the bound (what loses least for the load it sheds), then while a swap gains.

    Whether no rank ends above the bound.
    """
    slots = len(table)
    tiny = 1e-12
    for _ in range(4 * slots):
        above = 0.0
        for rank in range(len(load)):
            above += _excess(load[rank], bound)
        shed = above > tiny
        best, best_a, best_b = 0.0, -1, -1
        for a in range(slots):
            rank_a, part_a, one = a // room, a // per_part, table[a]
            for b in range((rank_a + 1) * room, (a // per_span + 1) * per_span):
                rank_b, part_b, two = b // room, b // per_part, table[b]
                if one == two or holds[rank_b, one] or holds[rank_a, two]:
                    continue
                if shed and load[rank_a] <= bound and load[rank_b] <= bound:
                    continue
                gain = 0.0
                if part_a != part_b:
                    gain = (
                        common[part_b, one]
                        + common[part_a, two]
                        - common[part_a, one]
                        - common[part_b, two]
                        - 2.0 * pair[one, two]
                    )
                moved = share[two] - share[one]
                less = (
                    _excess(load[rank_a], bound)
                    + _excess(load[rank_b], bound)
                    - _excess(load[rank_a] + moved, bound)
                    - _excess(load[rank_b] - moved, bound)
                )
                if shed:
                    if less <= tiny:
                        continue
                    value = less / (max(-gain, 0.0) + tiny)
                else:
                    if less < -tiny or gain <= tiny:
                        continue
                    value = gain
                if value > best:
                    best, best_a, best_b = value, a, b
        if best_a < 0:
            return not shed
        _apply(table, best_a, best_b, room, per_part, holds, load, share, pair, common)
    above = 0.0
    for rank in range(len(load)):
        above += _excess(load[rank], bound)
    return above <= tiny
