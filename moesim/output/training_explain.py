"""Why a training step is slow: the `explain` key of `simulate --json`, its tables in a terminal, its part of a page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from moesim.engine.training_explain import ExplainedTraining
from moesim.output.console import console
from moesim.output.explain_words import saved
from moesim.output.page import exact, number, percent, table
from moesim.units import human_seconds

WHAT_IFS = {
    "perfect_balance": "with perfect balance",
    "infinite_network": "with an infinite network",
    "perfect_overlap": "with perfect overlap",
    "no_pipeline_bubble": "without pipeline bubble",
}
HOTTEST = 8
_SMALL = 0.01


def training_explanation_json(one: ExplainedTraining) -> dict[str, Any]:
    """All of it, JSON-ready; lists are [stages] or [stages][ranks of a stage]. SI units."""

    def changed(found: dict[str, float]) -> dict[str, dict[str, float]]:
        return {name: {"step_s": seconds, "saves": 1.0 - seconds / one.step_s} for name, seconds in found.items()}

    return {
        "step_s": one.step_s,
        "critical_path_s": one.critical_path_s,
        "critical_instance": one.critical[0],
        "critical_stage": one.critical[1],
        "communication_s": {
            name: {"on_critical_path": one.exposed_s[name], "whole": whole} for name, whole in one.whole_s.items()
        },
        "stage_busy_s": one.stage_busy_s.tolist(),
        "bubble_s": one.bubble_s.tolist(),
        "waited_s": one.waited_s.tolist(),
        "waited_for_operation_s": {name: by.tolist() for name, by in one.waited_for_operation_s.items()},
        "waited_for_rank_s": one.waited_for_rank_s.tolist(),
        "layers": [{"stage": stage, **vars(layer)} for stage, layer in one.layers],
        "what_if": changed(one.what_if_s),
        "without_operation": changed(one.free_operation_s),
        "not_priced": one.not_priced,
    }


def training_summary(found: Mapping[str, Any]) -> list[str]:
    """Sentences: communication, the busiest stage, who waits for what, the hottest rank and expert."""
    whole, busy = found["step_s"], found["stage_busy_s"]
    exposed = ", ".join(
        f"{name.replace('_', ' ')} {human_seconds(one['on_critical_path'])} ({one['on_critical_path'] / whole:.1%})"
        for name, one in found["communication_s"].items()
    )
    stage = max(range(len(busy)), key=lambda index: busy[index])
    lines = [f"Exposed on the critical path: {exposed or 'no communication'}."]
    if len(busy) > 1:
        lines.append(
            f"The busiest stage is {stage}: {human_seconds(busy[stage])} in passes, {human_seconds(min(busy))} on the "
            f"least busy; stages stand still for {human_seconds(min(found['bubble_s']))} to "
            f"{human_seconds(max(found['bubble_s']))}."
        )
    waited = {name: sum(map(sum, by)) for name, by in found["waited_for_operation_s"].items()}
    everything = sum(waited.values())
    if everything > 0:
        ranks = sum(len(row) for row in found["waited_s"])
        named = ", ".join(
            f"{name.replace('_', ' ')} {seconds / everything:.0%}"
            for name, seconds in sorted(waited.items(), key=lambda item: -item[1])[:3]
        )
        lines.append(f"The mean rank waits {human_seconds(everything / ranks)} for ranks of its stage: {named}.")
    if found["layers"]:
        hot = max(found["layers"], key=lambda layer: float(layer["rank_over_mean"]))
        lines.append(
            f"Hottest: layer {hot['layer']} on stage {hot['stage']}, rank {hot['rank']} with "
            f"{hot['rank_over_mean']:.2f} times the mean tokens (expert {hot['expert']}: "
            f"{hot['expert_over_mean']:.1f} times the mean expert)."
        )
    return lines


def print_training_explanation(found: Mapping[str, Any]) -> None:
    """The critical path by pass and operation, and what the step would take otherwise."""
    from rich.table import Table

    out, whole = console(), found["step_s"]
    shown = Table(title=f"Critical path of the step: {human_seconds(whole)}", title_justify="left")
    for name in ("pass", "operation", "time", "share"):
        shown.add_column(name, justify="left" if name in ("pass", "operation") else "right")
    for where, operation, seconds in _rows(found):
        if seconds >= _SMALL * whole:
            shown.add_row(where, operation, human_seconds(seconds), f"{seconds / whole:.0%}")
    rest = sum(seconds for _, _, seconds in _rows(found) if seconds < _SMALL * whole)
    if rest > 0:
        shown.add_row("other", "", human_seconds(rest), f"{rest / whole:.0%}")
    shown.add_section()
    for label, change in _changes(found):
        shown.add_row(label, "", human_seconds(change["step_s"]), saved(change["saves"]))
    out.print(shown)
    for line in training_summary(found):
        out.print(line)
    for name, reason in found["not_priced"].items():
        out.print(f"Not explained: {name} ({reason}).")


def training_explanation_page(found: Mapping[str, Any]) -> str:
    """The same as tables of a report page, with the hottest layers."""
    whole = found["step_s"]
    rows = [
        [escape(where), escape(operation), exact(seconds, human_seconds(seconds)), percent(seconds / whole)]
        for where, operation, seconds in _rows(found)
    ]
    changes = [
        [escape(label), exact(one["step_s"], human_seconds(one["step_s"])), escape(saved(one["saves"]))]
        for label, one in _changes(found)
    ]
    hottest = sorted(found["layers"], key=lambda layer: -float(layer["rank_over_mean"]))[:HOTTEST]
    heat = [
        [
            str(one["layer"]),
            str(one["stage"]),
            f"{one['rank']}: {exact(one['rank_over_mean'], number(one['rank_over_mean']))}",
            f"{one['slowest_rank']}: {exact(one['slowest_over_mean'], number(one['slowest_over_mean']))}",
            f"{one['expert']}: {exact(one['expert_over_mean'], number(one['expert_over_mean']))}",
        ]
        for one in hottest
    ]
    notes = "".join(f"<p>{escape(line)}</p>" for line in training_summary(found))
    left_out = "".join(
        f"<p class='note'>Not explained: {escape(name)} ({escape(reason)}).</p>"
        for name, reason in found["not_priced"].items()
    )
    head = ["layer", "stage", "rank with most tokens: times mean", "slowest experts, rank: times mean",
            "hottest expert: times mean"]  # fmt: skip
    return (
        notes
        + table(["what if", "step", "saves"], changes)
        + table(["pass", "operation on the critical path", "time", "share"], rows)
        + (table(head, heat) if heat else "")
        + left_out
    )


def _rows(found: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    return sorted(
        (
            (where.replace("_", " "), operation.replace("_", " "), seconds)
            for where, inside in found["critical_path_s"].items()
            for operation, seconds in inside.items()
        ),
        key=lambda row: -row[2],
    )


def _changes(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    return [(label, found["what_if"][name]) for name, label in WHAT_IFS.items() if name in found["what_if"]]
