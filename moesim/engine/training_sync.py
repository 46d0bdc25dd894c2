"""What follows the pipeline of a training step: gradients are reduced, the optimizer steps, parameters are gathered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import CostModel, Tag, estimate
from moesim.cost.links import at_reached_rates
from moesim.cost.ops import Collective, MemoryBound
from moesim.cost.reach import REL_SIGMA
from moesim.engine.training_memory import optimizer_bytes, stage_parameters
from moesim.graph.priced_step import Part
from moesim.graph.training_layer import TrainingSetup
from moesim.network.rank_groups import Group
from moesim.units import BYTES_PER_ELEMENT

Floats = NDArray[np.float64]

# Gradients travel in buckets of this many elements, more on many ranks (Megatron-LM, `DistributedDataParallelConfig`:
# max(40,000,000, 1,000,000 x data-parallel ranks)).
BUCKET_ELEMENTS = 40e6
BUCKET_ELEMENTS_PER_RANK = 1e6


@dataclass(frozen=True)
class StageSync:
    """The prices of one stage's end of step. buckets: into how many pieces each collective is cut, at least 1.

    reduce: gradients, dense then experts, and a tied embedding's. optimizer: Adam on this rank's share. gather:
    parameters; nothing where the optimizer is not distributed. Left out: the norm's
    all-reduce of a few bytes, and that of the gates' gradients over TP (below a thousandth of all gradients).
    """

    reduce: Part
    optimizer: Part
    gather: Part
    buckets: int

    def exposed_reduce_s(self, normal: Mapping[str, float] | None, backward_s: float, *, overlap: bool) -> float:
        """Seconds of the reduction that the last micro-batch's backward pass does not hide; never its last bucket."""
        return _exposed(self.reduce, self.buckets, normal, backward_s if overlap else 0.0)

    def exposed_gather_s(self, normal: Mapping[str, float] | None, forward_s: float, *, overlap: bool) -> float:
        """Seconds of the gathering that the first micro-batch's forward pass does not hide; never its first bucket."""
        return _exposed(self.gather, self.buckets, normal, forward_s if overlap else 0.0)


def _exposed(part: Part, buckets: int, normal: Mapping[str, float] | None, hidden_s: float) -> float:
    whole = float(part.seconds(normal).max())
    return max(whole - hidden_s, whole / buckets)


def stage_sync(setup: TrainingSetup, costs: CostModel, chunks: tuple[range, ...], stage: int) -> StageSync:
    """Price the end of step of one stage. Raises OutsideProfile."""
    dense_items, experts = stage_parameters(setup, chunks, stage)
    dense = sum(dense_items.values())
    optimizer = setup.training.optimizer
    gradient, weight = BYTES_PER_ELEMENT[optimizer.gradients], BYTES_PER_ELEMENT[setup.precision.activations]
    reduce, gather, buckets = Part(), Part(), 1
    groups: tuple[tuple[Group, float], ...] = (("dp_cp", dense), ("expert_dp", experts))
    for group, weights in groups:
        cut = _buckets(setup, group, weights)
        if setup.grid.gpus(group) == 1 or not weights:
            continue
        buckets += cut
        kind = "reduce_scatter" if optimizer.distributed else "all_reduce"
        reduce = reduce + _collective(setup, costs, kind, group, weights * gradient, cut)
        if optimizer.distributed:
            gather = gather + _collective(setup, costs, "all_gather", group, weights * weight, cut)
    if setup.model.tied_embeddings and setup.parallel.pp > 1 and stage in (0, setup.parallel.pp - 1):
        table = setup.model.vocabulary * setup.model.hidden / setup.parallel.tp * gradient
        spread = setup.grid.spread("pp")
        size = np.full((1, 1), table)
        ends = Collective("all_reduce", size, 2, min(2, spread["nodes"]), min(2, spread["domains"]))
        reduce = reduce + Part((costs.estimate(ends),))
    shards = setup.grid.gpus("dp_cp") if optimizer.distributed else 1
    expert_shards = setup.grid.gpus("expert_dp") if optimizer.distributed else 1
    mine = dense / shards + experts / expert_shards
    # Gradients read for their norm and for the update; float32 weights and moments read and written; weights written.
    states = optimizer_bytes(setup.precision.activations)
    read = weight if setup.precision.activations == "fp32" else 0.0  # float32 weights are no copy
    moved = mine * (2 * gradient + 2 * states + read + weight)
    adam = costs.estimate(MemoryBound(bytes=np.full((1, 1), moved), name="optimizer"))
    return StageSync(reduce, Part((adam,)), gather, max(1, buckets - 1))


def _buckets(setup: TrainingSetup, group: Group, weights: float) -> int:
    size = max(BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_RANK * setup.grid.gpus(group))
    return max(1, int(-(-weights // size)))


def _collective(
    setup: TrainingSetup, costs: CostModel, kind: str, group: Group, whole_bytes: float, buckets: int
) -> Part:
    size = np.full((1, 1), whole_bytes / buckets)
    one = costs.estimate(Collective(kind, size, **setup.grid.spread(group)))  # type: ignore[arg-type]
    return Part((estimate(one.seconds * buckets, one.tags, one.family, one.rel_sigma, one.source),))


def stage_transfer(setup: TrainingSetup) -> Part:
    """A micro-batch's activations from a stage to the next: latency and bytes over the slowest link between them.

    By formula in every cost model: no table holds a send of one rank to another. The receiver waits, the sender not.
    """
    if setup.parallel.pp == 1:
        return Part()
    cluster, far = at_reached_rates(setup.cluster), setup.grid.domains("pp") > 1
    moved = setup.local_rows * setup.model.hidden * BYTES_PER_ELEMENT[setup.precision.activations]
    rate = cluster.shared_nic_bytes_per_s if far else cluster.near_bytes_per_s
    latency = cluster.nic_latency_s if far else cluster.near_latency_s
    seconds = np.full((1, 1), latency + moved / rate)
    return Part((estimate(seconds, Tag.FORMULA, "collective", REL_SIGMA, "latency and bytes between two stages"),))
