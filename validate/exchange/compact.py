"""A record of `validate exchange` in the compact form."""

from __future__ import annotations

from typing import Any

from moesim.spec.evidence import device_trait
from moesim.units import MIB
from validate.records.form import check, short, timed_head

COVERS = "exchanges"


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """Fields of the compact form. All skews exchange the same bytes and are alternatives to each other."""
    pairs, hardware = record["comparison"]["beyond_twice_the_spread"], record["hardware"]
    return {
        **timed_head(record),
        "what": f"{record['backend']}, {record['ranks']} ranks, nodes: {record['hosts']}, "
        f"{record['bytes'] / MIB:.1f} MiB a rank: {len(record['cases'])} uneven all-to-alls",
        "repeats": record["repeats"],
        "reliability": record["comparison"]["split_half"]["reliability"],
        "covers": [
            {
                "name": COVERS,
                "claim": "exchange_time",
                "traits": {
                    "gpu": device_trait(hardware["gpu"]) if "gpu" in hardware else "CPU",
                    "exchange": f"{record['backend']} alltoall",
                    **({} if record["pretended_hosts"] else {"nodes": record["hosts"]}),
                    "ranks": record["ranks"],
                    "rank_bytes": [record["bytes"], record["bytes"]],
                },
            }
        ],
        "cases": [
            {
                "case": case["case"],
                "covers": [COVERS],
                "group": "skews",
                "predicted_s": short(case["predicted_s"]),
                "measured_s": short(case["median_s"]),
                "measured_p10_s": short(case["p10_s"]),
                "measured_p90_s": short(case["p90_s"]),
            }
            for case in record["cases"]
        ],
        "checks": [
            check(
                "pairs beyond twice the spread ordered right",
                f"{pairs['agreed']} of {pairs['decided']}" if pairs["decided"] else "no pair differs by as much",
                "all",
                pairs["agreed"] == pairs["decided"],
            )
        ],
    }
