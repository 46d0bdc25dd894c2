"""Compiled annealing: swap replicas so that experts that tokens pick together share a node, within bounds on load."""

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

STEEP = 10.0
"""What load above the hottest rank of the given table costs more than load above the bound."""

TINY = 1e-12


@njit(cache=True)
def gather(table: Ints, pair: Floats, start: Floats) -> Floats:
    """What an expert has in common with each part: float64 [parts, experts], `start` and the part's replicas."""
    out = start.copy()
    per_part = len(table) // len(start)
    for slot in range(len(table)):
        row, mate = out[slot // per_part], pair[table[slot]]
        for expert in range(len(mate)):
            row[expert] += mate[expert]
    return out


@njit(cache=True)
def _joined(common: Floats, pair: Floats, one: int, two: int, home: int, other: int) -> float:
    """How much more the parts have in common when `one` leaves `home` for `other`, and `two` the other way."""
    return float(common[other, one] + common[home, two] - common[home, one] - common[other, two] - 2.0 * pair[one, two])


@njit(cache=True)
def _shift(common: Floats, pair: Floats, one: int, two: int, home: int, other: int) -> None:
    """Keep `common` right when `one` has left `home` for `other`, and `two` the other way."""
    for expert in range(pair.shape[0]):
        change = pair[two, expert] - pair[one, expert]
        common[home, expert] += change
        common[other, expert] -= change


@njit(cache=True)
def _excess(load: float, bound: float, top: float) -> float:
    """Load above the bound; what is above `top`, too, counts STEEP times more."""
    return float(max(load - bound, 0.0) + STEEP * max(load - top, 0.0))


@njit(cache=True)
def _relief(load_a: float, load_b: float, moved: float, bound: float, top: float) -> float:
    """How much less excess two ranks have when `moved` goes from rank b to rank a."""
    before = _excess(load_a, bound, top) + _excess(load_b, bound, top)
    return float(before - _excess(load_a + moved, bound, top) - _excess(load_b - moved, bound, top))


@njit(cache=True)
def regroup(
    table: Ints,
    weight: Floats,
    together: Floats,
    attract: Floats,
    swing: Floats,
    ranks: int,
    bound: float,
    rounds: int,
    wanted: int,
    tries: int,
    rng: np.random.Generator,
) -> bool:
    """Raise what the replicas of a part have in common, in place, and keep the ranks as even as they are bound to be.

    table: [slots]. weight: [experts], load; above `bound` x the mean there is no more load, all ranks together, than in
    the given table, and no rank is hotter than its hottest. together: [experts, experts],
    symmetric, 0 on the diagonal. attract: [parts, experts], what an expert gains by being in a part whatever else is
    there. swing: [experts, experts], covariance of the experts' loads from step to step; the ranks' variance, summed,
    does not rise above that of the given table. A pair of replicas counts by the shares of their experts' tokens that
    they serve. Runs `anneal` until `wanted` runs kept both bounds, at most `tries` times, and takes the best; False,
    and the table as it was, where none did.
    """
    experts, slots = len(weight), len(table)
    count = np.zeros(experts, dtype=np.int64)
    for slot in range(slots):
        count[table[slot]] += 1
    pair = np.empty((experts, experts))
    vary = np.zeros((experts, experts))
    unit = 0.0
    for one in range(experts):
        unit += swing[one, one] / count[one]
        for two in range(experts):
            pair[one, two] = together[one, two] / (count[one] * count[two])
    unit *= 0.5  # a pair counts once below
    for one in range(experts):
        for two in range(experts):
            if one != two and unit > 0.0:
                vary[one, two] = swing[one, two] / (count[one] * count[two] * unit)
    share = weight * ranks / (max(weight.sum(), 1e-300) * count)
    pull = attract / count
    given = table.copy()
    best, found = 0.0, 0
    for run in range(tries):
        row = given.copy()
        scale = EXCESS_SCALES[run % len(EXCESS_SCALES)]
        value = anneal(row, share, pair, pull, vary, ranks, bound, scale, rounds, rng)
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
    share: Floats,
    pair: Floats,
    pull: Floats,
    vary: Floats,
    ranks: int,
    bound: float,
    scale: float,
    rounds: int,
    rng: np.random.Generator,
) -> float:
    """One run of `regroup`, in place: what the parts have in common at the end, or -inf where a bound is not kept.

    share: [experts], load of a replica over a rank's mean. pair, pull, vary: as `together`, `attract` and `swing`, by
    replica, vary in units of the experts' own variance. scale: of EXCESS_SCALES. Simulated annealing (Kirkpatrick,
    Gelatt and Vecchi, Science 220, 1983) over swaps of two replicas, `rounds` x slots of them, then the best swaps
    until none helps.
    """
    slots, experts, parts = len(table), len(share), len(pull)
    room, per_part = slots // ranks, slots // parts
    holds = np.zeros((ranks, experts), dtype=np.bool_)
    load = np.zeros(ranks)
    for slot in range(slots):
        holds[slot // room, table[slot]] = True
        load[slot // room] += share[table[slot]]
    top = max(load.max(), bound)
    above, over = 0.0, 0.0  # excess, and variance, more than in the given table
    common = gather(table, pair, pull)
    beside = gather(table, vary, np.zeros((ranks, experts)))

    typical, found = 0.0, 0
    for _ in range(20 * SAMPLE):
        a, b = int(rng.random() * slots), int(rng.random() * slots)
        if table[a] != table[b] and a // per_part != b // per_part:
            typical += abs(_joined(common, pair, table[a], table[b], a // per_part, b // per_part))
            found += 1
        if found == SAMPLE:
            break
    if typical == 0.0:
        return -np.inf  # nothing to tell parts apart by
    typical /= found
    price = typical / scale

    swaps = rounds * slots
    cooling = COOLING ** (1.0 / swaps)
    heat = typical
    for _ in range(swaps):
        heat *= cooling
        a, b = int(rng.random() * slots), int(rng.random() * slots)
        one, two, rank_a, rank_b = table[a], table[b], a // room, b // room
        if rank_a == rank_b or one == two or holds[rank_b, one] or holds[rank_a, two]:
            continue
        more = _joined(beside, vary, one, two, rank_a, rank_b)
        moved = share[two] - share[one]
        less = _relief(load[rank_a], load[rank_b], moved, bound, top)
        worse = price * (max(over + more, 0.0) - max(over, 0.0) + max(above - less, 0.0) - max(above, 0.0))
        part_a, part_b = a // per_part, b // per_part
        if part_a != part_b:
            worse -= _joined(common, pair, one, two, part_a, part_b)
        if worse > 0.0 and rng.random() >= np.exp(-worse / heat):
            continue
        over += more
        above -= less
        _swap(table, a, b, room, per_part, holds, load, share, pair, common, vary, beside)
    limits = (bound, top, above, over)
    kept = _settle(table, room, per_part, limits, holds, load, share, pair, common, vary, beside)
    if not kept or load.max() > top + 1e-9:
        return -np.inf
    value = 0.0
    for slot in range(slots):
        value += 0.5 * (common[slot // per_part, table[slot]] + pull[slot // per_part, table[slot]])
    return value


@njit(cache=True)
def _swap(
    table: Ints, a: int, b: int, room: int, per_part: int, holds: NDArray[np.bool_], load: Floats, share: Floats,
    pair: Floats, common: Floats, vary: Floats, beside: Floats,
) -> None:  # fmt: skip
    """Swap the replicas in two slots, and keep right who holds what, loads, and what parts and ranks have in common."""
    one, two = table[a], table[b]
    rank_a, rank_b, part_a, part_b = a // room, b // room, a // per_part, b // per_part
    table[a], table[b] = two, one
    holds[rank_a, one] = False
    holds[rank_a, two] = True
    holds[rank_b, two] = False
    holds[rank_b, one] = True
    load[rank_a] += share[two] - share[one]
    load[rank_b] -= share[two] - share[one]
    _shift(beside, vary, one, two, rank_a, rank_b)
    if part_a != part_b:
        _shift(common, pair, one, two, part_a, part_b)


@njit(cache=True)
def _settle(
    table: Ints, room: int, per_part: int, limits: tuple[float, float, float, float], holds: NDArray[np.bool_],
    load: Floats, share: Floats, pair: Floats, common: Floats, vary: Floats, beside: Floats,
) -> bool:  # fmt: skip
    """Swap while a bound is not kept (what loses least for what it mends), then while a swap gains; if both hold."""
    slots = len(table)
    bound, top, above, over = limits
    for _ in range(slots):
        mend = above > TINY or over > TINY
        best, best_a, best_b, changed = 0.0, -1, -1, False
        for a in range(slots):
            rank_a, part_a = a // room, a // per_part
            for b in range((rank_a + 1) * room, slots):
                rank_b, part_b, one, two = b // room, b // per_part, table[a], table[b]
                if one == two or holds[rank_b, one] or holds[rank_a, two]:
                    continue
                if mend and over <= TINY and load[rank_a] <= bound and load[rank_b] <= bound:
                    continue
                gain = 0.0 if part_a == part_b else _joined(common, pair, one, two, part_a, part_b)
                if not mend and gain <= TINY:
                    continue
                more = _joined(beside, vary, one, two, rank_a, rank_b)
                less = _relief(load[rank_a], load[rank_b], share[two] - share[one], bound, top)
                mended = max(over, 0.0) - max(over + more, 0.0) + max(above, 0.0) - max(above - less, 0.0)
                if mended <= (TINY if mend else -TINY):
                    continue
                if not mend:
                    over += more
                    above -= less
                    _swap(table, a, b, room, per_part, holds, load, share, pair, common, vary, beside)
                    changed = True
                elif mended / (max(-gain, 0.0) + TINY) > best:
                    best, best_a, best_b = mended / (max(-gain, 0.0) + TINY), a, b
        if best_a >= 0:
            one, two, rank_a, rank_b = table[best_a], table[best_b], best_a // room, best_b // room
            over += _joined(beside, vary, one, two, rank_a, rank_b)
            above -= _relief(load[rank_a], load[rank_b], share[two] - share[one], bound, top)
            _swap(table, best_a, best_b, room, per_part, holds, load, share, pair, common, vary, beside)
        elif not changed:
            return not mend
    return False
