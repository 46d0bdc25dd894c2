"""The placements that a validation compares: as a solver makes them, bad ones on purpose, and steps between them.

All are made from the load profile alone, before anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moesim.plugins import SOLVERS, load
from moesim.spec.plan import PlacementRequest
from validate.hardware.job import PlacedCase

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# What is compared unless more are asked for: contiguous, planned, hot_first.
BUILT_IN = 3
# The part of the first rank's slots that the hottest experts take in the packings between.
PACKED = {"packed_half": 0.5, "packed_most": 0.75}
# Of each expert on the first rank in `thrice_on_rank_0`.
COPIES = 3


def family(
    profile: Floats, *, ranks: int, slots: int, count: int, seed: int, planned: bool = True
) -> tuple[PlacedCase, ...]:
    """The first `count` placements of the family, which ends in as many random ones as it takes.

    profile: [experts], sum 1; the ranks divide the experts. slots: of `planned`, over all ranks. planned: False leaves
    out what a solver makes. Among the first five are one that gives a rank nearly all the work (where a replica on the
    spot is preferred) and one that spreads it evenly, so with ranks that work one row after another the slowest rank's
    work spans about the number of ranks; the sixth reads the weights of most experts three times, so that it spans more
    where rows and not weights make the time. Raises Infeasible.
    """
    experts = len(profile)
    hottest = np.argsort(-profile, kind="stable").astype(np.int64)
    own = experts // ranks
    half = min(own // 2, experts - own)  # spare slots of a rank

    def solved(total: int) -> Ints:
        return _solved(profile, slots=total, ranks=ranks, seed=seed)

    made: list[tuple[str, Callable[[], Ints]]] = [
        ("contiguous", lambda: np.arange(experts)),
        ("planned", lambda: solved(slots)),
        ("hot_first", lambda: hottest),
        ("all_on_rank_0", lambda: on_rank_0(hottest, hottest, ranks)),
        ("all_everywhere", lambda: np.tile(hottest, ranks)),
        ("thrice_on_rank_0", lambda: on_rank_0(hottest, np.repeat(hottest, COPIES), ranks)),
        ("planned_no_spare", lambda: solved(experts)),
        ("planned_half_spare", lambda: solved(experts + half * ranks)),
        ("packed_half", lambda: packed(hottest, PACKED["packed_half"], ranks)),
        ("packed_most", lambda: packed(hottest, PACKED["packed_most"], ranks)),
        ("spare_on_rank_0", lambda: on_rank_0(hottest, hottest[: own + half], ranks)),
        ("random_spare", lambda: scattered(hottest, 2 * ranks, np.random.default_rng([seed, 10]))),
    ]
    asked = [one for one in made if planned or not one[0].startswith("planned")][:count]
    chosen = [(name, make()) for name, make in asked]
    chosen += [
        (f"random_{index + 1}", scattered(hottest, 0, np.random.default_rng([seed, 11, index])))
        for index in range(count - len(chosen))
    ]
    return tuple(
        PlacedCase(name=name, slots=tuple(table.tolist()), replicas=len(table) - experts) for name, table in chosen
    )


def on_rank_0(hottest: Ints, mine: Ints, ranks: int) -> Ints:
    """The first rank holds `mine`, the others the rest, and in slots to spare the coldest experts: [slots].

    hottest: [experts], the experts from the hottest to the coldest.
    """
    lacking = hottest[~np.isin(hottest, mine)]
    room = len(mine) * (ranks - 1)
    rest = np.concatenate([lacking, np.resize(hottest[::-1][:ranks], room - len(lacking))])
    return np.concatenate([mine, rest.reshape(len(mine), ranks - 1).T.ravel()])


def packed(hottest: Ints, share: float, ranks: int) -> Ints:
    """The hottest experts fill `share` of the first rank's slots, the coldest the others: [experts]."""
    own = len(hottest) // ranks
    taken = round(share * own)
    return on_rank_0(hottest, np.concatenate([hottest[:taken], hottest[len(hottest) - (own - taken) :]]), ranks)


def scattered(hottest: Ints, spare: int, rng: np.random.Generator) -> Ints:
    """Each expert and `spare` more replicas of any, anywhere: [experts + spare]."""
    more = rng.integers(0, len(hottest), size=spare)
    return rng.permutation(np.concatenate([hottest, more]))


def _solved(profile: Floats, *, slots: int, ranks: int, seed: int) -> Ints:
    request = PlacementRequest(
        loads=profile[None, None, :],
        weights=np.ones(1),
        layer_ids=np.zeros(1, dtype=np.int64),
        absolute_layers=1,
        slots=slots,
        ranks=ranks,
        seed=seed,
    )
    table: Ints = load(SOLVERS, "greedy")(request).physical_to_logical[0]
    return table
