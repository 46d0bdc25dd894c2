"""How long a product of matrices takes as its rows grow: whole tiles, rows that do not align, scattered timings.

What differs from kernel to kernel is found in its own measurements (`fit_product`): the tallest tile whose rows are
paid as a whole, what the padded rows weigh against the rows themselves, how much the timings scatter, and what a row
count costs that the kernel cannot take as it is. Everything else is fixed here with its source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from profiles.monotone import isotonic

Floats = NDArray[np.float64]

# Rows of the smallest tile that a tensor core instruction takes (m16n8 of mma.sync, NVIDIA's PTX ISA).
SMALLEST_TILE = 16.0
# Rows to which DeepGEMM aligns what it reads through the tensor memory accelerator: 16 bytes of 4-byte scales
# (deepseek-ai/DeepGEMM, get_tma_aligned_size). Other counts go through a slower path of their own.
ALIGNED_ROWS = 4.0
# Tiles between two measured sizes up to which each gets its step; beyond, a step is less than a twentieth.
STEPS = 20
NODES_PER_DOUBLING = 3
# What `fit_product` chooses from: tallest tiles (two clusters of the largest are 512 rows), weights of padded rows, and
# how far a point is drawn to the line between its neighbours.
TILES = (64.0, 128.0, 256.0, 512.0)
SHARES = (0.5, 2.0, 8.0, 30.0)
SMOOTHINGS = (0.0, 1.0 / 3.0, 0.5)
# Classes of shapes by size of weights that choose for themselves: small products wait for launches, large ones do not.
CLASSES = 4
# A single error counts no more than this in a choice: outliers say nothing of the rule.
CLIP = 0.3
# Shapes below which nothing is fitted, and the share of a plateau that a surcharge must reach to be one.
LEAST_SHAPES = 20
LEAST_SURCHARGE = 0.05
# A plateau ends at this many rows; so many rows of either kind tell where it lies.
PLATEAU_ROWS, PLATEAU_POINTS = 129.0, 3
# How far above the plateau (relative) a shape's aligned rows may take and still count as waiting for launches.
STILL_ON_PLATEAU = 0.15
LEAST_LEFT = 0.3
MOST = 1e6  # above any tile, share or surcharge that is stored


@dataclass(frozen=True)
class RowRule:
    """How seconds run between measured rows: linear in rows + share x rows padded to tiles of up to `tile` rows.

    smoothing: how far a measured point is drawn to the line between its neighbours, 0 to 0.5.
    """

    tile: float = 64.0
    share: float = 8.0
    smoothing: float = 0.0

    def work(self, rows: Floats) -> Floats:
        """What seconds are linear in, in rows."""
        found: Floats = rows + self.share * padded_rows(rows, self.tile)
        return found


@dataclass(frozen=True)
class Product:
    """One kernel and element type: the rule by weights (elements, n x k, up to which it holds), and a surcharge.

    surcharge_s: seconds more of a row count that is no multiple of ALIGNED_ROWS.
    """

    rules: tuple[tuple[float, RowRule], ...] = ((float("inf"), RowRule()),)
    surcharge_s: float = 0.0

    def rule(self, n: int, k: int) -> RowRule:
        """The rule of a shape [n, k]."""
        return next((rule for most, rule in self.rules if n * k <= most), self.rules[-1][1])

    def as_dict(self) -> dict[str, Any]:
        """For profile.json."""
        rules = [{"up_to": None if np.isinf(most) else most, **asdict(rule)} for most, rule in self.rules]
        return {"surcharge_s": float(f"{self.surcharge_s:.4g}"), "rules": rules}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Product:
        """As `as_dict` wrote it. Raises KeyError, TypeError or ValueError for anything else."""
        rules = []
        for one in stored["rules"]:
            rule = RowRule(float(one["tile"]), float(one["share"]), float(one["smoothing"]))
            if not (SMALLEST_TILE <= rule.tile <= MOST and 0.0 <= rule.share <= MOST and 0.0 <= rule.smoothing <= 0.5):
                raise ValueError("rule")
            rules.append((float("inf") if one["up_to"] is None else float(one["up_to"]), rule))
        surcharge_s = float(stored["surcharge_s"])
        if not rules or not 0.0 <= surcharge_s <= MOST or any(np.isnan(most) for most, _ in rules):
            raise ValueError("product")
        return cls(tuple(rules), surcharge_s)


@dataclass(frozen=True)
class Shape:
    """The measured rows of one shape: weights n x k, rows rising without repeats [points], seconds [points]."""

    weights: float
    rows: Floats
    seconds: Floats


@njit(cache=True)
def _padded(rows: float, tile: float) -> float:
    height = SMALLEST_TILE
    while height < rows and height < tile:
        height *= 2.0
    return float(np.ceil(rows / height) * height)


def padded_rows(rows: Floats, tile: float) -> Floats:
    """Rows that a product computes for `rows` real ones: whole tiles, of the smallest power of two that holds them."""
    height = np.minimum(2.0 ** np.ceil(np.log2(np.maximum(rows, SMALLEST_TILE))), tile)
    padded: Floats = np.ceil(rows / height) * height
    return padded


def unaligned(rows: Floats) -> NDArray[np.bool_]:
    """Which row counts pay the surcharge; a single row runs through kernels of its own."""
    found: NDArray[np.bool_] = (rows % ALIGNED_ROWS != 0.0) & (rows > 1.0)
    return found


def aligned_seconds(rows: Floats, seconds: Floats, surcharge_s: float) -> Floats:
    """Seconds as if all rows aligned; at least the share LEAST_LEFT of what was measured stays."""
    less: Floats = np.where(unaligned(rows), np.maximum(seconds - surcharge_s, LEAST_LEFT * seconds), seconds)
    return less


@njit(cache=True)
def smoothed(at: Floats, logs: Floats, smoothing: float) -> Floats:
    """Rising ln seconds, each drawn to the line between its neighbours over the coordinate `at`; the ends stay."""
    out = logs.copy()
    for i in range(1, len(logs) - 1):
        span = at[i + 1] - at[i - 1]
        share = (at[i] - at[i - 1]) / span if span > 0.0 else 0.5
        line = logs[i - 1] + share * (logs[i + 1] - logs[i - 1])
        out[i] = max((1.0 - smoothing) * logs[i] + smoothing * line, out[i - 1])
    out[-1] = max(out[-1], out[-2]) if len(out) > 1 else out[-1]
    return out


@njit(cache=True)
def _errors(rows: Floats, seconds: Floats, starts: NDArray[np.int64], tile: float, share: float, smoothing: float,
            surcharge_s: float) -> Floats:  # fmt: skip
    """|ln(predicted / measured)| of every second point of every shape, from the others; summed, clipped: [2]."""
    total = 0.0
    points = 0
    for shape in range(len(starts) - 1):
        begin, end = starts[shape], starts[shape + 1]
        size = end - begin
        if size < 5:
            continue
        work = np.empty(size)
        logs = np.empty(size)
        for i in range(size):
            m = rows[begin + i]
            work[i] = m + share * _padded(m, tile)
            s = seconds[begin + i]
            if m % ALIGNED_ROWS != 0.0 and m > 1.0:
                s = max(s - surcharge_s, LEAST_LEFT * s)
            logs[i] = np.log(s)
        kept = (size + 1) // 2 if size % 2 == 1 else size // 2 + 1
        at = np.empty(kept)
        known = np.empty(kept)
        for i in range(kept):
            j = min(2 * i, size - 1)
            at[i] = work[j]
            known[i] = logs[j]
        known = np.exp(smoothed(np.log(at), isotonic(known), smoothing))
        for i in range(1, size - 1, 2):
            low, high = at[(i - 1) // 2], at[(i + 1) // 2]
            part = (work[i] - low) / (high - low) if high > low else 0.0
            guess = known[(i - 1) // 2] + part * (known[(i + 1) // 2] - known[(i - 1) // 2])
            total += min(abs(np.log(guess) - logs[i]), CLIP)
            points += 1
    return np.array([total, float(points)])


def fit_product(shapes: Sequence[Shape]) -> Product:
    """What one kernel's measurements say of it; the defaults where there are too few.

    The rule of each class of shapes is the one that predicts every second measured size best from the others.
    """
    if len(shapes) < LEAST_SHAPES:
        return Product()
    surcharge_s = surcharge(shapes)
    weights = np.array([shape.weights for shape in shapes])
    cuts = [*np.quantile(weights, np.arange(1, CLASSES) / CLASSES).tolist(), float("inf")]
    rules = []
    low = -1.0
    for high in cuts:
        own = [shape for shape in shapes if low < shape.weights <= high]
        rules.append((high, _best(own, surcharge_s) if own else RowRule()))
        low = high
    return Product(tuple(rules), surcharge_s)


def _best(shapes: Sequence[Shape], surcharge_s: float) -> RowRule:
    rows = np.concatenate([shape.rows for shape in shapes])
    seconds = np.concatenate([shape.seconds for shape in shapes])
    starts = np.concatenate([[0], np.cumsum([len(shape.rows) for shape in shapes])]).astype(np.int64)
    best, least = RowRule(), np.inf
    for tile, share, smoothing in product(TILES, SHARES, SMOOTHINGS):
        total, points = _errors(rows, seconds, starts, tile, share, smoothing, surcharge_s)
        if points and total / points < least:
            best, least = RowRule(tile, share, smoothing), total / points
    return best


def surcharge(shapes: Sequence[Shape]) -> float:
    """Seconds that a row count costs more when it is no multiple of ALIGNED_ROWS; 0 where none is to be seen.

    Where both kinds were measured on the plateau of small sizes, the median difference over the shapes. Where aligned
    rows were measured at large sizes only, those still bound the plateau, as fewer rows never take longer: over the
    shapes that are still on it, the upper quartile of what the plateau of unaligned rows lies above.
    """
    both, bounds = [], []
    for shape in shapes:
        odd = unaligned(shape.rows)
        small = shape.rows <= PLATEAU_ROWS
        aligned = ~odd & (shape.rows > 1.0)
        if np.count_nonzero(odd & small) < PLATEAU_POINTS or not aligned.any():
            continue
        level = float(np.median(shape.seconds[odd & small]))
        if np.count_nonzero(aligned & small) >= PLATEAU_POINTS:
            both.append((level - float(np.median(shape.seconds[aligned & small])), level))
        else:
            bounds.append((level - float(shape.seconds[aligned].min()), level))
    if len(both) >= max(LEAST_SHAPES, len(shapes) // 5):
        found = np.array(both)
        share, more = np.median(found[:, 0] / found[:, 1]), np.median(found[:, 0])
    else:
        found = np.array([one for one in bounds if one[0] > -STILL_ON_PLATEAU * one[1]])
        if len(found) < LEAST_SHAPES:
            return 0.0
        share, more = np.median(found[:, 0] / found[:, 1]), np.quantile(found[:, 0], 0.75)
    return float(more) if share > LEAST_SURCHARGE else 0.0


def nodes(xs: Floats, logs: Floats, rule: RowRule) -> tuple[Floats, Floats]:
    """Nodes at both sides of every tile's edge between rising rows, and those rows: (rows, ln seconds)."""
    logs = smoothed(np.log(rule.work(xs)), logs, rule.smoothing)
    at, values = [xs[:1]], [logs[:1]]
    for low, high, start, end in zip(xs[:-1], xs[1:], logs[:-1], logs[1:], strict=True):
        edges = _edges(float(low), float(high), rule.tile)
        ends = rule.work(np.array([low, high]))
        share = (rule.work(edges) - ends[0]) / (ends[1] - ends[0])
        at += [edges, np.array([high])]
        values += [np.log((1.0 - share) * np.exp(start) + share * np.exp(end)), np.array([end])]
    return np.concatenate(at), np.concatenate(values)


def _edges(low: float, high: float, tile: float) -> Floats:
    """The last row of each tile and the first of the next, strictly between two sizes."""
    first = tile * np.ceil(low / tile)
    if (high - first) / tile > STEPS:
        return np.geomspace(low, high, 2 + int(NODES_PER_DOUBLING * np.log2(high / low)))[1:-1]
    smaller = 2.0 ** np.arange(np.log2(SMALLEST_TILE), np.log2(tile))
    edges = np.concatenate([smaller, np.arange(first, high, tile)])
    both = np.unique(np.concatenate([edges, edges + 1.0]))
    return both[(both > low) & (both < high)]
