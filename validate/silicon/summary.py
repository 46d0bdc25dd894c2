"""What is told of a set of predictions: figures for machines, and the Markdown of docs/accuracy.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from validate.silicon.attribution import ACROSS, Attribution, attributed, causes_in_order
from validate.silicon.disagg_score import disagg_score
from validate.silicon.gap import Gap, gap_section, gaps
from validate.silicon.goals import Goal, goals
from validate.silicon.intervals import Width, calibrate, judged
from validate.silicon.price import Prediction
from validate.silicon.score import markdown_table, plain, score_of, score_table, share, split_tables
from validate.silicon.scored import FIGURES, HALVES, Half, halves

# How to read each part, for the docs and the page alike; plain text.
READ_CAUSES = (
    "Share: of the predicted figure, mean over rows. Families of costs and the front end make up the whole; "
    "waiting (before the own prompt is read: queueing) and beside prompts (steps that read other prompts) are made "
    "of the families' time and stand across them. What overlap hides is in no share. Dearer: by how much a cause would "
    "have to be dearer, with its standard error, for predictions to come nearest to what was measured (robust "
    "regression of ln(measured / predicted) on the shares; causes under 1 % left out); where the standard error is as "
    "large, nothing can be told. It says where errors and shares go together, which is a correlation and no cause "
    "proven; nothing is fitted to it, and what it says of odd cells is not used at all."
)
READ_INTERVALS = (
    "Intervals reach from predicted / factor to predicted x factor, made on even cells alone (conformal: the 90 % "
    "quantile of |ln(measured / predicted)|, over the prediction's own sigma where that is narrower at equal "
    "coverage). "
    "Even cells are held to the quantile of the others, each left out in turn; odd ones to that of all even cells. "
    "Factors are geometric means."
)
READ_SPLITS = (
    "Of each part: MAPE, median of the absolute errors, median signed error. Attention DP: over 1; EP: over 1 without "
    "it; TP: neither. Parts of few rows stand together as others; of fewer than five rows nothing is told but their "
    "number."
)


@dataclass(frozen=True)
class Summary:
    """All that is told of predictions. widths: figure -> width of its intervals; causes: half -> figure -> causes.

    gaps: figure -> how much larger errors are on odd cells.
    """

    found: tuple[Prediction, ...]
    sides: Mapping[str, Half]
    score: Mapping[str, Any]
    goals: tuple[Goal, ...]
    causes: Mapping[str, Mapping[str, Attribution]]
    widths: Mapping[str, Width]
    intervals: Mapping[str, Any]
    gaps: Mapping[str, Gap]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "score": dict(self.score),
            "goals": [goal.as_dict() for goal in self.goals],
            "causes": {half: {figure: one.as_dict() for figure, one in of.items()} for half, of in self.causes.items()},
            "intervals": dict(self.intervals),
            "gaps": {name: one.as_dict() for name, one in self.gaps.items()},
        }


def summarized(found: Sequence[Prediction]) -> Summary:
    """The score, causes and intervals of predictions of measured rows."""
    sides = halves(found)
    scored = {**score_of(sides), "disaggregated": disagg_score(found)}
    widths = calibrate(sides["even"])
    return Summary(
        tuple(found),
        sides,
        scored,
        tuple(goals(found, scored)),
        {half: attributed(side) for half, side in sides.items()},
        widths,
        judged(widths, sides),
        gaps(sides),
    )


def markdown(told: Summary) -> str:
    """The generated part of docs/accuracy.md."""
    parts = [score_table(told.score)]
    if told.gaps:
        parts += ["### Between the halves", gap_section(told.gaps, told.sides)]
    parts += ["### By part", READ_SPLITS, split_tables(told.score)]
    if any(one.rows for of in told.causes.values() for one in of.values()):
        parts += ["### By cause", READ_CAUSES, causes_table(told)]
    if told.intervals:
        parts += ["### Intervals", READ_INTERVALS, intervals_table(told)]
    return "\n\n".join(parts)


def cause_cells(told: Summary) -> list[list[str]]:
    """Cause, then for each figure and half its mean share, and by how much it would have to be dearer."""
    names = list(dict.fromkeys(name for figure in ACROSS for name in causes_in_order(figure)))
    names.sort(key=lambda name: name in ACROSS.values())
    return [
        [name, *(cell for figure in ACROSS for half in HALVES for cell in _cause(told.causes[half][figure], name))]
        for name in names
    ]


def _cause(one: Attribution, name: str) -> tuple[str, str]:
    more = one.more.get(name)
    return share(one.shares.get(name)), "-" if more is None else f"{more[0]:+.0%} ± {more[1]:.0%}"


def cause_head() -> list[str]:
    """The head over `cause_cells`."""
    return [
        "cause",
        *(f"{FIGURES[f]}, {half}: {name}" for f in ACROSS for half in HALVES for name in ("share", "dearer")),
    ]


def causes_table(told: Summary) -> str:
    """Causes as a Markdown table, and a line on what they account for."""
    return f"{markdown_table(cause_head(), cause_cells(told))}\n\n{explained(told)}"


def explained(told: Summary) -> str:
    """What the causes, all dearer by what they would have to be, leave of the error."""
    lines = [
        f"{FIGURES[figure]}, {half} cells: {one.before:.3f} to {one.after:.3f}"
        for figure in ACROSS
        for half in HALVES
        if (one := told.causes[half][figure]).before is not None and one.after is not None
    ]
    return f"Median |ln(measured / predicted)| with every cause dearer by that: {'; '.join(lines) or '-'}."


def interval_cells(told: Summary) -> list[list[str]]:
    """Figure, then for each half the share of measurements inside, and the factor; and whether sigma scales it."""
    return [
        [
            FIGURES[figure],
            *(cell for half in HALVES for cell in (share(one[half]["share"]), plain(one[half]["factor"]))),
            "by sigma" if one["normalised"] else "one for all",
        ]
        for figure, one in told.intervals.items()
    ]


def interval_head() -> list[str]:
    """The head over `interval_cells`."""
    return ["90 % interval", *(f"{half}: {name}" for half in HALVES for name in ("inside", "factor")), "width"]


def intervals_table(told: Summary) -> str:
    """Intervals as a Markdown table."""
    return markdown_table(interval_head(), interval_cells(told))
