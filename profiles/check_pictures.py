"""The pictures of a leave-out check: how errors are distributed, and how they run with size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.output.charts import (
    BEST,
    INK,
    LIMIT,
    OTHER,
    Axis,
    Curve,
    figure,
    frame,
    line,
    polyline,
    rect,
    text,
)
from profiles.check_tables import Figures, LeftOut

Floats = NDArray[np.float64]

WIDE, NARROW = "#dbe7f4", "#a9c6e6"
# The least and the most error that a picture tells apart: 0.1 % and 100 %.
_LEAST, _MOST = 1e-3, 1.0
_ERROR_TICKS = ((0.001, "0.1"), (0.01, "1"), (0.1, "10"), (1.0, "100"))
_RATIO_TICKS = ((0.7, "0.7"), (0.8, "0.8"), (0.9, "0.9"), (1.0, "1"), (1.1, "1.1"), (1.25, "1.25"), (1.4, "1.4"))
# Points of a bin of sizes (a factor of four wide) below which its quantiles say nothing.
_ENOUGH = 8


def error_curves(name: str, found: Figures, parts: Sequence[LeftOut]) -> str:
    """Share of the left-out points whose error is at most this, ours and by plain log-log interpolation."""
    ours = _errors([one.predicted_over_measured for one in parts])
    if not len(ours):
        return ""
    x = Axis(math.log10(_LEAST), math.log10(_MOST), 46, 362, _log(_ERROR_TICKS))
    y = Axis(0.0, 100.0, 232, 26, tuple((float(p), str(p)) for p in (0, 25, 50, 75, 90, 100)))
    body = frame(x, y, "|predicted / measured − 1| (%), logarithmic", "% of points at most this")
    for quantile, limit in ((50.0, found.median_limit), (90.0, found.p90_limit)):
        if math.isfinite(limit):
            at, level = x.at(math.log10(limit)), y.at(quantile)
            body.append(line(at, y.start, at, level, stroke=LIMIT, width=1.4, dash="5 3"))
            body.append(
                f'<circle cx="{at:.1f}" cy="{level:.1f}" r="4" fill="none" stroke="{LIMIT}" stroke-width="1.6">'
                f"<title>limit of the {'median' if quantile == 50 else '90 % quantile'}: {limit:.1%}</title></circle>"
            )
    plain = _errors([one.plain for one in parts])
    if len(plain):
        body.append(polyline(_quantiles("plain log-log", OTHER, plain, "5 3"), x, y))
    body.append(polyline(_quantiles("moesim", BEST, ours, ""), x, y))
    told = f"{found.points:,} points: median {percent(found.median)}, 90\u00a0% quantile {percent(found.p90)}"
    if len(plain):
        told += f"; log-log {percent(found.log_log_median)} and {percent(found.log_log_p90)}"
    return f"<div><h3>{name}</h3><p class='note'>{told}</p>{figure(380, 276, f'Errors of {name}: {told}', body)}</div>"


def _errors(logs: Sequence[Floats]) -> Floats:
    pooled = np.concatenate(list(logs)) if logs else np.empty(0)
    return np.sort(np.abs(np.expm1(pooled[np.isfinite(pooled)])))


def _quantiles(name: str, colour: str, errors: Floats, dash: str) -> Curve:
    shares = np.linspace(0.0, 1.0, 101)
    at = np.log10(np.clip(np.quantile(errors, shares), _LEAST, _MOST))
    return Curve(name, colour, tuple(at.tolist()), tuple((100.0 * shares).tolist()), dash=dash)


def _log(ticks: Sequence[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    return tuple((math.log10(value), label) for value, label in ticks)


def by_size(name: str, parts: Sequence[LeftOut]) -> str:
    """Predicted over measured against size: the median, half and nine tenths of the points of each bin of sizes."""
    size = np.concatenate([one.size for one in parts])
    ratio = np.concatenate([one.predicted_over_measured for one in parts])
    use = np.isfinite(size) & np.isfinite(ratio) & (size > 0)
    bins = _bins(size[use], ratio[use])
    if len(bins) < 2:
        return ""
    low, high = min(bins), max(bins)
    x = Axis(float(low), float(high + 1), 46, 362, _size_ticks(low, high + 1))
    y = Axis(math.log10(0.7), math.log10(1.4), 232, 26, _log(_RATIO_TICKS))
    body = frame(x, y, f"{size_name(name)}, logarithmic", "predicted / measured")
    body.append(line(x.start, y.at(0.0), x.end, y.at(0.0), stroke=INK, width=1))
    for place, values in bins.items():
        p5, p25, p50, p75, p95 = (
            min(max(float(q), y.low), y.high) for q in np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))
        )
        left, right = x.at(place) + 1, x.at(place + 1) - 1
        told = (
            f"{_human(4.0**place)} to {_human(4.0 ** (place + 1))}: {len(values):,} points, median "
            f"{10**p50:.3f}, half within {10**p25:.3f} to {10**p75:.3f}, "
            f"nine tenths within {10**p5:.3f} to {10**p95:.3f}"
        )
        body.append(rect(left, y.at(p95), right - left, y.at(p5) - y.at(p95), WIDE, told))
        body.append(rect(left, y.at(p75), right - left, y.at(p25) - y.at(p75), NARROW, told))
        body.append(line(left, y.at(p50), right, y.at(p50), stroke=BEST, width=2.4))
    return f"<div><h3>{name}</h3>{figure(380, 276, f'Predicted over measured by size, {name}', body)}</div>"


def _bins(size: Floats, ratio: Floats) -> dict[int, Floats]:
    """log10 of the ratios by bin of sizes, a factor of four wide."""
    places = np.floor(np.log(size) / math.log(4.0) + 1e-9).astype(int)
    found = {int(place): ratio[places == place] / math.log(10.0) for place in np.unique(places)}
    return {place: values for place, values in found.items() if len(values) >= _ENOUGH}


def _size_ticks(low: int, high: int) -> tuple[tuple[float, str], ...]:
    every = max(1, -(-(high - low) // 6))
    return tuple((float(place), _human(4.0**place)) for place in range(low, high + 1, every))


def _human(value: float) -> str:
    for scale, unit in ((2.0**30, "Gi"), (2.0**20, "Mi"), (2.0**10, "Ki")):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g}"


def percent(value: float) -> str:
    """A share in percent with three digits, unbroken, as tables fold at spaces."""
    if math.isnan(value):
        return "–"
    return f"{value * 100:.2f}\u00a0%" if abs(value) < 0.1 else f"{value * 100:.1f}\u00a0%"


# What is interpolated over: raw_tables.KINDS, in words.
_SIZES: Mapping[str, str] = {
    "NCCL": "message (elements)",
    "all-reduce": "message (elements)",
    "attention": "tokens of a sequence",
    "attention prefill": "tokens of a prompt",
    "attention decode": "tokens in the cache",
    "MLA": "tokens of a sequence",
    "MLA prefill": "tokens of a prompt",
    "MLA decode": "tokens in the cache",
    "MLA absorb": "tokens",
}


def size_name(family: str) -> str:
    """The size that a family's tables are interpolated over, with its unit."""
    return _SIZES.get(family, "tokens")


def whiskers(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Median (dot), 68 % (thick) and 90 % (thin) quantiles of the error, one row a family, on one logarithmic axis."""
    left, upper, gap = 190.0, 20.0, 26.0
    bottom = upper + gap * len(rows)
    x = Axis(math.log10(_LEAST), math.log10(_MOST), left, 1090, _log(_ERROR_TICKS))
    body = []
    for value, label in x.ticks:
        body.append(line(x.at(value), upper - 8, x.at(value), bottom))
        body.append(text(x.at(value), bottom + 17, f"{label} %", anchor="middle"))
    for index, (name, median, p68, p90) in enumerate(rows):
        y = upper + gap * (index + 0.5)
        start, middle, end = (x.at(math.log10(min(max(v, _LEAST), _MOST))) for v in (median, p68, p90))
        told = f"{name}: median {percent(median)}, 68 % {percent(p68)}, 90 % {percent(p90)}"
        body.append(text(left - 10, y + 4, name, anchor="end", fill=INK))
        body.append(line(start, y, end, y, stroke=OTHER, width=2))
        body.append(line(start, y, middle, y, stroke=BEST, width=5))
        body.append(f'<circle cx="{start:.1f}" cy="{y:.1f}" r="5.5" fill="{BEST}"><title>{told}</title></circle>')
    body.append(
        text((left + 1090) / 2, bottom + 36, "|predicted / measured − 1|, logarithmic", anchor="middle", fill=INK)
    )
    return figure(1120, bottom + 44, "Leave-out error by family", body)
