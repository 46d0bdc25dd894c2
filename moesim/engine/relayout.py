"""Loads that shift while a deployment serves, and experts that are laid out anew: what it costs and what it brings.

Every `interval_steps` steps an instance solves its placement again from the counts of its last `window_steps` steps, as
the engines' expert load balancers do (vLLM `--eplb-config`, SGLang `--enable-eplb`). It sees what it served, not what
is to come. Its steps wait while weights move; in chunks of layers where asked, with a step between two chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moesim import plugins
from moesim.engine.batch_state import Plan
from moesim.engine.draws import FAMILIES, LATER, Draw
from moesim.engine.losses import Strike
from moesim.engine.stepmodel import StepModel, TimedModel
from moesim.errors import BadInput
from moesim.network.moves import Moves, move_seconds, plan_moves
from moesim.spec.plan import ExpertPlacement, PlacementRequest, max_over_mean
from moesim.spec.scenario import RebalanceSpec, Scenario, ShiftSpec
from moesim.units import BYTES_PER_ELEMENT

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Relayout:
    """One re-layout of an instance. pause_s: of all chunks. balance: max/mean of the window's counts before and after.

    step_before_s, step_after_s: the step before it, under the old and the new placement. moves: None where it was
    skipped, as the ranks were even enough.
    """

    instance: int
    at_s: float
    pause_s: float
    moves: Moves | None
    expert_bytes: float
    balance_before: float
    balance_after: float
    step_before_s: float
    step_after_s: float

    @property
    def break_even_steps(self) -> float | None:
        """Steps like the last one until the pause is made up for; None where the step did not get faster."""
        gained_s = self.step_before_s - self.step_after_s
        return self.pause_s / gained_s if gained_s > 0 else None


@dataclass
class _Instance:
    """What an instance remembers: its placement, its last steps as tokens by load, and what still has to move."""

    placement: ExpertPlacement
    window: deque[Floats]
    steps: int = 0
    due: bool = False
    stepped: bool = False
    until_s: float = 0.0
    chunks: deque[float] = field(default_factory=deque)
    following: ExpertPlacement | None = None
    last: Plan | None = None


@dataclass
class Layouts:
    """Step models by placement and solved placements by (instance, how many before): shared by a run and its draws."""

    models: dict[bytes, StepModel] = field(default_factory=dict)
    solved: dict[tuple[int, int], ExpertPlacement] = field(default_factory=dict)


class RelayoutClock:
    """Times the steps of one run under its shifts and re-layouts; takes the place of faults in the serving loop."""

    def __init__(self, model: StepModel, draw: Draw | None, layouts: Layouts, *, moving: bool = True) -> None:
        """moving: whether experts are laid out anew; shifts of the loads happen either way."""
        scenario = model.deployment.scenario
        self.model, self.draw, self.layouts = model, draw, layouts
        self.spec = scenario.placement.rebalance if moving else None
        self.shifts = shifts_of(scenario, model)
        self.found: list[Relayout] = []
        self.pauses: list[tuple[int, float, float]] = []  # instance, start, seconds of each chunk
        self._timed: dict[tuple[bytes, int], TimedModel] = {}
        self._instances: dict[int, _Instance] = {}

    def step_s(self, plan: Plan, instance: int, now_s: float) -> float:
        """Seconds of a planned step that an instance begins now."""
        state, when = self._state(instance), self._when(now_s)
        kind = "prefill" if plan.prefill_tokens.any() else "decode"
        if self.spec is not None:
            tokens = float(plan.decode_seqs.sum() + plan.prefill_tokens.sum())
            state.window.append(tokens * self._mix(when, kind))
            state.steps += 1
            state.due = state.steps % self.spec.interval_steps == 0 and not state.chunks
            state.last = Plan(*[part.copy() for part in plan])  # type: ignore[arg-type]
        state.stepped = True
        return self._model(state.placement, when)(plan)

    def down_until(self, instance: int, now_s: float) -> float:
        """When the instance goes on: after the chunk of layers that moves now, if one does."""
        state = self._state(instance)
        if now_s < state.until_s:
            return state.until_s
        if state.due:
            state.due = False
            self._begin(state, instance, now_s)
        if state.chunks and state.stepped:
            state.stepped = False
            pause_s = state.chunks.popleft()
            self.pauses.append((instance, now_s, pause_s))
            state.until_s = now_s + pause_s
            if not state.chunks and state.following is not None:
                state.placement, state.following = state.following, None
        return max(state.until_s, now_s)

    def strike(self, instance: int, now_s: float) -> list[Strike]:
        """Nothing is lost."""
        return []

    def route(self, instance: int, rank: int, now_s: float) -> tuple[int, int]:
        """Requests go where they were meant to."""
        return instance, rank

    def _state(self, instance: int) -> _Instance:
        if instance not in self._instances:
            most = 1 if self.spec is None else self.spec.window_steps
            self._instances[instance] = _Instance(self.model.deployment.setup.placement, deque(maxlen=most))
        return self._instances[instance]

    def _when(self, now_s: float) -> int:
        """Which shift is in force: 0 before the first."""
        return sum(now_s >= at_s for at_s, _ in self.shifts)

    def _weights(self, when: int) -> Floats:
        if when > 0:
            return self.shifts[when - 1][1]
        return self.model.routing.weights if self.draw is None else self.draw.load_weights

    def _mix(self, when: int, kind: str) -> Floats:
        """Share of each judged load in a step of a kind: [loads], sum 1."""
        weights, loads = self._weights(when), self.model.routing.for_phase(kind)
        mix = np.zeros(len(weights))
        mix[loads] = weights[loads] if weights[loads].sum() > 0 else 1.0
        return np.asarray(mix / mix.sum())

    def _model(self, placement: ExpertPlacement, when: int) -> TimedModel:
        key = (placement.physical_to_logical.tobytes(), when)
        if key not in self._timed:
            step_model = self._step_model(placement)
            normal = dict.fromkeys((*FAMILIES, *LATER), 0.0) if self.draw is None else self.draw.normal
            plain = self.draw is None and when == 0
            self._timed[key] = step_model.base if plain else step_model.under(Draw(normal, self._weights(when)))
        return self._timed[key]

    def _step_model(self, placement: ExpertPlacement) -> StepModel:
        if placement is self.model.deployment.setup.placement:
            return self.model
        key = placement.physical_to_logical.tobytes()
        if key not in self.layouts.models:
            deployment = self.model.deployment
            moved = replace(deployment, setup=replace(deployment.setup, placement=placement))
            self.layouts.models[key] = StepModel(moved, seed=self.model.seed, detail=self.model.detail)
        return self.layouts.models[key]

    def _begin(self, state: _Instance, instance: int, now_s: float) -> None:
        """Solve the placement from the window and plan its moves; nothing moves where the ranks are even enough."""
        assert self.spec is not None
        assert state.last is not None
        number = sum(one.instance == instance for one in self.found)
        counts = self._counts(state.window, instance, number)
        before = float(max_over_mean(state.placement.rank_loads(counts)).mean())
        when = self._when(now_s)
        step_s = self._model(state.placement, when)(state.last)
        size = expert_bytes(self.model)
        if 1.0 / before >= self.spec.skip_above:
            self.found.append(Relayout(instance, now_s, 0.0, None, size, before, before, step_s, step_s))
            return
        key = (instance, number)
        if key not in self.layouts.solved:
            self.layouts.solved[key] = solve(self.model, self.spec, counts)
        new = self.layouts.solved[key]
        setup, cluster = self.model.deployment.setup, self.model.deployment.ground.cluster
        assert setup.network is not None
        domain = max(1, cluster.domain_gpus // setup.parallel.expert_tp)
        moves = plan_moves(state.placement, new, domain)
        by_layer = move_seconds(moves, size, setup.network.cluster)
        chunk = self.spec.layers_per_chunk or len(by_layer)
        state.chunks = deque(float(by_layer[first : first + chunk].sum()) for first in range(0, len(by_layer), chunk))
        state.following = new
        after = float(max_over_mean(new.rank_loads(counts)).mean())
        step_after_s = self._model(new, when)(state.last)
        self.found.append(
            Relayout(instance, now_s, float(by_layer.sum()), moves, size, before, after, step_s, step_after_s)
        )

    def _counts(self, window: Sequence[Floats], instance: int, number: int) -> Floats:
        """Counts [layers, experts] of the window's tokens, drawn from the loads that they came from."""
        by_load = np.sum(window, axis=0)
        rng = np.random.default_rng([self.model.seed, 12, instance, number])
        found = [
            self.model.routing.counts(load, np.asarray([tokens]), rng)[0]
            for load, tokens in enumerate(by_load)
            if tokens >= 1.0
        ]
        return np.asarray(np.sum(found, axis=0))


def expert_bytes(model: StepModel) -> float:
    """Weight bytes of one expert on one GPU."""
    setup = model.deployment.setup
    return setup.model.expert_parameters() / setup.parallel.expert_tp * BYTES_PER_ELEMENT[setup.precision.experts]


def solve(model: StepModel, spec: RebalanceSpec, counts: Floats) -> ExpertPlacement:
    """The placement for counts [layers, experts], by the solver that re-layouts use."""
    setup, cluster = model.deployment.setup, model.deployment.ground.cluster
    profile = counts / counts.sum(axis=1, keepdims=True)
    request = PlacementRequest(
        loads=profile[None],
        weights=np.ones(1),
        layer_ids=setup.placement.layer_ids,
        absolute_layers=setup.placement.absolute_layers,
        slots=setup.placement.slots,
        ranks=setup.placement.ranks,
        nodes=max(1, setup.parallel.gpus // cluster.gpus_per_node),
        groups=model.deployment.scenario.placement.groups,
        seed=model.seed,
    )
    found: ExpertPlacement = plugins.load(plugins.SOLVERS, spec.solver, where="placement.rebalance.solver")(request)
    return found


def shifts_of(scenario: Scenario, model: StepModel) -> list[tuple[float, Floats]]:
    """Times and weights [loads] of the scenario's shifts, by time. Raises BadInput for loads that are not judged."""
    names = [load.name for load in model.routing.loads]
    return [(shift.at_s, _weights_of(shift, names)) for shift in sorted(scenario.routing.shifts, key=lambda s: s.at_s)]


def _weights_of(shift: ShiftSpec, names: Sequence[str]) -> Floats:
    weights = np.zeros(len(names))
    for name, weight in shift.loads.items():
        found = [index for index, known in enumerate(names) if name in known]
        if not found:
            raise BadInput(
                f"no judged load is named {name!r}",
                where="routing.shifts",
                mend=f"use parts of {', '.join(names[:6])}",
            )
        weights[found] += weight / len(found)
    return np.asarray(weights / weights.sum())


def refuse_relayout(scenario: Scenario, command: str) -> None:
    """For commands whose plans stay as they are and whose loads do not shift. Raises BadInput."""
    for key, asked in (
        ("placement.rebalance", scenario.placement.rebalance is not None),
        ("routing.shifts", bool(scenario.routing.shifts)),
    ):
        if asked:
            raise BadInput(f"{command} does not model {key}", where=key, mend="leave it out, or use `moesim simulate`")


def check_relayout(scenario: Scenario, fidelity: str) -> None:
    """What shifts and re-layouts are not modelled together with. Raises BadInput."""
    asked = [
        name
        for name, given in (
            ("placement.rebalance", scenario.placement.rebalance is not None),
            ("routing.shifts", bool(scenario.routing.shifts)),
        )
        if given
    ]
    if not asked:
        return
    serving = scenario.serving
    clashes = (
        (serving is None, "training"),
        (serving is not None and serving.roles is not None, "serving.roles"),
        (bool(scenario.faults), "faults"),
        (scenario.policies.storage != "resident", f"storage {scenario.policies.storage}"),
        (fidelity != "table", f"fidelity {fidelity}"),
    )
    for clash, what in clashes:
        if clash:
            raise BadInput(f"{asked[0]} is not modelled together with {what}", where=asked[0], mend="leave one out")
