"""The report's sections on why the answer is the answer: what each choice is worth, and what would change it."""

from __future__ import annotations

from html import escape

from moesim.output.page import exact, section, signed, table
from moesim.output.run_folder import ChoiceRow, Result, WhatIf, WorldPlan

LATENCY = "tpot_s.p50"


def answers_sections(result: Result) -> list[str]:
    """Both sections, where the run holds them."""
    found = []
    if result.choices:
        found.append(section("choices", "What each choice is worth", _choices(result), lead=_choices_lead(result)))
    if result.what_if is not None:
        lead = (
            "The finalists simulated again, each time with one thing changed and their placements kept as they were. A "
            "plan takes over where it is better by over 2 %, in the objective or else in median TPOT. Plans that are "
            "no finalists did not compete."
        )
        found.append(section("what-if", "What would change the answer", _worlds(result.what_if), lead=lead))
    return found


def _choices_lead(result: Result) -> str:
    how = (
        "The whole space was evaluated, so these are exact."
        if all(row.exact for row in result.choices)
        else "Not every plan was evaluated in full, so the true loss may be smaller."
    )
    return f"The best plan found when one choice of it is forbidden and all others are free again. {how}"


def _choices(result: Result) -> str:
    rows = [
        [
            f"{escape(row.choice)}: <strong>{escape(row.value)}</strong>",
            _loss(row),
            "–" if row.latency is None else exact(row.latency, signed(row.latency)),
            "no other plan meets the service levels" if row.plan is None else escape(row.plan),
            str(row.tried),
        ]
        for row in result.choices
    ]
    head = ["choice", "objective without it", "median TPOT without it", "the best plan without it", "plans tried"]
    return table(head, rows)


def _loss(row: ChoiceRow) -> str:
    return "–" if row.loss is None else exact(-row.loss, signed(-row.loss))


def _worlds(found: WhatIf) -> str:
    rows, classes = [], []
    for change in found.changes:
        leader = change.best if change.best is not None else "none meets the service levels"
        at = "" if change.turns_at is None else f'<span class="under">from about {change.turns_at:.2g} x on</span>'
        shown = f"<strong>{escape(leader)}</strong>{at}" if change.changed else escape(leader)
        rows.append([escape(change.told), shown, *(_cell(plan, found.metric) for plan in change.plans)])
        classes.append("best" if change.changed else "")
    head = ["what differs", "best there", *(escape(name) for name in found.plans)]
    told = f"<p>{escape(found.text)}</p>"
    return told + f'<div class="scroll">{table(head, rows, classes=classes)}</div>'


def _cell(plan: WorldPlan, metric: str) -> str:
    if plan.status != "ok":
        return f'<span class="missed">{escape(plan.status)}</span>'
    value, latency = plan.metrics[metric], plan.metrics[LATENCY]
    missed = "" if plan.meets_slo else ' <span class="missed">missed</span>'
    told = f"{exact(value, f'{value:.4g}')}{missed}"
    return f'{told}<span class="iv">TPOT {exact(latency, f"{1e3 * latency:.3g}")} ms</span>'
