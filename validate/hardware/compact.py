"""A record of `validate hardware` in the compact form."""

from __future__ import annotations

from typing import Any

from moesim.spec.evidence import device_trait, layer_trait
from validate.records.form import kept_checks, short, timed_head

# Types of torch as scenarios name them.
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
COVERS = "layer"


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """Fields of the compact form. A rank's placements at one number of tokens are alternatives."""
    job, shape = record["job"], record["job"]["shape"]
    tokens = ", ".join(str(count) for count in job["tokens"])
    hardware = record["hardware"]
    # Records of before hosts were counted: one clock is one host, and of others it is not told.
    hosts = record.get("hosts", 1 if record.get("clock") == "shared" else None)
    cases = [
        {
            "case": f"{predicted['placement']}, {predicted['tokens_per_rank']} tokens",
            "covers": [COVERS],
            "group": f"{predicted['tokens_per_rank']} tokens",
            "predicted_s": short(predicted["layer_s"]),
            "predicted_p10_s": short(predicted["layer_p10_s"]),
            "predicted_p90_s": short(predicted["layer_p90_s"]),
            "measured_s": short(measured["layer_s"]["median_s"]),
            "measured_p10_s": short(measured["layer_s"]["p10_s"]),
            "measured_p90_s": short(measured["layer_s"]["p90_s"]),
        }
        for predicted, measured in zip(record["predicted"], record["measured"], strict=True)
    ]
    return {
        **timed_head(record),
        "what": f"{job['backend']}, {job['ranks']} ranks, {record['dtype']}, {shape['experts']} experts of "
        f"{shape['hidden']} x {shape['intermediate']}, top-{shape['top_k']}, {job['profile_source']} routing: "
        f"{len(job['placements'])} placements at {tokens} tokens",
        "repeats": job["repeats"],
        "reliability": record["comparison"]["split_half"]["reliability"],
        "core_share": record["core_share"],
        "pace_s": record.get("pace_s", {}),
        "covers": [
            {
                "name": COVERS,
                "claim": "placement_gain",
                "figure": "layer time",
                "traits": {
                    "gpu": device_trait(hardware["gpu"]) if "gpu" in hardware else "CPU",
                    "exchange": f"{job['backend']} alltoall",
                    **({} if hosts is None else {"nodes": hosts}),
                    "ranks": job["ranks"],
                    "layer": layer_trait(shape["experts"], shape["hidden"], shape["intermediate"], shape["top_k"]),
                    "experts_dtype": DTYPES.get(record["dtype"], record["dtype"]),
                    "tokens_per_rank": [min(job["tokens"]), max(job["tokens"])],
                },
            }
        ],
        "cases": cases,
        "checks": kept_checks(record["comparison"]["goals"]),
    }
