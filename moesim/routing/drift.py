"""Loads over simulated time: which mix of them is served when."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.trace import RoutingCounts
from moesim.spec.drift import DriftSpec, ShiftSpec

Floats = NDArray[np.float64]

# A line between two points is served as so many steps, each at the line's middle: the mean is exact, and no moment is
# off by more than a sixteenth of the way.
LEVELS = 8
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class LoadDrift:
    """Weights of the loads, piecewise constant.

    from_s: [mixes], where each mix begins, the first at 0. weights: [mixes, loads]; each phase's loads count by their
    own sum. repeat_s: after which it starts again; None = the last mix goes on.
    """

    from_s: Floats
    weights: Floats
    repeat_s: float | None = None

    def mix_at(self, now_s: float) -> int:
        """The mix that is served at a time."""
        place = now_s if self.repeat_s is None else now_s % self.repeat_s
        return int(np.searchsorted(self.from_s, place, side="right")) - 1


def cut_in_blocks(loads: Sequence[RoutingCounts], drift: DriftSpec | None) -> tuple[RoutingCounts, ...]:
    """The loads as they are, or each file's steps in `blocks` parts, in their order: part b of load i stands at
    i x blocks + b, with the file's weight spread over its parts. Raises BadInput for a load with fewer steps.
    """
    if drift is None or drift.blocks is None:
        return tuple(loads)
    found = []
    for load in loads:
        steps = len(load.counts)
        if not load.per_step or steps < drift.blocks:
            raise BadInput(
                f"{steps} steps in order cannot be cut in {drift.blocks} blocks"
                if load.per_step
                else "the load is one aggregate and has no order in time",
                where=f"routing.drift.blocks: {load.name}",
                mend="ask for fewer blocks, or give `points`",
            )
        edges = np.linspace(0, steps, drift.blocks + 1).astype(np.int64)
        for block, (begin, end) in enumerate(itertools.pairwise(edges)):
            found.append(
                replace(
                    load,
                    counts=load.counts[begin:end],
                    name=f"{load.name}[{block}]",
                    weight=load.weight / drift.blocks,
                    per_step=bool(end - begin > 1),
                )
            )
    return tuple(found)


def load_drift(drift: DriftSpec, loads: Sequence[RoutingCounts]) -> LoadDrift:
    """The drift of loads that `cut_in_blocks` returned.

    Raises BadInput where weights are not one for each load, or leave a phase without any.
    """
    if drift.points is None:
        return _in_order(drift, loads)
    count = len(drift.points[0].weights)
    if count != len(loads):
        raise BadInput(
            f"{count} weights for {len(loads)} loads",
            where="routing.drift.points",
            mend=f"give one for each of {', '.join(load.name for load in loads)}"[:200],
        )
    for index, point in enumerate(drift.points):
        for phase in PHASES:
            weight = sum(one for one, load in zip(point.weights, loads, strict=True) if load.phase in (phase, "any"))
            known = any(load.phase in (phase, "any") for load in loads)
            if (known and weight == 0) or sum(point.weights) == 0:
                raise BadInput(
                    f"no {phase} load has a weight at {point.at_s:g} s",
                    where=f"routing.drift.points.{index}.weights",
                    mend="give one of them a weight",
                )
    times = np.asarray([point.at_s for point in drift.points], dtype=np.float64)
    weights = np.asarray([point.weights for point in drift.points], dtype=np.float64)
    if drift.between == "hold":
        return LoadDrift(times, weights, drift.repeat_s)
    return _stairs(times, weights, drift.repeat_s)


def _stairs(times: Floats, weights: Floats, repeat_s: float | None) -> LoadDrift:
    """Straight lines between points as LEVELS steps each; after the last it goes back to the first, or stays."""
    if repeat_s is not None:
        times, weights = np.append(times, repeat_s), np.concatenate([weights, weights[:1]])
    middle = (np.arange(LEVELS) + 0.5) / LEVELS
    begins, mixes = [], []
    for begin_s, end_s, first, last in zip(times, times[1:], weights, weights[1:], strict=False):
        begins.append(begin_s + (end_s - begin_s) * np.arange(LEVELS) / LEVELS)
        mixes.append(first + (last - first) * middle[:, None])
    if repeat_s is None:
        begins.append(times[-1:])
        mixes.append(weights[-1:])
    return LoadDrift(np.concatenate(begins), np.concatenate(mixes), repeat_s)


def _in_order(drift: DriftSpec, loads: Sequence[RoutingCounts]) -> LoadDrift:
    assert drift.blocks is not None
    assert drift.block_s is not None
    weights = np.zeros((drift.blocks, len(loads)))
    for index, load in enumerate(loads):
        weights[index % drift.blocks, index] = load.weight
    begins: Floats = np.arange(drift.blocks, dtype=np.float64) * drift.block_s
    return LoadDrift(begins, weights, drift.blocks * drift.block_s if drift.repeat else None)


def drift_of_shifts(shifts: Sequence[ShiftSpec], loads: Sequence[RoutingCounts]) -> LoadDrift:
    """The drift that shifts make: the loads by their own weights, then what each shift names, by time.

    Raises BadInput for a name that no judged load has.
    """
    ordered = sorted(shifts, key=lambda shift: shift.at_s)
    own = np.asarray([load.weight for load in loads], dtype=np.float64)
    weights = [own / own.sum(), *(_named(shift, loads) for shift in ordered)]
    return LoadDrift(np.asarray([0.0, *(shift.at_s for shift in ordered)]), np.stack(weights))


def _named(shift: ShiftSpec, loads: Sequence[RoutingCounts]) -> Floats:
    """Weights [loads] of a shift, a name's weight spread over the loads that have it in theirs."""
    weights = np.zeros(len(loads))
    names = [load.name for load in loads]
    for name, weight in shift.loads.items():
        found = [index for index, known in enumerate(names) if name in known]
        if not found:
            raise BadInput(
                f"no judged load is named {name!r}",
                where="routing.shifts",
                mend=f"use parts of {', '.join(names[:6])}",
            )
        weights[found] += weight / len(found)
    return np.asarray(weights / weights.sum())
