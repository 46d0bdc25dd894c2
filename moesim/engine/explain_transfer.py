"""What moving KV cache from the prefill to the decode role costs: its share of TTFT, and what-ifs by running again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.engine.deployment import Deployment
from moesim.engine.roles import Transfer, serve_roles
from moesim.engine.serving import Served
from moesim.engine.simulate import Simulation, kv_transfer, role_pool
from moesim.engine.stepmodel import ExactModel, StepModel, TimedModel

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TransferExplained:
    """The KV transfers of a run, over the requests whose cache moved.

    bytes: in all, by all GPUs; bytes_per_request: mean. transfer_s [requests]: from the read prompt to the cache being
    at the decode rank. alone_s: mean time on the NICs without waiting for others; waited_s: mean of what is more.
    hidden_s: mean of `alone_s` that passed while the prompt was still read (`by_layer`). ttft_s: mean time to the
    first token. share_of_ttft: of the summed TTFT, in transfers. sent_bytes, received_bytes: by attention-DP rank of
    all instances, instances side by side: [instances x ranks]. what_if: change -> mean TTFT, each from the run again.
    """

    requests: int
    bytes: float
    bytes_per_request: float
    transfer_s: Floats
    alone_s: float
    waited_s: float
    hidden_s: float
    ttft_s: float
    share_of_ttft: float
    sent_bytes: Floats
    received_bytes: Floats
    what_if_ttft_s: dict[str, float]


def explain_transfer(simulation: Simulation) -> TransferExplained | None:
    """What KV transfers did to a run with roles; None without roles, or where no request moved."""
    served, side = simulation.served, simulation.served.prefill
    if side is None:
        return None
    moved = np.isfinite(side.transfer_s)
    if not moved.any():
        return None
    transfer = kv_transfer(simulation.deployment)
    size = np.asarray(served.isl * (transfer.bytes_per_token * transfer.gpus), dtype=np.float64)
    alone_s = transfer.latency_s + served.isl[moved] * transfer.bytes_per_token / transfer.bytes_per_s
    taken_s = side.transfer_s[moved]
    ttft_s = (served.first_token_s - served.arrival_s)[moved]
    over = taken_s - alone_s
    deployment = simulation.deployment
    assert deployment.prefill is not None
    return TransferExplained(
        requests=int(moved.sum()),
        bytes=side.transfer_bytes,
        bytes_per_request=float(size[moved].mean()),
        transfer_s=taken_s,
        alone_s=float(alone_s.mean()),
        waited_s=float(np.maximum(over, 0.0).mean()),
        hidden_s=float(np.maximum(-over, 0.0).mean()) if transfer.by_layer else 0.0,
        ttft_s=float(ttft_s.mean()),
        share_of_ttft=float(taken_s.sum() / ttft_s.sum()),
        sent_bytes=_by_position(side.sender[moved], size[moved], deployment.prefill),
        received_bytes=_by_position(side.receiver[moved], size[moved], deployment),
        what_if_ttft_s=_what_ifs(simulation, transfer),
    )


def _by_position(position: NDArray[np.int64], size: Floats, deployment: Deployment) -> Floats:
    """Bytes summed by rank; positions run over instances first, see balance.py: [instances x ranks]."""
    instances, ranks = deployment.instances, deployment.setup.parallel.attention_dp
    found = np.bincount(position, weights=size, minlength=instances * ranks)
    return np.asarray(found.reshape(ranks, instances).T.ravel())


def _what_ifs(simulation: Simulation, transfer: Transfer) -> dict[str, float]:
    """Mean TTFT of the same run with transfers that take no time, and with layers leaving (or not) as they are read."""
    other = "after_the_prompt" if transfer.by_layer else "by_layer"
    changes = {
        "free_transfer": replace(transfer, bytes_per_s=np.inf, latency_s=0.0),
        other: replace(transfer, by_layer=not transfer.by_layer),
    }
    return {name: _mean_ttft_s(_again(simulation, change)) for name, change in changes.items()}


def _again(simulation: Simulation, transfer: Transfer) -> Served:
    """The run as best known, its KV moved otherwise."""

    def timed(model: StepModel) -> ExactModel | TimedModel:
        return model.under(None) if simulation.fidelity == "table" else ExactModel(model, simulation.fidelity)

    assert simulation.prefill_model is not None
    return serve_roles(
        simulation.load,
        role_pool(simulation.prefill_model, timed(simulation.prefill_model)),
        role_pool(simulation.model, timed(simulation.model)),
        transfer,
        balance=simulation.deployment.serving.balance,
    )


def _mean_ttft_s(served: Served) -> float:
    assert served.prefill is not None
    moved = np.isfinite(served.prefill.transfer_s)
    return float((served.first_token_s - served.arrival_s)[moved].mean())
