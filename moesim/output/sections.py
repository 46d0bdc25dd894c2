"""The sections of a report page that are set around its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from moesim.output import page, pictures
from moesim.output.page import details, exact, number, percent, section, table
from moesim.output.run_folder import Figures, PlanRow, RunFolder, Series, Told
from moesim.output.stage_words import stages_line
from moesim.units import human_bytes, human_seconds


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
            lead=f"A typical decode step of each run, mean over ranks, at its own batch ({tokens}). Steps that also "
            "read prompts are not shown: what they take is the rest of the time per output token. A "
            "collective takes as long as its own busiest endpoint; waiting is for ranks that come late to one."
            + _stages(figures),
        )
    )
    if kept:
        sizes = {name: _gpus(told.figures) for name, _, told in runs}
        found.append(_latencies(runs[0][2].figures, kept, sizes))
    return found


def _stages(runs: Sequence[tuple[str, Figures]]) -> str:
    """How batches pass through pipeline stages, for the runs that have several."""
    told = []
    for name, figures in runs:
        kept = None if figures.serving is None else figures.serving.model_dump()
        line = stages_line(figures.step.model_dump(), kept)
        if line:
            told.append(f" {name}: a step is a batch's way through all pipeline stages, others beside it. {line}")
    return "".join(told)


def _gpus(figures: Figures) -> int:
    """GPUs that a batch is on at once: of an instance, or of one pipeline stage."""
    return figures.plan.parallel.gpus // figures.plan.parallel.pp


def _batch(name: str, figures: Figures) -> str:
    ranks, gpus = figures.plan.parallel.attention_dp, _gpus(figures)
    tokens, where = figures.step.tokens_per_dp_rank, "" if figures.plan.parallel.pp == 1 else " of a stage"
    each = number(tokens * ranks / gpus, 3)
    return f"{name}: {number(tokens, 3)} tokens on each attention-DP rank, {each} a GPU{where}"


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
