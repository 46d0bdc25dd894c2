"""A record of `validate replay` in the compact form: what ranks compute, and nothing of what they exchange."""

from __future__ import annotations

from typing import Any

from moesim.spec.evidence import device_trait, layer_trait
from validate.hardware.compact import DTYPES
from validate.records.form import kept_checks, short, timed_head

COVERS = "ranks"


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """Fields of the compact form."""
    job, shape, hardware = record["job"], record["job"]["shape"], record["hardware"]
    tokens = ", ".join(str(count) for count in job["tokens"])
    cases = [
        {
            "case": f"{predicted['placement']}, {predicted['tokens_per_rank']} tokens",
            "covers": [COVERS],
            "group": f"{predicted['tokens_per_rank']} tokens",
            "predicted_s": short(predicted["layer_s"]),
            "measured_s": short(measured["layer_s"]),
        }
        for predicted, measured in zip(record["predicted"], record["measured"], strict=True)
    ]
    compared = record["comparison"]
    return {
        **timed_head(record),
        "what": f"{job['ranks']} ranks in turn on one {record['device']}, {record['dtype']}, {shape['experts']} "
        f"experts of {shape['hidden']} x {shape['intermediate']}, top-{shape['top_k']}, {job['profile_source']} "
        f"routing: {len(job['placements'])} placements at {tokens} tokens; nothing is exchanged",
        "repeats": job["repeats"],
        "reliability": compared["split_half"]["reliability"],
        "core_share": record["core_share"],
        "pace_s": record.get("pace_s", {}),
        "covers": [
            {
                "name": COVERS,
                "claim": "expert_time",
                "figure": "computing time",
                "traits": {
                    "gpu": device_trait(hardware["gpu"]) if "gpu" in hardware else "CPU",
                    "layer": layer_trait(shape["experts"], shape["hidden"], shape["intermediate"], shape["top_k"]),
                    "experts_dtype": DTYPES.get(record["dtype"], record["dtype"]),
                    "tokens_per_rank": [min(job["tokens"]), max(job["tokens"])],
                },
            }
        ],
        "cases": cases,
        "checks": kept_checks(compared["goals"]),
    }
