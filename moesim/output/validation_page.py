"""The section of a page that says which validations on record cover the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from moesim.output.page import section, table
from moesim.output.validation import NEAREST, NOT_VALIDATED, VALIDATED

_WORDS = {VALIDATED: "validated", NEAREST: "not validated; the nearest records", NOT_VALIDATED: "not validated"}
MOST = 4  # records that are named of each claim


def validation_sections(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The section, from the list under `validation`; none where the verdict leans on nothing."""
    if not found:
        return []
    rows = []
    for one in found:
        names = [escape(name) for name in one["records"][:MOST]]
        more = len(one["records"]) - MOST
        if more > 0:
            names.append(f"and {more} more")
        missed = [f"missed: {escape(goal)}" for goal in one["missed"]]
        rows.append(
            [
                escape(one["of"]),
                escape(_WORDS.get(one["status"], one["status"])),
                "<br/>".join(names) or "\u2013",
                _error(one["error"]),
                "<br/>".join([*map(escape, one["differs"]), *missed]) or "\u2013",
            ]
        )
    head = ["what the verdict leans on", "", "records", "error there", "how they differ"]
    lead = "A record covers what ran on the same hardware in the same way; all others are told as not validated."
    return [section("validation", "Validated by", table(head, rows), lead=lead)]


def _error(error: Mapping[str, Any] | None) -> str:
    if error is None:
        return "\u2013"
    kind, value = ("mean", error["mean"]) if error["median"] is None else ("median", error["median"])
    return f"{kind} {value:.1%}, {error['cases']} cases" + (f" ({escape(error['figure'])})" if error["figure"] else "")
