"""Charts as inline SVG: they need no script, no network and no library, and every mark has a title to hover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

# Figures closer than this, relatively, are drawn as one; smaller ones as none.
_SAME = 1e-12
INK, MUTED, GRID, SURFACE = "#1b2129", "#5b6673", "#e3e7ec", "#ffffff"
BEST, BASE, OTHER, LIMIT = "#1d5fa6", "#c2581a", "#8a95a3", "#b3261e"


@dataclass(frozen=True)
class Axis:
    """A scale from data to pixels; ticks are (value, label)."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def axis(low: float, high: float, start: float, end: float, *, ticks: int = 5) -> Axis:
    """A linear axis whose ticks are round numbers; it is widened to the ticks around `low` and `high`."""
    if high - low <= _SAME * max(abs(low), abs(high), _SAME):
        margin = 0.1 * max(abs(low), abs(high)) if max(abs(low), abs(high)) > _SAME else 0.1
        low, high = low - margin, high + margin
    step = nice_step((high - low) / ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (step / 10 ** math.floor(math.log10(step)) == 2.5))
    values = [index * step for index in range(first, last + 1)]
    return Axis(values[0], values[-1], start, end, tuple((value, f"{value:,.{digits}f}") for value in values))


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 and 10 times a power of ten that is not below `rough`."""
    scale = float(10.0 ** math.floor(math.log10(rough)))
    return next(step * scale for step in (1.0, 2.0, 2.5, 5.0, 10.0) if step * scale >= rough * (1 - 1e-9))


def figure(width: float, height: float, label: str, body: Sequence[str]) -> str:
    """An SVG that scales with its column; `label` is what a screen reader says."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(label)}</title>{"".join(body)}</svg>'
    )


def text(
    x: float, y: float, content: str, *, anchor: str = "start", fill: str = MUTED, size: float = 12, weight: int = 400
) -> str:
    """A line of text."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{size:g}" '
        f'font-weight="{weight}">{escape(content)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, *, stroke: str = GRID, width: float = 1, dash: str = "") -> str:
    """A straight line."""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" '
        f'stroke-width="{width:g}"{dashed}/>'
    )


def rect(x: float, y: float, width: float, height: float, fill: str, title: str = "", *, stroke: str = SURFACE) -> str:
    """A rectangle with a title to hover."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{height:.2f}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="0.6">{inner}</rect>'
    )


def frame(x: Axis, y: Axis, x_name: str, y_name: str) -> list[str]:
    """Grid lines, tick labels and names of both axes (y runs upwards: y.start is the bottom)."""
    body = []
    for value, label in y.ticks:
        body.append(line(x.start, y.at(value), x.end, y.at(value)))
        body.append(text(x.start - 7, y.at(value) + 4, label, anchor="end"))
    for value, label in x.ticks:
        body.append(line(x.at(value), y.start, x.at(value), y.start + 4, stroke=OTHER))
        body.append(text(x.at(value), y.start + 18, label, anchor="middle"))
    body.append(line(x.start, y.start, x.end, y.start, stroke=OTHER))
    body.append(text((x.start + x.end) / 2, y.start + 36, x_name, anchor="middle", fill=INK))
    body.append(text(x.start - 40, y.end - 10, y_name, fill=INK))
    return body


@dataclass(frozen=True)
class Curve:
    """A line through points in data units."""

    name: str
    colour: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    width: float = 2.2
    dash: str = ""


def polyline(curve: Curve, x: Axis, y: Axis) -> str:
    """A curve drawn on two axes."""
    points = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in zip(curve.xs, curve.ys, strict=True))
    dashed = f' stroke-dasharray="{curve.dash}"' if curve.dash else ""
    return (
        f'<polyline points="{points}" fill="none" stroke="{curve.colour}" stroke-width="{curve.width:g}" '
        f'stroke-linejoin="round"{dashed}><title>{escape(curve.name)}</title></polyline>'
    )


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot. shape: dot, ring, star or diamond; low/high: interval ends in both directions."""

    x: float
    y: float
    title: str
    colour: str
    shape: str = "dot"
    label: str = ""
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


def mark(point: Mark, x: Axis, y: Axis) -> str:
    """A point with the bars of its interval and its label."""
    at_x, at_y = x.at(point.x), y.at(point.y)
    body = []
    if point.x_range is not None:
        body.append(line(x.at(point.x_range[0]), at_y, x.at(point.x_range[1]), at_y, stroke=point.colour, width=1.4))
    if point.y_range is not None:
        body.append(line(at_x, y.at(point.y_range[0]), at_x, y.at(point.y_range[1]), stroke=point.colour, width=1.4))
    paint = f'fill="{point.colour}" stroke="{SURFACE}" stroke-width="1.2"'
    title = f"<title>{escape(point.title)}</title>"
    if point.shape == "ring":
        paint = f'fill="{SURFACE}" stroke="{point.colour}" stroke-width="1.6"'
    if point.shape in ("star", "diamond"):
        corners = 5 if point.shape == "star" else 4
        inner, outer = (4.2, 10.0) if point.shape == "star" else (5.6, 8.4)
        spikes = []
        for corner in range(2 * corners):
            radius = outer if corner % 2 == 0 else inner
            angle = -math.pi / 2 + corner * math.pi / corners
            spikes.append(f"{at_x + radius * math.cos(angle):.1f},{at_y + radius * math.sin(angle):.1f}")
        body.append(f'<polygon points="{" ".join(spikes)}" {paint}>{title}</polygon>')
    else:
        body.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4.6" {paint}>{title}</circle>')
    if point.label:
        right = at_x < x.end - 70
        body.append(
            text(
                at_x + (11 if right else -11),
                at_y - 8,
                point.label,
                anchor="start" if right else "end",
                fill=point.colour,
                weight=600,
            )
        )
    return "".join(body)


# Blue, near white, red, equally dark at both ends: a pair that colour-blind readers tell apart (as ColorBrewer's RdBu).
_COLD, _EVEN, _HOT = (33, 92, 150), (244, 245, 246), (166, 38, 24)
_SHADES = 12


def shade(ratio: float) -> str:
    """Colour of -1 (cold) to 1 (hot), 0 being even."""
    end = _HOT if ratio > 0 else _COLD
    share = min(abs(ratio), 1.0) ** 0.8
    mixed = (round(even + (far - even) * share) for even, far in zip(_EVEN, end, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def heatmap(
    loads: NDArray[np.float64],
    layer_ids: Sequence[int],
    *,
    top: float,
    width: float = 560,
    height: float = 380,
    label: str = "",
) -> str:
    """Load of each rank (across) in each layer (down), 1 = even, on a logarithmic scale from 1/top to top.

    loads: [layers, ranks]. One path for each shade; each row has a title that names its hottest rank.
    """
    layers, ranks = loads.shape
    left, upper, lower = 46.0, 8.0, 44.0
    cell_w, cell_h = (width - left - 8) / ranks, (height - upper - lower) / layers
    with np.errstate(divide="ignore"):
        ratio = np.clip(np.log(loads) / math.log(top), -1.0, 1.0)
    level = np.rint(ratio * _SHADES).astype(np.int64)
    body = []
    for value in np.unique(level):
        cells = [
            f"M{left + rank * cell_w:.2f} {upper + layer * cell_h:.2f}h{cell_w:.2f}v{cell_h:.2f}h-{cell_w:.2f}z"
            for layer, rank in np.argwhere(level == value)
        ]
        body.append(f'<path fill="{shade(value / _SHADES)}" d="{"".join(cells)}" shape-rendering="crispEdges"/>')
    for row, layer in enumerate(layer_ids):
        hottest = int(np.argmax(loads[row]))
        told = f"layer {layer}: hottest rank {hottest} at {loads[row, hottest]:.2f} times the mean"
        body.append(
            f'<rect x="{left}" y="{upper + row * cell_h:.2f}" width="{cell_w * ranks:.2f}" height="{cell_h:.2f}" '
            f'fill="transparent"><title>{told}</title></rect>'
        )
    body.append(
        f'<rect x="{left}" y="{upper}" width="{cell_w * ranks:.2f}" height="{cell_h * layers:.2f}" fill="none" '
        f'stroke="{OTHER}" stroke-width="0.8"/>'
    )
    for row in sorted({0, layers - 1, *range(0, layers, max(1, -(-layers // 7)))}):
        if 0 < layers - 1 - row < layers / 14:
            continue
        body.append(text(left - 6, upper + (row + 0.5) * cell_h + 4, str(layer_ids[row]), anchor="end"))
    every = max(1, -(-ranks // 8))
    body += [
        text(left + (rank + 0.5) * cell_w, height - lower + 16, str(rank), anchor="middle")
        for rank in range(0, ranks, every)
    ]
    body.append(text(left + cell_w * ranks / 2, height - 8, "expert-parallel rank", anchor="middle", fill=INK))
    body.append(
        f'<text transform="translate(12 {upper + cell_h * layers / 2:.0f}) rotate(-90)" text-anchor="middle" '
        f'fill="{INK}" font-size="12">layer</text>'
    )
    return figure(width, height, label, body)


def colour_key(top: float, *, width: float = 560) -> str:
    """The key of `heatmap`: shades from 1/top to top."""
    left, bar = 150.0, width - 300.0
    count = 2 * _SHADES + 1
    body = [
        f'<rect x="{left + bar * index / count:.1f}" y="4" width="{bar / count + 0.5:.1f}" height="12" '
        f'fill="{shade(index / _SHADES - 1)}"/>'
        for index in range(count)
    ]
    for share, label in ((0.0, f"{1 / top:.2f}"), (0.25, f"{top**-0.5:.2f}"), (0.5, "1 = even")):
        body.append(text(left + bar * share, 32, label, anchor="middle"))
    for share, label in ((0.75, f"{top**0.5:.2f}"), (1.0, f"{top:.2f}")):
        body.append(text(left + bar * share, 32, label, anchor="middle"))
    body.append(text(left - 22, 15, "less than its share", anchor="end"))
    body.append(text(left + bar + 22, 15, "more than its share"))
    return figure(width, 38, f"Colour key: load from {1 / top:.2f} to {top:.2f} times the mean", body)


@dataclass(frozen=True)
class Bar:
    """A bar of stacked parts (name, value, colour); mark: a line at a value, with its label."""

    name: str
    parts: tuple[tuple[str, float, str], ...]
    mark: tuple[float, str] | None = None


def stacked(
    bars: Sequence[Bar],
    *,
    unit: str,
    label: str,
    scale: float = 1.0,
    digits: int = 1,
    width: float = 1120,
    limit: tuple[float, str] | None = None,
    end: float | None = None,
) -> str:
    """Horizontal stacked bars on one axis; `scale` turns values into `unit`. Parts wide enough carry their figure."""
    left, bar_h, gap, upper = 92.0, 40.0, 22.0, 26.0
    height = upper + len(bars) * (bar_h + gap) + 34
    longest = max([sum(part[1] for part in bar.parts) for bar in bars] + [bar.mark[0] for bar in bars if bar.mark])
    longest = max(longest, limit[0] if limit else 0.0)
    x = axis(0.0, (end or longest) * scale, left, width - 26, ticks=8)
    if end is not None:
        x = Axis(0.0, end * scale, left, width - 26, tuple(tick for tick in x.ticks if tick[0] <= end * scale))
    bottom = upper + len(bars) * (bar_h + gap) - gap / 2
    body = []
    for value, tick in x.ticks:
        body.append(line(x.at(value), upper - 8, x.at(value), bottom))
        named = f"{tick} {unit}" if value == x.ticks[-1][0] else tick
        body.append(text(x.at(value), bottom + 17, named, anchor="middle"))
    for index, bar in enumerate(bars):
        y = upper + index * (bar_h + gap)
        body.append(text(left - 10, y + bar_h / 2 + 4, bar.name, anchor="end", fill=INK, size=13, weight=600))
        run = 0.0
        for name, value, colour in bar.parts:
            start, stop = x.at(run * scale), x.at((run + value) * scale)
            told = f"{name}: {value * scale:,.{digits}f} {unit}"
            body.append(rect(start, y, stop - start, bar_h, colour, told))
            if stop - start > 40:
                body.append(
                    text(
                        (start + stop) / 2,
                        y + bar_h / 2 + 4,
                        f"{value * scale:,.{digits}f}",
                        anchor="middle",
                        fill=on_top_of(colour),
                    )
                )
            run += value
        if bar.mark is not None:
            at = x.at(bar.mark[0] * scale)
            body.append(line(at, y - 5, at, y + bar_h + 5, stroke=INK, width=2))
            body.append(text(at, y - 8, bar.mark[1], anchor="end" if at > width / 2 else "start", fill=INK))
    if limit is not None:
        at = x.at(limit[0] * scale)
        body.append(line(at, upper - 10, at, bottom, stroke=LIMIT, width=1.6, dash="5 3"))
        body.append(text(at, upper - 14, limit[1], anchor="end", fill=LIMIT))
    return figure(width, height, label, body)


def on_top_of(colour: str) -> str:
    """Ink or white, whichever reads better on a colour (relative luminance, WCAG 2.1)."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return SURFACE if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.0525 else INK


def whisker(value: float, low: float, high: float, low_end: float, high_end: float, colour: str) -> str:
    """A point and its interval on a scale that a column of a table shares."""
    scale = Axis(low_end, high_end if high_end > low_end else low_end + 1.0, 4, 92, ())
    x = scale.at(value)
    return (
        '<svg viewBox="0 0 96 10" class="whisker" aria-hidden="true">'
        + line(4, 5, 92, 5)
        + line(scale.at(low), 5, scale.at(high), 5, stroke=colour, width=2.6)
        + f'<circle cx="{x:.1f}" cy="5" r="3.4" fill="{colour}"/></svg>'
    )
