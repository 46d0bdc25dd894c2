"""Published rows and ratios for people (text or Markdown) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from validate.pages import GeneratedPart
from validate.published.predict import Predicted, SetBeside

MAKE = "run `moesim validate published --update` and commit what it writes"
PART = GeneratedPart("moesim validate published --update", MAKE)
ROWS = ("row", "what ran", "GPU", "reported", "predicted", "90 % interval", "unit", "error", "note")
RATIOS = ("pair", "what", "reported", "predicted", "error", "sign")


def figure(value: float) -> str:
    """One decimal below 1,000, whole numbers from there on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def signed(value: float | None) -> str:
    """A relative error in per cent with its sign."""
    return "-" if value is None else f"{100 * value:+.0f} %"


def quotient(value: float) -> str:
    """Two decimals; three where two would hide on which side of 1 it lies."""
    return f"{value:.3f}" if round(value, 2) == 1.0 else f"{value:.2f}"


def row_cells(one: Predicted) -> tuple[str, ...]:
    """A row of the table, as `ROWS` names the columns."""
    row = one.row
    note = "calibrated on it" if row.calibrated and one.value is not None else ""
    predicted = "-" if one.value is None else figure(one.value)
    span = "" if one.span is None else f"{figure(one.span[0])} to {figure(one.span[1])}"
    reported, error = figure(row.reported), signed(one.error)
    return row.id, row.what, row.gpu, reported, predicted, span, row.unit, error, note or one.reason


def ratio_cells(one: SetBeside) -> tuple[str, ...]:
    """A ratio of the table, as `RATIOS` names the columns."""
    ratio = one.ratio
    predicted = "-" if one.predicted is None else quotient(one.predicted)
    sign = one.sign + (", calibrated" if one.calibrated and one.predicted is not None else "")
    return f"{ratio.over}/{ratio.under}", ratio.what, quotient(one.reported), predicted, signed(one.error), sign


def text(found: Sequence[Predicted], ratios: Sequence[SetBeside], total: dict[str, Any]) -> str:
    """Both tables in columns, then the summary, why signs are wrong, and what rows do not state."""
    parts = [_columns(ROWS, [row_cells(one) for one in found])]
    if ratios:
        parts.append(_columns(RATIOS, [ratio_cells(one) for one in ratios]))
    return "\n\n".join([*parts, "\n".join([*summary_lines(total), *_why(ratios)]), "\n".join(unstated(found))]).strip()


def markdown(found: Sequence[Predicted], ratios: Sequence[SetBeside], total: dict[str, Any]) -> str:
    """The same in Markdown."""
    lines = [*_pipes(ROWS, [row_cells(one) for one in found]), ""]
    if ratios:
        lines += [*_pipes(RATIOS, [ratio_cells(one) for one in ratios]), ""]
    lines += [f"- {line}" for line in [*summary_lines(total), *_why(ratios)]]
    notes = unstated(found)
    if notes:
        lines += ["", "What the rows do not state, and what is not priced:", "", *(f"- {line}" for line in notes)]
    return "\n".join(lines)


def summary_lines(total: dict[str, Any]) -> list[str]:
    """How many rows are priced, how far off they are, and how many ratios have the right sign."""
    lines = [f"{total['priced']} of {total['rows']} rows priced; {total['calibrated']} gave a figure and do not count."]
    for name, one in total["errors"].items():
        if one["n"]:
            lines.append(
                f"{name}: {one['n']} rows, mean error {one['mape']:.0%}, median {one['median']:.0%}, "
                f"median signed {one['bias']:+.0%}."
            )
    spans = total["intervals"]
    if spans["rows"]:
        lines.append(f"intervals: {spans['inside']} of {spans['rows']} hold what was reported.")
    signs = total["signs"]
    if sum(signs.values()):
        lines.append(
            f"ratios: {signs['right']} with the right sign ({total['signs_calibrated']} rest on a calibrated row), "
            f"{signs['wrong']} with the wrong one "
            f"({total['unexplained']} of them unexplained), {signs['open']} within their source's scatter, "
            f"{signs['not priced']} not priced."
        )
    sizes = total["sizes"]
    if sizes["n"]:
        lines.append(
            f"sizes of {sizes['n']} ratios, as far as they rest on no calibrated row: mean error {sizes['mape']:.0%}, "
            f"median {sizes['median']:.0%}."
        )
    return lines


def unstated(found: Sequence[Predicted]) -> list[str]:
    """What scenarios had to assume and what they leave out, each text once with its rows."""
    by_text: dict[str, list[str]] = {}
    for one in found:
        for kind, said in (("assumed", one.row.assumed), ("left out", one.row.left_out)):
            for text in said:
                by_text.setdefault(f"{kind}: {text}", []).append(one.row.id)
    return [f"{named(rows)}, {text}." for text, rows in by_text.items()]


def named(rows: Sequence[str]) -> str:
    """Row ids as people list them: three and more that follow each other as a range."""
    runs: list[list[str]] = []
    for row in rows:
        follows = runs and runs[-1][-1][:1] == row[:1] and row[1:].isdigit() and runs[-1][-1][1:].isdigit()
        if follows and int(row[1:]) == int(runs[-1][-1][1:]) + 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(run) for run in runs)


def _why(ratios: Sequence[SetBeside]) -> list[str]:
    """What was checked of wrong signs, each text once."""
    by_text: dict[str, list[str]] = {}
    for one in ratios:
        if one.sign == "wrong":
            text = one.ratio.why or "not explained"
            by_text.setdefault(text, []).append(f"{one.ratio.over}/{one.ratio.under}")
    return [f"wrong sign, {', '.join(pairs)}: {text}" for text, pairs in by_text.items()]


def as_json(found: Sequence[Predicted], ratios: Sequence[SetBeside], total: dict[str, Any]) -> dict[str, Any]:
    """JSON-ready: every row and ratio with its figures, and the summary."""
    return {
        "schema_version": 1,
        "rows": [
            {
                "id": one.row.id,
                "what": one.row.what,
                "source": one.row.source,
                "gpu": one.row.gpu,
                "gpus": one.row.gpus,
                "metric": one.row.metric,
                "unit": one.row.unit,
                "reported": one.row.reported,
                "predicted": one.value,
                "error": one.error,
                "interval": None if one.span is None else {"low": one.span[0], "high": one.span[1], "level": 0.9},
                "step_s": one.step_s,
                "reported_step_s": one.row.step_s,
                "calibrated": one.row.calibrated,
                "reason": one.reason or None,
                "assumed": list(one.row.assumed),
                "left_out": list(one.row.left_out),
            }
            for one in found
        ],
        "ratios": [
            {
                "over": one.ratio.over,
                "under": one.ratio.under,
                "kind": one.ratio.kind,
                "what": one.ratio.what,
                "reported": one.reported,
                "predicted": one.predicted,
                "error": one.error,
                "sign": one.sign,
                "calibrated": one.calibrated,
                "why": one.ratio.why or None,
            }
            for one in ratios
        ],
        "summary": total,
    }


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cells[index]) for cells in (head, *rows)) for index in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _pipes(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]
