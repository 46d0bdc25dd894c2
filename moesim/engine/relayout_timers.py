"""What times the steps of a run whose placement and loads change: a step model for each placement, kept."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.engine.batch_state import Plan
from moesim.engine.draws import Draw
from moesim.engine.mixtures import RequestMix
from moesim.engine.relayout_moves import MoveTime, move_time, plan_moves, rank_domains
from moesim.engine.routing_draws import RoutingDraws
from moesim.engine.stepmodel import ExactModel, Fidelity, StepModel, TimedModel
from moesim.graph.plan_pricer import PlanPricer
from moesim.spec.plan import ExpertPlacement

Floats = NDArray[np.float64]


class Layouts:
    """Step models by placement and mix of loads, made when first asked for; all draws of a run share them.

    A new placement costs the pricing of its grids, a new mix only their timing, unless requests are mixed: then what
    is priced depends on the mix.
    """

    def __init__(self, model: StepModel, mixes: Floats | None) -> None:
        """mixes: [mixes, loads], weights of the loads; None = the model's own throughout."""
        self.model, self.mixes = model, mixes
        self._models: dict[tuple[bytes, int], StepModel] = {}
        self._moves: dict[tuple[bytes, bytes], MoveTime] = {}

    def of(self, placement: ExpertPlacement, mix: int) -> StepModel:
        """The step model under a placement and, where requests are mixed, a mix."""
        mixed = isinstance(self.model.routing, RequestMix) and self.mixes is not None
        key = (placement.physical_to_logical.tobytes(), mix if mixed else 0)
        if key not in self._models:
            self._models[key] = self._make(placement, mix if mixed else None)
        return self._models[key]

    def timed(self, placement: ExpertPlacement, mix: int, draw: Draw | None) -> TimedModel:
        """Steps by table."""
        found = TimedModel(self.of(placement, mix), draw)
        if self.mixes is not None and not isinstance(self.model.routing, RequestMix):
            found.load_weights = self.mixes[mix]
        return found

    def exact(self, placement: ExpertPlacement, mix: int, fidelity: Fidelity, rng: np.random.Generator) -> ExactModel:
        """Steps one by one, their routing drawn from `rng`."""
        model = copy.copy(self.of(placement, mix))
        model.routing = self.routing(mix)
        found = ExactModel(model, fidelity)
        found.rng = rng
        return found

    def routing(self, mix: int) -> RoutingDraws:
        """The draws of a mix."""
        routing = self.model.routing
        if self.mixes is None:
            return routing
        if isinstance(routing, RequestMix):
            return routing.under(self.mixes[mix])
        twin = copy.copy(routing)
        twin.weights = self.mixes[mix]
        return twin

    def move_time(self, old: ExpertPlacement, new: ExpertPlacement) -> MoveTime:
        """What one placement takes to become another."""
        key = (old.physical_to_logical.tobytes(), new.physical_to_logical.tobytes())
        if key not in self._moves:
            setup = self.model.deployment.setup
            assert setup.network is not None
            moves = plan_moves(old, new, rank_domains(setup, setup.network.cluster.domain_gpus))
            hbm = self.model.deployment.ground.cluster.gpu.hbm_bytes_per_s
            self._moves[key] = move_time(moves, setup, setup.network, hbm)
        return self._moves[key]

    def _make(self, placement: ExpertPlacement, mix: int | None) -> StepModel:
        first = self.model.deployment.setup.placement
        same = np.array_equal(placement.physical_to_logical, first.physical_to_logical)
        if same and mix is None:
            return self.model
        twin = copy.copy(self.model)
        if not same:
            setup = replace(self.model.deployment.setup, placement=placement)
            twin.deployment = replace(self.model.deployment, setup=setup)
            twin.pricer = PlanPricer(setup, self.model.deployment.ground.costs)
        if mix is not None:
            twin.routing = self.routing(mix)
        twin.grids = {}
        twin.base = TimedModel(twin, None)
        return twin


def exchange_s(model: StepModel, plan: Plan) -> float:
    """Seconds of a planned step in which it dispatches or combines, as the nearest point of its grid has it."""
    kind = "prefill" if plan.prefill_tokens.any() else "decode"
    tokens = (plan.decode_seqs * (1 + model.drafts) + plan.prefill_tokens).astype(np.float64)
    grid = model.grid(kind)
    near = grid.steps_near(float(tokens.mean()), float(tokens.max() / max(tokens.mean(), 1e-9)))
    priced = grid.priced
    seconds = (priced.dispatch + priced.combine).seconds()
    whole = np.broadcast_to(seconds, (priced.batch.steps, *seconds.shape[1:]))[near]
    halves = 2 if model.deployment.setup.policies.schedule == "two_batch" else 1
    layers = model.deployment.setup.model.moe_layers
    by_layer = whole.sum(axis=1) if whole.ndim == 3 and whole.shape[1] > 1 else whole.mean(axis=1) * layers
    return float(by_layer.max(axis=-1).mean() * priced.chunks * halves)
