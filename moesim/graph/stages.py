"""The pipeline stages of a serving instance: which layers lie on which, and how activations get from one to the next.

Every stage is as many GPUs as `tp x attention_dp`, and EP spans the GPUs of one stage. Layers lie in order. The
embedding is on the first stage, the final norm and the logits on the last (vLLM, SGLang and TensorRT-LLM alike).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from moesim.cost.estimate import Estimate, Tag, estimate
from moesim.errors import BadInput
from moesim.graph.batch import Floats
from moesim.graph.task import Link, Stream, Task, TaskGraph

# What a stage sends of a token: the hidden state and the residual (vLLM's IntermediateTensors, SGLang's PPProxyTensors,
# TensorRT-LLM's `forward_before_send`).
TENSORS_SENT = 2
TRANSFER = "pipeline_transfer"


@dataclass(frozen=True)
class Hop:
    """The link from each GPU of a stage to its peer in the next. far: over NICs."""

    far: bool
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Stages:
    """layers: of each stage. hops: between neighbours, one fewer.

    scattered: a TP group sends each token once, a share from each GPU, and gathers it again on arrival; else every GPU
    sends all of it. rel_sigma: of the formula that prices a hop.
    """

    layers: tuple[range, ...]
    hops: tuple[Hop, ...]
    scattered: bool
    rel_sigma: float

    @property
    def count(self) -> int:
        """Stages."""
        return len(self.layers)

    def of_layer(self, layer: int) -> int:
        """The stage of an absolute layer."""
        return next(index for index, held in enumerate(self.layers) if layer in held)

    def transfer(self, token_bytes: Floats) -> Estimate:
        """Seconds of every hop: [steps, hops, 1].

        token_bytes: [steps, 1], that one GPU sends. Latency and bytes by formula, as no table holds a send from one
        rank to another.
        """
        latency = np.asarray([hop.latency_s for hop in self.hops])[None, :, None]
        rate = np.asarray([hop.bytes_per_s for hop in self.hops])[None, :, None]
        seconds = latency + token_bytes[:, None, :] / rate
        return estimate(seconds, Tag.FORMULA, "collective", self.rel_sigma, "latency and bytes between two stages")


def split_layers(layers: int, stages: int, engine: str, given: tuple[int, ...] | None = None) -> tuple[range, ...]:
    """The layers of each stage, in order, as even as can be. Raises BadInput.

    given: how many each gets (VLLM_PP_LAYER_PARTITION, SGLANG_PP_LAYER_PARTITION, TensorRT-LLM's pp_partition).
    Without it the layers left over go to the last stages but the very last in vLLM (`get_pp_indices` of
    vllm/distributed/utils.py), to the last ones in SGLang (its own in sglang/srt/distributed/utils.py) and to the first
    ones in TensorRT-LLM (`Mapping.pp_layers`: tensor_split).
    """
    where = "serving.pipeline.layers"
    if given is not None:
        if len(given) != stages or sum(given) != layers:
            raise BadInput(
                f"{len(given)} stages of {sum(given)} layers, not {stages} of {layers}",
                where=where,
                mend=f"list {stages} numbers that sum to {layers}",
            )
        sizes = list(given)
    else:
        base, more = divmod(layers, stages)
        sizes = [base] * stages
        first = {"sglang": stages - more, "trtllm": 0}.get(engine, stages - 1 - more)
        for stage in range(first, first + more):
            sizes[stage] += 1
    edges = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    return tuple(range(a, b) for a, b in pairwise(edges))


def joined(graphs: Sequence[TaskGraph], sends: Sequence[Floats], hops: Sequence[Hop]) -> TaskGraph:
    """One graph of a batch on its way through the stages, ranks of the first stage first.

    graphs: of each stage over its own ranks. sends: [steps, 1] of each hop. A stage begins when all of the batch has
    come: its ranks meet in its first layer anyway. On the ranks of other stages a task takes no time.
    """
    each = graphs[0].ranks
    ranks, steps = each * len(graphs), graphs[0].steps
    tasks: list[Task] = []
    arrived: tuple[int, ...] = ()
    for stage, graph in enumerate(graphs):
        first, mine = len(tasks), slice(stage * each, (stage + 1) * each)
        for task in graph.tasks:
            waits = tuple(first + other for other in task.depends_on) or arrived
            groups = None
            if task.groups is not None:
                groups = np.arange(ranks, dtype=np.int64) + ranks
                groups[mine] = task.groups
            tasks.append(replace(task, duration_s=_only(task.duration_s, mine, ranks), depends_on=waits, groups=groups))
        if stage == len(graphs) - 1:
            break
        meets = np.arange(ranks, dtype=np.int64) + ranks
        both = slice(stage * each, (stage + 2) * each)
        meets[both] = 0
        links = ((Link.NIC if hops[stage].far else Link.NVLINK, 1.0),)
        last = tuple(range(first, len(tasks)))
        sent = _only(sends[stage], both, ranks)
        tasks.append(Task("to the next stage", TRANSFER, Stream.COMMUNICATION, sent, last, meets, links))
        arrived = (len(tasks) - 1,)
    return TaskGraph(steps=steps, ranks=ranks, tasks=tuple(tasks))


def _only(seconds: Floats, mine: slice, ranks: int) -> Floats:
    """Durations of the ranks in `mine`, nothing on the others: [steps, ranks]."""
    whole = np.asarray(seconds, dtype=np.float64)
    found = np.zeros((whole.shape[0] if whole.ndim == 2 else 1, ranks))
    found[:, mine] = whole
    return found
