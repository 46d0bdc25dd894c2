"""What one MoE layer costs a placement, in a dozen numbers: small enough for a compiled search, in seconds.

    layer      = experts + exchange
    experts    = experts_s + max over ranks (expert_s x experts that get a token + token_s x tokens)
    exchange   = exchange_s + max(gpu_copy_s x copies into the hottest GPU, node_copy_s x copies into the hottest node)

An exchange is a dispatch and its combine. Where every pick travels by itself (low-latency DeepEP, plain all-to-alls), a
GPU's copies are its tokens and nodes do not matter; where a token goes once to each node and is forwarded once to each
GPU (normal DeepEP), copies follow from the chance that a token visits. `engine.layer_cost` fits the seconds to what a
scenario's own cost model says, so nothing here is typed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from moesim.spec.plan import ExpertPlacement

Floats = NDArray[np.float64]

# Less scatter than this is none.
LEAST_SCATTER = 1e-6
# The exponent of a power sum lies between 8 and 64.
LEAST_DOUBLINGS, MOST_DOUBLINGS = 3, 6


@dataclass(frozen=True)
class LayerCost:
    """Seconds of one MoE layer at one batch size, and of the rest of the step.

    tokens_per_rank: of each EP rank. top_k, groups, top_groups: of the gate. nodes: that the ranks span.
    by_visit: copies are visits of ranks and nodes, else picks. experts_s, exchange_s: what every layer takes however
    its experts lie. expert_s: one more expert that gets a token on a rank. token_s: one more token for an expert there.
    gpu_copy_s: one more copy into the hottest GPU, node_copy_s: into the hottest node, for each of its GPUs.
    other_s: the step without its MoE layers' experts and exchanges. step_scatter: relative standard deviation of a
    rank's tokens between steps of one load; load_scatter: between loads.
    """

    tokens_per_rank: float
    top_k: int
    nodes: int
    expert_s: float
    token_s: float
    gpu_copy_s: float
    node_copy_s: float = 0.0
    experts_s: float = 0.0
    exchange_s: float = 0.0
    other_s: float = 0.0
    groups: int = 1
    top_groups: int = 1
    by_visit: bool = False
    step_scatter: float = 0.0
    load_scatter: float = 0.0

    def doublings(self, placement: ExpertPlacement, loads: Floats) -> tuple[int, int]:
        """Doublings of the exponents p with which a compiled search takes maxima of loads that it has not seen.

        Of the experts that ranks read, and of their tokens; loads and placement: as in `step_s`, the mean counts.
        """
        scatter = float(np.hypot(self.step_scatter, self.load_scatter))
        slots = self._slot_tokens(placement, loads)
        read, spread = _read(slots)
        both = float(np.sqrt(spread).mean() / read.mean()), scatter
        reads, tokens = (round(float(np.log2(maximum_power(one, placement.ranks)))) for one in both)
        return reads, tokens

    def group_odds(self, loads: Floats) -> Floats:
        """Chance that a token opens each of the gate's groups [..., groups], of loads [..., experts] that sum to 1."""
        groups = self.groups_of(loads.shape[-1])
        if groups == 1:
            return np.ones((*loads.shape[:-1], 1))
        share = loads.reshape(*loads.shape[:-1], groups, -1).sum(axis=-1)
        odds = np.minimum(share * self.top_groups, 1.0)
        for _ in range(groups):  # what the cap cuts off goes to the others
            left = self.top_groups - odds.sum(axis=-1, keepdims=True)
            room = np.where(odds < 1.0, odds + 1e-9, 0.0)
            odds = np.minimum(odds + left * room / np.maximum(room.sum(axis=-1, keepdims=True), 1e-9), 1.0)
        return np.asarray(odds)

    def groups_of(self, experts: int) -> int:
        """The gate's groups where they limit it and the experts divide by them, else 1."""
        return self.groups if self.top_groups < self.groups and experts % self.groups == 0 else 1

    def picks_of_a_group(self, experts: int) -> int:
        """Picks of a token in each group that it opens."""
        return max(1, round(self.top_k / self.top_groups)) if self.groups_of(experts) > 1 else self.top_k

    def step_s(self, placement: ExpertPlacement, loads: Floats, *, expected: bool = True) -> Floats:
        """Seconds of a step [scenarios] of loads [scenarios, layers, experts], each layer summing to 1.

        expected: of steps whose tokens are drawn from the loads, else of steps that hold the loads exactly.
        """
        return np.asarray(self.other_s + self.layer_s(placement, loads, expected=expected).sum(axis=-1))

    def layer_s(self, placement: ExpertPlacement, loads: Floats, *, expected: bool = True) -> Floats:
        """Seconds of each layer's experts and exchange [scenarios, layers]; arguments as in `step_s`."""
        work, gpus, nodes = self.parts(placement, loads, expected=expected)
        if not expected:
            ends = np.maximum(gpus.max(axis=-1), nodes.max(axis=-1))
            return np.asarray(self.experts_s + work.max(axis=-1) + self.exchange_s + ends)
        power = maximum_power(self.step_scatter, placement.ranks)
        ends = power_sum(np.concatenate([gpus, nodes], axis=-1), power)
        experts = self._slowest_experts(placement, loads, work, power)
        return np.asarray(self.experts_s + experts + self.exchange_s + ends)

    def _slowest_experts(self, placement: ExpertPlacement, loads: Floats, work: Floats, power: float) -> Floats:
        """Expected largest work of a rank [..., layers]: what it reads scatters less than its tokens do.

        No rank reads more experts than it has slots.
        """
        slots = self._slot_tokens(placement, loads)
        arriving, (_, spread) = slots.sum(axis=-1), _read(slots)
        scatter = np.sqrt(self.expert_s**2 * spread + (self.token_s * self.step_scatter * arriving) ** 2).mean()
        most = self.expert_s * placement.slots_per_rank + power_sum(self.token_s * arriving, power)
        sharp = maximum_power(float(scatter) / max(float(work.mean()), 1e-300), placement.ranks)
        return np.asarray(np.minimum(power_sum(work, sharp), most))

    def parts(self, placement: ExpertPlacement, loads: Floats, *, expected: bool) -> tuple[Floats, Floats, Floats]:
        """Seconds of each rank's experts [..., ranks], of copies into each GPU, and into each node [..., nodes]."""
        touched, arriving = self.visited(placement, loads, expected=expected)
        gpus, nodes = self.copies(placement, loads, arriving)
        return self.expert_s * touched + self.token_s * arriving, self.gpu_copy_s * gpus, self.node_copy_s * nodes

    def visited(self, placement: ExpertPlacement, loads: Floats, *, expected: bool) -> tuple[Floats, Floats]:
        """Experts of each rank that get a token, and the tokens that they get: both [..., ranks]."""
        slots = self._slot_tokens(placement, loads)
        touched = _read(slots)[0] if expected else np.minimum(slots, 1.0).sum(axis=-1)
        return np.asarray(touched), np.asarray(slots.sum(axis=-1))

    def _slot_tokens(self, placement: ExpertPlacement, loads: Floats) -> Floats:
        """Mean tokens of each slot: [..., ranks, slots of a rank]."""
        slots = placement.slot_loads(loads * (self.tokens_per_rank * placement.ranks * self.top_k))
        return slots.reshape(*slots.shape[:-1], placement.ranks, placement.slots_per_rank)

    def copies(self, placement: ExpertPlacement, loads: Floats, arriving: Floats) -> tuple[Floats, Floats]:
        """Copies into each GPU [..., ranks], and into each node for each of its GPUs [..., nodes].

        arriving: [..., ranks], the tokens of each rank's experts.
        """
        ranks, experts = placement.ranks, placement.experts
        nodes = self.nodes if ranks % self.nodes == 0 else 1
        if not self.by_visit:
            return arriving, np.zeros((*arriving.shape[:-1], nodes))
        groups = self.groups_of(experts)
        slots = placement.slot_loads(loads)
        group = placement.physical_to_logical // (experts // groups)
        part = np.zeros((*slots.shape[:-1], ranks, groups))
        by_rank = slots.reshape(*slots.shape[:-1], ranks, -1)
        for one in range(groups):
            of_group = (group == one).reshape(placement.layers, ranks, -1)
            part[..., one] = (by_rank * of_group).sum(axis=-1)
        whole = part.sum(axis=-2, keepdims=True)
        part /= np.where(whole > 0, whole, 1.0)
        odds = self.group_odds(loads)[..., None, :]
        picks = self.picks_of_a_group(experts)
        by_node = part.reshape(*part.shape[:-2], nodes, ranks // nodes, groups).sum(axis=-2)
        step_tokens = self.tokens_per_rank * ranks
        to_gpu, to_node = (
            1.0 - (1.0 - odds * (1.0 - np.clip(1.0 - one, 0.0, 1.0) ** picks)).prod(-1) for one in (part, by_node)
        )
        return np.asarray(to_gpu * step_tokens), np.asarray(to_node * step_tokens * nodes / ranks)


def balance_cost(tokens_per_rank: float = 1.0, *, top_k: int = 1) -> LayerCost:
    """The cost where nothing is known of time: a layer takes as long as its hottest rank has tokens."""
    return LayerCost(tokens_per_rank=tokens_per_rank, top_k=top_k, nodes=1, expert_s=0.0, token_s=1.0, gpu_copy_s=0.0)


def maximum_power(scatter: float, ranks: int) -> float:
    """The exponent p with which (sum x^p)^(1/p) stands for the expected maximum over `ranks` ranks, 8 to 64.

    The largest of R even values that scatter by a share s is expected at 1 + z s, z = Phi^-1((R - 3/8) / (R + 1/4))
    (Blom, Statistical Estimates and Transformed Beta-Variables, 1958); the power sum gives the same for
    p = ln R / ln(1 + z s).
    """
    most = float(2**MOST_DOUBLINGS)
    if ranks < 2 or scatter <= LEAST_SCATTER:
        return most
    above = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) * scatter
    return float(np.clip(np.log(ranks) / np.log1p(above), 2**LEAST_DOUBLINGS, most))


def _read(slots: Floats) -> tuple[Floats, Floats]:
    """Mean and variance of the experts that get a token, of mean tokens [..., slots] (1 - exp(-tokens))."""
    missed = np.exp(-slots)
    return np.asarray((1.0 - missed).sum(axis=-1)), np.asarray((missed * (1.0 - missed)).sum(axis=-1))


def power_sum(values: Floats, power: float) -> Floats:
    """(sum x^p)^(1/p) along the last axis, scaled so that nothing overflows."""
    most = values.max(axis=-1, keepdims=True)
    scaled = values / np.where(most > 0, most, 1.0)
    return np.asarray(most[..., 0] * (scaled**power).sum(axis=-1) ** (1.0 / power))
