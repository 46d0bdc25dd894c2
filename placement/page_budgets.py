"""The section of a placement's page on replica budgets: what replicas gain in step time, by how many there are."""

from __future__ import annotations

from html import escape

from moesim.output.charts import INK, MUTED, Axis, Curve, Mark, axis, figure, frame, line, mark, polyline, text
from moesim.output.page import exact, key, number, section, table
from placement.budget import Budgets, BudgetTimes

# One colour for each batch size, light to dark with the batch (after ColorBrewer's YlGnBu).
_COLOURS = ("#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#0c2c84")


def budgets_section(budgets: Budgets) -> str:
    """Gain over the smallest budget at each batch size, with intervals, as a picture and a table."""
    least = budgets.sizes()[0]
    lead = (
        f"{budgets.solver} with each number of redundant experts, fitted to one part of the loads and judged on "
        f"{', '.join(budgets.judged)}: the same loads, steps and cost parameters for all, so gains over {least} are "
        "paired. Bars are 90 % intervals. A ring (in the table a star) is what is "
        "recommended: the smallest budget that no larger one is sure to beat."
    )
    left = (
        "".join(
            f'<p class="note">Not priced at {tokens} tokens per rank: {escape(reason)}</p>'
            for tokens, reason in budgets.unpriced.items()
        )
        + "".join(
            f'<p class="note">Does not fit: {escape(room.infeasible)}</p>'
            for room in budgets.room.values()
            if room.infeasible is not None
        )
        + "".join(
            f'<p class="note">Not priced at {row.tokens_per_rank} tokens per rank: {budget} redundant experts; '
            f"{escape(why)}</p>"
            for row in budgets.rows
            for budget, why in row.left_out.items()
        )
    )
    body = f"<p>{escape(budgets.text())}</p>{_picture(budgets, least)}{_table(budgets)}{left}"
    return section("budgets", "Step time by replica budget", body, lead=escape(lead))


def _coloured(budgets: Budgets) -> list[tuple[BudgetTimes, str]]:
    """Rows by batch size, each with its colour: the darker half of the scale where there are few."""
    rows = sorted(budgets.rows, key=lambda row: row.tokens_per_rank)
    first = max(0, len(_COLOURS) - len(rows))
    return [(row, _COLOURS[min(first + at, len(_COLOURS) - 1)]) for at, row in enumerate(rows)]


def _picture(budgets: Budgets, least: int) -> str:
    rows = _coloured(budgets)
    sizes = sorted({budget for row, _ in rows for budget in row.gain})
    ends = [100 * end for row, _ in rows for one in row.gain.values() for end in (one.low, one.high)]
    y = axis(min(0.0, *ends), max(0.0, *ends), 286, 20, ticks=6)
    x = Axis(
        sizes[0] - 0.04 * (sizes[-1] - sizes[0] or 1),
        sizes[-1] + 0.04 * (sizes[-1] - sizes[0] or 1),
        60,
        820,
        tuple((float(size), str(size)) for size in sizes),
    )
    body = frame(x, y, "redundant experts of a layer", f"% less step time than with {least}")
    body.append(line(x.start, y.at(0.0), x.end, y.at(0.0), stroke=MUTED))
    told = []
    for index, (row, colour) in enumerate(rows):
        aside = 0.006 * (sizes[-1] - sizes[0]) * (index - (len(rows) - 1) / 2)  # so that bars do not hide each other
        ordered = sorted(row.gain.items())
        xs, ys = zip(*((budget + aside, 100 * gain.value) for budget, gain in ordered), strict=True)
        body.append(polyline(Curve(f"{row.tokens_per_rank} tokens per rank", colour, xs, ys), x, y))
        for budget, gain in ordered:
            span = (100 * gain.low, 100 * gain.high)
            said = (
                f"{row.tokens_per_rank} tokens per rank, {budget} redundant experts: {number(100 * gain.value)} % "
                f"({number(span[0])} to {number(span[1])}){', does not run' if budget in row.full else ''}"
            )
            told.append(said)
            shape = "ring" if budget == row.recommended else "dot"
            body.append(mark(Mark(budget + aside, 100 * gain.value, said, colour, shape, y_range=span), x, y))
    if len(sizes) == 1:
        body.append(text((x.start + x.end) / 2, 40, "one budget alone: nothing to compare", anchor="middle", fill=INK))
    drawn = figure(840, 334, f"Gain in step time by redundant experts. {'; '.join(told)}", body)
    return f'<div class="scroll"><div style="min-width:560px">{drawn}</div></div>' + key(
        [(f"{row.tokens_per_rank} tokens per rank", colour) for row, colour in rows]
    )


def _table(budgets: Budgets) -> str:
    rows, sizes = [], budgets.sizes()
    for row, _ in _coloured(budgets):
        cells = [str(row.tokens_per_rank), escape(row.mode.replace("_", " "))]
        for budget in sizes:
            if budget in row.left_out:
                cells.append("\u2013")
                continue
            time = row.step_s[budget]
            shown = f"{exact(time.value, f'{1e3 * time.value:.4g}')}"
            if budget in row.full:
                shown += '<span class="iv">does not run</span>'
            elif budget != min(row.step_s):
                gain = row.gain[budget]
                shown += f'<span class="iv">{100 * gain.low:+.1f} to {100 * gain.high:+.1f} %</span>'
            cells.append(f"* {shown}" if budget == row.recommended else shown)
        rows.append(cells)
    taken = [f"{room.replica_bytes / 1e9:.1f} GB" for budget, room in budgets.room.items() if budget in sizes]
    rows.append(["", "taken on a GPU", *taken])
    return table(["tokens per rank", "dispatch", *(f"{budget}, ms" for budget in sizes)], rows)
