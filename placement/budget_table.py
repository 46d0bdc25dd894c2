"""The map of where replicas pay, as a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.units import MILLI
from placement.budget import Budgets, BudgetTimes

if TYPE_CHECKING:
    from rich.console import Console


def print_budgets(console: Console, budgets: Budgets) -> None:
    """Print step time and gain by tokens per GPU and redundant experts, what each takes, and the recommendation."""
    from rich.box import SIMPLE
    from rich.table import Table

    sizes = budgets.sizes()
    least = sizes[0]
    title = f"step time in ms by redundant experts, held-out loads, and the gain in % over {least}; * is recommended"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("tokens", justify="right", no_wrap=True, min_width=6)
    table.add_column("dispatch")
    for budget in sizes:
        table.add_column(str(budget), justify="right", no_wrap=True)
    for row in budgets.rows:
        cells = (_cell(row, budget) for budget in sizes)
        table.add_row(str(row.tokens_per_rank), row.mode.replace("_", " "), *cells)
    taken = (f"{budgets.room[budget].replica_bytes / 1e9:.1f} GB" for budget in sizes)
    table.add_row("", "replicas take", *taken)
    console.print(table)
    for room in budgets.room.values():
        if room.infeasible is not None:
            console.print(f"does not fit: {room.infeasible}")
    for tokens, reason in budgets.unpriced.items():
        console.print(f"not priced at {tokens} tokens per GPU: {reason}")
    for row in budgets.rows:
        if row.left_out:
            left = ", ".join(map(str, row.left_out))
            why = next(iter(row.left_out.values()))
            console.print(
                f"not priced at {row.tokens_per_rank} tokens per GPU: {left} redundant experts (gains there are over "
                f"{min(row.step_s)}); the first: {why}"
            )
        if row.extrapolated:
            found = ", ".join(map(str, row.extrapolated))
            at = f"{row.tokens_per_rank} tokens per GPU"
            console.print(f"~ extrapolated beyond what was measured at {at}: {found} redundant experts")
    each = ", each held out in turn" if len(budgets.judged) > 1 else ""
    console.print(f"Budgets are judged on {', '.join(budgets.judged)}{each}.")
    console.print(budgets.text())


def _cell(row: BudgetTimes, budget: int) -> str:
    if budget in row.left_out:
        return "-"
    mark = ("*" if budget == row.recommended else "") + ("~" if budget in row.extrapolated else "")
    first = f"{mark}{row.step_s[budget].value / MILLI:.3g}"
    if budget in row.full:
        return f"{first}\ndoes not run"
    if budget == min(row.step_s):
        return f"{first}\n"
    gain = row.gain[budget]
    return f"{first}\n{100 * gain.low:+.1f}..{100 * gain.high:+.1f}"
