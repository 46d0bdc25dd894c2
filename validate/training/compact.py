"""A record of `validate training` in the compact form: steps of one small model under many layouts."""

from __future__ import annotations

from typing import Any

from moesim.spec.evidence import layout_trait
from validate.records.form import check, short, timed_head
from validate.training.job import Layout, Shape
from validate.training.rank import GRADIENT_LIMIT


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """Fields of the compact form. Layouts of as many ranks are alternatives."""
    job, compared = record["job"], record["comparison"]
    layouts = [Layout.model_validate(one) for one in job["layouts"]]
    shape = Shape.model_validate(job["shape"])
    model = shape.config()["_name_or_path"]
    cases = [
        {
            "case": f"{layout.name}, {layout.ranks} ranks",
            "covers": [layout.name],
            "group": f"{layout.ranks} ranks",
            "predicted_s": short(predicted["step_s"]),
            "measured_s": short(measured["step_s"]["median_s"]),
            "measured_p10_s": short(measured["step_s"]["p10_s"]),
            "measured_p90_s": short(measured["step_s"]["p90_s"]),
        }
        for layout, predicted, measured in zip(layouts, record["predicted"], record["measured"], strict=True)
    ]
    covers = [
        {
            "name": layout.name,
            "claim": "training_step",
            "figure": "step time",
            "traits": {
                "gpu": "CPU",
                "exchange": f"{job['backend']} alltoall",
                "nodes": 1,
                "model": model,
                "layout": layout_trait(layout.parallel, "alltoall"),
            },
        }
        for layout in layouts
    ]
    order, error = compared["beyond_twice_the_spread"], record["gradient_error"]
    ranks = sorted({layout.ranks for layout in layouts})
    return {
        **timed_head(record),
        "what": f"{job['backend']}, {' and '.join(map(str, ranks))} ranks, fp32, {shape.layers} layers of "
        f"{shape.hidden}, {shape.experts} experts of {shape.intermediate}, top-{shape.top_k}: {len(layouts)} layouts, "
        f"{job['global_batch']} sequences of {job['sequence_length']} tokens",
        "repeats": job["repeats"],
        "reliability": compared["split_half"]["reliability"],
        "core_share": {f"profile, {name} ranks": share for name, share in record["core_share"].items()},
        "covers": covers,
        "cases": cases,
        "checks": [
            check("gradients as one process's", f"{error:.1g}", f"at most {GRADIENT_LIMIT:g}", error <= GRADIENT_LIMIT),
            check(
                "pairs beyond twice the spread ordered right",
                f"{order['agreed']} of {order['decided']}",
                "all",
                order["agreed"] == order["decided"],
            ),
        ],
    }
