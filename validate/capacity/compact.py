"""A record of `validate capacity` in the compact form: the cases of each policy together.

Which tokens are dropped is the same on any hardware, so no hardware is a trait of what is covered.
"""

from __future__ import annotations

import re
from typing import Any

from validate.records.form import check

# As `validate capacity` names a case; see `validate.capacity.run.Case.name`.
_NAME = re.compile(
    r"(?P<rule>\w+) [^,]+, top-\d+, keep by (?P<drop>\w+)(?:, backup (?P<backup>\w+))?(?P<pad>, padded)?;"
)


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """Fields of the compact form."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for one in record["outcomes"]:
        said = _NAME.match(one["name"])
        if said is None:
            raise ValueError(f"a case is called {one['name'][:60]!r}")
        key = (said["rule"], said["drop"], said["backup"] or "none", "true" if said["pad"] else "false")
        groups.setdefault(key, []).append(one)
    names = {key: _words(*key) for key in groups}
    counts = record["counts"]
    return {
        "what": f"{record['backend']}, {record['ranks']} ranks of {record['tokens']} tokens: {record['cases']} cases "
        f"of {len(groups)} policies, dropped tokens and rows",
        "hardware": record["hardware"],
        "versions": record["versions"],
        "covers": [
            {
                "name": names[key],
                "claim": "capacity_drops",
                "figure": "share of cases that differ",
                "traits": dict(zip(("rule", "drop", "backup", "pad"), key, strict=True)),
            }
            for key in groups
        ],
        "counted": [
            {
                "case": f"{names[key]}: picks dropped",
                "covers": [names[key]],
                "cases": len(found),
                "simulated": sum(one["dropped"]["simulated"] for one in found),
                "executed": sum(one["dropped"]["executed"] for one in found),
                "differ": sum(bool(one["differences"]) for one in found),
            }
            for key, found in groups.items()
        ],
        "checks": [
            check(
                "cases that agree token for token",
                f"{record['cases'] - record['cases_that_differ']} of {record['cases']}",
                "all",
                not record["cases_that_differ"],
            ),
            check(
                "cases in which counts alone hold what they claim",
                f"{counts['held']} of {record['cases']}",
                "all",
                counts["held"] == record["cases"],
            ),
        ],
    }


def _words(rule: str, drop: str, backup: str, pad: str) -> str:
    more = [] if backup == "none" else [f"backup {backup}"]
    return ", ".join([rule, f"keep by {drop}", *more, *(["padded"] if pad == "true" else [])])
