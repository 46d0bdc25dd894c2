"""What a person sees of a training run: tables in the terminal, and a report page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from moesim import __version__
from moesim.files import write_text
from moesim.output import page, tables
from moesim.output.console import capacity_line, console, generated_line, shown, with_interval
from moesim.output.page import exact, number, percent, section, table
from moesim.output.priced import priced_lines
from moesim.output.training_explain import training_explanation_page
from moesim.spec.scenario import Scenario
from moesim.units import human_bytes, human_seconds

FIGURES = (
    ("step_s", "step", 1.0, " s"),
    ("tokens_per_s_per_gpu", "tokens/s/GPU", 1.0, ""),
    ("tflops_per_s_per_gpu", "TFLOP/s/GPU", 1.0, ""),
    ("mfu", "MFU", 100.0, " %"),
)


def print_training(result: dict[str, Any]) -> None:
    """Tables of a training run for a person."""
    from rich.table import Table

    out, metrics, step = console(), result["metrics"], result["step"]
    rates = Table(title="Training step (90 % interval)", title_justify="left")
    rates.add_column("figure")
    rates.add_column("value", justify="right")
    for name, label, scale, unit in FIGURES:
        rates.add_row(label + unit, with_interval(metrics[name], result["intervals"].get(name), scale))
    out.print(rates)
    parts = Table(title=f"Mean over ranks: {human_seconds(step['step_s'])}", title_justify="left")
    for column in ("operation", "time", "share"):
        parts.add_column(column, justify="left" if column == "operation" else "right")
    for name, seconds in sorted(step["by_operation_s"].items(), key=lambda item: -item[1]):
        parts.add_row(name, human_seconds(seconds), f"{seconds / step['step_s']:.1%}")
    out.print(parts)
    memory, plan, routing = result["memory"], result["plan"], result["routing"]
    out.print(
        f"{plan['micro_batches']} micro-batches through {plan['parallel']['pp']} stages "
        f"({plan['pipeline']['schedule']}); bubble {step['bubble_share']:.1%} of the step, exposed communication "
        f"{step['exposed_communication_s'] / step['step_s']:.1%}."
    )
    out.print(
        f"Rank load max/mean {shown(routing['max_over_mean'], 4)} on average, "
        f"{shown(routing['per_step_max_over_mean'], 4)} per micro-batch. Memory {human_bytes(memory['peak_bytes'])} of "
        f"{human_bytes(memory['limit_bytes'])} (stage {memory['fullest_stage']})."
    )
    for told in (generated_line(routing["generated"]), capacity_line(routing)):
        if told:
            out.print(told)
    shares = ", ".join(f"{share:.0%} {tag}" for tag, share in sorted(result["provenance"].items(), key=lambda x: -x[1]))
    out.print(f"Where the working time comes from: {shares}.")
    for line in priced_lines(result):
        out.print(line)


def write_training_report(path: Path, scenario: Scenario, result: Mapping[str, Any]) -> None:
    """Write the page of one training run, from what `simulate --json` prints."""
    write_text(Path(path), training_page(scenario, result))


def training_page(scenario: Scenario, result: Mapping[str, Any]) -> str:
    """The whole page of a training run."""
    training = scenario.training
    assert training is not None
    title = f"Training {scenario.model}"
    asked = (
        f"Global batch of {training.global_batch} sequences of {training.sequence_length} tokens, micro-batch "
        f"{training.micro_batch}, {training.pipeline.schedule} pipeline, recompute {training.recompute}."
    )
    head = (
        f'<p class="eyebrow">moesim training report</p><h1>{escape(title)}</h1><p class="lead">{escape(asked)}</p>'
        f"{_tiles(result)}"
    )
    step = result["step"]
    exposed = percent(step["exposed_communication_s"] / step["step_s"])
    lead = (
        f"{capacity_line(result['routing'])} Mean over ranks. The pipeline's bubble is "
        f"{percent(step['bubble_share'])} of the step; communication that nothing hides, waiting for the slowest rank "
        f"included, {exposed}."
    )
    run = [(name, str(value)) for name, value in result["run"].items()]
    parts = [
        section("step", "Where the step goes", _operations(step), lead=lead),
        *_why(result),
        section(
            "memory", "Memory of each stage's fullest GPU", _memory(result["memory"]), lead=_limit(result["memory"])
        ),
        section("provenance", "Where these figures come from", _shares(result), lead=_caveat()),
        section("run", "This run", tables.about(scenario, run)),
    ]
    foot = f"Written by moesim {__version__}. This page loads nothing from elsewhere."
    return page.page(f"moesim: {title}", head, parts, foot)


def _why(result: Mapping[str, Any]) -> list[str]:
    """The section that explains the step, where it was."""
    found = result.get("explain")
    if found is None:
        return []
    lead = (
        "The critical path is the chain of work whose times sum to the step: through the pipeline of the instance that "
        "ends last, and inside a pass along its slowest rank. Every what-if is the whole step timed again, so gains do "
        "not add up."
    )
    body = training_explanation_page(found)
    return [section("why", "Why the step takes so long, and what would help", body, lead=lead)]


def _tiles(result: Mapping[str, Any]) -> str:
    cells = []
    for name, label, scale, unit in FIGURES:
        value, found = result["metrics"][name], result["intervals"].get(name)
        span = "no intervals were drawn"
        if found is not None:
            span = f"{number(found['low'] * scale)} to {number(found['high'] * scale)} (90 %)"
        figure = exact(value, number(value * scale) + unit)
        cells.append(f'<dl class="tile"><dt>{label}</dt><dd>{figure}<small>{span}</small></dd></dl>')
    return f'<div class="tiles">{"".join(cells)}</div>'


def _operations(step: Mapping[str, Any]) -> str:
    rows = [
        [escape(name.replace("_", " ")), exact(seconds, human_seconds(seconds)), percent(seconds / step["step_s"])]
        for name, seconds in sorted(step["by_operation_s"].items(), key=lambda item: -item[1])
    ]
    return table(["operation", "time", "share"], rows)


def _memory(memory: Mapping[str, Any]) -> str:
    stages = memory["by_stage"]
    names = dict.fromkeys(name for stage in stages for name in stage)
    rows = [
        [escape(name.replace("_", " ")), *(exact(s[name], human_bytes(s[name])) if name in s else "–" for s in stages)]
        for name in names
    ]
    rows.append(["<b>all</b>", *(exact(sum(s.values()), human_bytes(sum(s.values()))) for s in stages)])
    return table(["item", *(f"stage {index}" for index in range(len(stages)))], rows)


def _limit(memory: Mapping[str, Any]) -> str:
    return (
        f"The fullest is stage {memory['fullest_stage']} with {human_bytes(memory['peak_bytes'])} of the "
        f"{human_bytes(memory['limit_bytes'])} allowed. Assumed: {escape('; '.join(memory['assumed'].values()))}."
    )


def _shares(result: Mapping[str, Any]) -> str:
    found = sorted(result["provenance"].items(), key=lambda item: -item[1])
    return table(
        ["tag", "share of working time"], [[escape(tag), exact(share, percent(share))] for tag, share in found]
    )


def _caveat() -> str:
    return (
        "No table holds backward kernels: transposed products are tagged extrapolated at best, what is priced by a "
        "ratio to its forward time formula. Host time, and communication beside computation inside a layer, are not "
        "counted."
    )
