"""Why a run is slow, as one JSON-ready mapping: the `explain` key of `simulate --json`."""

from __future__ import annotations

from typing import Any

from moesim.engine.explain import ExplainedStep, Explanation
from moesim.engine.explain_transfer import TransferExplained
from moesim.engine.stepbytes import StepBytes
from moesim.output.metrics import latency


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    """steps: the representative steps in full; not_priced: those without a price, with what is missing. SI units.

    transfer: of KV cache between roles; None without roles.
    """
    return {
        "steps": [_step(one) for one in explanation.steps],
        "not_priced": explanation.not_priced,
        "transfer": None if explanation.transfer is None else _transfer(explanation.transfer),
    }


def _transfer(one: TransferExplained) -> dict[str, Any]:
    return {
        "requests": one.requests,
        "bytes": one.bytes,
        "bytes_per_request": one.bytes_per_request,
        "transfer_s": latency(one.transfer_s),
        "alone_s": one.alone_s,
        "waited_for_nics_s": one.waited_s,
        "hidden_s": one.hidden_s,
        "ttft_s": one.ttft_s,
        "share_of_ttft": one.share_of_ttft,
        "sent_bytes_by_rank": one.sent_bytes.tolist(),
        "received_bytes_by_rank": one.received_bytes.tolist(),
        "what_if": {
            name: {"ttft_s": seconds, "saves": 1.0 - seconds / one.ttft_s}
            for name, seconds in one.what_if_ttft_s.items()
        },
    }


def _step(one: ExplainedStep) -> dict[str, Any]:
    def changed(found: dict[str, float]) -> dict[str, dict[str, float]]:
        return {name: {"step_s": seconds, "saves": 1.0 - seconds / one.step_s} for name, seconds in found.items()}

    return {
        "kind": one.kind,
        "which": one.which,
        "mode": one.mode,
        "role": one.role,
        "share_of_time": one.share_of_time,
        "tokens_per_dp_rank": one.tokens_per_dp_rank,
        "reading_ranks": one.reading_ranks,
        "drawn_steps": one.steps,
        "step_s": one.step_s,
        **({"stages": one.stages} if one.stages > 1 else {}),
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
