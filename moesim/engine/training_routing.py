"""Which experts the micro-batches of a training step want: a pool of drawn routings, shared by all joint draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.engine.routing_draws import RoutingDraws
from moesim.errors import BadInput
from moesim.graph.training_layer import TrainingSetup
from moesim.spec.scenario import CapacitySpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Routings drawn for a run; a step with more micro-batches over all instances meets some of them more than once.
POOL = 256
# Fewest routings of each load, so that the slowest rank is not one sample's.
FEWEST_PER_LOAD = 8


@dataclass(frozen=True, eq=False)
class RoutingPool:
    """Drawn routings: counts [pool, MoE layers, experts] after capacity; pool = loads x each, one load after another.

    weights: [loads], as judged. dropped_fraction: of all picks, by the capacity rule.
    """

    counts: Floats
    each: int
    weights: Floats
    dropped_fraction: float

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
    """Draw the pool: by the judged loads and their dispersion, or even (`router: balanced`)."""
    tokens = setup.group_tokens
    moe = setup.model.moe
    if setup.training.router == "balanced":
        share = tokens * moe.top_k / moe.experts
        counts, dropped = processed(
            np.full((1, setup.model.moe_layers, moe.experts), share), setup.policies.capacity
        )  # fmt: skip
        return RoutingPool(counts, 1, np.ones(1), dropped)
    loads = len(routing.loads)
    each = max(FEWEST_PER_LOAD, -(-min(POOL, setup.micro_batches * setup.grid.instances) // loads))
    sequences = float(setup.training.micro_batch * setup.parallel.attention_dp)
    drawn = [
        routing.counts(
            load, np.full(each, tokens), np.random.default_rng([seed, 8, load]), requests=np.full(each, sequences)
        )
        for load in range(loads)
    ]
    counts, dropped = processed(np.concatenate(drawn), setup.policies.capacity)
    return RoutingPool(counts, each, routing.weights, dropped)


def processed(counts: Floats, capacity: CapacitySpec) -> tuple[Floats, float]:
    """Counts that experts process under a capacity rule, and the fraction dropped. The one place that knows of rules.

    Raises BadInput for any rule but `dropless`.
    """
    refuse_capacity(capacity)
    return counts, 0.0


def refuse_capacity(capacity: CapacitySpec) -> None:
    """Raises BadInput, by name, for a capacity rule that training does not simulate yet."""
    if capacity.rule != "dropless":
        raise BadInput(
            f"capacity rule {capacity.rule} is not simulated in training yet",
            where="policies.capacity.rule",
            mend="write `rule: dropless`",
        )
