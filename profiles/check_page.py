"""The page of `profile check --report`: one HTML file, in the look of the run report, that opens offline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from moesim import __version__
from moesim.output import page
from moesim.output.charts import BEST, LIMIT, OTHER
from moesim.output.page import details, exact, key, section, table
from profiles import check_pictures as pictures
from profiles.check_pictures import percent
from profiles.check_tables import Figures, LeftOut, TableFigures, by_family, by_system, by_table, families, worst
from profiles.every_second import LEAST_POINTS, LIMITS
from profiles.raw_tables import TOGETHER

# What was left out and how, in words; the rules themselves are in `every_second` and `skew_out`.
PROTOCOLS = {
    "every-second": (
        "Every second measured size was left out and predicted from the rest. Rows that agree in every column but the "
        f"size (message size, token count or sequence length) make a group; groups of at least {LEAST_POINTS} sizes, "
        "repeated sizes by their median, are sorted, the odd positions are left out and the last is kept. The "
        "prediction sees the kept rows alone. The 90 % intervals are as wide as the errors of points with such a gap "
        "between their neighbours, found by the same halving once more, inside the kept rows; a simulation draws with "
        "one figure for each family instead."
    ),
    "distribution": (
        "Every skewed distribution of tokens over experts was left out of its table and predicted from the nearest "
        "other one: its measured time at the same sizes, times the ratio of the two in the model of touched weights, "
        "products and activations. No parameter was fitted. There is no rival and no interval here: plain "
        "interpolation over sizes cannot tell distributions apart."
    ),
    "inner": (
        "Every second inner point of each curve, and every second inner line of each grid, was left out and predicted "
        "from the others. Experts: physics is fitted on balanced rows, and skewed rows that the fit has not seen are "
        "predicted as histograms. These are the errors from which the profile's intervals are made (the 68 % quantile "
        "is taken as one standard deviation)."
    ),
}


@dataclass(frozen=True)
class Check:
    """What the page says of itself. source: name and version of the package of tables, or the profile's folder."""

    protocol: str
    source: str
    systems: tuple[str, ...]
    date: str
    command: str


def tables_page(found: Sequence[LeftOut], check: Check) -> str:
    """The whole page of a check over tables."""
    lines, systems, tables = _ordered(by_family(found)), _ordered(by_system(found)), by_table(found)
    judged = [line for line in lines if line.judged]
    head = f"{_head(check)}{_verdict(judged)}" + _tiles(
        [
            ("systems", f"{len(check.systems)}", ", ".join(check.systems)),
            ("tables", f"{len({one.table for one in found}):,}", "each time column counts as one"),
            ("points left out", f"{sum(len(one.size) for one in found):,}", "predicted from what was kept"),
            (
                "within limits",
                f"{sum(line.holds for line in judged)} of {len(judged)}",
                _ASKED[check.protocol],
            ),
        ]
    )
    parts = [
        section("families", "By family, over all systems", _figures(lines), lead=_READING[check.protocol]),
        section("errors", "How the errors are distributed", _curves(found, lines), lead=_CURVES),
        _sizes(found, lines),
        section("systems", "By system", _systems(check.systems, systems), lead=_SYSTEMS),
        section("worst", "The worst tables", _worst(tables)),
        section("tables", "Every table", _tables(tables), lead="By family, largest median error first."),
        _about(check),
    ]
    return page.page(_title(check), head, parts, _foot())


def profile_page(errors: Mapping[str, Mapping[str, float]], check: Check) -> str:
    """The whole page of a check of one profile: errors by family, as `leave_out.errors_of` gives them."""
    ordered = sorted(errors.items(), key=lambda item: item[1]["median"], reverse=True)
    rows = [
        [
            escape(name.replace("_", " ")),
            *(_share(error[column]) for column in ("median", "p68", "p90")),
            exact(error["points"], f"{error['points']:,.0f}"),
        ]
        for name, error in ordered
    ]
    head = _head(check) + _tiles(
        [
            ("system", ", ".join(check.systems), ""),
            ("families", f"{len(rows)}", ""),
            ("points left out", f"{sum(error['points'] for error in errors.values()):,.0f}", ""),
        ]
    )
    drawn = pictures.whiskers(
        [(name.replace("_", " "), error["median"], error["p68"], error["p90"]) for name, error in ordered]
    )
    scrolled = f'<div class="scroll"><div style="min-width:760px">{drawn}</div></div>'
    lead = "The dot is the median, the thick bar ends at the 68 % quantile, the thin one at the 90 % quantile."
    parts = [
        section("families", "By family", table(["family", "median", "68 %", "90 %", "points"], rows)),
        section("errors", "How far the errors reach", scrolled, lead=lead),
        _about(check),
    ]
    return page.page(_title(check), head, parts, _foot())


_READING = {
    "every-second": (
        "Error is |predicted / measured − 1|. <i>Covered</i> is the share of left-out points inside their 90 % "
        "interval, <i>half width</i> how far that interval reaches, on average. A family holds when its median and its "
        "90 % quantile are within their limits and its median is below that of plain log-log interpolation."
    ),
    "distribution": (
        "Error is |predicted / measured − 1|. Each row is a distribution that was predicted from another one; it holds "
        "when its median is within the limit."
    ),
}
_ASKED = {"every-second": "median, 90 % quantile, better than log-log", "distribution": "median"}
_CURVES = (
    "The further left a curve, the smaller the errors. The dashed red lines stand at the limits; a curve keeps them "
    "when it passes above the red rings."
)
_SIZES = (
    "Each bar holds the points of a factor of four in size: nine tenths of them are within the light bar, half within "
    "the dark one, the line is the median. Above 1 is predicted too slow. What lies beyond 0.7 or 1.4 is drawn at the "
    "edge."
)
_SYSTEMS = "The limits are asked of all systems together; here each is held against them alone."


def _head(check: Check) -> str:
    words = {"every-second": "every second size", "distribution": "whole distributions", "inner": "every second point"}
    return (
        f'<p class="eyebrow">moesim profile check</p><h1>{escape(_title(check))}</h1>'
        f'<p class="lead">Left out: {words[check.protocol]}. {escape(check.source)}; {escape(check.date)}.</p>'
    )


def _title(check: Check) -> str:
    what = "of unmeasured distributions" if check.protocol == "distribution" else "between measured points"
    return f"How wrong prices {what} are: {', '.join(check.systems)}"


def _verdict(judged: Sequence[Figures]) -> str:
    missed = [line for line in judged if not line.holds]
    if not judged:
        return ""
    if not missed:
        told = f"Every one of the {len(judged)} judged groups is within its limits."
    else:
        told = "Missed: " + "; ".join(f"{escape(line.family)} ({_why(line)})" for line in missed) + "."
    tone, badge = ("no", "missed") if missed else ("good", "holds")
    return (
        f'<section class="verdict {tone}" id="verdict" aria-label="Verdict"><span class="badge">{badge}</span>'
        f"<p>{told}</p></section>"
    )


def _why(line: Figures) -> str:
    if math.isnan(line.median):
        return "none of its points could be priced"
    found = []
    if not line.median <= line.median_limit:
        found.append(f"median {_against(line.median, line.median_limit)}, limit {_limit(line.median_limit)}")
    if not line.p90 <= line.p90_limit:
        found.append(f"90\u00a0% quantile {_against(line.p90, line.p90_limit)}, limit {_limit(line.p90_limit)}")
    if not math.isnan(line.log_log_median) and not line.median < line.log_log_median:
        found.append(f"median {percent(line.median)}, no better than log-log's {percent(line.log_log_median)}")
    return " and ".join(found)


def _tiles(shown: Sequence[tuple[str, str, str]]) -> str:
    tiles = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>'
        for name, value, note in shown
    )
    return f'<dl class="tiles">{tiles}</dl>'


_COLUMNS = ("points", "median", "90 %", "log-log median", "log-log 90 %", "covered", "half width", "limits", "verdict")


def _cells(line: Figures) -> list[str]:
    unpriced = f'<span class="iv">{line.unpriced:,} unpriced</span>' if line.unpriced else ""
    return [
        exact(line.points, f"{line.points:,}") + unpriced,
        _share(line.median, line.median_limit),
        _share(line.p90, line.p90_limit),
        *(_share(value) for value in (line.log_log_median, line.log_log_p90, line.covered_90)),
        "–" if math.isnan(line.mean_half_width) else exact(line.mean_half_width, f"±{percent(line.mean_half_width)}"),
        *_limits(line),
    ]


def _filled(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns in which any row has something."""
    kept = [place for place in range(len(head)) if any(row[place] != "–" for row in rows)]
    return [head[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _limits(line: Figures) -> list[str]:
    if not line.judged:
        return ["–", ""]
    most = _limit(line.median_limit) + (f", {_limit(line.p90_limit)}" if math.isfinite(line.p90_limit) else "")
    return [most, '<span class="met">holds</span>' if line.holds else '<span class="missed">missed</span>']


def _figures(lines: Sequence[Figures]) -> str:
    head, rows = _filled(["family", *_COLUMNS], [[_family(line), *_cells(line)] for line in lines])
    return table(head, rows, classes=["base" if line.judged and not line.holds else "" for line in lines])


def _family(line: Figures) -> str:
    within = TOGETHER.get(line.family)
    tables = f"{line.tables} table{'s' if line.tables != 1 else ''}"
    part = f"part of {within}, " if within else ""
    return escape(line.family) + f'<span class="under">{part}{tables}</span>'


def _curves(found: Sequence[LeftOut], lines: Sequence[Figures]) -> str:
    grouped = families(found)
    panels = "".join(
        pictures.error_curves(escape(line.family), line, grouped[line.family]) for line in lines if _own_panel(line)
    )
    rival = any(not math.isnan(line.log_log_median) for line in lines)
    legend = [("moesim", BEST), *([("plain log-log interpolation", OTHER)] if rival else []), ("limit", LIMIT)]
    return key(legend) + f'<div class="three">{panels}</div>'


def _ordered(lines: Sequence[Figures]) -> list[Figures]:
    """Judged families first, in the order of their limits, each with its parts behind it."""
    names = list(LIMITS)

    def place(line: Figures) -> tuple[int, bool]:
        whole = TOGETHER.get(line.family, line.family)
        return (names.index(whole) if whole in names else len(names), whole != line.family)

    return sorted(lines, key=place)


def _own_panel(line: Figures) -> bool:
    """Judged groups, and those that belong to none."""
    return line.judged or line.family not in TOGETHER


def _sizes(found: Sequence[LeftOut], lines: Sequence[Figures]) -> str:
    grouped = families(found)
    alone = {one.family for one in found}  # prompts and caches are different axes: one picture each, none of both
    names = [line.family for line in lines if line.family in alone]
    panels = [pictures.by_size(escape(name), grouped[name]) for name in names]
    if not any(panels):
        return ""
    body = f'<div class="three">{"".join(panels)}</div>'
    return section("sizes", "Where along the size they are made", body, lead=_SIZES)


def _systems(names: Sequence[str], lines: Sequence[Figures]) -> str:
    shown = ""
    for name in names:
        own = [line for line in lines if line.system == name]
        shown += f'<h3 style="margin-top:18px">{escape(name)}</h3>{_figures(own)}'
    return shown


def _worst(lines: Sequence[TableFigures]) -> str:
    found = worst(lines)
    if not found:
        return "<p>No table has enough points to be named.</p>"
    named = ", ".join(f"<code>{escape(line.table)}</code> ({percent(line.figures.median)})" for line in found[:3])
    return f"<p>Largest median error: {named}.</p>" + _table_of(found)


def _tables(lines: Sequence[TableFigures]) -> str:
    names = dict.fromkeys(line.figures.family for line in lines)
    shown = ""
    for name in sorted(names):
        own = [line for line in lines if line.figures.family == name]
        shown += details(f"{name}: {len(own)} table{'s' if len(own) != 1 else ''}", _table_of(own))
    return shown


def _table_of(lines: Sequence[TableFigures]) -> str:
    columns = ("points", "median", "90 %", "log-log median", "log-log 90 %", "covered", "half width")
    rows = []
    for line in lines:
        system, _, rest = line.table.partition("/")
        name = f'{escape(rest)}<span class="under">{escape(system)}, {escape(line.figures.family)}</span>'
        rows.append([name, *_cells(line.figures)[:-2]])
    return table(*_filled(["table", *columns], rows))


def _about(check: Check) -> str:
    rows = [
        ("protocol", PROTOCOLS[check.protocol]),
        ("measurements", check.source),
        ("systems", ", ".join(check.systems)),
        ("moesim", __version__),
        ("date", check.date),
    ]
    listed = "".join(f"<li><b>{escape(name)}</b>: {escape(value)}</li>" for name, value in rows)
    return section(
        "check", "What was left out, and how", f"<ul>{listed}</ul><pre><code>{escape(check.command)}</code></pre>"
    )


def _foot() -> str:
    return f"Written by moesim {__version__}. This page loads nothing from elsewhere."


def _share(value: float, limit: float = math.nan) -> str:
    return "–" if math.isnan(value) else exact(value, _against(value, limit))


def _against(value: float, limit: float) -> str:
    """A share with as many digits as tell it from its limit."""
    shown = percent(value)
    return f"{value * 100:.4g}\u00a0%" if value > limit and float(shown[:-2]) <= limit * 100 else shown


def _limit(value: float) -> str:
    return f"{value * 100:g}\u00a0%"
