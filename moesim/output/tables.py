"""The parts of a report page that are tables and tiles: the ranked plans, the launch, the reasons, the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import yaml

from moesim.output.charts import BASE, BEST, OTHER, whisker
from moesim.output.page import details, exact, number, percent, signed, table
from moesim.output.run_folder import Figures, Gain, PlanRow, RunFolder
from moesim.spec.scenario import Scenario
from moesim.units import human_bytes, human_seconds

LEVEL_PERCENT = 90
# metric, heading, scale to the shown unit, significant digits
COLUMNS = (
    ("output_tokens_per_s_per_gpu", "output tok/s/GPU", 1.0, 4),
    ("ttft_s.p50", "TTFT p50, ms", 1e3, 3),
    ("ttft_s.p99", "TTFT p99, ms", 1e3, 3),
    ("tpot_s.p50", "TPOT p50, ms", 1e3, 3),
    ("tpot_s.p99", "TPOT p99, ms", 1e3, 3),
    ("rank_load_max_over_mean", "max/mean rank load", 1.0, 4),
    ("memory_peak_bytes", "memory, GB", 1e-9, 3),
)
_REASONS = {
    "out_of_memory": "weights, buffers and one request's KV cache exceed the memory limit",
    "outside_profile": "the profile holds no measurement there, and extrapolation is refused",
    "slots_not_divisible": "experts and replicas do not divide by the ranks",
    "heads_not_divisible": "attention heads do not divide by TP",
    "expert_not_divisible": "an expert's width does not divide by expert-TP",
    "gpus_not_divisible": "instances do not fill the cluster",
    "nodes_not_filled": "an instance does not fill whole nodes",
    "more_ranks_than_experts": "more ranks than experts",
    "backend_needs_ep": "this dispatch needs whole experts spread over ranks",
    "backend_needs_same_tokens": "all-reduce combines experts only where all ranks hold the same tokens",
    "backend_needs_tp_1": "this dispatch takes each token from one rank, and a TP group holds it on several",
    "backend_needs_tp": "there is no TP group whose ranks could send the same token twice",
    "backend_needs_domains": "a two-level exchange needs more than one NVLink domain",
    "domains_not_filled": "an instance does not fill whole NVLink domains",
    "tp_spans_nodes": "TP groups do not lie inside nodes",
    "backend_does_not_pack": "this dispatch sends what its own kernels send: nothing can be compressed",
    "nothing_to_split": "TP keeps no copies of a context that its GPUs could split",
    "with_decode_cp": "split contexts are not simulated with this engine, model or schedule",
    "roles_exceed_cluster": "the pools of the roles ask for more GPUs than the cluster has",
    "replica_choice_needs_ep": "with one expert-parallel rank there is no replica to choose",
}


def _tile(name: str, shown: str, small: str) -> str:
    return f'<dl class="tile"><dt>{name}</dt><dd>{shown}<small>{small}</small></dd></dl>'


def tiles(run: RunFolder) -> str:
    """The figures that one wants first: what the best plan gains, and where it stands."""
    result = run.result
    best, base = result.best, result.baseline
    shown = []
    for gain, name in ((result.gain, _objective(result.gain)), (result.latency_gain, "median TPOT saved")):
        if gain.value is not None and gain.low is not None and gain.high is not None:
            span = f"{signed(gain.low)} to {signed(gain.high)}, against the baseline"
            shown.append(_tile(name, exact(gain.value, signed(gain.value)), span))
    placed = (result.placement_gain or {}).get(result.latency_gain.metric)
    if placed is not None and placed.low is not None and placed.high is not None and _spread(best):
        span = f"{signed(placed.low)} to {signed(placed.high)}, against contiguous experts in the same layout"
        shown.append(_tile("TPOT saved by placing experts", exact(placed.value, signed(placed.value)), span))
    for metric, name, scale, digits in (
        ("tpot_s.p99", "TPOT p99", 1e3, 3),
        ("rank_load_max_over_mean", "max/mean rank load", 1.0, 3),
    ):
        unit = " ms" if scale == 1e3 else ""
        before = "no baseline to compare"
        if base is not None and metric in base.metrics:
            before = f"baseline {number(base.metrics[metric] * scale, digits)}{unit}"
        shown.append(
            _tile(name, exact(best.metrics[metric], number(best.metrics[metric] * scale, digits) + unit), before)
        )
    return f'<div class="tiles">{"".join(shown)}</div>'


def _spread(row: PlanRow) -> bool:
    """Whether there are experts to place in it."""
    pools = [] if row.roles is None else [row.roles.prefill.parallel, row.roles.decode.parallel]
    return any(one is not None and one.ep > 1 for one in (row.parallel, *pools))


def simulation_tiles(figures: Figures) -> str:
    """The figures of one simulation that one wants first, with their intervals."""
    flat = _flat(figures)
    shown = []
    for metric, name, scale, unit in (
        ("output_tokens_per_s_per_gpu", "output tokens/s/GPU", 1.0, ""),
        ("ttft_s.p99", "TTFT p99", 1e3, " ms"),
        ("tpot_s.p99", "TPOT p99", 1e3, " ms"),
    ):
        if metric not in flat:
            continue
        found = figures.intervals.get(metric)
        span = "no intervals were drawn"
        if found is not None:
            span = f"{number(found.low * scale, 3)} to {number(found.high * scale, 3)} ({LEVEL_PERCENT} %)"
        shown.append(_tile(name, exact(flat[metric], number(flat[metric] * scale, 3) + unit), span))
    if figures.slo.limits:
        missed = ", ".join(limit.metric for limit in figures.slo.limits if not limit.met)
        shown.append(_tile("service levels", "missed" if missed else "met", escape(missed) or "all of them"))
    return f'<div class="tiles">{"".join(shown)}</div>'


def _flat(figures: Figures) -> dict[str, float]:
    return _flattened(figures.metrics)


def _flattened(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Figures by dotted name, those of roles too."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": one for inner, one in _flattened(value).items()})
        else:
            flat[name] = value
    return flat


def _objective(gain: Gain) -> str:
    return gain.metric.removesuffix("_per_gpu").replace("_per_s", "/s").replace("_", " ") + "/GPU gained"


def ranked_lead(run: RunFolder) -> str:
    """How to read the ranked table."""
    how = "all of them simulated" if run.result.exhausted else f"{run.result.trials} of them simulated"
    return (
        f"{run.result.space} legal plans, {how}. Below each figure its {LEVEL_PERCENT} % interval, from draws of cost "
        "errors and routing that all plans here share; bars in a column are on one scale. Plans whose "
        "objectives are close are ranked by TPOT. Max/mean rank load is that of each judged load, averaged."
    )


def _rows(run: RunFolder) -> list[tuple[str, str, PlanRow]]:
    result = run.result
    rows = [("best", "best", result.best)]
    rows += [("", "runner-up", one) for one in result.alternatives]
    if result.baseline is not None and result.baseline.label != result.best.label:
        rows.append(("base", "plain baseline", result.baseline))
    return rows


def ranked(run: RunFolder) -> str:
    """The ranked table: best, runners-up and the plain baseline, each figure with its interval."""
    rows = _rows(run)
    spans = {metric: _span(metric, [row for _, _, row in rows]) for metric, *_ in COLUMNS}
    shown = []
    for kind, role, row in rows:
        tie = " · tied with best" if row.tied_with_best else ""
        lean = row.metrics.get("extrapolated_share", 0.0)
        under = f'<span class="under">{percent(lean)} of its priced steps extrapolated</span>' if lean > 0 else ""
        name = f'<span class="role">{role}{tie}</span>{escape(row.label)}{under}'
        if row.status != "ok":
            shown.append([name, *["–"] * len(COLUMNS), f'<span class="missed">{escape(row.status)}</span>'])
            continue
        colour = {"best": BEST, "base": BASE}.get(kind, OTHER)
        level = '<span class="met">met</span>' if row.meets_slo else '<span class="missed">missed</span>'
        shown.append([name, *(_cell(row, column, spans[column[0]], colour) for column in COLUMNS), level])
    head = ["plan", *(heading for _, heading, _, _ in COLUMNS), "service levels"]
    return table(head, shown, classes=[kind for kind, _, _ in rows])


def _span(metric: str, rows: Sequence[PlanRow]) -> tuple[float, float]:
    ends = [row.metrics[metric] for row in rows if metric in row.metrics]
    ends += [end for row in rows if metric in row.intervals for end in vars(row.intervals[metric]).values()]
    return (min(ends), max(ends)) if ends else (0.0, 1.0)


def _cell(row: PlanRow, column: tuple[str, str, float, int], span: tuple[float, float], colour: str) -> str:
    metric, _, scale, digits = column
    if metric not in row.metrics:
        return "–"
    value = row.metrics[metric]
    shown = exact(value, number(value * scale, digits))
    found = row.intervals.get(metric)
    if found is None:
        return shown
    low, high = number(found.low * scale, digits), number(found.high * scale, digits)
    return f'{shown}<span class="iv">{low} – {high}</span>{whisker(value, found.low, found.high, *span, colour)}'


def plan_lead(figures: Figures, label: str) -> str:
    """A plan in one sentence."""
    plan = figures.plan
    backend, mode = plan.dispatch.get("backend", ""), plan.dispatch.get("mode", "auto")
    dispatch = backend if mode == "auto" else f"{backend} {mode.replace('_', '-')}"
    copies = f"{plan.instances} copies of the model, each" if plan.instances > 1 else "one copy of the model"
    return (
        f"<b>{escape(label)}</b>: {copies} on {plan.parallel.gpus} GPUs "
        f"({escape(plan.parallel.label())}); {escape(dispatch)} dispatch, "
        f"{escape(plan.schedule.replace('_', ' '))} schedule; experts placed by {escape(plan.solver)} with "
        f"{plan.redundant_experts} redundant; at most {plan.max_running_requests_per_dp_rank} requests on each "
        "attention-DP rank."
    )


def roles_lead(row: PlanRow) -> str:
    """The pools of a plan with roles in one sentence; empty without."""
    if row.roles is None:
        return ""
    told = []
    for name in ("prefill", "decode"):
        role = getattr(row.roles, name)
        backend = ((role.policies or {}).get("dispatch") or {}).get("backend", "")
        copies = f"{role.replicas} copies, each" if role.replicas > 1 else "one copy"
        layout = "" if role.parallel is None else f" ({escape(role.parallel.label())}, {escape(str(backend))})"
        told.append(f"{name}: {copies} on {role.gpus} GPUs{layout}")
    return (
        f" Prompts are read in a pool of their own: {'; '.join(told)}. What is said of one plan here is the decode's."
    )


def launch(run: RunFolder) -> str:
    """The launch commands that were exported, and the files of the run."""
    parts = [
        f"<div><h3>{escape(engine)}</h3><pre>{escape(text.strip())}</pre></div>" for engine, text in run.launch.items()
    ]
    told = f'<div class="two">{"".join(parts)}</div>' if len(parts) > 1 else "".join(parts)
    if not parts:
        told = "<p>No engine's launch options could be written; the notes at the end say why.</p>"
    files = table(["file", "size"], [[f"<code>{escape(name)}</code>", human_bytes(size)] for name, size in run.files])
    look = ""
    if any(name == "timeline.json.gz" for name, _ in run.files):
        look = (
            "<p class='note'>timeline.json.gz is a typical decode step of the best plan: open it in Perfetto "
            "(ui.perfetto.dev, “Open trace file”).</p>"
        )
    return f"{told}{details('Files of this run', files)}{look}"


def infeasible(run: RunFolder) -> str:
    """Why plans could not run, counted, and how many missed a service level."""
    result = run.result
    rows = [
        [f"<code>{escape(reason)}</code>", str(count), escape(_reason(reason))]
        for reason, count in sorted(result.infeasible.items(), key=lambda item: -item[1])
    ]
    missed = f"<p>{result.missed_slo} of {result.trials} simulated plans missed a service level.</p>"
    if not rows:
        return f"<p>Every plan of the grid could run.</p>{missed}"
    made = table(["reason", "plans", "what it means"], rows).replace("<td>", '<td class="text">')
    return made.replace('<th scope="col">', '<th scope="col" class="text">') + f"<p></p>{missed}"


def _reason(reason: str) -> str:
    for role in ("prefill", "decode"):
        if reason.startswith(f"{role}_"):
            return f"the {role} pool: {_REASONS.get(reason.removeprefix(f'{role}_'), '')}"
    return _REASONS.get(reason, "")


def figures_table(figures: Figures) -> str:
    """All metrics of one simulation with their intervals, and its service levels."""
    rows = []
    for name, value in _flat(figures).items():
        found = figures.intervals.get(name)
        span = "–" if found is None else f"{number(found.low, 4)} – {number(found.high, 4)}"
        rows.append([f"<code>{escape(name)}</code>", exact(value, number(value, 4)), span])
    levels = "".join(
        f"<li>{escape(limit.metric)} ≤ {human_seconds(limit.limit_s)}: {human_seconds(limit.value_s)}, "
        f'<span class="{"met" if limit.met else "missed"}">{"met" if limit.met else "missed"}</span></li>'
        for limit in figures.slo.limits
    )
    asked = f"<h3>Service levels</h3><ul>{levels}</ul>" if levels else ""
    shown = table(["metric (SI units)", "value", f"{LEVEL_PERCENT} % interval"], rows)
    return asked + details("All metrics", shown)


def run_rows(run: RunFolder) -> list[tuple[str, str]]:
    """Facts about how the run was made."""
    return [
        (name, str(round(value, 2) if isinstance(value, float) else value)) for name, value in run.result.run.items()
    ]


def about(scenario: Scenario, rows: Sequence[tuple[str, str]]) -> str:
    """How the run was made, and its scenario."""
    text = yaml.safe_dump(scenario.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
    shown = table(["", ""], [[escape(name.replace("_", " ")), escape(value)] for name, value in rows])
    return shown + details("The scenario, with this plan's choices", f"<pre>{escape(text)}</pre>")
