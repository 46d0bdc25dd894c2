"""The page of `validate silicon --report`: one HTML file, in the look of the run report, that opens offline.

It shows measurements, which belong to the package that ships them: it is made locally and not committed. Of odd cells
it shows sums, curves and unnamed points, never which row is which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from textwrap import shorten

import numpy as np

from moesim import __version__
from moesim.files import write_text
from moesim.output import page
from moesim.output.page import details, exact, key, number, section
from validate.accuracy import each_choice
from validate.silicon import pictures
from validate.silicon.disagg_score import kind
from validate.silicon.rows import choice_groups
from validate.silicon.score import NAMES, TOLD, share, split_cells, split_head
from validate.silicon.scored import FIGURES, HALVES, SPLITS, Half
from validate.silicon.summary import (
    READ_CAUSES,
    READ_INTERVALS,
    READ_SPLITS,
    Summary,
    cause_cells,
    cause_head,
    explained,
    interval_cells,
    interval_head,
)

_KEY = [(f"{half} cells ({'blind' if half == 'odd' else 'calibrated'})", pictures.COLOURS[half]) for half in HALVES]
# Upper ends of the bins of regret, and lower ends of those of rank correlation.
_REGRET = (0.0, 0.01, 0.03, 0.05, 0.1)
_ORDER = (0.95, 0.8, 0.5, 0.0)
WORST = 12


def write_page(path: Path, told: Summary, table: Path) -> None:
    """Write the page, whole or not at all. table: the rows that were priced. Raises BadInput."""
    write_text(path, silicon_page(told, str(table), datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")))


def silicon_page(told: Summary, source: str, date: str) -> str:
    """The whole page. source: where the measured rows come from."""
    head = (
        '<p class="eyebrow">moesim validate silicon</p><h1>How far predictions of measured serving runs are off</h1>'
        f'<p class="lead">{escape(source)}; {escape(date)}. Odd cells are blind: nothing was fitted to them.</p>'
        f"{_verdict(told)}{_tiles(told)}"
    )
    parts = [
        section("goals", "Goals", _goals(told), lead="On odd cells, where nothing else is said."),
        section("scatter", "Predicted against measured", _scatter(told), lead=_SCATTER),
        *(_split(told, split) for split in SPLITS),
        _causes(told),
        _intervals(told),
        section("choices", "Choosing between layouts", _choices(told), lead=_CHOICES),
        section("reasons", "What is not priced, and why", _reasons(told)),
    ]
    return page.page("moesim validate silicon", head, parts, f"Written by moesim {__version__}. {_FOOT}")


_FOOT = "This page loads nothing from elsewhere."
_SCATTER = (
    "Each point is a run. On the line it was predicted as measured; the dashed lines are 1.5 times off. Above the line "
    "of TTFT and TPOT, and below that of tokens/s/GPU, the prediction is too slow."
)
_CHOICES = (
    "Groups of runs that differ in nothing but their layout, three or more layouts each. Spearman: rank correlation of "
    "predicted and measured tokens/s/GPU. Regret: what the layout predicted best loses of the best measured."
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text."""
    return page.table([escape(cell) for cell in head], [[escape(cell) for cell in row] for row in rows])


def _verdict(told: Summary) -> str:
    judged = [goal for goal in told.goals if goal.met is not None]
    missed = [goal for goal in judged if not goal.met]
    if not judged:
        return ""
    words = f"{len(judged) - len(missed)} of {len(judged)} goals are met."
    if missed:
        words += " Missed: " + "; ".join(f"{goal.name} ({goal.figure}, {goal.target})" for goal in missed) + "."
    tone, badge = ("no", "missed") if missed else ("good", "met")
    return (
        f'<section class="verdict {tone}" id="verdict" aria-label="Verdict"><span class="badge">{badge}</span>'
        f"<p>{escape(words)}</p></section>"
    )


def _tiles(told: Summary) -> str:
    odd, even = (told.score[half] for half in HALVES)
    shown = [("rows, odd cells", f"{odd['rows']:,}", f"{odd['priced']:,} priced; even cells {even['rows']:,}")]
    for figure, name in FIGURES.items():
        note = f"median {share(odd[figure]['median'])}; even cells {share(even[figure]['mape'])}"
        shown.append((f"{name}, MAPE", share(odd[figure]["mape"]), note))
    tiles = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>'
        for name, value, note in shown
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _goals(told: Summary) -> str:
    verdicts = {
        True: '<span class="met">met</span>',
        False: '<span class="missed">missed</span>',
        None: "not\u00a0told\u00a0here",
    }
    rows = [
        [
            *(escape(cell) for cell in (goal.name, goal.target, goal.figure.replace("`", ""))),
            verdicts[goal.met],
            goal.rival or "–",
        ]
        for goal in told.goals
    ]
    classes = ["base" if goal.met is False else "" for goal in told.goals]
    shown = page.table(["goal", "target", "figure", "", "aiconfigurator"], rows, classes=classes)
    return shown + '<p class="note">aiconfigurator: on the 60 % of the odd rows that it prices.</p>'


def _scatter(told: Summary) -> str:
    panels = "".join(pictures.scatter(name, told.sides) for name in FIGURES)
    return f'{key(_KEY)}<div class="three">{panels}</div>' if panels else "<p>No row is priced and measured.</p>"


def _split(told: Summary, split: str) -> str:
    by = {half: {name: told.score[half][f"{name}_by"][split] for name in ("tpot", "ttft")} for half in HALVES}
    names = list(by[HALVES[0]]["tpot"])
    if not names:
        return ""
    drawn = "".join(
        pictures.bars(
            FIGURES[figure],
            names,
            {half: [by[half][figure][name]["mape"] for name in names] for half in HALVES},
            "mean absolute error (%)",
        )
        for figure in ("tpot", "ttft")
    )
    body = f'{key(_KEY)}<div class="two">{drawn}</div>{_table(split_head(split), split_cells(told.score, split))}'
    lead = escape(READ_SPLITS) if split == next(iter(SPLITS)) else ""
    return section(f"by-{split}", f"By {NAMES[split]}", body, lead=lead)


def _causes(told: Summary) -> str:
    drawn = pictures.shares(told.causes)
    if not drawn:
        return ""
    scrolled = f'<div class="scroll"><div style="min-width:760px">{drawn}</div></div>'
    body = (
        f"{key(pictures.cause_colours())}{scrolled}{_table(cause_head(), cause_cells(told))}"
        f'<p class="note">{escape(explained(told))}</p>'
    )
    return section("causes", "By cause", body, lead=escape(READ_CAUSES))


def _intervals(told: Summary) -> str:
    if not told.intervals:
        return ""
    factors = {name: {half: one[half]["factor"] for half in HALVES} for name, one in told.intervals.items()}
    panels = "".join(pictures.within(name, told.sides, factors[name]) for name in factors)
    note = "Dotted: the factor of the intervals, on average; dashed red: 90 %."
    body = (
        f'{_table(interval_head(), interval_cells(told))}{key(_KEY)}<div class="three">{panels}</div>'
        f'<p class="note">{note}</p>'
    )
    return section("intervals", "Intervals", body, lead=escape(READ_INTERVALS))


def _choices(told: Summary) -> str:
    found = {half: _groups(side) for half, side in told.sides.items()}
    if not any(found.values()):
        return "<p>No group of three or more layouts is priced and measured.</p>"
    rows = [
        [
            f"{half} cells",
            f"{told.score[half]['choices']['groups']}",
            *(
                "–" if (value := told.score[half]["choices"][name]) is None else exact(value, shown(value))
                for name, shown in (("spearman", lambda v: f"{v:.2f}"), ("regret", share))
            ),
        ]
        for half in HALVES
    ]
    drawn = pictures.bars(
        "Rank correlation",
        [*(f"{low:g} and more" for low in _ORDER), "below 0"],
        {half: _bins([-order for order, _, _ in groups], [-low for low in _ORDER]) for half, groups in found.items()},
        "% of groups",
    ) + pictures.bars(
        "Regret",
        ["none", *(f"up to {high:.0%}" for high in _REGRET[1:]), f"over {_REGRET[-1]:.0%}"],
        {half: _bins([lost for _, lost, _ in groups], _REGRET) for half, groups in found.items()},
        "% of groups",
    )
    return (
        page.table(["", "groups", "mean Spearman", "mean regret"], rows)
        + f'{key(_KEY)}<div class="two">{drawn}</div>'
        + _worst(told.sides["even"], found["even"])
    )


def _groups(side: Half) -> list[tuple[float, float, list[int]]]:
    """Rank correlation, regret and rows of each choice group of a half."""
    groups = [group for group in choice_groups(side.rows).values() if len(group) >= 3]
    rate, true_rate = (of["tokens_per_s_per_gpu"] for of in (side.predicted, side.measured))
    each = each_choice(groups, rate, true_rate)
    return [(order, lost, group) for (order, lost), group in zip(each, groups, strict=True)]


def _bins(values: Sequence[float], ends: Sequence[float]) -> list[float | None]:
    """Share of the values at most each end and above the one before it, and above the last; None without values."""
    if not values:
        return [None] * (len(ends) + 1)
    places = np.searchsorted(np.asarray(ends), np.asarray(values) - 1e-12, side="left")
    counts = np.bincount(places, minlength=len(ends) + 1)
    return [float(count) / len(values) for count in counts]


def _worst(side: Half, groups: Sequence[tuple[float, float, list[int]]]) -> str:
    """The even groups with the most regret; those of odd cells are not told one by one."""
    rate, true_rate = (of["tokens_per_s_per_gpu"] for of in (side.predicted, side.measured))
    rows = []
    for order, lost, group in sorted(groups, key=lambda one: -one[1])[:WORST]:
        if lost <= 0.0:
            break
        first = side.rows[group[0]]
        chosen, best = (max(group, key=lambda at, of=of: float(of[at])) for of in (rate, true_rate))  # type: ignore[misc]
        where = f"{first.model}, {first.system}, {first.engine}"
        rows.append(
            [
                f"{where}, {first.isl}/{first.osl}, {first.concurrency} in flight",
                f"{order:.2f}",
                share(lost),
                _layout(side, chosen, float(true_rate[chosen])),
                _layout(side, best, float(true_rate[best])),
            ]
        )
    if not rows:
        return ""
    head = ["group", "Spearman", "regret", "predicted best", "measured best"]
    return details(f"Groups of even cells with the most regret: {len(rows)}", _table(head, rows))


def _layout(side: Half, at: int, rate: float) -> str:
    layout = side.rows[at].layout
    return f"TP{layout.tp} DP{layout.attention_dp} EP{layout.ep} ETP{layout.expert_tp}: {number(rate)} tokens/s/GPU"


def _reasons(told: Summary) -> str:
    names = list(dict.fromkeys(name for half in HALVES for name in told.score[half]["reasons"]))
    examples = {kind(one.reason): one.reason for side in told.sides.values() for one in side.counted if one.reason}
    rows = [
        [
            shorten(examples[name], 160, placeholder=" …"),
            *(f"{told.score[half]['reasons'].get(name, 0):,}" for half in HALVES),
        ]
        for name in names
    ]
    counted = {id(one) for side in told.sides.values() for one in side.counted}
    rest = Counter(
        _rest(one.row.aggregated, one.row.moe) for one in told.found if one.reason and id(one) not in counted
    )
    shown = (
        _table(["reason (of one row of its kind), rows that are scored", *(f"{half} cells" for half in HALVES)], rows)
        if rows
        else ""
    )
    shown = shown or "<p>Every row that is scored is priced.</p>"
    if rest:
        others = [[name, f"{count:,}"] for name, count in rest.most_common()]
        shown += _table(["not priced among rows that are not scored", "rows"], others)
    return shown + f'<p class="note">{len(told.found):,} rows in all; parts of fewer than {TOLD} rows are not told.</p>'


def _rest(aggregated: bool, moe: bool) -> str:
    if not moe:
        return "dense models"
    return (
        "repeats, rows without a measurement, or with expert-TP and EP both over 1"
        if aggregated
        else "prefill and decode pools"
    )
