"""Costs made of points measured on the spot: curves over size, and over the histogram of the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from profiles.monotone import least_squares

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
    return Curve(np.asarray(sizes, dtype=np.float64), least_squares(np.asarray(seconds, dtype=np.float64)))


class ExpertCost(Protocol):
    """Time of a rank's local experts as a function of the tokens that each of them gets."""

    def at(self, counts: Floats) -> tuple[Floats, Tags]:
        """Seconds and tags [...] for counts [..., local slots]."""
        ...


@dataclass(frozen=True)
class LoopCost:
    """Experts one after another: the sum of a curve over the tokens of each; an expert without tokens costs nothing.

    start_s: what the first of them takes longer, as caches hold what ran before.
    """

    curve: Curve
    start_s: float = 0.0

    def at(self, counts: Floats) -> tuple[Floats, Tags]:
        """Seconds and tags [...] for counts [..., local slots]."""
        seconds, tags = self.curve.at(counts)
        busy = counts > 0
        worst = np.where(busy, tags, np.int8(Tag.INTERPOLATED)).max(axis=-1)
        return np.where(busy, seconds, 0.0).sum(axis=-1) + self.start_s * busy.any(axis=-1), worst


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
    """The curve of one expert over its rows, from histograms ([experts]; zero = not used) of like rows, and seconds.

    Histograms of the same mean rows but of fewer experts tell what the start takes: the median of what is left of them
    by the slope from few experts to many. Without any it is 0. The curve may fall: a library's product of a few more
    rows can take a quicker path.
    """
    by_rows: dict[float, list[tuple[int, float]]] = {}
    for histogram, value in zip(histograms, seconds, strict=True):
        used = int((histogram > 0).sum())
        by_rows.setdefault(float(histogram.sum() / used), []).append((used, value))
    started = []
    for found in by_rows.values():
        (few, few_s), (many, many_s) = min(found), max(found)
        if many > few:
            started.append(few_s - few * (many_s - few_s) / (many - few))
    start_s = min(max(float(np.median(started)), 0.0), *seconds) if started else 0.0  # no sample takes less
    sizes = sorted(by_rows)
    most = [max(by_rows[size]) for size in sizes]
    each = [(value - start_s) / used for used, value in most]
    return LoopCost(Curve(np.asarray(sizes), np.asarray(each, dtype=np.float64)), start_s)


def fit_grouped(histograms: Sequence[NDArray[np.int64]], seconds: Sequence[float]) -> GroupedCost:
    """Non-negative least squares of the relative error over histograms [local slots] and their seconds."""
    from scipy.optimize import nnls

    rows = [float(histogram.sum()) for histogram in histograms]
    features = [[1.0, float((histogram > 0).sum()), total] for histogram, total in zip(histograms, rows, strict=True)]
    scale = 1.0 / np.asarray(seconds)
    fixed, per_expert, per_row = nnls(np.asarray(features) * scale[:, None], np.ones(len(scale)))[0].tolist()
    return GroupedCost(fixed, per_expert, per_row, most_rows=max(rows))


def in_company(seconds: Floats, alone: float) -> Floats:
    """Time of each rank's work where ranks that are done leave the others more of what they share: [..., ranks].

    seconds: what the work takes while all ranks work. alone: a rank's time while the others wait, over its time while
    all work; with some of them at work, linearly between. On separate devices it is 1; below 1 where ranks share the
    memory's bandwidth, a core's two threads, or cores that other programs use, too.
    """
    ranks = seconds.shape[-1]
    if ranks == 1:
        return seconds
    order = np.argsort(seconds, axis=-1, kind="stable")
    work = np.diff(np.take_along_axis(seconds, order, axis=-1), axis=-1, prepend=0.0)  # until the next one is done
    others = np.arange(ranks - 1, -1, -1) / (ranks - 1)  # share of the others at work meanwhile
    ends = np.cumsum(work * (alone + (1.0 - alone) * others), axis=-1)
    found = np.empty_like(ends)
    np.put_along_axis(found, order, ends, axis=-1)
    return found
