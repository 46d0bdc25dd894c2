"""The table and the figure that show generated loads beside real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WIDTH, HEIGHT, MARGIN = 380, 300, 46
REAL, DRAWN = "#1f4e79", "#d1722a"


def table(real: Mapping[str, float], drawn: Sequence[Mapping[str, float]]) -> str:
    """A Markdown table: each statistic of the real loads, its mean and standard deviation over the generated sets."""
    lines = ["| statistic | real | generated (mean ± sd) | off by |", "| --- | --- | --- | --- |"]
    for name, value in real.items():
        found = np.asarray([one[name] for one in drawn])
        off = found.mean() / value - 1.0
        lines.append(f"| {name} | {value:.3f} | {found.mean():.3f} ± {found.std(ddof=1):.3f} | {off:+.1%} |")
    return "\n".join(lines)


def figure(shares: Floats, sets: Sequence[Floats], balance: Floats, drawn_balance: Floats) -> str:
    """An SVG of two panels: quantiles of ln(share x experts), and contiguous max/mean over the layers, sorted.

    shares: [workloads, layers, experts]; sets: generated ones; balance: [workloads, layers]; drawn_balance: the same
    of each set.
    """
    grid = np.linspace(0.001, 0.999, 60)
    experts = shares.shape[2]
    left = [
        (REAL, grid, np.quantile(np.log(shares * experts), grid)),
        (DRAWN, grid, np.quantile(np.log(np.stack(sets) * experts), grid)),
    ]
    place = np.linspace(0.0, 1.0, balance.shape[1])
    right = [(REAL, place, np.sort(row)) for row in balance]
    spread = np.sort(drawn_balance, axis=2).reshape(-1, balance.shape[1])
    right += [(DRAWN, place, np.quantile(spread, level, axis=0)) for level in (0.05, 0.5, 0.95)]
    panels = [
        _panel(0, "ln(share × experts), by quantile", left, "quantile"),
        _panel(WIDTH, "max/mean of 32 ranks, contiguous: layers sorted", right, "part of the layers"),
    ]
    legend = (
        f'<text x="{MARGIN + 14}" y="58" fill="{REAL}">real: six workloads of DeepSeek-R1</text>'
        f'<text x="{MARGIN + 14}" y="74" fill="{DRAWN}">generated: 20 sets (right: 5, 50, 95 %)</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(panels)}{legend}</svg>\n'
    )


def _panel(x0: int, title: str, lines: Sequence[tuple[str, Floats, Floats]], label: str) -> str:
    low = min(float(line[2].min()) for line in lines)
    high = max(float(line[2].max()) for line in lines)
    wide, tall = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN

    def at(x: float, y: float) -> tuple[float, float]:
        return x0 + MARGIN + x * wide, HEIGHT - MARGIN - (y - low) / (high - low) * tall

    parts = [
        f'<text x="{x0 + WIDTH / 2}" y="24" text-anchor="middle">{title}</text>',
        f'<text x="{x0 + WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">{label}</text>',
    ]
    for tick in np.linspace(low, high, 5):
        x, y = at(0.0, float(tick))
        parts.append(f'<text x="{x - 6:.0f}" y="{y + 4:.0f}" text-anchor="end">{tick:.1f}</text>')
        parts.append(f'<path d="M{x:.0f} {y:.0f}h{wide}" stroke="#ddd"/>')
    for tick in (0.0, 0.5, 1.0):
        x, y = at(tick, low)
        parts.append(f'<text x="{x:.0f}" y="{y + 16:.0f}" text-anchor="middle">{tick:.1f}</text>')
    for colour, xs, ys in lines:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(float(a), float(b)) for a, b in zip(xs, ys, strict=True)))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6" opacity="0.8"/>')
    return "".join(parts)
