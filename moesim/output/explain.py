"""Why a run is slow, as one JSON-ready mapping: the `explain` key of `simulate --json`."""

from __future__ import annotations

from typing import Any

from moesim.engine.explain import ExplainedStep, Explanation
from moesim.engine.stepbytes import StepBytes


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """steps: the representative steps in full; not_priced: those without a price, with what is missing. SI units."""
    return {"steps": [_step(one) for one in explanation.steps], "not_priced": explanation.not_priced}


def _step(one: ExplainedStep) -> dict[str, Any]:
    def changed(found: dict[str, float]) -> dict[str, dict[str, float]]:
        return {name: {"step_s": seconds, "saves": 1.0 - seconds / one.step_s} for name, seconds in found.items()}

    return {
        "kind": one.kind,
        "which": one.which,
        "mode": one.mode,
        "share_of_time": one.share_of_time,
        "tokens_per_dp_rank": one.tokens_per_dp_rank,
        "reading_ranks": one.reading_ranks,
        "drawn_steps": one.steps,
        "step_s": one.step_s,
        "critical_path_s": one.critical_path_s,
        "busy_s": one.busy_s,
        "exposed_communication_s": one.exposed_s.tolist(),
        "waited_s": one.waited_s.tolist(),
        "waited_for_operation_s": {name: by.tolist() for name, by in one.waited_for_operation_s.items()},
        "waited_for_rank_s": one.waited_for_rank_s.tolist(),
        "layers": [vars(layer) for layer in one.layers],
        "what_if": changed(one.what_if_s),
        "without_operation": changed(one.free_operation_s),
        "exchange_evened": one.exchange_evened,
        "traffic": None if one.traffic is None else _traffic(one.traffic),
    }


def _traffic(traffic: StepBytes) -> dict[str, Any]:
    return {
        "tag": traffic.tag,
        "links": [
            {
                "from": load.link[0],
                "to": load.link[1],
                "dispatch_bytes": load.dispatch_bytes,
                "combine_bytes": load.combine_bytes,
                "full_rate_s": load.full_rate_s,
            }
            for load in traffic.links
        ],
        "endpoint_bytes": {leg: by.tolist() for leg, by in traffic.endpoints.items()},
    }
