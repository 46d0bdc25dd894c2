"""Moving experts while a deployment serves: when the placement is solved again, and how the weights travel."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from moesim.spec.base import Spec


class RebalanceSpec(Spec):
    """A new placement every `interval_steps`, from the counts of the last `window_steps` steps.

    Defaults are vLLM's (EPLBConfig: window_size 1000, step_interval 3000); SGLang's eplb_rebalance_num_iterations is
    interval_steps, its eplb_rebalance_layers_per_chunk layers_per_chunk.
    """

    solver: str = "eplb"
    window_steps: int = Field(default=1000, gt=0)
    interval_steps: int = Field(default=3000, gt=0)
    mode: Literal["blocking", "async"] = Field(
        default="blocking", description="the engine waits for the weights, or they travel beside its steps"
    )
    layers_per_chunk: int | None = Field(
        default=None, gt=0, description="blocking: layers moved between two steps; none = all at once"
    )
    skip_above: float = Field(
        default=1.0, gt=0, le=1, description="not solved where mean over max of the ranks' loads is at least this"
    )
    min_gain: float | None = Field(
        default=None, ge=0, lt=1, description="move only if max/mean of the window falls by this share; none = always"
    )
    solve_s: float | None = Field(
        default=None, ge=0, description="time of the solver; none = what DeepSeek's EPLB takes on a CPU core"
    )
    match_ranks: bool = Field(
        default=False, description="give each rank the new part that shares most with its old one; engines do not"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.window_steps > self.interval_steps:
            raise ValueError("window_steps may be at most interval_steps: older counts belong to an older placement")
        if self.layers_per_chunk is not None and self.mode == "async":
            raise ValueError("async moves layer by layer as it is: leave layers_per_chunk out")
        return self
