"""Exchanges of one micro-batch beside the computation of another: forward and backward passes of a stage, paired.

In the steady part of 1F1B a stage alternates a forward and a backward pass. Under `policies.schedule: forward_backward`
it runs the two together, stage by stage (`graph.schedules.forward_backward`), as Megatron-Core does under
`overlap_moe_expert_parallel_comm`; only dispatch and combine are on a stream of their own, the host and the other
collectives keep to the computation's. Every pass is then shortened by what its pair saves, in proportion. Passes that
have no partner (warm-up and cool-down of the pipeline) are shortened, too: a little too quick for short pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from moesim.engine import maxplus
from moesim.graph.pipeline import Pass
from moesim.graph.schedules import forward_backward
from moesim.graph.training_passes import PricedLayers, chunk_graph

Floats = NDArray[np.float64]

OVERLAPPED = "forward_backward"


def pair_share(layers: PricedLayers, chunks: tuple[range, ...], normal: Mapping[str, float] | None = None) -> Floats:
    """What a forward and a backward pass take together over what they take one after the other: [chunks, routings].

    1 where passes run alone. normal: a joint draw, see `Part.seconds`.
    """
    found = np.ones((len(chunks), layers.steps))
    if layers.setup.policies.schedule != OVERLAPPED:
        return found
    for index, chunk in enumerate(chunks):
        forward, backward = (
            chunk_graph(layers, chunk, kind, split=False, normal=normal, exchanges_apart=True)
            for kind in (Pass.FORWARD, Pass.BACKWARD)
        )
        alone = maxplus.run(forward).step_s + maxplus.run(backward).step_s
        paired = forward_backward(forward.tasks, backward.tasks, layers.steps, forward.ranks)
        found[index] = np.minimum(maxplus.run(paired).step_s / alone, 1.0)
    return found
