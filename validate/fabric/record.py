"""What `validate fabric` writes and prints: predictions, the record, its tables and its verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.units import MILLI
from validate.compare import split_half
from validate.fabric.rank import Case
from validate.fabric.spec import ROUTED, LabSpec

Floats = NDArray[np.float64]
# A difference between two ways below this share of the quicker one decides nothing.
DECIDES = 0.1
SCHEMES = ("flat", "two_level")


def lab_entry(
    lab: LabSpec,
    cases: Sequence[Case],
    predicted: Sequence[Sequence[float]],
    bound: Sequence[str],
    executed: Sequence[Sequence[float]],
    found: dict[str, Any],
) -> dict[str, Any]:
    """What was predicted and measured on one lab."""
    rows = []
    for case, foretold, link, des, parts in zip(cases, predicted, bound, executed, found["seconds"], strict=True):
        for number, (expected, samples) in enumerate(zip(foretold, parts, strict=False)):
            low, middle, high = np.quantile(samples, (0.1, 0.5, 0.9)).tolist()
            rows.append({
                "patterns": list(case.patterns), "part": number, "scheme": case.scheme, "bounded_by": link,
                "predicted_s": expected, "median_s": middle, "p10_s": low, "p90_s": high,
                "error": expected / middle - 1.0, "samples_s": list(samples),
                **({"des_s": des[number], "des_error": des[number] / middle - 1.0} if des else {}),
            })  # fmt: skip
    return {
        "lab": lab.model_dump(mode="json"), "delay": found["delay"], "busy": found["busy"],
        "counters": found["counters"], "cases": rows, "measured_from": found["measured_from"],
        "wall_s": found["wall_s"],
    }  # fmt: skip


def winners(labs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Which scheme and which placement wins, predicted and measured, wherever both were run."""
    schemes, placements = [], []
    for entry in labs:
        alone = {(row["patterns"][0], row["scheme"]): row for row in entry["cases"] if len(row["patterns"]) == 1}
        name = entry["lab"]["name"]
        for pattern in dict.fromkeys(pattern for pattern, _ in alone):
            pair = [alone[pattern, scheme] for scheme in SCHEMES if (pattern, scheme) in alone]
            if len(pair) == 2:
                schemes.append({"lab": name, "of": pattern, **_contest(SCHEMES, pair)})
        for scheme in SCHEMES:
            pair = [alone[pattern, scheme] for pattern in ROUTED if (pattern, scheme) in alone]
            if len(pair) == 2:
                placements.append({"lab": name, "of": scheme, **_contest(ROUTED, pair)})
    return {"schemes": schemes, "placements": placements}


def _contest(names: Sequence[str], pair: Sequence[dict[str, Any]]) -> dict[str, Any]:
    predicted, measured = ([row[key] for row in pair] for key in ("predicted_s", "median_s"))
    apart = max(measured) / min(measured) - 1.0
    return {
        "predicted": names[int(np.argmin(predicted))], "measured": names[int(np.argmin(measured))],
        "apart": apart, "decided": apart > DECIDES,
    }  # fmt: skip


def comparison(labs: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Errors over all cases of one exchange, of two at once, winners and how far the measurement can be trusted."""
    alone = [row for entry in labs for row in entry["cases"] if len(row["patterns"]) == 1]
    beside = [row for entry in labs for row in entry["cases"] if len(row["patterns"]) > 1]
    found: dict[str, Any] = {"cases": len(alone), "error": _errors(alone), "beside": _errors(beside)}
    found["beside_des"] = _errors(beside, "des_error")
    found["by_scheme"] = {scheme: _errors([row for row in alone if row["scheme"] == scheme]) for scheme in SCHEMES}
    rows = [*alone, *beside]
    fewest = min((len(row["samples_s"]) for row in rows), default=0)
    samples = np.asarray([row["samples_s"][:fewest] for row in rows])
    found["split_half"] = asdict(split_half(samples, np.random.default_rng([seed, 3]))) if fewest >= 4 else None
    for kind, contests in winners(labs).items():
        decided = [one for one in contests if one["decided"]]
        right = [one for one in decided if one["predicted"] == one["measured"]]
        found[kind] = {
            "contests": len(contests), "decided": len(decided), "right": len(right),
            "wrong": [one for one in decided if one["predicted"] != one["measured"]], "all": contests,
        }  # fmt: skip
    return found


def _errors(rows: Sequence[dict[str, Any]], key: str = "error") -> dict[str, float] | None:
    if not rows:
        return None
    errors = np.asarray([row[key] for row in rows])
    size = np.abs(errors)
    return {
        "cases": len(rows), "median": float(np.median(size)), "p90": float(np.quantile(size, 0.9)),
        "mean_signed": float(errors.mean()), "largest": float(errors[size.argmax()]),
    }  # fmt: skip


def holds(record: dict[str, Any]) -> bool:
    """Whether every winner that the measurement decides was foretold."""
    return not any(record["comparison"][kind]["wrong"] for kind in ("schemes", "placements"))


def describe(lab: dict[str, Any]) -> str:
    """A fabric in one line."""
    nics = f"{lab['nics_per_node']} NIC{'s' if lab['nics_per_node'] > 1 else ''}"
    parts = [
        f"{lab['nodes']} nodes x {lab['ranks_per_node']} ranks, {nics} of {lab['nic_bits_per_s'] / 1e6:g} Mbit/s a node"
    ]
    parts += [
        f"NIC {slow['nic']} of node {slow['node']} at {slow['bits_per_s'] / 1e6:g} Mbit/s" for slow in lab["slow_nics"]
    ]
    if lab["rails"]:
        parts.append("rails")
    if lab["nodes_per_leaf"]:
        parts.append(f"{lab['nodes_per_leaf']} nodes to a leaf")
    if lab["spine_bits_per_s"]:
        parts.append(f"uplinks of {lab['spine_bits_per_s'] / 1e6:g} Mbit/s")
    if lab["delay_s"]:
        parts.append(f"{lab['delay_s'] * 1e3:g} ms away")
    return ", ".join(parts)


def table(record: dict[str, Any]) -> str:
    """The record for a person."""
    figures = record["calibration"]["figures"]
    lines = [
        f"fabric lab, gloo in network namespaces, {record['hardware']['cpu']} ({record['hardware']['cpus']} CPUs), "
        f"Linux {record['versions']['kernel']}",
        f"predictions written {record['predictions']['written']}, measured from {record['measured_from']}",
        f"calibration ({record['calibration']['source']}): a message {figures['message_s'] * 1e6:.0f} µs of the "
        f"machine, copies {figures['copy_bytes_per_s'] / 1e9:.2f} GB/s; wire {figures['wire'] - 1:+.1%}",
    ]
    for entry in record["labs"]:
        lines += [
            "",
            f"{entry['lab']['name']}: {describe(entry['lab'])}"
            + (f" (by {entry['delay']})" if entry["lab"]["delay_s"] else ""),
            f"{'pattern':<36}{'scheme':<11}{'predicted':>10}{'measured':>10}  {'[p10 to p90]':<18}{'error':>7}   ms",
        ]
        for row in entry["cases"]:
            name = row["patterns"][row["part"]]
            other = [pattern for number, pattern in enumerate(row["patterns"]) if number != row["part"]]
            name += f" beside {other[0]}" if other else ""
            between = f"[{row['p10_s'] / MILLI:.1f} to {row['p90_s'] / MILLI:.1f}]"
            lines.append(
                f"{name:<36}{row['scheme']:<11}{row['predicted_s'] / MILLI:>10.1f}{row['median_s'] / MILLI:>10.1f}  "
                f"{between:<18}{row['error']:>+7.1%}"
            )
    return "\n".join([*lines, "", *_summary(record["comparison"])])


def _summary(found: dict[str, Any]) -> list[str]:
    lines = []
    for key, what in (
        ("error", "one exchange"), ("beside", "two at once, as a fluid"), ("beside_des", "two at once, by des")
    ):  # fmt: skip
        if found[key]:
            error = found[key]
            lines.append(
                f"{what}: {error['cases']} cases, absolute error: median {error['median']:.1%}, "
                f"p90 {error['p90']:.1%}, largest {error['largest']:+.1%}, mean with sign {error['mean_signed']:+.1%}"
            )
    for key, what in (("schemes", "flat or two-level"), ("placements", "which placement")):
        one = found[key]
        if one["contests"]:
            wrong = "".join(f"; wrong: {w['lab']} {w['of']} ({w['apart']:.0%} apart)" for w in one["wrong"])
            lines.append(
                f"{what}: {one['right']} of {one['decided']} foretold where the measured times differ by more than "
                f"{DECIDES:.0%} ({one['contests'] - one['decided']} differ less){wrong}"
            )
    half = found["split_half"]
    if half:
        reliability = "-" if half["reliability"] is None else f"{half['reliability']:.3f}"
        lines.append(
            f"the measurement itself: halves of the repeats differ by {half['gap']:.1%}, reliability {reliability}"
        )
    return lines
