"""A simulation whose placement or loads change: the clocks of its runs, and what they found."""

from __future__ import annotations

from moesim.engine.draws import Draw
from moesim.engine.relayout import LayoutClock
from moesim.engine.relayout_decisions import Relayout, solver_of
from moesim.engine.relayout_timers import Layouts
from moesim.engine.stepmodel import Fidelity, StepModel
from moesim.routing.drift import drift_of_shifts, load_drift


class MovingRuns:
    """Makes the clock of each run of a simulation; None where nothing changes."""

    def __init__(self, model: StepModel, fidelity: Fidelity) -> None:
        scenario, ground = model.deployment.scenario, model.deployment.ground
        self.spec = scenario.placement.rebalance
        drift, shifts = scenario.routing.drift, scenario.routing.shifts
        self.drift = None
        if drift is not None:
            self.drift = load_drift(drift, ground.judge)
        elif shifts:
            self.drift = drift_of_shifts(shifts, ground.judge)
        self.moves = self.drift is not None or self.spec is not None
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

    @property
    def events(self) -> tuple[Relayout, ...]:
        """The decisions of the first run."""
        return () if self.first is None else tuple(self.first.events)

    @property
    def pauses(self) -> tuple[tuple[int, float, float], ...]:
        """Instance, start and seconds of each time that one stood still in the first run."""
        return () if self.first is None else tuple(self.first.pauses)
