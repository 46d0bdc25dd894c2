"""Which experts the micro-batches of a training step want: a pool of drawn routings, shared by all joint draws."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.engine.routing_draws import RoutingDraws
from moesim.graph.training_layer import TrainingSetup
from moesim.routing.capacity.on_counts import CountFlow, cap_counts
from moesim.routing.capacity.rule import CapacityRule, capacity_rule

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Routings drawn for a run; a step with more micro-batches over all instances meets some of them more than once.
POOL = 256
# Fewest routings of each load, so that the slowest rank is not one sample's.
FEWEST_PER_LOAD = 8


@dataclass(frozen=True, eq=False)
class RoutingPool:
    """Drawn routings: wanted [pool, MoE layers, experts]; pool = loads x each, one load after another.

    flow: what the capacity rule makes of them. weights: [loads], as judged.
    """

    wanted: Floats
    flow: CountFlow
    rule: CapacityRule
    each: int
    weights: Floats

    @property
    def counts(self) -> Floats:
        """Rows that each expert computes and that travel to it: [pool, MoE layers, experts]."""
        return np.asarray(self.flow.rows, dtype=np.float64)

    @property
    def kept(self) -> Floats | None:
        """Share of the picks that are sent [pool, MoE layers]; None where all are."""
        if self.rule.dropless:
            return None
        whole = self.wanted.sum(axis=2)
        return np.asarray(self.counts.sum(axis=2) / np.where(whole > 0, whole, 1.0))

    @property
    def routing_weights(self) -> Floats:
        """Weight of each drawn routing [pool], sum 1."""
        return np.asarray(np.repeat(self.weights, self.each) / self.weights.sum() / self.each)

    def assign(self, shape: tuple[int, int], seed: int, weights: Floats) -> Ints:
        """The routing of each micro-batch [instances, micro-batches], its load chosen by `weights` (sum 1).

        The same seed chooses by the same random numbers, so that two sets of weights are compared paired.
        """
        rng = np.random.default_rng([seed, 9])
        chance, sample = rng.random(shape), rng.integers(0, self.each, shape)
        edges = np.cumsum(weights) / np.sum(weights)
        load = np.minimum(np.searchsorted(edges, chance, side="right"), len(weights) - 1)
        return np.asarray(load * self.each + sample)


def draw_pool(setup: TrainingSetup, routing: RoutingDraws, seed: int) -> RoutingPool:
    """Draw the pool: by the judged loads and their dispersion, or even (`router: balanced`); then apply capacity.

    Every rank that exchanges tokens keeps the capacity of its own part of the micro-batch, as Megatron-LM and DeepSpeed
    do before their all-to-all. Raises BadInput or Infeasible by key for a rule that cannot be.
    """
    tokens = setup.group_tokens
    moe = setup.model.moe
    rule = capacity_rule(setup.policies, moe.top_k)
    if setup.training.router == "balanced":
        wanted = np.full((1, setup.model.moe_layers, moe.experts), tokens * moe.top_k / moe.experts)
        return _pool(setup, wanted, replace(rule, even_sources=True), 1, np.ones(1))
    loads = len(routing.loads)
    each = max(FEWEST_PER_LOAD, -(-min(POOL, setup.micro_batches * setup.grid.instances) // loads))
    sequences = float(setup.training.micro_batch * setup.parallel.attention_dp)
    drawn = [
        routing.counts(
            load, np.full(each, tokens), np.random.default_rng([seed, 8, load]), requests=np.full(each, sequences)
        )
        for load in range(loads)
    ]
    return _pool(setup, np.concatenate(drawn), rule, each, routing.weights)


def _pool(setup: TrainingSetup, wanted: Floats, rule: CapacityRule, each: int, weights: Floats) -> RoutingPool:
    sources = np.full((len(wanted), setup.exchange_ranks), setup.local_rows)
    flow = cap_counts(wanted, sources, rule, top_k=setup.model.moe.top_k)
    return RoutingPool(wanted, flow, rule, each, weights)
