"""Faults over the time of a serving run: which step model holds when, who is down, whose requests are lost.

Faults act at step granularity: a step that has begun ends as planned, and what a fault changes shows from the next
step of the instance on. A dead rank's requests, and those of an instance that goes down, are lost with their KV cache;
requests that only wait keep their place, on another rank where theirs is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moesim.engine.batch_state import Plan
from moesim.engine.draws import Draw
from moesim.engine.faults import FaultedTable, FaultState, jitter_factors, model_without, state_at
from moesim.engine.losses import Strike
from moesim.engine.step_graph import best_step
from moesim.engine.stepmodel import ExactModel, Fidelity, StepModel
from moesim.graph.priced_step import PricedStep
from moesim.graph.task import TaskGraph
from moesim.spec.faults import FaultSpec

# The table holds two points of jitter, 1 and this; between and beyond them it goes straight, which is exact for a
# sequential schedule.
JITTER_REFERENCE = 1.5


class FaultClock:
    """The faults of one run under one draw; a step model for each state, made when it first comes."""

    def __init__(self, faults: Sequence[FaultSpec], model: StepModel, draw: Draw | None, fidelity: Fidelity) -> None:
        self.faults = tuple(faults)
        self.model, self.draw, self.fidelity = model, draw, fidelity
        self.parallel = model.deployment.setup.parallel
        self.instances = model.deployment.instances
        self.rng = np.random.default_rng([model.seed, 9])
        self.routing_rng = np.random.default_rng([model.seed, 5])
        self._timers: dict[FaultState, Any] = {}
        self._without: dict[frozenset[int], StepModel] = {frozenset(): model}
        self._struck: set[tuple[int, int]] = set()

    def step_s(self, plan: Plan, instance: int, now_s: float) -> float:
        """Seconds of a planned step that an instance begins now. Raises OutsideProfile."""
        state = state_at(self.faults, instance, now_s, self.parallel)
        if state not in self._timers:
            self._timers[state] = self._timer(state)
        return float(self._timers[state](plan))

    def down_until(self, instance: int, now_s: float) -> float:
        """When the instance is back; now, where it is not down."""
        return max((end for fault in self.faults if (end := _back(fault, instance, now_s)) is not None), default=now_s)

    def strike(self, instance: int, now_s: float) -> list[Strike]:
        """What faults that have begun since the last call take from an instance; each is told once."""
        found = []
        for index, fault in enumerate(self.faults):
            lethal = fault.kind == "dead_rank" or fault.recovery_s is not None
            told = (index, instance) in self._struck
            if not lethal or told or fault.instance != instance or now_s < fault.from_s:
                continue
            self._struck.add((index, instance))
            if fault.recovery_s is not None:
                found.append(Strike(tuple(range(self.parallel.attention_dp)), queues_move=False))
            elif fault.active(instance, now_s):
                assert fault.gpu is not None
                found.append(Strike((fault.gpu // self.parallel.tp,), queues_move=True))
        return found

    def route(self, instance: int, rank: int, now_s: float) -> tuple[int, int]:
        """Where a request that was meant for a rank goes: to the next instance that is up, the next rank alive."""
        for turn in range(self.instances):
            other = (instance + turn) % self.instances
            if self.down_until(other, now_s) <= now_s:
                instance = other
                break
        dead = state_at(self.faults, instance, now_s, self.parallel).dead
        ranks = self.parallel.attention_dp
        alive = [(rank + turn) % ranks for turn in range(ranks) if (rank + turn) % ranks not in dead]
        return instance, alive[0] if alive else rank

    def _timer(self, state: FaultState) -> Any:
        if state.dead not in self._without:
            self._without[state.dead] = model_without(self.model, state.dead)
        model = self._without[state.dead]
        if self.fidelity != "table" and self.draw is None:
            return _FaultedExact(model, self.fidelity, state, self.routing_rng, self.rng)
        table = FaultedTable(model, self.draw, state)
        if state.sigma == 0.0:
            return table
        slower = FaultedTable(model, self.draw, state, extra=JITTER_REFERENCE)
        ranks = self.parallel.gpus
        alive = ranks - len(state.dead) * self.parallel.tp

        def jittered(plan: Plan) -> float:
            """A step goes by its most delayed rank."""
            most = float(jitter_factors(state.sigma, (ranks,), self.rng)[:alive].max())
            alone = table(plan)
            return alone + (most - 1.0) / (JITTER_REFERENCE - 1.0) * (slower(plan) - alone)

        return jittered


class _FaultedExact(ExactModel):
    """An ExactModel whose graphs are slowed by a state; routing is drawn as without faults."""

    def __init__(
        self,
        model: StepModel,
        fidelity: Fidelity,
        state: FaultState,
        routing_rng: np.random.Generator,
        rng: np.random.Generator,
    ) -> None:
        super().__init__(model, fidelity)
        self.rng = routing_rng
        self._state = replace(state, dead=frozenset())
        self._jitter_rng = rng

    def graph(self, priced: Sequence[PricedStep]) -> tuple[TaskGraph, list[PricedStep]]:
        """The graph of priced micro-batches under the state and its own jitter, and its number of chunks."""
        setup = self.model.deployment.setup
        jitter = None
        if self._state.sigma > 0.0:
            shape = (priced[0].batch.steps, setup.parallel.gpus)
            jitter = jitter_factors(self._state.sigma, shape, self._jitter_rng)
        return best_step(setup, priced, lambda graph: self._state.slowed(graph, jitter))


def _back(fault: FaultSpec, instance: int, now_s: float) -> float | None:
    """When an instance is back from a fault that has it down now."""
    if fault.recovery_s is None or fault.instance != instance:
        return None
    end_s = fault.from_s + fault.recovery_s
    return end_s if fault.from_s <= now_s < end_s else None
