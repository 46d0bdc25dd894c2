"""The decision to lay experts out anew: solved from a window's counts, told with what it cost and brought."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.engine.deployment import Deployment
from moesim.engine.deployment import solve as solve_for
from moesim.engine.relayout_moves import match_ranks
from moesim.graph.priced_step import LayerSetup
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import ExpertPlacement, max_over_mean
from moesim.spec.rebalance import RebalanceSpec

Floats = NDArray[np.float64]
Solve = Callable[[RoutingCounts], ExpertPlacement]

# DeepSeek's EPLB in Python on one core of a 2-core CI machine: 1.45 s for 58 layers of 288 slots (32 GPUs, one group).
# SGLang and vLLM (without async) run it between two steps. Taken in proportion to layers x slots: `assumed`.
EPLB_S_PER_SLOT = 1.45 / (58 * 288)


@dataclass(frozen=True)
class Relayout:
    """One decision of one instance.

    at_s, step: when, and after how many steps of the instance. balance_before, balance_after: max/mean (mean over
    layers) of the window's counts under the old and the new placement. placement: the new one; None where it was
    skipped. moved_experts, moved_bytes, bytes_by_level, pair_bytes [GPUs, GPUs]: what travelled. copied_bytes: inside
    ranks. pause_s: how long the engine stood still, solve_s of it for the solver where it waits for that. delay_s: how
    much longer steps beside an async transfer took. done_s: when the last layer was in place; None where the run ended
    before. step_before_s, step_after_s: mean time of steps of the window's sizes under both placements, on the loads at
    that time. next_balance_before, next_balance_after: max/mean of the next window's counts, which neither was fitted
    to; None without one.
    """

    instance: int
    at_s: float
    step: int
    solve_s: float
    balance_before: float = 1.0
    balance_after: float = 1.0
    placement: ExpertPlacement | None = field(default=None, compare=False)
    moved_experts: int = 0
    moved_bytes: float = 0.0
    bytes_by_level: dict[str, float] = field(default_factory=dict)
    copied_bytes: float = 0.0
    pair_bytes: Floats = field(default_factory=lambda: np.zeros((0, 0)), repr=False, compare=False)
    tag: str = ""
    pause_s: float = 0.0
    delay_s: float = 0.0
    done_s: float | None = None
    step_before_s: float = 0.0
    step_after_s: float = 0.0
    next_balance_before: float | None = None
    next_balance_after: float | None = None

    @property
    def lost_s(self) -> float:
        """What the re-layout cost."""
        return self.pause_s + self.delay_s

    @property
    def gain_s(self) -> float:
        """What it saves in each step, on the loads at the time of the decision."""
        return self.step_before_s - self.step_after_s

    @property
    def break_even_steps(self) -> float | None:
        """Steps until what was lost is back; None where a step gains nothing."""
        return self.lost_s / self.gain_s if self.gain_s > 0 else None


def balance(placement: ExpertPlacement, counts: Floats) -> float:
    """max/mean of the ranks' loads under counts [layers, experts] split evenly over replicas, mean over layers."""
    return float(max_over_mean(placement.rank_loads(counts)).mean())


def solver_of(deployment: Deployment, spec: RebalanceSpec) -> Solve:
    """Solves a placement of as many slots as the deployment has, from a window's counts."""
    setup = deployment.setup

    def solve(window: RoutingCounts) -> ExpertPlacement:
        return solve_for(
            deployment.ground,
            spec.solver,
            slots=setup.placement.slots,
            parallel=setup.parallel,
            groups=deployment.scenario.placement.groups,
            loads=(window,),
        )

    return solve


def solver_seconds(setup: LayerSetup, spec: RebalanceSpec) -> float:
    """How long the solver takes: as given, or as DeepSeek's EPLB does."""
    plan = setup.placement
    return EPLB_S_PER_SLOT * plan.layers * plan.slots if spec.solve_s is None else spec.solve_s


@dataclass(frozen=True)
class Decision:
    """The new placement, or None where it is skipped; max/mean of the window before and after, and if it was solved."""

    placement: ExpertPlacement | None
    before: float
    after: float
    solved: bool = True


def decide(
    spec: RebalanceSpec, setup: LayerSetup, solve: Solve, old: ExpertPlacement, window: RoutingCounts
) -> Decision:
    """Solve the window's counts, unless the ranks are even enough as they are; skip what gains too little."""
    counts = window.counts[0]
    before = balance(old, counts)
    if 1.0 / before >= spec.skip_above:
        return Decision(None, before, before, solved=False)
    new = solve(window)
    if spec.match_ranks:
        nodes = setup.nodes if old.ranks % setup.nodes == 0 else 1
        new = match_ranks(old, new, [rank // (old.ranks // nodes) for rank in range(old.ranks)])
    after = balance(new, counts)
    enough = spec.min_gain is None or before - after >= spec.min_gain * before
    return Decision(new if enough else None, before, after)
