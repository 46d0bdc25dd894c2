"""Whether a run shows the deployment at its load, or only how a burst fills and drains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.engine.serving import Served
from moesim.engine.simulate import Simulation

# A run whose batch is this much larger in the last third of its arrivals than in the middle third is still growing.
GROWTH = 1.25


@dataclass(frozen=True)
class Steadiness:
    """Offered and served output tokens/s/GPU, and what is wrong with the run (None: nothing that shows)."""

    offered_per_gpu: float | None
    served_per_gpu: float
    fault: str | None

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "offered_output_tokens_per_s_per_gpu": self.offered_per_gpu,
            "served_output_tokens_per_s_per_gpu": self.served_per_gpu,
            "steady": self.fault is None,
            "fault": self.fault,
        }


def steadiness(simulation: Simulation) -> Steadiness:
    """Judge an open-loop run; a closed loop offers what it serves."""
    served, gpus = simulation.served, simulation.deployment.ground.cluster.gpus
    rate = float(served.osl[np.isfinite(served.finish_s)].sum()) / served.duration_s / gpus
    requests_per_s = offered_rate(simulation)
    if requests_per_s is None:
        return Steadiness(None, rate, None)
    return Steadiness(requests_per_s * float(served.osl.mean()) / gpus, rate, fault_of(served, requests_per_s))


def offered_rate(simulation: Simulation) -> float | None:
    """Requests/s that come, whatever is served: as asked for, or the mean of a trace file; None in a closed loop."""
    arrivals = simulation.deployment.serving.workload.arrivals
    if arrivals is None:
        times_s = simulation.served.arrival_s
        span_s = float(times_s.max() - times_s.min())
        return (len(times_s) - 1) / span_s if span_s > 0 else None
    open_loop = arrivals.poisson or arrivals.gamma
    return None if open_loop is None else open_loop.requests_per_s


def fault_of(served: Served, requests_per_s: float) -> str | None:
    """Why the latencies of an open-loop run depend on its length, as a clause; None when nothing shows."""
    span_s = float(served.arrival_s.max() - served.arrival_s.min())
    median_s = float(np.nanmedian(served.finish_s - served.arrival_s))
    if span_s < median_s:
        enough = int(np.ceil(3 * median_s * requests_per_s))
        return (
            f"the run is too short for its load: arrivals last {span_s:.3g} s, a request takes {median_s:.3g} s; "
            f"simulate at least {enough} requests"
        )
    arriving = served.step_start_s < served.arrival_s.max()
    third = np.minimum((3 * served.step_start_s / max(served.arrival_s.max(), 1e-12)).astype(np.int64), 2)
    means = []
    for part in (1, 2):
        chosen = arriving & (third == part)
        weight = served.step_s[chosen].sum()
        means.append(float((served.step_decode_seqs * served.step_s)[chosen].sum() / weight) if weight > 0 else 0.0)
    if means[0] > 0 and means[1] > GROWTH * means[0]:
        return (
            f"the batch still grows when the arrivals end ({means[0]:.0f} to {means[1]:.0f} sequences in a step): "
            "latencies depend on the length of the run"
        )
    return None
