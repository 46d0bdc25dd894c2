"""A record of `validate fabric` in the compact form: exchanges over several nodes, and which placement wins there.

Nodes are namespaces of one machine and the wire is `tc tbf`: real packets and TCP, no NIC and no GPU.
"""

from __future__ import annotations

from typing import Any

from validate.records.form import check, short, timed_head

ROUTED = ("routed_contiguous", "routed_planned")
# Limits on the error over all exchanges that run alone.
MEDIAN, P90 = 0.10, 0.25


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """Fields of the compact form: for each lab and scheme what exchanges take, and what a placement gains there."""
    labs = record["labs"]
    named = [(entry["lab"], row) for entry in labs for row in entry["cases"]]
    sizes = sorted({lab["nodes"] for lab, _ in named})
    between = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
    compared = record["comparison"]
    half = compared["split_half"]
    return {
        **timed_head(record),
        "what": f"gloo in network namespaces, {between} nodes, {len(labs)} fabrics: {len(named)} all-to-alls, flat and "
        "two-level, even, skewed and routed, alone and two at once",
        "repeats": min(entry["lab"]["repeats"] for entry in labs),
        "reliability": None if half is None else half["reliability"],
        "covers": [cover for entry in labs for cover in _covers(entry)],
        "cases": [_case(lab, row) for lab, row in named],
        "checks": _checks(compared),
    }


def _schemes(entry: dict[str, Any]) -> list[str]:
    return sorted({row["scheme"] for row in entry["cases"]})


def _covers(entry: dict[str, Any]) -> list[dict[str, Any]]:
    lab, found = entry["lab"], []
    for scheme in _schemes(entry):
        traits = {
            "gpu": "CPU",
            "exchange": f"gloo {'alltoall' if scheme == 'flat' else scheme}",
            "nodes": lab["nodes"],
            "ranks": lab["nodes"] * lab["ranks_per_node"],
        }
        size = [lab["bytes_per_rank"], lab["bytes_per_rank"]]
        name = f"{lab['name']}, {scheme}"
        found.append({"name": name, "claim": "exchange_time", "traits": {**traits, "rank_bytes": size}})
        if {row["patterns"][0] for row in entry["cases"] if _routed(row) and row["scheme"] == scheme} == set(ROUTED):
            found.append({"name": f"{name}, placed", "claim": "placement_gain", "figure": "exchange", "traits": traits})
    return found


def _routed(row: dict[str, Any]) -> bool:
    return len(row["patterns"]) == 1 and row["patterns"][0] in ROUTED


def _case(lab: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    name, scheme = row["patterns"][row["part"]], row["scheme"]
    other = [pattern for number, pattern in enumerate(row["patterns"]) if number != row["part"]]
    covers = [f"{lab['name']}, {scheme}"]
    both = set(ROUTED) <= set(lab["patterns"])
    placed = _routed(row) and both
    return {
        "case": f"{lab['name']}: {name}{f' beside {other[0]}' if other else ''}, {scheme}",
        "covers": [*covers, f"{covers[0]}, placed"] if placed else covers,
        "group": f"{lab['name']}, {scheme}" if placed else "",
        "predicted_s": short(row["predicted_s"]),
        "measured_s": short(row["median_s"]),
        "measured_p10_s": short(row["p10_s"]),
        "measured_p90_s": short(row["p90_s"]),
    }


def _checks(compared: dict[str, Any]) -> list[dict[str, Any]]:
    found, error = [], compared["error"]
    if error is not None:
        for name, limit in (("median", MEDIAN), ("p90", P90)):
            told = f"{error[name]:.1%}"
            found.append(
                check(f"one exchange, {name} absolute error", told, f"at most {limit:.0%}", error[name] <= limit)
            )
    for key, what in (("schemes", "flat or two-level"), ("placements", "which placement")):
        one = compared[key]
        if one["contests"]:
            told = f"{one['right']} of {one['decided']}"
            told += "".join(f"; wrong: {wrong['lab']} {wrong['of']}" for wrong in one["wrong"])
            found.append(check(f"{what} wins, where over 10% apart", told, "all", one["right"] == one["decided"]))
    return found
