"""Where the time goes and what would help, for a person in a terminal."""

from __future__ import annotations

from typing import Any

from moesim.output.console import console
from moesim.output.explain_words import WHAT_IFS, saved, summary, title, transfer_summary
from moesim.units import human_bytes, human_seconds

# Operations below this share of a step are told together.
SMALL = 0.02
HOTTEST = 3


def print_explanation(found: dict[str, Any]) -> None:
    """A table of each typical step: its critical path, and what it would take otherwise. The rest is in the JSON."""
    from rich.table import Table

    out = console()
    for step in found["steps"]:
        if step["which"] != "typical":
            continue
        whole = step["step_s"]
        out.print(f"{title(step)}.")
        shown = Table()
        shown.add_column("critical path")
        for name in ("time", "share", "if free"):
            shown.add_column(name, justify="right")
        rows = sorted(step["critical_path_s"].items(), key=lambda item: -item[1])
        for name, seconds in rows:
            if seconds >= SMALL * whole:
                saves = step["without_operation"][name]["saves"]
                shown.add_row(name.replace("_", " "), human_seconds(seconds), f"{seconds / whole:.0%}", saved(saves))
        rest = sum(seconds for _, seconds in rows if seconds < SMALL * whole)
        if rest > 0:
            shown.add_row("other", human_seconds(rest), f"{rest / whole:.0%}", "")
        shown.add_section()
        for name, label in WHAT_IFS.items():
            change = step["what_if"][name]
            shown.add_row(label, human_seconds(change["step_s"]), "", saved(change["saves"]))
        out.print(shown)
        for line in (*summary(step), *_links(step)):
            out.print(line)
    if found["transfer"] is not None:
        for line in transfer_summary(found["transfer"]):
            out.print(line)
    for name, reason in found["not_priced"].items():
        out.print(f"Not explained: {name} ({reason}).")


def _links(step: dict[str, Any]) -> list[str]:
    if step["traffic"] is None:
        return []
    told = []
    for load in step["traffic"]["links"][:HOTTEST]:
        size = load["dispatch_bytes"] + load["combine_bytes"]
        told.append(f"{load['from']} to {load['to']} {human_bytes(size)} ({human_seconds(load['full_rate_s'])})")
    return [f"Busiest links, bytes and time at full rate ({step['traffic']['tag']}): {', '.join(told)}."]
