"""A record of `validate training` in the compact form; layouts of as many ranks are alternatives to each other."""

from __future__ import annotations

from typing import Any

from moesim.spec.evidence import device_trait, training_layout_trait
from profiles.groups import PRETENDED
from validate.records.form import check, short, timed_head
from validate.training.job import Layout
from validate.training.rank import GRADIENT_LIMIT, LOSS_LIMIT

# The only dispatcher that is run, and what its model is called in a scenario: see Shape.config.
DISPATCHER, MODEL = "alltoall", "small-moe"


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """Fields of the compact form."""
    job, compared = record["job"], record["comparison"]
    layouts = [Layout.read(one, where="layout") for one in job["layouts"]]
    shape, order, half = job["shape"], compared["pairs"], compared["split_half"]
    ranks = sorted({layout.ranks for layout in layouts})
    between = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
    hardware = record["hardware"]
    return {
        **timed_head(record),
        "what": f"{job['backend']}, {between} ranks, fp32, {shape['layers']} layers of "
        f"{shape['hidden']}, {shape['experts']} experts of {shape['intermediate']}, top-{shape['top_k']}: "
        f"{len(layouts)} layouts, {job['global_batch']} sequences of {job['sequence_length']} tokens a step",
        "repeats": job["repeats"],
        "reliability": half["reliability"],
        "core_share": {f"profile of {ranks} ranks": share for ranks, share in record["core_share"].items()},
        "covers": [
            {
                "name": layout.name,
                "claim": "training_step",
                "figure": "step time",
                "traits": {
                    "gpu": device_trait(hardware["gpu"]) if "gpu" in hardware else "CPU",
                    "exchange": f"{job['backend']} {DISPATCHER}",
                    # Records of before nodes were told are of one; nodes that were pretended are none.
                    **({} if record.get(PRETENDED) else {"nodes": record.get("nodes", {}).get(str(layout.ranks), 1)}),
                    "model": MODEL,
                    "ranks": layout.ranks,
                    "layout": training_layout_trait(
                        layout.parallel, DISPATCHER, "sequential", layout.schedule, layout.virtual_stages
                    ),
                },
            }
            for layout in layouts
        ],
        "cases": [
            {
                "case": f"{layout.name}, {layout.ranks} ranks",
                "covers": [layout.name],
                "group": f"{layout.ranks} ranks",
                "predicted_s": short(foretold["step_s"]),
                "measured_s": short(found["step_s"]["median_s"]),
                "measured_p10_s": short(found["step_s"]["p10_s"]),
                "measured_p90_s": short(found["step_s"]["p90_s"]),
            }
            for layout, foretold, found in zip(layouts, record["predicted"], record["measured"], strict=True)
        ],
        "checks": [
            check(
                "gradients and loss as one process's",
                f"{record['gradient_error']:.1g} and {record['loss_error']:.1g}",
                f"at most {GRADIENT_LIMIT:g} and {LOSS_LIMIT:g}",
                record["gradient_error"] <= GRADIENT_LIMIT and record["loss_error"] <= LOSS_LIMIT,
            ),
            check(
                "layouts of as many ranks that differ by more than chance ordered right",
                f"{order['agreed']} of {order['decided']}",
                "all",
                0 < order["decided"] == order["agreed"],
            ),
        ],
    }
