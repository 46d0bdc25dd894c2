"""The report page: one HTML file, made from the files of a run and nothing else, which opens offline."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from moesim import __version__
from moesim.files import write_text
from moesim.output import page, sections, tables
from moesim.output.answers import answers_sections
from moesim.output.caveats import caveats_of
from moesim.output.charts import BASE, BEST
from moesim.output.explain_page import why
from moesim.output.page import section
from moesim.output.run_folder import RunFolder, Told, check_series, read_run
from moesim.output.validation import told_over_nodes
from moesim.output.validation_page import validation_sections
from moesim.spec.scenario import Scenario
from moesim.units import human_seconds

REPORT = "report.html"
_BADGES = {
    "gain": ("good", "worth it"),
    "latency_gain": ("good", "latency gains"),
    "baseline_fails": ("good", "baseline fails"),
    "tie": ("", "tie"),
    "withheld": ("", "verdict withheld"),
    "dont": ("no", "don't"),
}


def write_run_report(folder: Path) -> None:
    """Write `report.html` into a run folder, whole or not at all: a pure function of the folder's other files.

    Raises BadInput when one of them is missing or damaged.
    """
    folder = Path(folder)
    write_text(folder / REPORT, run_page(read_run(folder)))


def write_simulation_report(
    path: Path, scenario: Scenario, result: Mapping[str, Any], series: Mapping[str, Any] | None = None
) -> None:
    """Write the page of one simulation: `result` as `simulate --json` prints it, `series` for the pictures."""
    told = Told.read({"figures": result, "series": series}, where="simulation")
    if told.series is not None:
        check_series(told.series, where="simulation: series")
    write_text(Path(path), simulation_page(told, scenario))


def run_page(run: RunFolder) -> str:
    """The whole page of a run."""
    result, best, base = run.result, run.simulations.best, run.simulations.baseline
    same = base is not None and result.baseline is not None and result.baseline.label == result.best.label
    runs = [("best", BEST, best)] + ([("baseline", BASE, base)] if base is not None and not same else [])
    code = result.verdict.code
    tone, badge = _BADGES.get(code, ("", code.replace("_", " ")))
    planned = tables.plan_lead(best.figures, result.best.label) + tables.roles_lead(result.best)
    head = (
        f'<p class="eyebrow">moesim plan report</p><h1>{escape(_title(run.scenario))}</h1>'
        f'<p class="lead">{escape(_workload(run.scenario))}</p>'
        f'<section class="verdict {tone}" id="verdict" aria-label="Verdict"><span class="badge">{escape(badge)}</span>'
        f"<p>{escape(result.verdict.text)}</p></section>{tables.tiles(run)}"
    )
    sure = told_over_nodes((one.claim, one.nodes, one.status) for one in result.validation)
    rests = caveats_of(run.scenario, best, None if same else base, result.notes, nodes_validated=sure)
    parts = [
        section("plans", "The best plan and its alternatives", tables.ranked(run), lead=tables.ranked_lead(run)),
        section("launch", "What would be launched", tables.launch(run), lead=planned),
        *sections.drawn(runs),
        *why(runs),
        section("search", "What the search traded off", sections.search(run), lead=sections.search_lead(run)),
        *answers_sections(result),
        *sections.ledgers(runs),
        section("not-run", "Plans that could not run, or missed a level", tables.infeasible(run)),
        *validation_sections([one.model_dump() for one in result.validation]),
        section("caveats", "What this rests on", rests),
        section("run", "This run", tables.about(run.scenario, tables.run_rows(run))),
    ]
    return page.page(f"moesim: {_title(run.scenario)}", head, parts, _foot())


def simulation_page(told: Told, scenario: Scenario) -> str:
    """The whole page of one simulation."""
    figures = told.figures
    runs = [("this plan", BEST, told)]
    head = (
        f'<p class="eyebrow">moesim simulation report</p><h1>{escape(_title(scenario))}</h1>'
        f'<p class="lead">{escape(_workload(scenario))}</p>{tables.simulation_tiles(figures)}'
    )
    parts = [
        section("figures", "Figures", tables.figures_table(figures), lead=tables.plan_lead(figures, "The plan")),
        *sections.drawn(runs),
        *why(runs),
        *sections.ledgers(runs),
        section("caveats", "What this rests on", caveats_of(scenario, told, None, ())),
        section("run", "This run", tables.about(scenario, [(name, str(value)) for name, value in figures.run.items()])),
    ]
    return page.page(f"moesim: {_title(scenario)}", head, parts, _foot())


def _foot() -> str:
    return f"Written by moesim {__version__}. This page loads nothing from elsewhere."


def _title(scenario: Scenario) -> str:
    cluster = scenario.cluster
    if isinstance(cluster, Path):
        return f"{scenario.model} on {cluster.name}"
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"
    each = f" of {cluster.gpus_per_node}" if cluster.gpus_per_node is not None else ""
    return f"{scenario.model} on {nodes}{each} {cluster.system}"


def _workload(scenario: Scenario) -> str:
    if scenario.serving is None:
        return "Training."
    work = scenario.serving.workload
    arrivals = ""
    if work.arrivals is not None and work.arrivals.poisson is not None:
        arrivals = f", Poisson arrivals at {work.arrivals.poisson.requests_per_s:g} requests/s"
    elif work.arrivals is not None and work.arrivals.concurrency is not None:
        arrivals = f", {work.arrivals.concurrency} requests at a time"
    levels = ", ".join(
        f"{name.removesuffix('_s').upper()} {statistic} ≤ {human_seconds(limit)}"
        for (name, statistic), limit in scenario.objective.slo.limits().items()
    )
    asked = f" Service levels: {levels}." if levels else " No service level was set."
    engine = f"{scenario.engine.name} {scenario.engine.version}".strip()
    return f"{work.requests} requests of {work.isl} tokens in, {work.osl} out{arrivals}; {engine}.{asked}"
