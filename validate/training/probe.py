"""Measuring the single operations that the simulator asks for, on all ranks at once, before any step is run."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import Infeasible
from profiles.points import Family, Key
from validate.hardware.group import Beat, CoreShare, Group, Marks, need_torch
from validate.training.job import WHERE, TrainingJob
from validate.training.model import entropy_function, rotated, swiglu
from validate.training.ways import Made, Way, all_gather, all_to_all, reduce_scatter

Floats = NDArray[np.float64]

# Calls of a sample, which takes as long as the job says so that a slice of the scheduler's is not all of it.
MOST_CALLS = 200
# Weights (and accumulated gradients) that calls take in turn are as large together: in a step, too, all others are used
# before the same ones come again. Rows are one set, as they were just written when an operation gets them. On a GPU as
# much as leaves nothing in an L2 of 50 MB (H100, H200), or of 126 MB (B200).
TURNING_BYTES = {"cpu": 96e6, "cuda": 512e6}
MOST_COPIES = 256
FLOAT_BYTES = 4.0
# Elements' worth of bytes that the simulator counts for adding a gradient to the one kept (moesim/graph/backward.py: 6
# bytes a weight).
ACCUMULATED = 1.5
# Experts of a call, each with as many rows; their results are joined, as a rank joins those of its own.
TOGETHER = 4
# Families in which the ranks meet: timed from a common start to the last one's end, one call a sample.
MEETING = ("collective", "send")


@dataclass(frozen=True)
class Asked:
    """One operation at one size, over so many nodes where ranks meet.

    family "send" (one rank to another, key empty, bytes) prices the pipeline's sends: inside a node, or between two.
    """

    family: Family | str
    key: Key
    size: float
    nodes: int = 1


@dataclass(frozen=True)
class Measured:
    """Seconds of the samples of one operation: of all ranks, or of the last one where they meet."""

    asked: Asked
    samples: Floats


def measure(
    job: TrainingJob, made: Made, group: Group, hosts: Sequence[int], asked: Sequence[Asked]
) -> tuple[list[Measured], float | None]:
    """Measure every operation on all ranks together, in turns that differ; every rank returns the same.

    Also the share of a core that ranks had while they computed: 1 on a machine with as many free cores as ranks, None
    where devices compute. hosts: the number of each rank's host.
    """
    calls = [_call(job, made, hosts, one) for one in asked]
    order = np.random.default_rng([job.seed, 11])
    counts = []
    for number, (one, call) in enumerate(zip(asked, calls, strict=True)):
        made.beat.at(f"trying operations: {one.family}, {number + 1} of {len(asked)}")
        counts.append(_repeats(job, one, call, group))
    samples = np.zeros((len(asked), job.samples))
    share = CoreShare()
    for turn in range(job.samples):
        for index in order.permutation(len(asked)).tolist():
            made.beat.at(f"profiling, turn {turn + 1} of {job.samples}: {asked[index].family}")
            meeting = asked[index].family in MEETING
            group.ready()
            marks = _timed(calls[index], counts[index], group, meeting=meeting)
            start, end = marks.read()
            samples[index, turn] = (end - start) / counts[index] / _works(asked[index])
            share.add(marks, [meeting])
            if not meeting:
                for _ in range(-(-counts[index] // 2)):  # company for ranks that are not done yet
                    calls[index]()
    _memory_of_all.cache_clear()
    table = group.gather(samples)  # [ranks, operations, samples]
    found = [
        Measured(one, table[:, index].max(axis=0) if one.family in MEETING else table[:, index].ravel())
        for index, one in enumerate(asked)
    ]
    return found, group.core_share(share)


def _timed(call: Callable[[], Any], count: int, group: Group, *, meeting: bool) -> Marks:
    """Two marks with so many calls between them, all done; meeting: the rank waits for others in them."""
    marks = group.marks()
    group.beat.waiting = meeting
    marks.mark()
    for _ in range(count):
        call()
    marks.mark()
    marks.read()
    group.beat.waiting = False
    return marks


def _repeats(job: TrainingJob, asked: Asked, call: Callable[[], Any], group: Group) -> int:
    """Calls of a sample, the same on every rank."""
    meeting = asked.family in MEETING
    _timed(call, 1, group, meeting=meeting)
    group.ready()
    start, end = _timed(call, 1, group, meeting=meeting).read()
    took = float(group.gather(np.asarray([end - start])).max())
    most = MOST_CALLS // 20 if meeting else MOST_CALLS
    return int(min(max(1, math.ceil(job.sample_s / max(took, 1e-7))), most))


def _works(asked: Asked) -> int:
    """Operations that one call does."""
    return TOGETHER if asked.family == "experts" else 1


def _call(job: TrainingJob, made: Made, hosts: Sequence[int], asked: Asked) -> Callable[[], Any]:
    """One call of an operation, on weights that take turns."""
    device = made.device
    if asked.family in MEETING:
        return _meeting(job, made, hosts, asked)
    if asked.family == "memory_bound":
        return _memory(job, asked, device)
    if asked.family == "attention":
        return _attention(asked, device)
    torch = need_torch()
    functional, rows = torch.nn.functional, int(asked.size)
    if asked.family == "gemm":
        n, k = (int(one) for one in asked.key)
        x, weights = torch.randn(rows, k, device=device), _turning((n, k), device)
        return lambda: functional.linear(x, next(weights))
    hidden, width = (int(one) for one in asked.key)
    x = torch.randn(rows * TOGETHER, hidden, device=device)
    ups, downs = _turning((2 * width, hidden), device), _turning((hidden, width), device)
    return lambda: torch.cat([swiglu(part, next(ups), next(downs)) for part in x.split(rows)])


def _turning(shape: tuple[int, ...], device: Any, *, graph: bool = True) -> Iterator[Any]:
    """Tensors of one shape in turn, without end.

    graph: as weights in training, so that calls leave what their backward pass would need.
    """
    return itertools.cycle(_set(shape, device, graph))


@functools.cache
def _memory_of_all(device: Any) -> Any:
    """What all shapes' tensors are parts of: [floats]."""
    return need_torch().randn(round(TURNING_BYTES[device.type] / FLOAT_BYTES), device=device)


def _set(shape: tuple[int, ...], device: Any, graph: bool) -> list[Any]:
    """Tensors of one shape in the memory that all share; not in its order, which a core would foresee."""
    torch = need_torch()
    size, whole = math.prod(shape), _memory_of_all(device)
    count = min(MOST_COPIES, len(whole) // size)
    if not count:
        return [torch.randn(shape, device=device).requires_grad_(graph)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    parts = [whole[index * size : (index + 1) * size].view(shape).detach() for index in order]
    return [one.requires_grad_(graph) for one in parts]


def _attention(asked: Asked, device: Any) -> Callable[[], Any]:
    torch = need_torch()
    length, prefix, heads, kv_heads, width, window = (int(one) for one in asked.key)
    assert prefix == 0 and window == 0
    batch = int(asked.size)
    q, k, v = (
        torch.randn(batch, length, count, width, device=device).transpose(1, 2) for count in (heads, kv_heads, kv_heads)
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, is_causal=True, enable_gqa=kv_heads != heads)


def _memory(job: TrainingJob, asked: Asked, device: Any) -> Callable[[], Any]:
    """The kernel of a name that moves so many bytes, by the tensors that the simulator counts for it."""
    torch = need_torch()
    functional, shape = torch.nn.functional, job.shape
    name, size, hidden = str(asked.key[0]), asked.size / FLOAT_BYTES, shape.hidden

    def rows_of(elements: float) -> int:
        return max(1, round(size / elements))

    def random(*sizes: int) -> Any:
        return torch.randn(*sizes, device=device)

    if name == "norm":  # two tensors read, two written
        x, y, w = random(rows_of(4 * hidden), hidden), random(rows_of(4 * hidden), hidden), random(hidden)
        return lambda: functional.rms_norm(x + y, (hidden,), w, 1e-6)
    if name == "silu":  # gate and up read, their product written: here of the dense layer's width
        wide = shape.dense_intermediate
        both = random(rows_of(3 * wide), 2 * wide)

        def silu() -> Any:
            gate_part, up_part = both.chunk(2, dim=-1)
            return functional.silu(gate_part) * up_part

        return silu
    if name == "rope":
        heads, width = shape.heads + shape.kv_heads, shape.head_dim
        rows = rows_of(2 * heads * width)
        x, cosine, sine = random(1, rows, heads, width), random(rows, 1, width), random(rows, 1, width)
        return lambda: rotated(x, cosine, sine)
    if name == "top-k":  # logits read and written
        logits = random(rows_of(2 * shape.experts), shape.experts)
        return lambda: torch.softmax(logits.topk(shape.top_k, dim=-1).values, dim=-1)
    if name == "permute":  # rows into the experts' order, and back
        rows = rows_of(4 * hidden)
        x, order = random(rows, hidden), torch.randperm(rows, device=device)
        return lambda: x.index_select(0, order).index_select(0, order)
    if name == "embedding":
        rows = rows_of(2 * hidden)
        table, ids = random(shape.vocabulary, hidden), torch.randint(shape.vocabulary, (rows,), device=device)
        return lambda: functional.embedding(ids, table)
    if name == "cross entropy":  # logits of TP's share of the vocabulary: twice read, the softmax written
        rows = job.micro_batch * job.sequence_length
        columns = max(2, round(size / 3 / rows))
        logits, targets = random(rows, columns), torch.randint(columns, (rows,), device=device)
        alone, entropy = Way((0,), 0, None, Beat(None)), entropy_function()
        return lambda: entropy(logits, targets, alone)
    if name == "gradient accumulation":
        y = torch.zeros(rows_of(ACCUMULATED), device=device)
        sums = _turning((rows_of(ACCUMULATED),), device, graph=False)
        return lambda: next(sums).add_(y)
    if name == "optimizer":  # as many bytes a weight as moesim/engine/training_sync.py counts in float32
        weights = torch.zeros(max(1, round(asked.size / 32.0)), requires_grad=True, device=device)
        weights.grad = torch.zeros_like(weights)
        adam = torch.optim.AdamW([weights], lr=0.0, weight_decay=0.0, fused=True)
        return lambda: (weights.grad.square().sum(), adam.step())
    raise ValueError(f"no kernel of that name: {name}")


def groups_of(asked: Iterable[Asked], made: Made, hosts: Sequence[int]) -> None:
    """Make the groups in which operations are measured; called by all ranks alike."""
    for one in asked:
        if one.family == "send":
            for source, target in pairs_of(one.nodes, hosts):
                made.channel(source, target, "probe")
        elif one.family in MEETING:
            for members in members_of(int(one.key[1]), one.nodes, hosts):
                made.group(members)


def members_of(size: int, nodes: int, hosts: Sequence[int]) -> list[tuple[int, ...]]:
    """Groups of so many ranks over so many nodes, as many at once as there is room for.

    Neighbours inside nodes; over several, neighbours of each. hosts: ranks in order, as many on each host.
    """
    here = list(hosts).count(hosts[0])
    each = size // nodes
    if size % nodes or each > here or nodes > len(hosts) // here:
        raise Infeasible(
            f"a group of {size} ranks does not lie evenly over {nodes} nodes of {here} ranks",
            where=WHERE, mend="leave its layouts out by --layout", reason="nodes_not_filled",
        )  # fmt: skip
    return [
        tuple((first + node) * here + place + one for node in range(nodes) for one in range(each))
        for first in range(0, len(hosts) // here - nodes + 1, nodes)
        for place in range(0, here - each + 1, each)
    ]


def pairs_of(nodes: int, hosts: Sequence[int]) -> list[tuple[int, int]]:
    """Who sends to whom at once: each even rank of a node to the next, or each rank of one node to the next node's."""
    return [(one, other) for one, other in members_of(2, min(nodes, 2), hosts)]


def _meeting(job: TrainingJob, made: Made, hosts: Sequence[int], asked: Asked) -> Callable[[], Any]:
    """A collective in all its groups at once, or sends between pairs of ranks."""
    torch = need_torch()
    distributed, device = torch.distributed, made.device
    if asked.family == "send":
        return _send(made, hosts, asked)
    kind, size = str(asked.key[0]), int(asked.key[1])
    mine = next((one for one in members_of(size, asked.nodes, hosts) if made.rank in one), None)
    if mine is None:
        return lambda: None
    group, elements = made.group(mine), max(size, round(asked.size / FLOAT_BYTES / size) * size)
    columns = job.shape.hidden
    rows = max(1, elements // size // columns)
    whole, part = torch.zeros(rows * size, columns, device=device), torch.zeros(rows, columns, device=device)
    if kind == "all_reduce":
        flat = torch.zeros(elements, device=device)
        return lambda: distributed.all_reduce(flat, group=group)
    if kind == "all_gather":
        return lambda: all_gather(part, group, size)
    if kind == "reduce_scatter":
        return lambda: reduce_scatter(whole, group, size)
    each = [rows] * size
    return lambda: all_to_all(whole, each, each, group)


def _send(made: Made, hosts: Sequence[int], asked: Asked) -> Callable[[], Any]:
    """From one rank of each pair to the other, by a channel as pipelines have it; then nothing is under way."""
    torch = need_torch()
    data = torch.zeros(max(1, round(asked.size / FLOAT_BYTES)), device=made.device)
    pair = next((one for one in pairs_of(asked.nodes, hosts) if made.rank in one), None)
    if pair is None:
        return lambda: None
    channel = made.channel(*pair, "probe")
    if made.rank == channel.target:
        return lambda: channel.receive(data)
    return lambda: channel.send(data).wait()
