"""Exchanges of one micro-batch beside the computation of another: forward and backward passes of a stage, paired.

In the steady part of 1F1B a stage alternates a forward and a backward pass. Under `policies.schedule: forward_backward`
it runs the two together, stage by stage (`graph.schedules.forward_backward`), as Megatron-Core does under
`overlap_moe_expert_parallel_comm`; only dispatch and combine are on a stream of their own, the host and the other
collectives keep to the computation's. Under `training.host.waits_for_counts` DeepEP's dispatch of a forward pass has
nothing beside it: its call returns when the counts of what will be received are on the host (deepseek-ai/DeepEP,
README, on the normal kernels), and an eager host launches nothing meanwhile. An upper end: it waits for the counts,
not for the tokens that follow. Every pass is then shortened by what its pair saves, in proportion. Passes that
have no partner (warm-up and cool-down of the pipeline) are shortened, too: a little too quick for short pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from moesim.cost.overlap import DEEPEP_NORMAL_MULTIPROCESSORS, Slowdown, by_multiprocessors
from moesim.engine import maxplus
from moesim.engine.stretch import stretched
from moesim.graph.pipeline import Pass
from moesim.graph.schedules import forward_backward
from moesim.graph.task import Stream, Task
from moesim.graph.training_passes import PricedLayers, chunk_graph
from moesim.spec.overlap import SlowdownSpec

Floats = NDArray[np.float64]

OVERLAPPED = "forward_backward"


def pair_slowdown(layers: PricedLayers) -> Slowdown | None:
    """What exchanges and the computation beside them cost each other (`policies.overlap.slowdown`); None = nothing.

    Of the named choices `multiprocessors` alone can be: those that DeepEP's kernels hold, none of another dispatcher's.
    """
    setup = layers.setup
    asked = setup.policies.overlap.slowdown
    if asked == "none":
        return None
    if isinstance(asked, SlowdownSpec):
        return Slowdown(asked.compute, asked.communication, 0, Tag.ASSUMED, "policies.overlap.slowdown")
    if setup.policies.dispatch.backend != "deepep":
        return None
    return by_multiprocessors(DEEPEP_NORMAL_MULTIPROCESSORS, setup.cluster.gpu.multiprocessors)


def _held(task: Task) -> Task:
    """A dispatch that holds up the host, so that nothing computes beside it."""
    return replace(task, stream=Stream.COMPUTE) if task.operation == "dispatch" else task


def pair_share(layers: PricedLayers, chunks: tuple[range, ...], normal: Mapping[str, float] | None = None) -> Floats:
    """What a forward and a backward pass take together over what they take one after the other: [chunks, routings].

    1 where passes run alone. normal: a joint draw, see `Part.seconds`.
    """
    found = np.ones((len(chunks), layers.steps))
    if layers.setup.policies.schedule != OVERLAPPED:
        return found
    taken = pair_slowdown(layers)
    host = layers.setup.training.host
    waits = host.waits_for_counts and layers.setup.policies.dispatch.backend == "deepep"
    for index, chunk in enumerate(chunks):
        forward, backward = (
            chunk_graph(layers, chunk, kind, split=False, normal=normal, exchanges_apart=True)
            for kind in (Pass.FORWARD, Pass.BACKWARD)
        )
        if waits:
            forward = replace(forward, tasks=tuple(_held(task) for task in forward.tasks))
        alone = maxplus.run(forward).step_s + maxplus.run(backward).step_s
        paired = forward_backward(forward.tasks, backward.tasks, layers.steps, forward.ranks)
        if taken is not None:
            paired = stretched(paired, taken)
        found[index] = np.minimum(maxplus.run(paired).step_s / alone, 1.0)
    return found
