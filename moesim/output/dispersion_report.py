"""What steps stray from the mean profile by, and how each part of it is known."""

from __future__ import annotations

from typing import Any

from moesim.engine.routing_draws import RoutingDraws
from moesim.routing.components import between_loads


def dispersion_json(routing: RoutingDraws) -> dict[str, Any]:
    """cv2 and tag of each component that single steps are drawn with, and what the load files show.

    between_loads: by phase, the domain component of load files that are a domain each (None where there are fewer than
    two, or shares instead of counts). It is drawn as the files themselves, not as a factor.
    """
    drawn = routing.dispersion
    found: dict[str, Any] = {
        name: {"cv2": getattr(drawn, f"{name}_cv2"), "tag": drawn.tag_of(name)}
        for name in ("request", "domain", "time")
    }
    between = {}
    for phase in ("prefill", "decode"):
        loads = [load for load in routing.loads if load.phase in (phase, "any") and load.law == "top_k"]
        one = between_loads(loads, routing.top_k) if loads else None
        between[phase] = None if one is None else {"cv2": one.cv2, "error": one.error, "tag": "measured"}
    return {**found, "between_loads": between}
