"""The pictures of the page on measured serving runs. Odd cells are blind: no mark of theirs says which row it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.output.charts import (
    BASE,
    BEST,
    INK,
    LIMIT,
    OTHER,
    Axis,
    Bar,
    Curve,
    axis,
    figure,
    frame,
    line,
    polyline,
    rect,
    stacked,
    text,
)
from validate.silicon.attribution import ACROSS, Attribution
from validate.silicon.causes import FRONT_END, PARTS
from validate.silicon.intervals import LEVEL
from validate.silicon.scored import FIGURES, HALVES, Half

Floats = NDArray[np.float64]

COLOURS = {"odd": BEST, "even": BASE}
_CAUSE_COLOURS = ("#1d5fa6", "#6fa8dc", "#0f7b6c", "#c2581a", "#b7bec7", "#7d5ba6", "#e0b23f")
# Figure -> by what its value is multiplied, and the unit.
_UNITS = {"tpot": (1e3, "ms"), "ttft": (1.0, "s"), "tokens_per_s_per_gpu": (1.0, "tokens/s/GPU")}
_MOST = 4.0  # the largest factor between predicted and measured that curves tell apart


def cause_colours() -> list[tuple[str, str]]:
    """Cause and its colour, for a legend."""
    return list(zip((*PARTS, FRONT_END), _CAUSE_COLOURS, strict=True))


def scatter(name: str, sides: Mapping[str, Half]) -> str:
    """Predicted against measured on logarithmic axes; the line is where they are equal, dashed 1.5 times off."""
    scale, unit = _UNITS[name]
    points = {half: _points(side, name, scale) for half, side in sides.items()}
    every = np.concatenate([part.ravel() for part in points.values()])
    if not len(every):
        return ""
    low, high = math.log10(float(every.min())), math.log10(float(every.max()))
    low, high = low - 0.04 * (high - low) - 0.01, high + 0.04 * (high - low) + 0.01
    ticks = _decades(low, high)
    x, y = Axis(low, high, 50, 366, ticks), Axis(low, high, 342, 26, ticks)
    body = frame(x, y, f"measured ({unit}), logarithmic", f"predicted ({unit})")
    for off, dash in ((0.0, ""), (math.log10(1.5), "4 3"), (-math.log10(1.5), "4 3")):
        first, last = max(low, low - off), min(high, high - off)
        colour, width = (INK, 1.2) if not dash else (OTHER, 1.0)
        body.append(
            line(x.at(first), y.at(first + off), x.at(last), y.at(last + off), stroke=colour, width=width, dash=dash)
        )
    for half in reversed(HALVES):  # blind cells on top
        logs = np.log10(points[half])
        path = "".join(f"M{x.at(a):.1f} {y.at(b):.1f}h0" for a, b in logs)
        body.append(
            f'<path d="{path}" fill="none" stroke="{COLOURS[half]}" stroke-width="3.4" stroke-linecap="round" '
            f'stroke-opacity="0.5"><title>{len(logs):,} rows of {half} cells</title></path>'
            if len(logs)
            else ""
        )
    label = f"{FIGURES[name]}, predicted against measured, {sum(len(part) for part in points.values()):,} rows"
    return f"<div><h3>{FIGURES[name]}</h3>{figure(380, 386, label, body)}</div>"


def _points(side: Half, name: str, scale: float) -> Floats:
    """Measured and predicted, [n, 2], of rows where both are above 0."""
    both = np.stack([side.measured[name], side.predicted[name]], axis=1) * scale
    found: Floats = both[np.isfinite(side.logs(name))]
    return found


def _decades(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Ticks of a logarithmic axis: decades, and 2 and 5 between them where there is room."""
    steps = (1.0, 2.0, 5.0) if high - low < 2.2 else (1.0,)
    values = [step * 10.0**place for place in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return tuple((math.log10(value), f"{value:,g}") for value in values if low <= math.log10(value) <= high)


def within(name: str, sides: Mapping[str, Half], told: Mapping[str, float | None]) -> str:
    """Share of rows whose measurement is within a factor of the prediction. told: half -> factor of its intervals."""
    ticks = tuple((math.log(value), f"{value:g}x") for value in (1.0, 1.25, 1.5, 2.0, 3.0, 4.0))
    x = Axis(0.0, math.log(_MOST), 46, 362, ticks)
    y = Axis(0.0, 100.0, 232, 26, tuple((float(p), str(p)) for p in (0, 25, 50, 75, 90, 100)))
    body = frame(x, y, "factor between predicted and measured", "% of rows within")
    body.append(line(x.start, y.at(100 * LEVEL), x.end, y.at(100 * LEVEL), stroke=LIMIT, width=1.2, dash="5 3"))
    for half, side in sides.items():
        sizes = np.abs(side.logs(name))
        sizes = np.sort(sizes[np.isfinite(sizes)])
        if not len(sizes):
            continue
        at = np.linspace(0.0, math.log(_MOST), 120)
        shares = 100.0 * np.searchsorted(sizes, at, side="right") / len(sizes)
        body.append(polyline(Curve(f"{half} cells", COLOURS[half], tuple(at.tolist()), tuple(shares.tolist())), x, y))
        factor = told.get(half)
        if factor is not None:
            middle = x.at(min(math.log(factor), math.log(_MOST)))
            body.append(line(middle, y.start, middle, y.end, stroke=COLOURS[half], width=1, dash="2 3"))
    label = f"Share of rows whose {FIGURES[name]} is within a factor of the prediction"
    return f"<div><h3>{FIGURES[name]}</h3>{figure(380, 276, label, body)}</div>"


def bars(title: str, names: Sequence[str], values: Mapping[str, Sequence[float | None]], unit_name: str) -> str:
    """Horizontal bars beside each other: for each name one of each half; values are shares, None where not told."""
    left, each, upper = 150.0, 30.0, 8.0
    bottom = upper + each * len(names)
    most = max([value for half in values for value in values[half] if value is not None] or [0.0])
    x = axis(0.0, 100.0 * max(most, 0.01), left, 540.0, ticks=4)
    body = []
    for value, label in x.ticks:
        body.append(line(x.at(value), upper, x.at(value), bottom))
        body.append(text(x.at(value), bottom + 16, label, anchor="middle"))
    for index, name in enumerate(names):
        y = upper + each * index
        body.append(text(left - 8, y + each / 2 + 4, _cut(name), anchor="end", fill=INK))
        for place, half in enumerate(HALVES):
            told = values[half][index]
            if told is not None:
                top = y + 4 + place * 11
                label = f"{name}, {half} cells: {told:.1%}"
                body.append(rect(left, top, x.at(100.0 * told) - left, 10, COLOURS[half], label))
    body.append(text((left + 540.0) / 2, bottom + 34, unit_name, anchor="middle", fill=INK))
    return f"<div><h3>{title}</h3>{figure(560, bottom + 42, f'{title}: {unit_name}', body)}</div>"


def _cut(name: str) -> str:
    """The last part of a name, short enough to stand beside a bar."""
    last = name.rpartition("/")[2] if not name[:1].isdigit() else name
    return last if len(last) <= 22 else last[:21] + "…"


def shares(causes: Mapping[str, Mapping[str, Attribution]]) -> str:
    """Mean shares of each figure by cause, one bar a figure and half; '' where none are told."""
    found = [
        Bar(
            f"{FIGURES[name]}, {half}",
            tuple((cause, max(one.shares[cause], 0.0), colour) for cause, colour in cause_colours()),
        )
        for name in ACROSS
        for half in HALVES
        if (one := causes[half][name]).rows
    ]
    return (
        stacked(found, unit="%", label="Mean shares of the predictions by cause", scale=100.0, end=1.0) if found else ""
    )
