"""Judging a solver on loads that its placement was not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.foretell import Expected, fit_expecting
from moesim.routing.holdout import split
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from moesim.spec.scenario import HoldoutSpec
from placement.costs import CostOf, no_cost, with_cost
from placement.judge import Figure, balance, paired_gain
from placement.problem import request_from_loads, solve, without_redundancy

BASELINE = "contiguous"
PLANNED = "planned"
WITHOUT_REPLICAS = "planned_without_replicas"

SPLITS = 4
"""Splits of the loads: every split fits anew, and each held-out workload counts once, as its mean over the splits."""


@dataclass(frozen=True)
class Split:
    """Loads to fit to, and loads to judge on."""

    fit: tuple[RoutingCounts, ...]
    judge: tuple[RoutingCounts, ...]


@dataclass(frozen=True)
class HeldLoads:
    """Loads of the ranks on one held-out workload, over the mean of the layer: contender -> [layers, ranks]."""

    workload: str
    loads: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class HeldOut:
    """max/mean rank load on held-out loads, for each contender, and what the plan gains.

    each: contender -> weighted mean over held-out workloads; by_workload: contender -> workload -> mean over layers and
    the splits that held it out. gain: planned against contiguous. replicas: planned against the same solver without
    replicas; None where the plan has none. worst: loads of the ranks on the workload that the plan does worst on.
    """

    spec: HoldoutSpec
    splits: int
    workloads: tuple[str, ...]
    each: dict[str, float]
    gain: Figure
    replicas: Figure | None
    by_workload: dict[str, dict[str, float]]
    worst: HeldLoads

    def to_json(self) -> dict[str, Any]:
        """How the loads were split, and the figures."""
        return {
            "by": self.spec.by,
            "fraction": self.spec.fraction,
            "splits": self.splits,
            "workloads": list(self.workloads),
            "max_over_mean": self.each,
            "by_workload": self.by_workload,
            "gain_from_replicas": None if self.replicas is None else self.replicas.to_json(),
        }


def contenders(request: PlacementRequest, solver: str) -> dict[str, ExpertPlacement]:
    """The plain baseline, the plan without replicas where it has some, and the plan, all fitted to the same loads."""
    plain = without_redundancy(request)
    found = {BASELINE: solve(plain, BASELINE).placement}
    if request.slots > plain.slots:
        found[WITHOUT_REPLICAS] = solve(replace(request, slots=plain.slots, current=None), solver).placement
    found[PLANNED] = solve(request, solver).placement
    return found


def make_splits(
    loads: Sequence[RoutingCounts], spec: HoldoutSpec, rng: np.random.Generator, expected: Expected | None = None
) -> list[Split]:
    """Up to SPLITS different splits of the loads; none where there is nothing to split (one snapshot).

    expected: by the scenario; the fits are then told what they are judged on, as `fit_expecting` says.
    """
    found: dict[tuple[str, ...], Split] = {}
    for generator in rng.spawn(4 * SPLITS):  # the same split may come up again
        if len(found) == SPLITS:
            break
        fit, judge = split(loads, spec, generator)
        if not fit or not judge:
            return []
        key = tuple(sorted(f"{load.name} {load.counts.sum():.17g}" for load in judge))
        found.setdefault(key, Split(fit_expecting(fit, judge if spec.by == "file" else (), expected), judge))
    return list(found.values())


def judge_splits(
    splits: Sequence[Split], request: PlacementRequest, solver: str, spec: HoldoutSpec, costs: CostOf = no_cost
) -> HeldOut:
    """Fit every contender to each split's first part and judge it on the second. Raises what the solver raises."""
    rows: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
    weight: dict[str, float] = {}
    most, worst = 0.0, HeldLoads("", {})
    for part in splits:
        fitted = with_cost(refit(request, part.fit), part.fit, costs)
        found = contenders(fitted, solver)
        for contender, placement in found.items():
            judged = balance(placement, part.judge)
            each = judged.by_load.mean(axis=1)
            if contender == PLANNED and each.max() > most:
                most = float(each.max())
                worst = _held_loads(judged.names[int(each.argmax())], part.judge[int(each.argmax())], found)
            for name, row, load_weight in zip(judged.names, judged.by_load, judged.weights, strict=True):
                rows.setdefault(contender, {}).setdefault(name, []).append(row)
                weight[name] = float(load_weight)
    names = tuple(sorted(weight))
    weights = np.asarray([weight[name] for name in names])
    table = {contender: np.stack([np.mean(found[name], axis=0) for name in names]) for contender, found in rows.items()}
    rng = np.random.default_rng(request.seed)
    first, second = rng.spawn(2)
    replicas = None
    if WITHOUT_REPLICAS in table:
        replicas = paired_gain(table[WITHOUT_REPLICAS], table[PLANNED], weights, second)
    return HeldOut(
        spec=spec,
        splits=len(splits),
        workloads=names,
        each={name: float(weights @ rows.mean(axis=1) / weights.sum()) for name, rows in table.items()},
        gain=paired_gain(table[BASELINE], table[PLANNED], weights, first),
        replicas=replicas,
        by_workload={
            contender: dict(zip(names, map(float, figures.mean(axis=1)), strict=True))
            for contender, figures in table.items()
        },
        worst=worst,
    )


def _held_loads(name: str, load: RoutingCounts, found: dict[str, ExpertPlacement]) -> HeldLoads:
    by_rank = {contender: placement.rank_loads(load.profile()) for contender, placement in found.items()}
    return HeldLoads(name, {key: loads / loads.mean(axis=1, keepdims=True) for key, loads in by_rank.items()})


def refit(request: PlacementRequest, loads: Sequence[RoutingCounts]) -> PlacementRequest:
    """The same request for other loads, without a cost: that of the old loads would not be of these."""
    fitted = request_from_loads(
        loads,
        slots=request.slots,
        ranks=request.ranks,
        nodes=request.nodes,
        groups=request.groups,
        seed=request.seed,
    )
    return replace(fitted, current=request.current)
