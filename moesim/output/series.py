"""The series behind the pictures of a simulation: loads by rank and layer, latency curves, steps over time."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.engine.simulate import Simulation
from moesim.routing.trace import stack_profiles

_QUANTILES = np.linspace(0.0, 100.0, 101)
_MOST_POINTS = 400


def simulation_series(simulation: Simulation) -> dict[str, Any]:
    """JSON-ready series.

    rank_loads: [layers][ranks], share of a layer's tokens times ranks (1 = even), on the mix of judged loads.
    layer_ids: [layers]. latency: seconds at percentiles 0, 1 ... 100 by metric. steps: time, step seconds, decoding
    sequences and prompt tokens, thinned to a few hundred points.
    """
    deployment, served = simulation.deployment, simulation.served
    placement = deployment.setup.placement
    profiles, weights = stack_profiles(deployment.ground.judge)
    replicas = simulation.model.pricer.replicas
    loads = replicas.average_rank_loads(np.tensordot(weights, profiles, axes=1)) * placement.ranks
    done = np.isfinite(served.finish_s)  # faults lose requests
    later = done & (served.osl > 1)
    curves = {
        "ttft_s": (served.first_token_s - served.arrival_s)[done],
        "tpot_s": (served.finish_s - served.first_token_s)[later] / (served.osl[later] - 1),
        "itl_s": served.gaps_s,
        "e2e_s": (served.finish_s - served.arrival_s)[done],
    }
    keep = np.unique(np.linspace(0, max(served.steps - 1, 0), _MOST_POINTS).astype(np.int64))
    return {
        "layer_ids": placement.layer_ids.tolist(),
        "rank_loads": np.round(loads, 5).tolist(),
        "latency": {
            name: [float(value) for value in np.percentile(values, _QUANTILES)] if values.size else []
            for name, values in curves.items()
        },
        "steps": {
            "start_s": served.step_start_s[keep].tolist(),
            "step_s": served.step_s[keep].tolist(),
            "decode_seqs": served.step_decode_seqs[keep].tolist(),
            "prefill_tokens": served.step_prefill_tokens[keep].tolist(),
        },
    }
