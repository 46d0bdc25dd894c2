"""Curves and surfaces through measured points: monotone, by the rule of the kernel, never beyond the measured hull.

Kernel times are noisy, and on a dense grid a larger size often took less time. Prices must not, so the points are first
moved to the nearest monotone ones in the logarithm (`monotone`): a curve's by least absolute deviations, a grid's by
least squares. A running maximum would do that, too, but it lifts: by 12 % on average over the shipped products of
matrices. Between the points `refine`, `products` and `protocols` say how a kernel's seconds run; a curve is straight
between its nodes, a surface log-log.

Every lookup returns seconds and a tag; the tag OUTSIDE marks points that the measurements do not enclose, and the
caller decides whether that is an error. Compiled: one pass over the points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from profiles.diagonal import equal_work
from profiles.monotone import isotonic, least_squares
from profiles.products import RowRule, aligned_seconds, nodes, unaligned
from profiles.protocols import protocol_nodes
from profiles.refine import NODES_PER_DOUBLING, Rule, between

Floats = NDArray[np.float64]
Tags = NDArray[np.int8]

OUTSIDE = -1
_MEASURED = int(Tag.MEASURED)
_INTERPOLATED = int(Tag.INTERPOLATED)
_EXTRAPOLATED = int(Tag.EXTRAPOLATED)
_FORMULA = int(Tag.FORMULA)
# Two sizes closer than this (relative) are the same point: sizes may come through a division and a product.
SAME = 1e-9
# A measured point that isotonic regression moved by less than this (in ln) still counts as measured: repeated timings
# of one kernel differ by as much.
NOISE = 0.01


@njit(cache=True)
def _curve(
    x: Floats, xs: Floats, ys: Floats, exact: NDArray[np.bool_], below: int, out: Floats, tags: Tags,
) -> None:  # fmt: skip
    last = len(xs) - 1
    for i in range(len(x)):
        value = x[i]
        if value <= 0.0:
            out[i] = 0.0
            tags[i] = _MEASURED
            continue
        if value < xs[0] * (1.0 - SAME):
            out[i] = ys[0]
            tags[i] = below
            continue
        if value > xs[last] * (1.0 + SAME):
            out[i] = ys[last]
            tags[i] = OUTSIDE
            continue
        low = 0
        high = last
        while high - low > 1:
            middle = (low + high) // 2
            if xs[middle] <= value:
                low = middle
            else:
                high = middle
        near = high if abs(xs[high] - value) <= SAME * value else low
        if abs(xs[near] - value) <= SAME * value:
            out[i] = ys[near]
            tags[i] = _MEASURED if exact[near] else _INTERPOLATED
            continue
        share = (value - xs[low]) / (xs[high] - xs[low])
        out[i] = ys[low] + share * (ys[high] - ys[low])
        tags[i] = _INTERPOLATED


@dataclass(frozen=True)
class Curve:
    """Seconds as a monotone function of one size, straight between its nodes.

    xs, ys: float64 [nodes], sizes rising, monotone seconds. exact: bool [nodes], false where a point was moved by
    more than NOISE or is itself interpolated. below: the tag of sizes under the smallest point, which are held at that
    point's price, an upper bound by monotonicity. surcharge_s: seconds more of rows that do not align
    (`products.unaligned`); 0 for all but a product of matrices, and for nearly all of these.
    """

    xs: Floats
    ys: Floats
    exact: NDArray[np.bool_]
    below: int = _INTERPOLATED
    surcharge_s: float = 0.0

    def price(self, size: Floats) -> tuple[Floats, Tags]:
        """Seconds and tags in the shape of `size`; a size of 0 costs 0, one beyond the largest has the tag OUTSIDE."""
        flat = np.ascontiguousarray(size, dtype=np.float64).reshape(-1)
        out = np.empty(flat.shape)
        tags = np.empty(flat.shape, dtype=np.int8)
        _curve(flat, self.xs, self.ys, self.exact, self.below, out, tags)
        if self.surcharge_s:
            out += np.where(unaligned(flat), self.surcharge_s, 0.0)
        return out.reshape(np.shape(size)), tags.reshape(np.shape(size))

    @property
    def largest(self) -> float:
        """The largest size inside."""
        return float(self.xs[-1])


def curve(
    xs: Floats, ys: Floats, *, rule: Rule | RowRule = "chord", below: int = _INTERPOLATED, exact: bool = True,
    surcharge_s: float = 0.0,
) -> Curve:  # fmt: skip
    """A curve through points in any order; repeated sizes are averaged by their median.

    rule: how seconds run between them, "chord" (straight), a RowRule (a product of matrices over its rows), "lines" or
    "steps" (a collective over its bytes). surcharge_s: what `ys` hold for rows that do not align.
    """
    xs, ys = medians(np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64))
    logs = np.log(aligned_seconds(xs, ys, surcharge_s) if surcharge_s else ys)
    moved = least_squares(logs) if rule in ("lines", "steps") else isotonic(logs)
    if rule == "chord":
        return Curve(xs, np.exp(moved), (np.abs(moved - logs) < NOISE) & exact, below)
    if isinstance(rule, RowRule):
        at, values = nodes(xs, moved, rule)
        values = np.exp(values)
    else:
        at, values = protocol_nodes(xs, np.exp(moved), rule)
    places = np.searchsorted(at, xs)
    on_node = np.zeros(len(at), dtype=bool)
    on_node[places] = (np.abs(np.log(values[places]) - logs) < NOISE) & exact
    return Curve(at, values, on_node, below, surcharge_s)


def medians(xs: Floats, ys: Floats) -> tuple[Floats, Floats]:
    """Rising unique `xs` with the median of their `ys`."""
    unique, where = np.unique(xs, return_inverse=True)
    if len(unique) == len(xs):
        order = np.argsort(xs)
        return xs[order], ys[order]
    return unique, np.array([np.median(ys[where == index]) for index in range(len(unique))])


@njit(cache=True)
def _surface(
    a: Floats, b: Floats, axis_a: Floats, log_a: Floats, axis_b: Floats, log_b: Floats, log_y: Floats, y: Floats,
    known: NDArray[np.int8], out: Floats, tags: Tags,
) -> None:  # fmt: skip
    """`known`: OUTSIDE for a missing grid point, else its tag."""
    last_a = len(axis_a) - 1
    last_b = len(axis_b) - 1
    for i in range(len(a)):
        va = a[i]
        vb = b[i]
        if va <= 0.0 or vb <= 0.0:
            out[i] = 0.0
            tags[i] = _MEASURED
            continue
        beyond = va > axis_a[last_a] * (1.0 + SAME) or vb > axis_b[last_b] * (1.0 + SAME)
        va = min(max(va, axis_a[0]), axis_a[last_a])
        vb = min(max(vb, axis_b[0]), axis_b[last_b])
        low_a = 0
        high_a = last_a
        while high_a - low_a > 1:
            middle = (low_a + high_a) // 2
            if axis_a[middle] <= va:
                low_a = middle
            else:
                high_a = middle
        if abs(axis_a[high_a] - va) <= SAME * va:
            low_a = high_a
        elif abs(axis_a[low_a] - va) <= SAME * va:
            high_a = low_a
        low_b = 0
        high_b = last_b
        while high_b - low_b > 1:
            middle = (low_b + high_b) // 2
            if axis_b[middle] <= vb:
                low_b = middle
            else:
                high_b = middle
        if abs(axis_b[high_b] - vb) <= SAME * vb:
            low_b = high_b
        elif abs(axis_b[low_b] - vb) <= SAME * vb:
            high_b = low_b
        k00 = known[low_a, low_b]
        k01 = known[low_a, high_b]
        k10 = known[high_a, low_b]
        k11 = known[high_a, high_b]
        if min(k00, k01, k10, k11) < 0:
            out[i] = np.nan
            tags[i] = OUTSIDE
            continue
        worst = max(k00, k01, k10, k11)
        if low_a == high_a and low_b == high_b:
            out[i] = y[low_a, low_b]
            tags[i] = k00
        else:
            share_a = 0.0 if low_a == high_a else (np.log(va) - log_a[low_a]) / (log_a[high_a] - log_a[low_a])
            share_b = 0.0 if low_b == high_b else (np.log(vb) - log_b[low_b]) / (log_b[high_b] - log_b[low_b])
            bottom = log_y[low_a, low_b] * (1.0 - share_b) + log_y[low_a, high_b] * share_b
            top = log_y[high_a, low_b] * (1.0 - share_b) + log_y[high_a, high_b] * share_b
            out[i] = np.exp(bottom * (1.0 - share_a) + top * share_a)
            tags[i] = max(worst, _INTERPOLATED)
        if a[i] < va * (1.0 - SAME) or b[i] < vb * (1.0 - SAME):
            tags[i] = max(tags[i], _INTERPOLATED)
        if beyond:
            tags[i] = OUTSIDE


@dataclass(frozen=True)
class Surface:
    """Seconds as a monotone function of two sizes on a grid that may lack corners.

    axis_a, axis_b: float64, rising. seconds: float64 [a, b], NaN where nothing was measured. known: int8 [a, b], the
    tag of each grid point, OUTSIDE where there is none. Sizes below the smallest are held there, as in Curve.
    """

    axis_a: Floats
    axis_b: Floats
    seconds: Floats
    known: Tags

    def __post_init__(self) -> None:
        object.__setattr__(self, "_log_a", np.log(self.axis_a))
        object.__setattr__(self, "_log_b", np.log(self.axis_b))
        object.__setattr__(self, "_log_y", np.log(self.seconds))

    def price(self, a: Floats, b: Floats) -> tuple[Floats, Tags]:
        """Seconds and tags in the broadcast shape; where `a` or `b` is 0 it costs 0."""
        a, b = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
        flat_a = np.ascontiguousarray(a).reshape(-1)
        flat_b = np.ascontiguousarray(b).reshape(-1)
        out = np.empty(flat_a.shape)
        tags = np.empty(flat_a.shape, dtype=np.int8)
        _surface(
            flat_a, flat_b, self.axis_a, self._log_a, self.axis_b, self._log_b, self._log_y, self.seconds,  # type: ignore[attr-defined]
            self.known, out, tags,
        )  # fmt: skip
        return out.reshape(a.shape), tags.reshape(a.shape)


def surface(a: Floats, b: Floats, seconds: Floats) -> Surface:
    """A surface through points; repeated points take their median, then the nearest monotone grid in the logarithm.

    What lies between the points is log-log until `refined` says more.
    """
    axis_a, row = np.unique(np.asarray(a, dtype=np.float64), return_inverse=True)
    axis_b, column = np.unique(np.asarray(b, dtype=np.float64), return_inverse=True)
    cell = row * len(axis_b) + column
    cells, values = medians(cell.astype(np.float64), np.asarray(seconds, dtype=np.float64))
    line = np.full(len(axis_a) * len(axis_b), np.nan)
    line[cells.astype(np.int64)] = values
    grid: Floats = line.reshape(len(axis_a), len(axis_b))
    moved = monotone_grid(np.log(grid))
    known = np.where(np.abs(moved - np.log(grid)) < NOISE, _MEASURED, _INTERPOLATED).astype(np.int8)
    known[np.isnan(grid)] = OUTSIDE
    return Surface(axis_a, axis_b, np.exp(moved), known)


# Rounds of alternating projections; what is left of a violation after them is lifted.
ROUNDS = 30


def monotone_grid(grid: Floats) -> Floats:
    """The grid that rises along both axes nearest to `grid`: Dykstra's alternating projections; NaN stays NaN.

    Source: Dykstra and Robertson, An algorithm for isotonic regression for two or more independent variables, 1982.
    """
    known = ~np.isnan(grid)
    moved = grid.copy()
    by_row, by_column = np.zeros_like(grid), np.zeros_like(grid)
    for _ in range(ROUNDS):
        along_rows = _project(moved + by_row, known)
        by_row = moved + by_row - along_rows
        after = _project((along_rows + by_column).T, known.T).T
        by_column = along_rows + by_column - after
        change = np.nanmax(np.abs(after - moved))
        moved = after
        if change < NOISE * 1e-2:
            break
    lifted = np.where(known, moved, -np.inf)
    lifted = np.maximum.accumulate(np.maximum.accumulate(lifted, axis=0), axis=1)
    return np.where(known, lifted, np.nan)


def _project(grid: Floats, known: NDArray[np.bool_]) -> Floats:
    """Every row made monotone over its known cells."""
    out = grid.copy()
    for row in range(len(grid)):
        out[row, known[row]] = least_squares(np.ascontiguousarray(grid[row, known[row]]))
    return out


def refined(part: Surface, rule: Rule) -> Surface:
    """The surface with columns between its own along `b`: by the rule, and by what rows of equal work were measured at.

    Filled cells lie between the two around them; they carry INTERPOLATED, or EXTRAPOLATED where one of those does.
    """
    log_b = np.log(part.axis_b)
    if len(log_b) < 2:
        return part
    columns, grid = equal_work(np.log(part.axis_a), log_b, np.log(part.seconds), rule)
    wide = np.unique(np.concatenate([columns, *_nodes_between(columns)]))
    values = np.full((len(grid), len(wide)), np.nan)
    known = np.full(values.shape, OUTSIDE, dtype=np.int8)
    measured = np.searchsorted(wide, columns[np.searchsorted(columns, log_b - SAME)])
    for i, row in enumerate(grid):
        have = ~np.isnan(row)
        if not have.any():
            continue
        x, y = columns[have], row[have]
        inside = (wide >= x[0]) & (wide <= x[-1])
        values[i, inside] = between(rule, x, y, wide[inside]) if len(x) > 1 else y
        known[i, inside] = _INTERPOLATED
        carried = np.flatnonzero(part.known[i] == _EXTRAPOLATED)
        if len(carried):
            known[i, inside & (wide > wide[measured[max(carried[0] - 1, 0)]])] = _EXTRAPOLATED
        own = part.known[i] != OUTSIDE
        values[i, measured[own]] = np.log(part.seconds[i, own])
        known[i, measured[own]] = part.known[i, own]
    lifted = np.fmax.accumulate(np.fmax.accumulate(values, axis=0), axis=1)
    lifted[np.isnan(values)] = np.nan
    axis_b = np.exp(wide)
    axis_b[measured] = part.axis_b
    return Surface(part.axis_a, axis_b, np.exp(lifted), known)


def _nodes_between(columns: Floats) -> list[Floats]:
    """Nodes inside every gap of the columns (ln sizes), evenly in the logarithm."""
    counts = np.ceil(NODES_PER_DOUBLING * np.diff(columns) / np.log(2.0)).astype(np.int64)
    gaps = zip(columns[:-1], columns[1:], counts, strict=True)
    return [np.linspace(low, high, count + 1)[1:-1] for low, high, count in gaps]


def completed(part: Surface, formula: Floats) -> Surface:
    """The surface with its missing corners filled: the nearest known point on the grid, scaled by a formula.

    formula: float64 [a, b], seconds by formula at every grid point. Filled points carry EXTRAPOLATED.
    """
    lacking = np.argwhere(part.known == OUTSIDE)
    if not len(lacking):
        return part
    have = np.argwhere(part.known != OUTSIDE)
    seconds = part.seconds.copy()
    known = part.known.copy()
    for i, j in lacking:
        distance = np.abs(have[:, 0] - i) + np.abs(have[:, 1] - j)
        p, q = have[int(distance.argmin())]
        seconds[i, j] = part.seconds[p, q] * formula[i, j] / formula[p, q]
        known[i, j] = _EXTRAPOLATED
    return Surface(part.axis_a, part.axis_b, np.exp(monotone_grid(np.log(seconds))), known)


@dataclass(frozen=True)
class Errors:
    """How far predictions lie from points that were left out: quantiles of |ln(predicted / measured)|."""

    median: float
    p68: float
    p90: float
    points: int

    def as_dict(self) -> dict[str, float]:
        """For profile.json."""
        return {
            "median": round(self.median, 5),
            "p68": round(self.p68, 5),
            "p90": round(self.p90, 5),
            "points": float(self.points),
        }


def summarise(residuals: Floats) -> Errors | None:
    """Quantiles of |residuals|; None without residuals. p68 is one standard deviation if they are normal."""
    sizes = np.abs(residuals[np.isfinite(residuals)])
    if not len(sizes):
        return None
    median, p68, p90 = np.quantile(sizes, (0.5, 0.6827, 0.9))
    return Errors(float(median), float(p68), float(p90), len(sizes))


def curve_residuals(xs: Floats, ys: Floats, rule: Rule | RowRule = "chord", surcharge_s: float = 0.0) -> Floats:
    """ln(predicted / measured) of every second inner point, predicted from the others."""
    xs, ys = medians(np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64))
    out = np.zeros(len(xs), dtype=bool)
    out[1:-1:2] = True
    if not out.any():
        return np.empty(0)
    predicted, _ = curve(xs[~out], ys[~out], rule=rule, surcharge_s=surcharge_s).price(xs[out])
    return np.log(predicted / ys[out])


def surface_residuals(a: Floats, b: Floats, seconds: Floats, rule: Rule = "chord") -> Floats:
    """ln(predicted / measured) of the points on every second inner line of either axis, predicted from the others."""
    found = []
    for axis in (a, b):
        lines = np.unique(axis)
        out = np.isin(axis, lines[1:-1:2])
        if not out.any():
            continue
        predicted, tags = refined(surface(a[~out], b[~out], seconds[~out]), rule).price(a[out], b[out])
        inside = tags != OUTSIDE
        found.append(np.log(predicted[inside] / seconds[out][inside]))
    return np.concatenate(found) if found else np.empty(0)
