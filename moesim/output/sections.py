"""The sections of a report page that are tables and words, and the pictures set between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import yaml

from moesim.output import page, pictures
from moesim.output.charts import BASE, BEST, OTHER, whisker
from moesim.output.page import details, exact, number, percent, section, signed, table
from moesim.output.run_folder import Figures, Gain, PlanRow, RunFolder, Series, Told
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
    flat: dict[str, float] = {}
    for name, value in figures.metrics.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{statistic}": one for statistic, one in value.items()})
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
        under = f'<span class="under">{percent(lean)} extrapolated</span>' if lean > 0 else ""
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
    copies = f"{plan.instances} copies of the model, each" if plan.instances > 1 else "one copy of the model"
    return (
        f"<b>{escape(label)}</b>: {copies} on {plan.parallel.gpus} GPUs "
        f"({escape(plan.parallel.label())}); {escape(plan.dispatch.get('backend', ''))} dispatch, "
        f"{escape(plan.schedule.replace('_', ' '))} schedule; experts placed by {escape(plan.solver)} with "
        f"{plan.redundant_experts} redundant; at most {plan.max_running_requests_per_dp_rank} requests on each "
        "attention-DP rank."
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


def drawn(runs: Sequence[tuple[str, str, Told]]) -> list[str]:
    """Sections of loads, step time and latency, for (name, colour, run) each; those without series leave some out."""
    kept = [(name, colour, told.series) for name, colour, told in runs if told.series is not None]
    figures = [(name, told.figures) for name, _, told in runs]
    found = []
    if kept:
        order = sorted(kept, key=lambda item: item[0] != "baseline")
        titles = {"baseline": "before: baseline", "best": "after: best plan"}
        loads = pictures.load_maps([(titles.get(name, name), series) for name, _, series in order])
        judged = ", ".join(runs[0][2].figures.routing.judged_on)
        found.append(
            section(
                "loads",
                "Load by rank and layer",
                loads,
                lead=f"Tokens of each rank in each MoE layer over the mean of the layer, averaged over the loads that "
                f"the plan is judged on ({escape(judged)}). A single step is less even than this average: "
                + "; ".join(
                    f"{name} {number(told.routing.per_step_max_over_mean, 3)} per step against "
                    f"{number(told.routing.max_over_mean, 3)} on average"
                    for name, told in figures
                )
                + ". Balance is not time: see the next picture.",
            )
        )
    tokens = "; ".join(_batch(name, told) for name, told in figures)
    found.append(
        section(
            "step",
            "Where the time of a decode step goes",
            pictures.step_bars(figures) + details("The figures of this picture", _step_table(figures)),
            lead=f"A typical decode step of each run, mean over ranks, at its own batch ({tokens}). "
            " A collective takes as long as its own busiest endpoint; waiting is for ranks that "
            "come late to one.",
        )
    )
    if kept:
        sizes = {name: told.figures.plan.parallel.gpus for name, _, told in runs}
        found.append(_latencies(runs[0][2].figures, kept, sizes))
    return found


def _batch(name: str, figures: Figures) -> str:
    ranks, gpus = figures.plan.parallel.attention_dp, figures.plan.parallel.gpus
    tokens = figures.step.tokens_per_dp_rank
    return f"{name}: {number(tokens, 3)} tokens on each attention-DP rank, {number(tokens * ranks / gpus, 3)} a GPU"


def _latencies(figures: Figures, kept: Sequence[tuple[str, str, Series]], sizes: Mapping[str, int]) -> str:
    titles = (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL"))
    drawn = [pictures.latency_curves(metric, title, kept, figures.slo.limits) for metric, title in titles]
    names = page.key([(name, colour) for name, colour, _ in kept])
    batch = pictures.over_time([(name, colour, series, sizes[name]) for name, colour, series in kept])
    rates = f"<h3 style='margin-top:14px'>The run over time</h3>{batch}" if batch else ""
    return section(
        "latency",
        "How long requests wait",
        f'{names}<div class="three">{"".join(drawn)}</div>{rates}',
        lead="Of all requests, none cut as warm-up: time to first token, mean time per output token of each request, "
        "and single gaps between tokens (a gap with another request's prompt in it is long). Dashed: service levels, "
        "with a ring at the percentile they bind.",
    )


def _step_table(runs: Sequence[tuple[str, Figures]]) -> str:
    parts = [{name: seconds for name, seconds, _ in pictures.step_parts(figures)} for _, figures in runs]
    rows = [
        [escape(name), *(exact(one[name], human_seconds(one[name])) if name in one else "–" for one in parts)]
        for name in dict.fromkeys(name for one in parts for name in one)
    ]
    rows.append(["<b>step</b>", *(exact(told.step.step_s, human_seconds(told.step.step_s)) for _, told in runs)])
    hidden = [told.step.exposed_communication_s for _, told in runs]
    rows.append(["communication that nothing hides", *(exact(value, human_seconds(value)) for value in hidden)])
    return table(["operation", *(name for name, _ in runs)], rows)


def search_lead(run: RunFolder) -> str:
    """How to read the picture of the search."""
    return (
        f"Each point is a plan that was simulated ({sum(row.status == 'ok' for row in run.result.trial_list)}); "
        "hollow: it misses a service level. Bars: intervals of the best plan and the baseline. Numbered: plans that no "
        "other beats in both."
    )


def search(run: RunFolder) -> str:
    """Throughput against latency over all trials, and the plans on the front."""
    result = run.result
    metric = result.gain.metric
    limits = [limit for limit in run.simulations.best.figures.slo.limits if limit.metric.startswith("tpot_s.")]
    views: list[tuple[str, float | None, Sequence[PlanRow]]] = [("p50", None, result.pareto)]
    for limit in limits:
        statistic = limit.metric.split(".")[1]
        if statistic == "p50":
            views[0] = ("p50", limit.limit_s, result.pareto)
        else:
            views.append((statistic, limit.limit_s, ()))
    drawn = [
        "<div>"
        + pictures.trade_off(
            result.trial_list,
            front,
            result.best,
            result.baseline,
            metric=metric,
            statistic=statistic,
            limit_s=limit,
        )
        + "</div>"
        for statistic, limit, front in views[:2]
    ]
    rows = [
        [
            f"{index}. {escape(row.label)}",
            exact(row.metrics[metric], number(row.metrics[metric], 4)),
            exact(row.metrics["tpot_s.p50"], number(1e3 * row.metrics["tpot_s.p50"], 3)),
            "met" if row.meets_slo else '<span class="missed">missed</span>',
        ]
        for index, row in enumerate(result.pareto, 1)
    ]
    front = table(["plans on the front", "output tok/s/GPU", "TPOT p50, ms", "service levels"], rows)
    return f'<div class="two">{"".join(drawn)}</div><div style="margin-top:12px">{front}</div>'


def ledgers(runs: Sequence[tuple[str, str, Told]]) -> list[str]:
    """Sections of memory and of provenance."""
    figures = [(name, told.figures) for name, _, told in runs]
    items = dict.fromkeys(item for _, told in figures for item in told.memory.ledger)
    rows = [
        [
            escape(pictures.named(item)),
            *(
                exact(told.memory.ledger[item], human_bytes(told.memory.ledger[item]))
                if item in told.memory.ledger
                else "–"
                for _, told in figures
            ),
        ]
        for item in items
    ]
    memory = pictures.memory_bars(figures) + details(
        "The figures of this picture", table(["item", *(name for name, _ in figures)], rows)
    )
    return [
        section("memory", "Memory of the fullest GPU", memory, lead="Against the share that the engine may use."),
        section(
            "provenance",
            "Where these figures come from",
            pictures.provenance_bars([(name, told.provenance) for name, told in figures]),
            lead=_provenance_lead(figures[0][0], figures[0][1].provenance),
        ),
    ]


def _provenance_lead(name: str, shares: Mapping[str, float]) -> str:
    table_share = percent(shares.get("measured", 0.0) + shares.get("interpolated", 0.0))
    rest = [
        f"{percent(shares[tag])} {tag}" for tag in ("extrapolated", "formula", "assumed") if shares.get(tag, 0.0) > 0
    ]
    told = f"; the rest is {', '.join(rest)}" if rest else ""
    return (
        f"Of the simulated step time of {name}, {table_share} rests on measured tables, at a point or between "
        f"points{told}."
    )


def infeasible(run: RunFolder) -> str:
    """Why plans could not run, counted, and how many missed a service level."""
    result = run.result
    rows = [
        [f"<code>{escape(reason)}</code>", str(count), escape(_REASONS.get(reason, ""))]
        for reason, count in sorted(result.infeasible.items(), key=lambda item: -item[1])
    ]
    missed = f"<p>{result.missed_slo} of {result.trials} simulated plans missed a service level.</p>"
    if not rows:
        return f"<p>Every plan of the grid could run.</p>{missed}"
    made = table(["reason", "plans", "what it means"], rows).replace("<td>", '<td class="text">')
    return made.replace('<th scope="col">', '<th scope="col" class="text">') + f"<p></p>{missed}"


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
