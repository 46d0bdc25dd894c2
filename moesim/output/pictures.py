"""The pictures of a run: loads, where a step's time goes, latencies, the search, memory, where figures come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from moesim.output.charts import (
    BASE,
    BEST,
    INK,
    LIMIT,
    MUTED,
    OTHER,
    Axis,
    Bar,
    Curve,
    Mark,
    axis,
    colour_key,
    figure,
    frame,
    heatmap,
    line,
    mark,
    polyline,
    stacked,
    text,
)
from moesim.output.page import key, number
from moesim.output.run_folder import Figures, Limit, PlanRow, Series

# Families of operations share a hue: attention blue, expert work green, communication orange, the rest grey.
OPERATIONS = {
    "attention": "#1f5d99",
    "attention_projections": "#5b93c7",
    "tp_collective": "#f2c14e",
    "context_collective": "#dca33a",
    "gate": "#b9dfc8",
    "experts": "#1f7a4d",
    "shared_expert": "#6bb58d",
    "dense": "#94cfae",
    "replica_choice": "#e8c39e",
    "dispatch": "#d9722e",
    "combine": "#f0a868",
    "pipeline_transfer": "#a8551f",
    "embedding": "#c5ccd4",
    "lm_head": "#8e99a6",
    "engine_overhead": "#5b6673",
}
WAITING = "#eceff2"
MEMORY = {
    "weights_embeddings": "#9dbfe0",
    "weights_attention": "#1f5d99",
    "weights_dense": "#5b93c7",
    "weights_gates": "#c9dcef",
    "weights_shared": "#6bb58d",
    "weights_experts": "#1f7a4d",
    "weights_mtp": "#94cfae",
    "activations": "#d9722e",
    "stage_inputs": "#f6c79c",
    "split_contexts": "#f6dfa0",
    "communication_buffers": "#f0a868",
    "low_latency_tensors": "#f2c14e",
    "nccl_buffers": "#e8d9a8",
    "cuda_graphs": "#8e99a6",
    "runtime": "#5b6673",
}
KV_USED, KV_FREE = "#7a5ba6", "#e6def0"
PROVENANCE = {
    "measured": ("#1f7a4d", "read from a table at a point that was measured"),
    "interpolated": ("#6bb58d", "read between measured points of a table"),
    "extrapolated": ("#f2c14e", "read beyond the measured points, which the scenario allows"),
    "formula": ("#5b93c7", "computed from a published formula and datasheet peaks, not measured"),
    "assumed": ("#d9722e", "taken as given: nobody measured it here"),
}
_FALLBACK = "#b5bdc7"
_PERCENTILES = tuple(float(percent) for percent in range(101))
_WIDE_ENOUGH = 1.25  # the smallest end of the load scale, so that an even plan does not look uneven


def named(operation: str) -> str:
    """An operation or a memory item as a person reads it."""
    return operation.removeprefix("weights_").replace("_", " ") + (
        " weights" if operation.startswith("weights_") else ""
    )


class RankLoads(Protocol):
    """Load of each rank over the mean of its layer, [layers][ranks], and the layers' absolute ids."""

    @property
    def layer_ids(self) -> Sequence[int]:
        """Absolute layer of each row."""

    @property
    def rank_loads(self) -> Sequence[Sequence[float]]:
        """1 where a rank has its share."""


def load_maps(panels: Sequence[tuple[str, RankLoads]]) -> str:
    """Heat maps of load by rank and layer, two in a row, all on one colour scale."""
    arrays = [np.asarray(series.rank_loads, dtype=np.float64) for _, series in panels]
    top = max([_WIDE_ENOUGH, *(float(loads.max()) for loads in arrays)])
    shown = []
    for (name, series), loads in zip(panels, arrays, strict=True):
        layer, rank = (int(at) for at in np.unravel_index(int(np.argmax(loads)), loads.shape))
        if loads.shape[1] == 1:
            told = "every GPU holds a slice of every expert, so the load is even by construction"
        else:
            told = (
                f"max/mean {number(float(loads.max(axis=1).mean()), 3)} over layers; hottest: layer "
                f"{series.layer_ids[layer]}, rank {rank}, {loads[layer, rank]:.2f} times the mean"
            )
        drawn = ""
        if loads.shape[1] > 1:
            drawn = heatmap(loads, series.layer_ids, top=top, label=f"Load by rank and layer, {name}: {told}")
        shown.append(f"<div><h3>{name}</h3><p class='note'>{told}</p>{drawn}</div>")
    return (
        f'<div class="two">{"".join(shown)}</div><div style="max-width:640px;margin:6px auto 0">{colour_key(top)}</div>'
    )


def step_parts(figures: Figures) -> tuple[tuple[str, float, str], ...]:
    """Parts of a typical decode step in the order of a layer, and what is left as waiting: (name, seconds, colour)."""
    spent = figures.step.by_operation_s
    order = [name for name in OPERATIONS if name in spent] + sorted(set(spent) - set(OPERATIONS))
    parts = [(named(name), spent[name], OPERATIONS.get(name, _FALLBACK)) for name in order]
    left = figures.step.step_s - sum(spent.values())
    if left > 0.001 * figures.step.step_s:
        parts.append(("waiting", left, WAITING))
    return tuple(parts)


def step_bars(runs: Sequence[tuple[str, Figures]]) -> str:
    """Where the time of a typical decode step goes, one bar for each run, on one axis."""
    bars = [
        Bar(name, step_parts(figures), (figures.step.step_s, f"step {figures.step.step_s * 1e3:.1f} ms"))
        for name, figures in runs
    ]
    seen = dict.fromkeys((name, colour) for bar in bars for name, _, colour in bar.parts)
    told = "; ".join(f"{name}: {figures.step.step_s * 1e3:.1f} ms" for name, figures in runs)
    return stacked(bars, unit="ms", scale=1e3, label=f"Time of a typical decode step by operation. {told}") + key(
        list(seen)
    )


def latency_curves(metric: str, title: str, runs: Sequence[tuple[str, str, Series]], limits: Sequence[Limit]) -> str:
    """Share of requests (or gaps) at most this slow, with the service levels of this metric. Empty without data."""
    drawn = [
        Curve(name, colour, tuple(1e3 * value for value in series.latency[metric]), _PERCENTILES)
        for name, colour, series in runs
        if series.latency.get(metric)
    ]
    if not drawn:
        return ""
    mine = [limit for limit in limits if limit.metric.split(".")[0] == metric]
    longest = max(curve.xs[-1] for curve in drawn)
    shown = [limit for limit in mine if limit.limit_s * 1e3 <= 1.6 * longest]
    x = axis(0.0, max([longest, *(1.04e3 * limit.limit_s for limit in shown)]), 46, 362, ticks=4)
    y = Axis(0.0, 100.0, 232, 26, tuple((float(p), str(p)) for p in (0, 25, 50, 75, 90, 100)))
    body = frame(x, y, f"{title} (ms)", "% at most this")
    for limit in shown:
        statistic = limit.metric.split(".")[1]
        at, level = x.at(limit.limit_s * 1e3), y.at(float(statistic.removeprefix("p")))
        body.append(line(at, y.start, at, y.end, stroke=LIMIT, width=1.5, dash="5 3"))
        body.append(f'<circle cx="{at:.1f}" cy="{level:.1f}" r="3.6" fill="none" stroke="{LIMIT}" stroke-width="1.5"/>')
        side = "end" if at > 200 else "start"
        told = f"{statistic} ≤ {number(limit.limit_s * 1e3)} ms"
        body.append(text(at + (-6 if side == "end" else 6), y.start - 8, told, anchor=side, fill=LIMIT))
    body += [polyline(curve, x, y) for curve in drawn]
    medians = ", ".join(f"{curve.name} p50 {number(curve.xs[50])} ms, p99 {number(curve.xs[99])} ms" for curve in drawn)
    beyond = "".join(
        f"<p class='note'>The level of {number(limit.limit_s * 1e3)} ms ({limit.metric.split('.')[1]}) lies beyond "
        "the picture.</p>"
        for limit in mine
        if limit not in shown
    )
    return (
        f"<div><h3>{title}</h3><p class='note'>{medians}</p>"
        f"{figure(380, 276, f'Distribution of {title}: {medians}', body)}{beyond}</div>"
    )


def trade_off(
    trials: Sequence[PlanRow],
    front: Sequence[PlanRow],
    best: PlanRow,
    baseline: PlanRow | None,
    *,
    metric: str,
    statistic: str,
    limit_s: float | None,
) -> str:
    """Throughput against time per output token over all plans that ran; the front only where it is given."""
    latency = f"tpot_s.{statistic}"
    ran = [trial for trial in trials if trial.status == "ok"]
    ends = [row for row in (best, baseline) if row is not None and row.status == "ok"]
    xs = [1e3 * row.metrics[latency] for row in [*ran, *ends]]
    ys = [row.metrics[metric] for row in [*ran, *ends]]
    for row in ends:
        for values, name, scale in ((xs, latency, 1e3), (ys, metric, 1.0)):
            if name in row.intervals:
                values += [scale * row.intervals[name].low, scale * row.intervals[name].high]
    if limit_s is not None:
        xs.append(1.02e3 * limit_s)
    x, y = axis(min(xs), max(xs), 52, 540, ticks=6), axis(min(ys), max(ys), 306, 30, ticks=5)
    body = frame(x, y, f"TPOT {statistic} (ms), less is better", "output tokens/s/GPU, more is better")
    if limit_s is not None:
        at = x.at(1e3 * limit_s)
        body.append(line(at, y.start, at, y.end, stroke=LIMIT, width=1.5, dash="5 3"))
        side = "end" if at > 300 else "start"
        told = f"service level {number(1e3 * limit_s)} ms"
        body.append(text(at + (-6 if side == "end" else 6), y.start - 8, told, anchor=side, fill=LIMIT))
    if len(front) > 1:
        steps = sorted(front, key=lambda row: row.metrics[latency])
        path_x, path_y = [steps[0].metrics[latency] * 1e3], [steps[0].metrics[metric]]
        for row in steps[1:]:
            path_x += [row.metrics[latency] * 1e3] * 2
            path_y += [path_y[-1], row.metrics[metric]]
        body.append(polyline(Curve("front", MUTED, tuple(path_x), tuple(path_y), 1.4, "2 3"), x, y))
    where = {row.label: index + 1 for index, row in enumerate(front)}
    for row in ran:
        if row.label in {end.label for end in ends} and row.label not in where:
            continue
        told = f"{row.label}: {number(row.metrics[metric], 4)} tok/s/GPU, {number(1e3 * row.metrics[latency])} ms"
        body.append(
            mark(
                Mark(
                    1e3 * row.metrics[latency],
                    row.metrics[metric],
                    told + ("" if row.meets_slo else "; misses a service level"),
                    INK if row.label in where else OTHER,
                    "dot" if row.meets_slo else "ring",
                    str(where[row.label]) if row.label in where and row.label != best.label else "",
                ),
                x,
                y,
            )
        )
    for end, name, colour, shape in ((baseline, "baseline", BASE, "diamond"), (best, "best", BEST, "star")):
        if end is None or end.status != "ok" or (name == "baseline" and end.label == best.label):
            continue
        body.append(mark(_end(end, name, colour, shape, metric, latency), x, y))
    said = f"Throughput against TPOT {statistic} of {len(ran)} plans; best: {best.label}"
    return figure(560, 352, said, body)


def _end(row: PlanRow, name: str, colour: str, shape: str, metric: str, latency: str) -> Mark:
    across, up = row.intervals.get(latency), row.intervals.get(metric)
    return Mark(
        1e3 * row.metrics[latency],
        row.metrics[metric],
        f"{name}: {row.label}",
        colour,
        shape,
        name,
        None if across is None else (1e3 * across.low, 1e3 * across.high),
        None if up is None else (up.low, up.high),
    )


def memory_bars(runs: Sequence[tuple[str, Figures]]) -> str:
    """The ledger of the fullest GPU, KV cache parted into what was used at the peak and what stays free."""
    bars = []
    for name, figures in runs:
        ledger = figures.memory.ledger
        known = [item for item in MEMORY if item in ledger]
        other = sorted(set(ledger) - set(MEMORY) - {"kv_cache"})
        parts = [(named(item), ledger[item], MEMORY.get(item, _FALLBACK)) for item in [*known, *other]]
        used = max(figures.memory.peak_bytes - sum(part[1] for part in parts), 0.0)
        parts.append(("KV cache used at the peak", used, KV_USED))
        free = ledger.get("kv_cache", 0.0) - used
        if free > 0:
            parts.append(("KV cache left free", free, KV_FREE))
        peak = figures.memory.peak_bytes
        bars.append(Bar(name, tuple(parts), (peak, f"peak {number(peak / 1e9)} GB")))
    limit = max(figures.memory.limit_bytes for _, figures in runs)
    seen = dict.fromkeys((name, colour) for bar in bars for name, _, colour in bar.parts)
    drawn = stacked(
        bars,
        unit="GB",
        scale=1e-9,
        label="Memory of the fullest GPU by item",
        limit=(limit, f"limit {number(limit / 1e9)} GB"),
    )
    return drawn + key(list(seen))


def provenance_bars(runs: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Which share of the simulated step time rests on what."""
    bars = []
    for name, shares in runs:
        order = [tag for tag in PROVENANCE if shares.get(tag, 0.0) > 0] + sorted(set(shares) - set(PROVENANCE))
        bars.append(Bar(name, tuple((tag, shares[tag], PROVENANCE.get(tag, (_FALLBACK, ""))[0]) for tag in order)))
    seen = dict.fromkeys((name, colour) for bar in bars for name, _, colour in bar.parts)
    drawn = stacked(
        bars, unit="%", scale=100.0, digits=0, end=1.0, label="Share of the simulated step time by provenance"
    )
    return drawn + key([(f"{tag}: {PROVENANCE[tag][1]}" if tag in PROVENANCE else tag, colour) for tag, colour in seen])


def over_time(runs: Sequence[tuple[str, str, Series, int]]) -> str:
    """Sequences that a step decodes, for each GPU of its instance, over the run: whether the deployment kept up."""
    drawn = []
    for name, colour, series, gpus in runs:
        points = sorted(zip(series.steps.start_s, series.steps.decode_seqs, strict=True))
        if len(points) > 1:
            xs, ys = (tuple(values) for values in zip(*points, strict=True))
            drawn.append(Curve(name, colour, xs, tuple(value / gpus for value in ys), 1.5))
    if not drawn:
        return ""
    x = axis(0.0, max(curve.xs[-1] for curve in drawn), 56, 1094, ticks=10)
    y = axis(0.0, max(max(curve.ys) for curve in drawn), 190, 28, ticks=4)
    body = frame(x, y, "simulated time (s)", "sequences in a step, per GPU")
    body += [polyline(curve, x, y) for curve in drawn]
    return figure(1120, 236, "Sequences in a step, for each GPU, over the simulated time", body)
