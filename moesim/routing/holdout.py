"""Loads that a placement is fitted to, and loads that it is judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.trace import RoutingCounts
from moesim.spec.scenario import HoldoutSpec

Loads = tuple[RoutingCounts, ...]


def split(loads: Sequence[RoutingCounts], holdout: HoldoutSpec, rng: np.random.Generator) -> tuple[Loads, Loads]:
    """Split into (to fit, to judge); nothing to judge on is an empty second part: the verdict is then withheld.

    by "file": whole files, `fraction` of those of each phase that has several, at least one on each side; where no
    phase has two files, of all files. by "step": `fraction` of the steps, at random; by "time": the last steps. Files
    without steps of their own then stay on the fitting side.
    """
    given = tuple(loads)
    if holdout.by == "none":
        return given, ()
    if holdout.by == "file":
        return _by_file(given, holdout.fraction, rng)
    parts = [_by_step(load, holdout, rng) for load in given]
    return tuple(fit for fit, _ in parts), tuple(judge for _, judge in parts if judge is not None)


def refuse_repeats(loads: Sequence[RoutingCounts], *, where: str) -> None:
    """Refuse loads with the same shares in all layers: one of them held out is no load that the other's fit never saw.

    Even shares are alike whatever they are of, and pass. Raises BadInput that names both.
    """
    profiles = [load.profile() for load in loads]
    for second, profile in enumerate(profiles):
        for first in range(second):
            other = profiles[first]
            if other.shape != profile.shape or not np.allclose(other, profile, rtol=1e-9, atol=0.0):
                continue
            if np.ptp(profile, axis=1).any():
                one, same = loads[first].name, loads[second].name
                what = f"{one} is given twice" if one == same else f"{one} and {same} hold the same counts"
                raise BadInput(what, where=where, mend="give each workload once")


def _judged(count: int, fraction: float) -> int:
    return min(max(round(count * fraction), 1), count - 1)


def _by_file(loads: Loads, fraction: float, rng: np.random.Generator) -> tuple[Loads, Loads]:
    if len(loads) < 2:
        return loads, ()
    phases = sorted({load.phase for load in loads})
    members = [[index for index, load in enumerate(loads) if load.phase == phase] for phase in phases]
    pools = [pool for pool in members if len(pool) > 1] or [list(range(len(loads)))]
    judged: set[int] = set()
    for pool in pools:
        judged.update(int(index) for index in rng.choice(pool, _judged(len(pool), fraction), replace=False))
    fit = tuple(load for index, load in enumerate(loads) if index not in judged)
    return fit, tuple(load for index, load in enumerate(loads) if index in judged)


def _by_step(
    load: RoutingCounts, holdout: HoldoutSpec, rng: np.random.Generator
) -> tuple[RoutingCounts, RoutingCounts | None]:
    steps = len(load.counts)
    if not load.per_step or steps < 2:
        return load, None
    held = _judged(steps, holdout.fraction)
    order = rng.permutation(steps) if holdout.by == "step" else np.arange(steps)
    fit, judge = np.sort(order[: steps - held]), np.sort(order[steps - held :])
    return _take(load, fit), _take(load, judge)


def _take(load: RoutingCounts, steps: NDArray[np.int64]) -> RoutingCounts:
    records = None if load.records is None else load.records.of_steps(steps)
    tokens = None if load.tokens is None else load.tokens.of_steps(steps)
    return replace(load, counts=load.counts[steps], per_step=len(steps) > 1, records=records, tokens=tokens)
