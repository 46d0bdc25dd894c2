"""Costs made of points measured on the spot: curves over size, expert histograms, the traffic of an exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Tag

Floats = NDArray[np.float64]
Tags = NDArray[np.int8]


@dataclass(frozen=True)
class Curve:
    """Time over size, linear between measured points: sizes and seconds [points], sizes rising."""

    sizes: Floats
    seconds: Floats

    def at(self, sizes: Floats) -> tuple[Floats, Tags]:
        """Seconds and tags at `sizes` [...]; past the last point the last slope goes on, tagged extrapolated."""
        sizes = np.asarray(sizes, dtype=np.float64)
        inside = np.interp(sizes, self.sizes, self.seconds)
        beyond = np.maximum(sizes - self.sizes[-1], 0.0)
        slope = 0.0
        if len(self.sizes) > 1:
            slope = float((self.seconds[-1] - self.seconds[-2]) / (self.sizes[-1] - self.sizes[-2]))
        outside = (sizes > self.sizes[-1]) | (sizes < self.sizes[0])
        return inside + slope * beyond, np.where(outside, Tag.EXTRAPOLATED, Tag.INTERPOLATED).astype(np.int8)


def rising(sizes: Sequence[float], seconds: Sequence[float]) -> Curve:
    """The closest curve that never falls (isotonic regression): more work is never quicker, scatter is."""
    from scipy.optimize import isotonic_regression

    return Curve(np.asarray(sizes, dtype=np.float64), np.asarray(isotonic_regression(np.asarray(seconds)).x))


class ExpertCost(Protocol):
    """Time of a rank's local experts as a function of the tokens that each of them gets."""

    def at(self, counts: Floats) -> tuple[Floats, Tags]:
        """Seconds and tags [...] for counts [..., local slots]."""
        ...


@dataclass(frozen=True)
class LoopCost:
    """Experts one after another: the sum of a curve over the tokens of each; an expert without tokens costs nothing."""

    curve: Curve

    def at(self, counts: Floats) -> tuple[Floats, Tags]:
        """Seconds and tags [...] for counts [..., local slots]."""
        seconds, tags = self.curve.at(counts)
        busy = counts > 0
        worst = np.where(busy, tags, np.int8(Tag.INTERPOLATED)).max(axis=-1)
        return np.where(busy, seconds, 0.0).sum(axis=-1), worst


@dataclass(frozen=True)
class GroupedCost:
    """One grouped kernel: a fixed part, a part for each expert touched (its weights) and one for each row.

    Fitted by non-negative least squares of the relative error to random histograms of at most `most_rows` rows.
    """

    fixed_s: float
    per_expert_s: float
    per_row_s: float
    most_rows: float

    def at(self, counts: Floats) -> tuple[Floats, Tags]:
        """Seconds and tags [...] for counts [..., local slots]."""
        rows, touched = counts.sum(axis=-1), (counts > 0).sum(axis=-1)
        seconds = np.where(rows > 0, self.fixed_s + self.per_expert_s * touched + self.per_row_s * rows, 0.0)
        return seconds, np.where(rows > self.most_rows, Tag.EXTRAPOLATED, Tag.INTERPOLATED).astype(np.int8)


def fit_loop(histograms: Sequence[NDArray[np.int64]], seconds: Sequence[float]) -> LoopCost:
    """The curve of one expert, from balanced histograms ([local slots]; zero = not used) and their seconds."""
    each = [value / int((histogram > 0).sum()) for histogram, value in zip(histograms, seconds, strict=True)]
    return LoopCost(rising([float(histogram.max()) for histogram in histograms], each))


def fit_grouped(histograms: Sequence[NDArray[np.int64]], seconds: Sequence[float]) -> GroupedCost:
    """Non-negative least squares of the relative error over histograms [local slots] and their seconds."""
    from scipy.optimize import nnls

    rows = [float(histogram.sum()) for histogram in histograms]
    features = [[1.0, float((histogram > 0).sum()), total] for histogram, total in zip(histograms, rows, strict=True)]
    scale = 1.0 / np.asarray(seconds)
    fixed, per_expert, per_row = nnls(np.asarray(features) * scale[:, None], np.ones(len(scale)))[0].tolist()
    return GroupedCost(fixed, per_expert, per_row, most_rows=max(rows))


@dataclass(frozen=True)
class Traffic:
    """Rows that each rank sends to others, gets from others, and keeps: [ranks] each."""

    sent: NDArray[np.int64]
    received: NDArray[np.int64]
    kept: NDArray[np.int64]

    def busiest(self, both_ways: float) -> float:
        """Rows of an even exchange that loads every rank as this one loads its busiest.

        A rank's load is its busier direction plus `both_ways` of the other one; in an even exchange, both are equal.
        """
        more, less = np.maximum(self.sent, self.received), np.minimum(self.sent, self.received)
        return float((more + both_ways * less).max() / (1.0 + both_ways))


def traffic(counts: NDArray[np.int64]) -> Traffic:
    """Rows by direction of a dispatch with `counts` [source ranks, slots]; a combine has the same, turned round."""
    ranks = counts.shape[0]
    table = counts.reshape(ranks, ranks, -1).sum(axis=-1)
    kept = np.diagonal(table).copy()
    return Traffic(table.sum(axis=1) - kept, table.sum(axis=0) - kept, kept)


def both_ways_share(even: Curve, sizes: list[int], seconds: list[float]) -> float:
    """How much of a rank's other direction adds to its time, from exchanges in one direction only: 0 to 1.

    A one-way exchange of b bytes takes as long as an even one of e bytes each way (read backwards from the even curve):
    b = (1 + both_ways) e. 0: the directions do not disturb each other; 1: they take turns, as in a transport that one
    thread serves. The median over the sizes.
    """
    found = []
    for size, value in zip(sizes, seconds, strict=True):
        alike = float(np.interp(value, even.seconds, even.sizes))
        found.append(min(max(size / alike - 1.0, 0.0), 1.0) if alike > 0 else 1.0)
    return float(np.median(found)) if found else 0.0
