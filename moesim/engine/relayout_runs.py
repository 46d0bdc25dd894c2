"""A simulation whose placement or loads change: the clocks of its runs, and what they found."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.engine.draws import Draw
from moesim.engine.moving import asked_changes
from moesim.engine.relayout import LayoutClock
from moesim.engine.relayout_decisions import Relayout, solver_of
from moesim.engine.relayout_timers import Layouts
from moesim.engine.serving import Served
from moesim.engine.stepmodel import Fidelity, StepModel
from moesim.routing.drift import load_drift


@dataclass(frozen=True)
class Relayouts:
    """What happened to the placement of a run: decisions, pauses (instance, start, seconds), and the run without.

    interval_steps: between two decisions.
    """

    events: tuple[Relayout, ...]
    pauses: tuple[tuple[int, float, float], ...]
    without: Served
    interval_steps: int


class MovingRuns:
    """Makes the clock of each run of a simulation; None where nothing changes."""

    def __init__(self, model: StepModel, fidelity: Fidelity) -> None:
        scenario, ground = model.deployment.scenario, model.deployment.ground
        self.spec = scenario.placement.rebalance
        self.moves = asked_changes(scenario)["routing.drift"] or self.spec is not None
        drift = scenario.routing.drift
        self.drift = None if drift is None else load_drift(drift, ground.judge)
        self.layouts = Layouts(model, None if self.drift is None else self.drift.weights)
        self.solve = None if self.spec is None else solver_of(model.deployment, self.spec)
        self.fidelity: Fidelity = fidelity
        self.first: LayoutClock | None = None

    def clock(self, draw: Draw | None, *, still: bool = False) -> LayoutClock | None:
        """The clock of a run. The first decides; runs under draws take its placements again.

        still: without new placements.
        """
        if not self.moves:
            return None
        found = LayoutClock(
            self.layouts,
            drift=self.drift,
            rebalance=None if still else self.spec,
            solve=self.solve,
            fidelity=self.fidelity,
            draw=draw,
            replay=None if draw is None or self.first is None else self.first.events,
        )
        if self.first is None and not still:
            self.first = found
        return found

    def told(self, without: Served | None) -> Relayouts | None:
        """What the first run's clock has seen; None without new placements."""
        if self.first is None or self.spec is None or without is None:
            return None
        events, pauses = tuple(self.first.events), tuple(self.first.pauses)
        return Relayouts(events, pauses, without, self.spec.interval_steps)
