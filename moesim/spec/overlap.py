"""The keys of a scenario that go with its schedule and its storage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from moesim.spec.base import Spec

Schedule = Literal[
    "sequential", "two_batch", "pipeline", "shared_overlap", "shortcut", "forward_backward", "whole_graph"
]
Storage = Literal["resident", "offload", "pregated", "cached"]


class SlowdownSpec(Spec):
    """How much longer work takes while the other kind runs on the same GPU; assumed, as the scenario gives it."""

    compute: float = Field(default=1.0, ge=1, le=10, description="compute beside communication, over alone")
    communication: float = Field(default=1.0, ge=1, le=10, description="communication beside compute, over alone")


def _figures_or_name(value: Any) -> str:
    """Which kind of slowdown is meant, so that an error speaks of that kind alone."""
    return "figures" if isinstance(value, dict | SlowdownSpec) else "name"


SlowdownChoice = Annotated[
    Annotated[Literal["none", "multiprocessors", "measured"], Tag("name")] | Annotated[SlowdownSpec, Tag("figures")],
    Discriminator(_figures_or_name),
]


class OverlapSpec(Spec):
    """How a schedule cuts a layer, and what running two kinds of work at once costs."""

    chunks: Literal["auto"] | int = Field(
        default="auto", description="of `pipeline`: a number from 2 to 16, or the best of 1, 2, 4 and 8 at each step"
    )
    slowdown: SlowdownChoice = "none"


class ExpertCacheSpec(Spec):
    """The experts that stay on a GPU under `storage: cached`."""

    experts_per_layer: int = Field(gt=0, description="of one rank, in each MoE layer")
    policy: Literal["lru", "lfu", "predicted"] = "lru"
