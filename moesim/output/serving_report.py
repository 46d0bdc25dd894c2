"""What the serving loop did beside making tokens: memory that ran out, prefixes found, requests left out."""

from __future__ import annotations

from typing import Any

from moesim.engine.simulate import Simulation
from moesim.engine.workload import failed_requests


def serving_report(simulation: Simulation) -> dict[str, Any]:
    """JSON-ready. prefix_hit_rate: share of admitted prompt tokens that a prefix cache held; None without a cache."""
    served, serving = simulation.served, simulation.deployment.serving
    asked = served.prefix_asked_tokens
    return {
        "admission": serving.memory.admission,
        "balance": serving.balance,
        "preemptions": served.preemptions,
        "recomputed_tokens": served.recomputed_tokens,
        "prefix_hit_rate": served.prefix_found_tokens / asked if asked else None,
        "failed_requests_left_out": failed_requests(serving.workload),
    }
