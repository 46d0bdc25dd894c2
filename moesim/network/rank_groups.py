"""Which ranks form each parallel group, and how many nodes a group spans, from the plan's rank order.

Ranks are numbered along `rank_order`, its first axis fastest, as in Megatron-LM (megatron/core/parallel_state.py,
`RankGenerator`). The axis `dp` is all of data parallelism: attention-DP ranks of one instance, then instances. Experts
have groups of their own over the ranks of a pipeline stage in order: expert-TP fastest, then EP, then expert-DP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from moesim.spec.parallel import ParallelSpec

Ints = NDArray[np.int64]
Group = Literal["tp", "cp", "dp_cp", "pp", "ep", "expert_tp", "expert_dp", "exchange"]


class Spread(TypedDict):
    """Where the ranks of a group are, as `Collective` takes it."""

    gpus: int
    nodes: int
    domains: int


@dataclass(frozen=True)
class RankGrid:
    """The ranks of `instances` copies of a plan on nodes of `gpus_per_node` GPUs.

    domain_gpus: GPUs of an NVLink domain that joins several nodes; 0 where none does.
    """

    parallel: ParallelSpec
    instances: int
    gpus_per_node: int
    domain_gpus: int = 0

    def sizes(self) -> dict[str, int]:
        """Length of each axis; `dp` counts all instances."""
        plan = self.parallel
        return {"tp": plan.tp, "cp": plan.cp, "dp": plan.attention_dp * self.instances, "pp": plan.pp}

    def members(self, group: Group) -> Ints:
        """Ranks of each group of a kind: [groups, ranks of a group].

        dp_cp: the ranks that hold the same dense weights. exchange: EP and expert-TP ranks together, all that tokens
        travel among. expert_dp: the ranks that hold the same experts.
        """
        order, sizes = self.parallel.rank_order, self.sizes()
        grid = np.arange(np.prod(list(sizes.values())), dtype=np.int64).reshape([sizes[axis] for axis in order[::-1]])
        place = {axis: len(order) - 1 - index for index, axis in enumerate(order)}
        if group in ("tp", "cp", "pp", "dp_cp"):
            axes = [axis for axis in order[::-1] if axis in group.split("_")]
            moved = np.moveaxis(grid, [place[axis] for axis in axes], range(-len(axes), 0))
            return moved.reshape(-1, int(np.prod([sizes[axis] for axis in axes])))
        plan = self.parallel
        stages = np.sort(np.moveaxis(grid, place["pp"], 0).reshape(plan.pp, -1), axis=1)
        experts = stages.reshape(plan.pp, self.instances, plan.ep, plan.expert_tp)
        if group == "exchange":
            return experts.reshape(-1, plan.ep * plan.expert_tp)
        axis = {"expert_dp": 1, "ep": 2, "expert_tp": 3}[group]
        return np.moveaxis(experts, axis, -1).reshape(-1, experts.shape[axis])

    def gpus(self, group: Group) -> int:
        """Ranks of one group of a kind."""
        return int(self.members(group).shape[1])

    def nodes(self, group: Group) -> int:
        """Nodes that the widest group of a kind spans."""
        nodes = self.members(group) // self.gpus_per_node
        return max(len(np.unique(row)) for row in nodes)

    def domains(self, group: Group) -> int:
        """NVLink domains that the widest group of a kind spans; nodes where none joins several of them."""
        if not self.domain_gpus:
            return self.nodes(group)
        return max(len(np.unique(row)) for row in self.members(group) // self.domain_gpus)

    def spread(self, group: Group) -> Spread:
        """Ranks of one group of a kind, and what they span; domains 0 where those are its nodes."""
        return Spread(
            gpus=self.gpus(group), nodes=self.nodes(group), domains=self.domains(group) if self.domain_gpus else 0
        )

    def even(self, group: Group) -> bool:
        """Whether every group of a kind has as many ranks on each of its nodes, in order of the ranks."""
        nodes = self.members(group) // self.gpus_per_node
        count = self.nodes(group)
        if nodes.shape[1] % count:
            return False
        each = nodes.reshape(len(nodes), count, -1)
        return bool((each == each[:, :, :1]).all() and all(len(np.unique(row)) == count for row in nodes))
