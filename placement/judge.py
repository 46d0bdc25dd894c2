"""How a placement does on given loads, and how sure a difference between two placements is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.trace import RoutingCounts, stack_profiles
from moesim.spec.plan import ExpertPlacement, max_over_mean

LEVEL = 0.9
"""Level of the interval: 90 % unless asked otherwise."""

DRAWS = 2000
"""Bootstrap draws: the 5 % quantile of 2,000 draws has a standard error of half a percent of rank, enough to print."""


@dataclass(frozen=True)
class Balance:
    """max/mean rank load of a placement: on the weighted mix of the loads, and on each load by itself.

    by_layer: float64 [layers], on the mix. by_load: float64 [loads, layers]. names: of the loads.
    """

    by_layer: NDArray[np.float64]
    by_load: NDArray[np.float64]
    weights: NDArray[np.float64]
    names: tuple[str, ...]
    layer_ids: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Mean over layers, on the mix."""
        return float(self.by_layer.mean())

    @property
    def each(self) -> float:
        """Weighted mean over loads of the mean over layers, each load by itself."""
        return float(self.weights @ self.by_load.mean(axis=1))

    def to_json(self) -> dict[str, Any]:
        """`mean` and `worst_layer` on the mix, `each_workload` and one figure for each load."""
        return {
            "mean": self.mean,
            "worst_layer": float(self.by_layer.max()),
            "worst_layer_id": int(self.layer_ids[int(self.by_layer.argmax())]),
            "each_workload": self.each,
            "by_workload": dict(zip(self.names, map(float, self.by_load.mean(axis=1)), strict=True)),
        }


@dataclass(frozen=True)
class Figure:
    """A figure with its interval: most often a relative gain (0.1 = 10 % less of what is compared)."""

    value: float
    low: float
    high: float
    level: float = LEVEL

    def to_json(self) -> dict[str, float]:
        """Its four figures."""
        return {"value": self.value, "low": self.low, "high": self.high, "level": self.level}


def balance(placement: ExpertPlacement, loads: Sequence[RoutingCounts]) -> Balance:
    """Balance of a placement under equal split over replicas. Raises BadInput where the loads are of another model."""
    fits = loads[0].counts.shape[1:] == (placement.layers, placement.experts)
    if not fits or not np.array_equal(loads[0].layer_ids, placement.layer_ids):
        raise BadInput(
            f"loads of {loads[0].counts.shape[1]} layers x {loads[0].experts} experts do not fit a map of "
            f"{placement.layers} x {placement.experts}",
            where=loads[0].name,
            mend="give a map and loads of one model",
        )
    profiles, weights = stack_profiles(loads)
    return Balance(
        by_layer=max_over_mean(placement.rank_loads(np.tensordot(weights, profiles, axes=1))),
        by_load=max_over_mean(placement.rank_loads(profiles)),
        weights=weights,
        names=_unique([load.name for load in loads]),
        layer_ids=placement.layer_ids,
    )


def _unique(names: list[str]) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(out)


def paired_gain(
    baseline: NDArray[np.float64],
    candidate: NDArray[np.float64],
    weights: NDArray[np.float64],
    rng: np.random.Generator,
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Figure:
    """1 - candidate / baseline of mean max/mean, by a bootstrap that draws workloads and layers, the same for both.

    baseline, candidate: [loads, layers]; weights: [loads]. Loads are drawn with replacement by their weight, layers
    evenly (Efron, Annals of Statistics 7(1), 1979); both placements meet the same draws, so what they share cancels.
    With one load the interval tells the spread over layers only.
    """
    weight = weights / weights.sum()
    value = 1.0 - float(weight @ candidate.mean(axis=1)) / float(weight @ baseline.mean(axis=1))
    loads, layers = baseline.shape
    # Drawing with replacement = multiplying each load and each layer by how often it was drawn.
    load_times = rng.multinomial(loads, weight, size=draws)
    layer_times = rng.multinomial(layers, np.full(layers, 1.0 / layers), size=draws)
    base = np.einsum("dw,wl,dl->d", load_times, baseline, layer_times, optimize=True)
    cand = np.einsum("dw,wl,dl->d", load_times, candidate, layer_times, optimize=True)
    low, high = np.quantile(1.0 - cand / base, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Figure(value=value, low=float(low), high=float(high), level=level)
