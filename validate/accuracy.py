"""How far predictions are from measurements: errors, order within choices, regret. Pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    """Relative errors of n predictions: mean and median of |error|, its 90 % quantile, and the median signed error."""

    n: int
    mape: float
    median: float
    p90: float
    bias: float

    def as_dict(self) -> dict[str, float | int | None]:
        """JSON-ready: None where there is nothing to tell."""
        return {
            name: (None if isinstance(value, float) and math.isnan(value) else value)
            for name, value in vars(self).items()
        }


def errors(predicted: Floats, measured: Floats) -> Errors:
    """Errors of predictions [n] against positive measurements [n]; NaN figures where there are none."""
    if len(measured) == 0:
        return Errors(0, math.nan, math.nan, math.nan, math.nan)
    relative = np.asarray(predicted) / np.asarray(measured) - 1.0
    size = np.abs(relative)
    return Errors(
        len(relative),
        float(size.mean()),
        float(np.median(size)),
        float(np.quantile(size, 0.9)),
        float(np.median(relative)),
    )


def spearman(predicted: Floats, measured: Floats) -> float:
    """Rank correlation with ties averaged; NaN where either side is constant."""
    one, other = rankdata(predicted), rankdata(measured)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(np.corrcoef(one, other)[0, 1])


def regret(predicted: Floats, measured: Floats) -> float:
    """What choosing the highest prediction loses of the highest measurement: 0 where it is the best."""
    best = float(np.max(measured))
    return float(1.0 - measured[int(np.argmax(predicted))] / best)


@dataclass(frozen=True)
class Choices:
    """Order within groups of alternatives: number of groups, mean rank correlation, mean top-1 regret."""

    groups: int
    spearman: float
    regret: float


def choices(groups: Sequence[Sequence[int]], predicted: Floats, measured: Floats) -> Choices:
    """Order of `predicted` against `measured` (higher is better) within groups of at least 3 indices.

    A group whose predictions are all alike counts as no correlation (0): it tells nothing.
    """
    found = each_choice(groups, predicted, measured)
    if not found:
        return Choices(0, math.nan, math.nan)
    mean = np.mean(found, axis=0)
    return Choices(len(found), float(mean[0]), float(mean[1]))


def each_choice(groups: Sequence[Sequence[int]], predicted: Floats, measured: Floats) -> list[tuple[float, float]]:
    """Rank correlation and top-1 regret of each group of at least 3 indices, in order; see `choices`."""
    found = []
    for group in (np.asarray(group) for group in groups if len(group) >= 3):
        order = spearman(predicted[group], measured[group])
        found.append((0.0 if math.isnan(order) else order, regret(predicted[group], measured[group])))
    return found


def coverage(low: Floats, high: Floats, measured: Floats) -> dict[str, Any]:
    """Share of measurements inside their intervals, and the mean half-width relative to the middle."""
    if len(measured) == 0:
        return {"share": None, "half_width": None}
    inside = (measured >= low) & (measured <= high)
    return {"share": float(inside.mean()), "half_width": float(((high - low) / (high + low)).mean())}
