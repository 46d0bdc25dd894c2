"""The pictures of a placement: held out against fit, step time by batch, and where the replicas are."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from moesim.output.charts import (
    BASE,
    BEST,
    GRID,
    INK,
    MUTED,
    OTHER,
    Axis,
    Mark,
    axis,
    figure,
    frame,
    line,
    mark,
    text,
)
from moesim.output.page import key, number
from moesim.spec.plan import ExpertPlacement
from placement.compare import BASELINE, PLANNED, WITHOUT_REPLICAS
from placement.judge import Figure
from placement.planning import Placed

CONTENDERS = {
    BASELINE: ("contiguous, no replicas", BASE),
    WITHOUT_REPLICAS: ("the same solver, no replicas", OTHER),
    PLANNED: ("the plan", BEST),
}
# One replica is left blank; from two on a darker green (as ColorBrewer's Greens).
_REPLICAS = ("#c7e9c0", "#74c476", "#31a354", "#006d2c", "#00441b")
_LONGEST = 38


def workloads(placed: Placed) -> str:
    """max/mean load of each workload: held out, fitted to it, and contiguous; one row for each."""
    held = placed.held
    fit = dict(zip(placed.balance.names, placed.balance.by_load.mean(axis=1).tolist(), strict=True))
    names = list(held.workloads) if held is not None else list(fit)
    shown: list[tuple[str, str, str, dict[str, float]]] = []
    if held is not None:
        for contender in (BASELINE, WITHOUT_REPLICAS, PLANNED):
            if contender in held.by_workload:
                name, colour = CONTENDERS[contender]
                shown.append((f"{name}, left out of the fit", colour, "dot", held.by_workload[contender]))
    else:
        even = placed.baseline_balance
        told = dict(zip(even.names, even.by_load.mean(axis=1).tolist(), strict=True))
        shown.append((CONTENDERS[BASELINE][0], BASE, "dot", told))
    if set(names) <= set(fit):
        shown.append(("the plan, fitted to it as well", BEST, "ring", fit))
    values = [figures[name] for _, _, _, figures in shown for name in names]
    left, row, upper = 300.0, 30.0, 14.0
    x = axis(1.0, max(1.05, *values), left, 1090, ticks=6)
    bottom = upper + row * len(names)
    body = [line(x.at(value), upper - 6, x.at(value), bottom) for value, _ in x.ticks]
    body += [text(x.at(value), bottom + 17, label, anchor="middle") for value, label in x.ticks]
    body.append(text((x.start + x.end) / 2, bottom + 36, "largest / mean rank load", anchor="middle", fill=INK))
    for index, name in enumerate(names):
        at = upper + row * (index + 0.5)
        body.append(line(left, at, x.end, at))
        cut = name if len(name) <= _LONGEST else f"\u2026{name[1 - _LONGEST :]}"
        body.append(text(left - 12, at + 4, cut, anchor="end", fill=INK))
        if held is not None and name in fit:  # how far the plan falls back where it has not seen the load
            ends = (x.at(fit[name]), x.at(held.by_workload[PLANNED][name]))
            body.append(line(ends[0], at, ends[1], at, stroke=BEST, width=2))
        y = Axis(0.0, 1.0, at, at - 1, ())
        for label, colour, shape, found in shown:
            title = f"{name}: {label}: {found[name]:.3f}"
            body.append(mark(Mark(found[name], 0.0, title, colour, shape), x, y))
    said = "; ".join(f"{name}: {', '.join(f'{label} {of[name]:.3f}' for label, _, _, of in shown)}" for name in names)
    drawn = figure(1120, bottom + 46, f"Largest over mean rank load by workload. {said}", body)
    return f'<div class="scroll"><div style="min-width:680px">{drawn}</div></div>' + key(
        [(f"{label}{' (ring)' if shape == 'ring' else ''}", colour) for label, colour, shape, _ in shown]
    )


def step_times(placed: Placed) -> str:
    """Step time of every contender by tokens per rank, and what the plan gains, both with their intervals."""
    assert placed.step_time is not None
    times = placed.step_time.step_s
    series = [
        (name, colour, {tokens: row[contender] for tokens, row in times.items() if contender in row})
        for contender, (name, colour) in CONTENDERS.items()
    ]
    steps = placed.step_time
    gains = [("over contiguous", BEST, steps.that_run(steps.gains))]
    if steps.replicas:
        gains.append(("over no replicas", OTHER, steps.that_run(steps.replicas)))
    gains = [one for one in gains if one[2]]
    gained = _by_tokens(gains, "% less time", 100.0, zero=False) if gains else "<p>Nothing that runs to compare.</p>"
    return (
        f'<div class="two"><div><h3>Time of a decode step</h3>'
        f"{_by_tokens([one for one in series if one[2]], 'ms', 1e3, zero=True)}"
        f"{key([(name, colour) for name, colour, found in series if found])}</div>"
        f"<div><h3>What the plan gains in it</h3>{gained}"
        f"{key([(name, colour) for name, colour, _ in gains])}</div></div>"
    )


def _by_tokens(series: Sequence[tuple[str, str, dict[int, Figure]]], unit: str, scale: float, *, zero: bool) -> str:
    tokens = sorted({size for _, _, found in series for size in found})
    ends = [scale * end for _, _, found in series for one in found.values() for end in (one.low, one.high, one.value)]
    y = axis(0.0 if zero else min(0.0, *ends), max(0.0, *ends), 232, 26, ticks=5)
    x = Axis(-0.5, len(tokens) - 0.5, 52, 530, tuple((float(i), str(size)) for i, size in enumerate(tokens)))
    body = frame(x, y, "tokens per rank", unit)
    body.append(line(x.start, y.at(0.0), x.end, y.at(0.0), stroke=MUTED))
    told = []
    for index, (name, colour, found) in enumerate(series):
        for size, one in found.items():
            at = tokens.index(size) + 0.16 * (index - (len(series) - 1) / 2)
            span = (scale * one.low, scale * one.high)
            shown = (
                f"{name}, {size} tokens per rank: {number(scale * one.value)} ({number(span[0])} to {number(span[1])})"
            )
            told.append(shown)
            body.append(mark(Mark(at, scale * one.value, f"{shown} {unit}", colour, y_range=span), x, y))
    return figure(550, 276, f"By tokens per rank, {unit}. {'; '.join(told)}", body)


def replica_maps(placement: ExpertPlacement) -> str:
    """Which experts have replicas in each layer, and on which ranks those lie."""
    counts = placement.replica_counts()
    in_slots = np.take_along_axis(counts, placement.physical_to_logical, axis=1)
    ids = placement.layer_ids.tolist()
    told = [_told(placement, counts, row) for row in range(placement.layers)]
    ranks = [(rank * placement.slots_per_rank, str(rank)) for rank in range(placement.ranks)]
    return (
        f'<div class="two"><div><h3>By expert</h3>{_grid(counts, ids, told, "expert", _every(placement.experts))}</div>'
        f"<div><h3>By rank</h3>{_grid(in_slots, ids, told, 'rank, its slots side by side', ranks)}</div></div>"
        + key([("1 replica", "#f4f5f6"), *((f"{_label(level)} replicas", colour) for level, colour in _levels(counts))])
    )


def _every(width: int) -> list[tuple[int, str]]:
    return [(at, str(at)) for at in range(width)]


def _levels(counts: NDArray[np.int64]) -> list[tuple[int, str]]:
    return [(level, colour) for level, colour in enumerate(_REPLICAS, 2) if counts.max() >= level]


def _label(level: int) -> str:
    return f"{level}" if level < len(_REPLICAS) + 1 else f"{level} or more"


def _told(placement: ExpertPlacement, counts: NDArray[np.int64], row: int) -> str:
    """A layer's replicas in a sentence: how many experts have some, and the most of them with their ranks."""
    most = int(counts[row].argmax())
    held = np.nonzero(placement.physical_to_logical[row] == most)[0] // placement.slots_per_rank
    ranks = ", ".join(map(str, held.tolist()))
    several = int((counts[row] > 1).sum())
    return (
        f"layer {placement.layer_ids[row]}: {several} of {placement.experts} experts have replicas; most: expert "
        f"{most} on ranks {ranks}"
    )


def _grid(
    values: NDArray[np.int64], ids: Sequence[int], told: Sequence[str], name: str, ticks: Sequence[tuple[int, str]]
) -> str:
    """Replicas [layers, columns] as coloured cells, one path for each colour; each row has a title."""
    layers, columns = values.shape
    width, height, left, upper, lower = 560.0, 380.0, 46.0, 8.0, 44.0
    cell_w, cell_h = (width - left - 8) / columns, (height - upper - lower) / layers
    body = [
        f'<rect x="{left}" y="{upper}" width="{cell_w * columns:.2f}" height="{cell_h * layers:.2f}" fill="#f4f5f6"/>'
    ]
    for level, colour in enumerate(_REPLICAS, 2):
        last = level == len(_REPLICAS) + 1
        where = np.argwhere(values >= level if last else values == level)
        cells = [
            f"M{left + x * cell_w:.2f} {upper + y * cell_h:.2f}h{cell_w:.2f}v{cell_h:.2f}h-{cell_w:.2f}z"
            for y, x in where
        ]
        if cells:
            body.append(f'<path fill="{colour}" d="{"".join(cells)}" shape-rendering="crispEdges"/>')
    for row, sentence in enumerate(told):
        body.append(
            f'<rect x="{left}" y="{upper + row * cell_h:.2f}" width="{cell_w * columns:.2f}" height="{cell_h:.2f}" '
            f'fill="transparent"><title>{escape(sentence)}</title></rect>'
        )
    body += [
        text(left - 6, upper + (row + 0.5) * cell_h + 4, str(ids[row]), anchor="end")
        for row in sorted({0, layers - 1, *range(0, layers, max(1, -(-layers // 7)))})
        if not 0 < layers - 1 - row < layers / 14
    ]
    for at, label in ticks[:: max(1, -(-len(ticks) // 8))]:
        body.append(line(left + at * cell_w, upper, left + at * cell_w, height - lower, stroke=GRID, width=0.6))
        body.append(text(left + at * cell_w + 2, height - lower + 16, label, anchor="start"))
    body.append(text(left + cell_w * columns / 2, height - 8, name, anchor="middle", fill=INK))
    body.append(
        f'<text transform="translate(12 {upper + cell_h * layers / 2:.0f}) rotate(-90)" text-anchor="middle" '
        f'fill="{INK}" font-size="12">layer</text>'
    )
    several = int((values > 1).any(axis=0).sum())
    return figure(width, height, f"Replicas by layer and {name}: {several} of {columns} columns hold some", body)
