"""Measuring the single operations that the simulator asks for, on all ranks at once, before any step is run."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from profiles.points import Family, Key
from validate.hardware.group import Beat, need_torch
from validate.training.job import TrainingJob
from validate.training.model import entropy_function, rotated, swiglu
from validate.training.ways import Made, Way, all_gather, all_to_all, reduce_scatter

Floats = NDArray[np.float64]

# Calls of a sample, which takes as long as the job says so that a slice of the scheduler's is not all of it.
MOST_CALLS = 200
# Weights (and accumulated gradients) that calls take in turn are as large together: in a step, too, all others are used
# before the same ones come again. Rows are one set, as they were just written when an operation gets them.
TURNING_BYTES = 96e6
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
    """One operation at one size. family "send" (one rank to the next, key empty, bytes) prices the pipeline's sends."""

    family: Family | str
    key: Key
    size: float


@dataclass(frozen=True)
class Measured:
    """Seconds of the samples of one operation: of all ranks, or of the last one where they meet."""

    asked: Asked
    samples: Floats


def measure(job: TrainingJob, made: Made, ranks: int, asked: list[Asked]) -> tuple[list[Measured], float]:
    """Measure every operation on all ranks together, in turns that differ; every rank returns the same.

    Also the share of a core that ranks had while they computed: 1 on a machine with as many free cores as ranks.
    """
    torch = need_torch()
    distributed, met = torch.distributed, Way((), 0, None, made.beat).meet
    calls = [_call(job, made, ranks, one) for one in asked]
    order = np.random.default_rng([job.seed, 11])
    counts = []
    for number, (one, call) in enumerate(zip(asked, calls, strict=True)):
        made.beat.at(f"trying operations: {one.family}, {number + 1} of {len(asked)}")
        counts.append(_repeats(job, one, call, met))
    samples = np.zeros((len(asked), job.samples))
    passed = np.zeros(2)  # wall clock and processor, outside of meetings
    for turn in range(job.samples):
        for index in order.permutation(len(asked)).tolist():
            made.beat.at(f"profiling, turn {turn + 1} of {job.samples}: {asked[index].family}")
            met(distributed.barrier)
            worked, start = process_time(), perf_counter()
            made.beat.waiting = asked[index].family in MEETING
            for _ in range(counts[index]):
                calls[index]()
            made.beat.waiting = False
            took = perf_counter() - start
            samples[index, turn] = took / counts[index] / _works(asked[index])
            if asked[index].family not in MEETING:
                passed += (took, process_time() - worked)
                for _ in range(-(-counts[index] // 2)):  # company for ranks that are not done yet
                    calls[index]()
    total = torch.as_tensor(passed)
    met(lambda: distributed.all_reduce(total))
    gathered = [torch.zeros(samples.shape, dtype=torch.float64) for _ in range(ranks)]
    met(lambda: distributed.all_gather(gathered, torch.as_tensor(samples)))
    table = np.stack([one.numpy() for one in gathered])  # [ranks, operations, samples]
    found = [
        Measured(one, table[:, index].max(axis=0) if one.family in MEETING else table[:, index].ravel())
        for index, one in enumerate(asked)
    ]
    return found, float(total[1] / total[0])


def _repeats(job: TrainingJob, asked: Asked, call: Callable[[], None], met: Callable[[Callable[[], Any]], Any]) -> int:
    """Calls of a sample, the same on every rank."""
    torch = need_torch()
    run = met if asked.family in MEETING else lambda work: work()
    run(call)
    met(torch.distributed.barrier)
    start = perf_counter()
    run(call)
    took = torch.tensor([perf_counter() - start])
    met(lambda: torch.distributed.all_reduce(took, op=torch.distributed.ReduceOp.MAX))
    most = MOST_CALLS // 20 if asked.family in MEETING else MOST_CALLS
    return int(min(max(1, math.ceil(job.sample_s / max(float(took), 1e-7))), most))


def _works(asked: Asked) -> int:
    """Operations that one call does."""
    return TOGETHER if asked.family == "experts" else 1


def _call(job: TrainingJob, made: Made, ranks: int, asked: Asked) -> Callable[[], Any]:
    """One call of an operation, on weights that take turns."""
    if asked.family in MEETING:
        return _meeting(job, made, ranks, asked)
    if asked.family == "memory_bound":
        return _memory(job, asked)
    if asked.family == "attention":
        return _attention(job, asked)
    torch = need_torch()
    functional, rows = torch.nn.functional, int(asked.size)
    if asked.family == "gemm":
        n, k = (int(one) for one in asked.key)
        x, weights = torch.randn(rows, k), _turning((n, k))
        return lambda: functional.linear(x, next(weights))
    hidden, width = (int(one) for one in asked.key)
    x, ups, downs = torch.randn(rows * TOGETHER, hidden), _turning((2 * width, hidden)), _turning((hidden, width))
    return lambda: torch.cat([swiglu(part, next(ups), next(downs)) for part in x.split(rows)])


def _turning(shape: tuple[int, ...], *, graph: bool = True) -> Iterator[Any]:
    """Tensors of one shape in turn, without end.

    graph: as weights in training, so that calls leave what their backward pass would need.
    """
    return itertools.cycle(_set(shape, graph))


@functools.cache
def _set(shape: tuple[int, ...], graph: bool) -> list[Any]:
    """Tensors of one shape, shared by all operations on it; not in memory's order, which a core would foresee."""
    torch = need_torch()
    count = min(MOST_COPIES, max(1, math.ceil(TURNING_BYTES / (math.prod(shape) * FLOAT_BYTES))))
    tensors = [torch.randn(shape).requires_grad_(graph) for _ in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    return [tensors[index] for index in order]


def _attention(job: TrainingJob, asked: Asked) -> Callable[[], Any]:
    torch = need_torch()
    length, prefix, heads, kv_heads, width, window = (int(one) for one in asked.key)
    assert prefix == 0 and window == 0
    batch = int(asked.size)
    q, k, v = (torch.randn(batch, length, count, width).transpose(1, 2) for count in (heads, kv_heads, kv_heads))
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, k, v, is_causal=True, enable_gqa=kv_heads != heads)


def _memory(job: TrainingJob, asked: Asked) -> Callable[[], Any]:
    """The kernel of a name that moves so many bytes, by the tensors that the simulator counts for it."""
    torch = need_torch()
    functional, shape = torch.nn.functional, job.shape
    name, size, hidden = str(asked.key[0]), asked.size / FLOAT_BYTES, shape.hidden

    def rows_of(elements: float) -> int:
        return max(1, round(size / elements))

    if name == "norm":  # two tensors read, two written
        x, y, w = torch.randn(rows_of(4 * hidden), hidden), torch.randn(rows_of(4 * hidden), hidden), torch.ones(hidden)
        return lambda: functional.rms_norm(x + y, (hidden,), w, 1e-6)
    if name == "silu":  # gate and up read, their product written: here of the dense layer's width
        wide = shape.dense_intermediate
        both = torch.randn(rows_of(3 * wide), 2 * wide)

        def silu() -> Any:
            gate_part, up_part = both.chunk(2, dim=-1)
            return functional.silu(gate_part) * up_part

        return silu
    if name == "rope":
        heads, width = shape.heads + shape.kv_heads, shape.head_dim
        rows = rows_of(2 * heads * width)
        x, cosine, sine = torch.randn(1, rows, heads, width), torch.randn(rows, 1, width), torch.randn(rows, 1, width)
        return lambda: rotated(x, cosine, sine)
    if name == "top-k":  # logits read and written
        logits = torch.randn(rows_of(2 * shape.experts), shape.experts)
        return lambda: torch.softmax(logits.topk(shape.top_k, dim=-1).values, dim=-1)
    if name == "permute":  # rows into the experts' order, and back
        rows = rows_of(4 * hidden)
        x, order = torch.randn(rows, hidden), torch.randperm(rows)
        return lambda: x.index_select(0, order).index_select(0, order)
    if name == "embedding":
        rows = rows_of(2 * hidden)
        table, ids = torch.randn(shape.vocabulary, hidden), torch.randint(shape.vocabulary, (rows,))
        return lambda: functional.embedding(ids, table)
    if name == "cross entropy":
        logits, columns = _logits(job, asked)
        targets, alone, entropy = (
            torch.randint(columns, (len(logits),)),
            Way((0,), 0, None, Beat(None)),
            entropy_function(),
        )
        return lambda: entropy(logits, targets, alone)
    if name == "gradient accumulation":
        y, sums = torch.zeros(rows_of(ACCUMULATED)), _turning((rows_of(ACCUMULATED),), graph=False)
        return lambda: next(sums).add_(y)
    if name == "optimizer":  # as many bytes a weight as moesim/engine/training_sync.py counts in float32
        weights = torch.zeros(max(1, round(asked.size / 32.0)), requires_grad=True)
        weights.grad = torch.zeros_like(weights)
        adam = torch.optim.AdamW([weights], lr=0.0, weight_decay=0.0, fused=True)
        return lambda: (weights.grad.square().sum(), adam.step())
    raise ValueError(f"no kernel of that name: {name}")


def _logits(job: TrainingJob, asked: Asked) -> tuple[Any, int]:
    """Logits of a micro-batch over TP's share of the vocabulary: twice read, the softmax written."""
    torch = need_torch()
    rows = job.micro_batch * job.sequence_length
    columns = max(2, round(asked.size / FLOAT_BYTES / 3 / rows))
    return torch.randn(rows, columns), columns


def _meeting(job: TrainingJob, made: Made, ranks: int, asked: Asked) -> Callable[[], None]:
    """A collective among ranks that follow each other, in all groups at once; a send from each rank to the next."""
    torch = need_torch()
    distributed = torch.distributed
    if asked.family == "send":
        return _send(made.rank, ranks, max(1, round(asked.size / FLOAT_BYTES)))
    kind, size = str(asked.key[0]), int(asked.key[1])
    members = [tuple(range(first, first + size)) for first in range(0, ranks - size + 1, size)]
    groups = {one: made.group(one) for one in members}
    mine = next((one for one in members if made.rank in one), None)
    if mine is None:
        return lambda: None
    group, elements = groups[mine], max(size, round(asked.size / FLOAT_BYTES / size) * size)
    columns = job.shape.hidden
    rows = max(1, elements // size // columns)
    whole, part = torch.zeros(rows * size, columns), torch.zeros(rows, columns)
    if kind == "all_reduce":
        flat = torch.zeros(elements)
        return lambda: distributed.all_reduce(flat, group=group)
    if kind == "all_gather":
        return lambda: all_gather(part, group, size)
    if kind == "reduce_scatter":
        return lambda: reduce_scatter(whole, group, size)
    each = [rows] * size
    return lambda: all_to_all(whole, each, each, group)


def _send(rank: int, ranks: int, elements: int) -> Callable[[], None]:
    """Each pair of neighbours: the lower rank sends, the higher one receives; then nothing is under way."""
    torch = need_torch()
    distributed, data = torch.distributed, torch.zeros(elements)
    partner = rank ^ 1
    if partner >= ranks:
        return lambda: None
    if rank < partner:
        return lambda: distributed.send(data, partner)
    return lambda: distributed.recv(data, partner)
