"""Published rows and ratios for people (text or Markdown) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from validate.published_predict import Predicted, SetBeside

ROWS = ("row", "what ran", "GPU", "reported", "predicted", "90 % interval", "unit", "error", "note")
RATIOS = ("pair", "what", "reported", "predicted", "sign")


def figure(value: float) -> str:
    """One decimal below 1,000, whole numbers from there on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def signed(value: float | None) -> str:
    """A relative error in per cent with its sign."""
    return "-" if value is None else f"{100 * value:+.0f} %"


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
    predicted = "-" if one.predicted is None else f"{one.predicted:.2f}"
    sign = one.sign + (", calibrated" if one.calibrated and one.predicted is not None else "")
    return f"{ratio.over}/{ratio.under}", ratio.what, f"{one.reported:.2f}", predicted, sign


def text(found: Sequence[Predicted], ratios: Sequence[SetBeside], total: dict[str, Any]) -> str:
    """Both tables in columns, then the summary and why signs are wrong."""
    parts = [_columns(ROWS, [row_cells(one) for one in found])]
    if ratios:
        parts.append(_columns(RATIOS, [ratio_cells(one) for one in ratios]))
    return "\n\n".join([*parts, "\n".join([*summary_lines(total), *_why(ratios)])])


def markdown(found: Sequence[Predicted], ratios: Sequence[SetBeside], total: dict[str, Any]) -> str:
    """The same in Markdown, with what each row assumed and leaves out."""
    lines = [*_pipes(ROWS, [row_cells(one) for one in found]), ""]
    if ratios:
        lines += [*_pipes(RATIOS, [ratio_cells(one) for one in ratios]), ""]
    lines += [f"- {line}" for line in [*summary_lines(total), *_why(ratios)]]
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
            f"ratios: {signs['right']} with the right sign, {signs['wrong']} with the wrong one "
            f"({total['unexplained']} of them unexplained), {signs['open']} within their source's scatter, "
            f"{signs['not priced']} not priced."
        )
    return lines


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
