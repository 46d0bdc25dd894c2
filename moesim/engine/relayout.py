"""Placements that are solved again while a deployment serves, and loads that change: the clock of such a run.

The serving loop asks this clock instead of a step model, as it asks faults (`losses.Faults`): how long a step takes
now, and until when an instance stands still. So such runs go through the SimPy loop, never the compiled one, which
holds one table for each kind of step from a run's first to its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.cost.reach import REL_SIGMA
from moesim.engine.batch_state import Plan
from moesim.engine.draws import Draw
from moesim.engine.losses import Strike
from moesim.engine.relayout_decisions import Relayout, Solve, balance, decide, solver_seconds
from moesim.engine.relayout_moves import MoveTime
from moesim.engine.relayout_timers import Layouts, exchange_s
from moesim.engine.relayout_window import Window
from moesim.engine.stepmodel import ExactModel, Fidelity, TimedModel
from moesim.routing.drift import LoadDrift
from moesim.spec.plan import ExpertPlacement
from moesim.spec.rebalance import RebalanceSpec


@dataclass
class _Moving:
    """A new placement on its way: layers in place so far, and what the one that travels still needs (async)."""

    new: ExpertPlacement
    time: MoveTime
    event: int
    ready_s: float
    layers: int = 0
    left_s: float = 0.0


@dataclass
class _Instance:
    """One lockstep group: its placement and the one before, steps since the last decision and in all, the pause."""

    placement: ExpertPlacement
    window: Window
    previous: ExpertPlacement | None = None
    moving: _Moving | None = None
    last: int | None = None  # event of the last decision
    decisions: int = 0
    steps: int = 0
    total: int = 0
    until_s: float = 0.0
    stepped: bool = False


class LayoutClock:
    """The placements and loads of one run under one draw; it is `losses.Faults` to the serving loop."""

    def __init__(
        self, layouts: Layouts, *, drift: LoadDrift | None, rebalance: RebalanceSpec | None = None,
        solve: Solve | None = None, fidelity: Fidelity = "table", draw: Draw | None = None,
        replay: Sequence[Relayout] | None = None,
    ) -> None:  # fmt: skip
        """replay: decisions of another run, whose placements each instance takes in turn instead of solving."""
        self.layouts, self.rebalance, self.drift, self.solve = layouts, rebalance, drift, solve
        self.fidelity: Fidelity = fidelity if draw is None else "table"
        self.draw, self.replay = draw, replay
        deployment = layouts.model.deployment
        self.setup = deployment.setup
        error = 0.0 if draw is None else draw.normal["collective"]
        self.link_factor = float(np.exp(REL_SIGMA * error))
        self.events: list[Relayout] = []
        self.pauses: list[tuple[int, float, float]] = []  # instance, start, seconds
        self._timers: dict[tuple[bytes, int], TimedModel | ExactModel] = {}
        self._routing_rng = np.random.default_rng([layouts.model.seed, 5])
        self._instances = [
            _Instance(self.setup.placement, Window(layouts, np.random.default_rng([layouts.model.seed, 12, instance])))
            for instance in range(deployment.instances)
        ]

    def step_s(self, plan: Plan, instance: int, now_s: float) -> float:
        """Seconds of a planned step that an instance begins now. Raises OutsideProfile."""
        one, mix = self._instances[instance], self._mix(now_s)
        one.stepped, one.total = True, one.total + 1
        if one.moving is not None:
            return self._beside(one, one.moving, plan, mix, now_s)
        timer = self._timer(one.placement, mix)
        seconds = float(timer(plan))
        if self.rebalance is not None:
            if self.replay is None and self.rebalance.interval_steps - one.steps <= self.rebalance.window_steps:
                one.window.add(plan, mix, timer if isinstance(timer, ExactModel) else None)
            one.steps += 1
        return seconds

    def down_until(self, instance: int, now_s: float) -> float:
        """When the instance goes on; now, where it does not stand still."""
        one = self._instances[instance]
        if self.rebalance is not None and one.until_s <= now_s:
            if one.moving is not None and one.stepped:
                self._go_on(one, one.moving, instance, now_s)
            elif one.moving is None and one.steps >= self.rebalance.interval_steps:
                self._decide(one, self.rebalance, instance, now_s)
        return max(one.until_s, now_s)

    def strike(self, instance: int, now_s: float) -> list[Strike]:
        """Nothing is ever lost."""
        del instance, now_s
        return []

    def route(self, instance: int, rank: int, now_s: float) -> tuple[int, int]:
        """Every request goes where it was meant for."""
        del now_s
        return instance, rank

    def _mix(self, now_s: float) -> int:
        return 0 if self.drift is None else self.drift.mix_at(now_s)

    def _timer(self, placement: ExpertPlacement, mix: int) -> TimedModel | ExactModel:
        key = (placement.physical_to_logical.tobytes(), mix)
        if key not in self._timers:
            self._timers[key] = (
                self.layouts.timed(placement, mix, self.draw)
                if self.fidelity == "table"
                else self.layouts.exact(placement, mix, self.fidelity, self._routing_rng)
            )
        return self._timers[key]

    def _decide(self, one: _Instance, spec: RebalanceSpec, instance: int, now_s: float) -> None:
        """Solve again and, where it is worth it, begin to move."""
        event = Relayout(instance, now_s, one.total, solver_seconds(self.setup, spec))
        if self.replay is not None:
            theirs = [found for found in self.replay if found.instance == instance][one.decisions : one.decisions + 1]
            new = theirs[0].placement if theirs else None
            event = replace(event, solve_s=theirs[0].solve_s if theirs else 0.0)
        else:
            event, new = self._solved(one, spec, event)
        one.steps, one.decisions, one.last = 0, one.decisions + 1, len(self.events)
        one.window.clear()
        if new is not None:
            timed = self.layouts.move_time(one.placement, new)
            event = replace(
                event,
                placement=new,
                moved_experts=timed.experts,
                moved_bytes=sum(timed.bytes_by_level.values()),
                bytes_by_level=timed.bytes_by_level,
                copied_bytes=timed.copied_bytes,
                pair_bytes=timed.pair_bytes.sum(axis=0),
                tag=timed.tag.label,
            )
            ready_s = now_s + (event.solve_s if spec.mode == "async" else 0.0)
            one.moving = _Moving(new, timed, len(self.events), ready_s)
        self.events.append(event)
        solving_s = event.solve_s if spec.mode == "blocking" else 0.0
        if one.moving is None or spec.mode == "async":
            self._pause(one, instance, now_s, solving_s)
            one.stepped = False
            if one.moving is not None:
                self._next_layer(one, one.moving, now_s)
        else:
            self._chunk(one, one.moving, instance, now_s, solving_s)

    def _solved(self, one: _Instance, spec: RebalanceSpec, event: Relayout) -> tuple[Relayout, ExpertPlacement | None]:
        """The decision on the window's counts, told with the step times that it leads to; judges the last one."""
        assert self.solve is not None
        counts = one.window.counts()
        if one.last is not None and one.previous is not None and self.events[one.last].placement is not None:
            self.events[one.last] = replace(
                self.events[one.last],
                next_balance_before=balance(one.previous, counts),
                next_balance_after=balance(one.placement, counts),
            )
        found = decide(spec, self.setup, self.solve, one.placement, one.window.as_load(counts))
        solve_s = event.solve_s if found.solved else 0.0
        event = replace(event, balance_before=found.before, balance_after=found.after, solve_s=solve_s)
        new = found.placement
        if new is None:
            return event, None
        mix = self._mix(event.at_s)
        timers = [self.layouts.timed(plan, mix, None) for plan in (one.placement, new)]
        before_s, after_s = one.window.mean_step_s(timers)
        return replace(event, step_before_s=before_s, step_after_s=after_s), new

    def _chunk(self, one: _Instance, moving: _Moving, instance: int, now_s: float, solving_s: float) -> None:
        """Blocking: stand still while the next layers move."""
        assert self.rebalance is not None
        layers = self.setup.placement.layers
        last = min(moving.layers + (self.rebalance.layers_per_chunk or layers), layers)
        part = slice(moving.layers, last)
        seconds = float(moving.time.transfer_s[part].sum()) * self.link_factor + float(moving.time.copy_s[part].sum())
        self._pause(one, instance, now_s, solving_s + seconds)
        moving.layers, one.stepped = last, False
        if last == layers:
            self._done(one, moving, max(now_s, one.until_s))

    def _go_on(self, one: _Instance, moving: _Moving, instance: int, now_s: float) -> None:
        """After a step: the next chunk, or the layer that has arrived is copied into place."""
        assert self.rebalance is not None
        if self.rebalance.mode == "blocking":
            self._chunk(one, moving, instance, now_s, 0.0)
            return
        one.stepped = False
        if now_s > moving.ready_s and moving.left_s <= 0.0:
            self._pause(one, instance, now_s, float(moving.time.copy_s[moving.layers]))
            moving.layers += 1
            self._next_layer(one, moving, max(now_s, one.until_s))

    def _next_layer(self, one: _Instance, moving: _Moving, now_s: float) -> None:
        """Async: what the next layer to travel needs; those that stay as they are take no time."""
        seconds = moving.time.transfer_s
        while moving.layers < len(seconds) and seconds[moving.layers] == 0.0 and moving.time.copy_s[moving.layers] == 0:
            moving.layers += 1
        if moving.layers == len(seconds):
            self._done(one, moving, now_s)
        else:
            moving.left_s = float(seconds[moving.layers]) * self.link_factor

    def _beside(self, one: _Instance, moving: _Moving, plan: Plan, mix: int, now_s: float) -> float:
        """Seconds of a step while some layers have moved and, async, one travels.

        A transfer and the step's exchanges share their link half and half: each second that both are on it delays the
        exchange by as long as the transfer got on. An upper bound: they may use different links.
        """
        seconds = self._partly(one.placement, moving, plan, mix)
        assert self.rebalance is not None
        if self.rebalance.mode == "blocking" or now_s < moving.ready_s:
            return seconds
        travelled = min(moving.left_s, seconds)
        exchanging = min(exchange_s(self.layouts.of(one.placement, mix), plan), seconds)
        delay_s = travelled * exchanging / seconds
        moving.left_s -= travelled
        event = self.events[moving.event]
        self.events[moving.event] = replace(event, delay_s=event.delay_s + delay_s)
        return seconds + delay_s

    def _partly(self, old: ExpertPlacement, moving: _Moving, plan: Plan, mix: int) -> float:
        """A step with the first layers in their new place: exact one by one; by table, a part of either step's time."""
        layers, done = old.layers, moving.layers
        if self.fidelity != "table" and done:
            rows = np.concatenate([moving.new.physical_to_logical[:done], old.physical_to_logical[done:]])
            return float(self._timer(replace(moving.new, physical_to_logical=rows), mix)(plan))
        before_s = float(self._timer(old, mix)(plan))
        if not done:
            return before_s
        return before_s + done / layers * (float(self._timer(moving.new, mix)(plan)) - before_s)

    def _done(self, one: _Instance, moving: _Moving, now_s: float) -> None:
        self.events[moving.event] = replace(self.events[moving.event], done_s=now_s)
        one.previous, one.placement, one.moving = one.placement, moving.new, None

    def _pause(self, one: _Instance, instance: int, now_s: float, seconds: float) -> None:
        if seconds > 0.0:
            one.until_s = now_s + seconds
            self.pauses.append((instance, now_s, seconds))
            index = one.last
            assert index is not None
            self.events[index] = replace(self.events[index], pause_s=self.events[index].pause_s + seconds)
