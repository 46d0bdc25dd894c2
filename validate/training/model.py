"""The small MoE transformer as one rank holds it: weights made alike on every rank, cut to its share, and run.

Tensor parallelism comes with sequence parallelism, experts lie over all ranks of a stage, as `moesim` simulates it
(moesim/graph/training_layer.py). On one rank it is the whole model, the reference of all others.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.network.rank_groups import Group as GroupKind
from validate.hardware.group import need_torch
from validate.training.job import Layout, Shape, TrainingJob
from validate.training.ways import Made, Way, functions

ROPE_BASE = 10_000.0
EPSILON = 1e-6

# Which gradients are summed over which ranks: `dense` over those with the same share of the dense weights, `experts`
# over those with the same experts, `whole` (norms and gates, which every TP rank has but feeds its own tokens) over TP
# and over those of `dense`.
KINDS = ("dense", "experts", "whole")


@dataclass(frozen=True)
class Slice:
    """A parameter of the whole model and this rank's part of it: `rows` picks along `axis`, all of it without."""

    name: str
    kind: str
    shape: tuple[int, ...]
    axis: int = 0
    rows: tuple[int, ...] | None = None

    def of(self, whole: Any) -> Any:
        """This rank's part."""
        if self.rows is None:
            return whole
        return whole.index_select(self.axis, need_torch().as_tensor(self.rows, device=whole.device))


def whole_parameter(name: str, shape: tuple[int, ...], seed: int) -> Any:
    """A parameter of the whole model, the same wherever it is made: ones for norms, else normal by 1 / sqrt(fan-in)."""
    torch = need_torch()
    if len(shape) == 1:
        return torch.ones(shape)
    source = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
    return torch.randn(shape, generator=source) / (1.0 if name == "embedding" else shape[-1] ** 0.5)


def gate_bias(job: TrainingJob, layer: int) -> NDArray[np.float64]:
    """What is added to the gate's logits [experts], so that some experts are wanted more; it is not trained."""
    return np.random.default_rng([job.seed, 3, layer]).normal(scale=job.bias, size=job.shape.experts)


def batch_tokens(job: TrainingJob) -> NDArray[np.int64]:
    """The global batch: [sequences, sequence_length + 1] token ids; the last column is only foretold."""
    rng = np.random.default_rng([job.seed, 1])
    return rng.integers(job.shape.vocabulary, size=(job.global_batch, job.sequence_length + 1))


def _span(size: int, parts: int, part: int) -> tuple[int, ...] | None:
    if parts == 1:
        return None
    each = size // parts
    return tuple(range(part * each, (part + 1) * each))


def slices(shape: Shape, chunk: range, tp: int, place: int, experts: Sequence[Sequence[int]]) -> tuple[Slice, ...]:
    """Parameters of some layers on one rank. place: its place in its TP group. experts: it holds, by MoE layer."""
    hidden, width = shape.hidden, shape.head_dim
    queries, keys = shape.heads * width, shape.kv_heads * width
    found: list[Slice] = []
    if chunk.start == 0:
        table = _span(shape.vocabulary, tp, place)
        found.append(Slice("embedding", "dense", (shape.vocabulary, hidden), 0, table))
    for layer in chunk:
        rows = None
        if tp > 1:
            q, k = _span(queries, tp, place), _span(keys, tp, place)
            assert q is not None and k is not None
            rows = (*q, *(queries + one for one in k), *(queries + keys + one for one in k))
        found += [
            Slice(f"{layer}.attention_norm", "whole", (hidden,)),
            Slice(f"{layer}.qkv", "dense", (queries + 2 * keys, hidden), 0, rows),
            Slice(f"{layer}.out", "dense", (hidden, queries), 1, _span(queries, tp, place)),
            Slice(f"{layer}.norm", "whole", (hidden,)),
        ]
        if layer == 0:
            wide = shape.dense_intermediate
            part = _span(wide, tp, place)
            both = None if part is None else (*part, *(wide + one for one in part))
            found += [
                Slice(f"{layer}.up", "dense", (2 * wide, hidden), 0, both),
                Slice(f"{layer}.down", "dense", (hidden, wide), 1, part),
            ]
            continue
        found.append(Slice(f"{layer}.gate", "whole", (shape.experts, hidden)))
        for expert in experts[layer - 1]:
            found += [
                Slice(f"{layer}.{expert}.up", "experts", (2 * shape.intermediate, hidden)),
                Slice(f"{layer}.{expert}.down", "experts", (hidden, shape.intermediate)),
            ]
    if chunk.stop == shape.layers:
        table = _span(shape.vocabulary, tp, place)
        found += [
            Slice("last_norm", "whole", (hidden,)),
            Slice("head", "dense", (shape.vocabulary, hidden), 0, table),
        ]
    return tuple(found)


class Weights:
    """Parameters of a rank in one flat tensor for each kind, and their gradients likewise.

    views: name -> parameter, a view of the flat one. slices: name -> what it is of the whole model.
    """

    def __init__(self, job: TrainingJob, listed: Sequence[Slice], made: Made) -> None:
        torch = need_torch()
        self.slices = {one.name: one for one in listed}
        self.flat: dict[str, Any] = {}
        self.gradients: dict[str, Any] = {}
        self.views: dict[str, Any] = {}
        for kind in KINDS:
            values = []
            for one in listed:
                if one.kind == kind:
                    made.beat.at(f"making the weights: {one.name}")
                    # Made on the host, so that they are the same on every kind of device.
                    values.append((one, one.of(whole_parameter(one.name, one.shape, job.seed)).to(made.device)))
            flat = torch.cat([one.reshape(-1) for _, one in values]) if values else torch.zeros(0, device=made.device)
            gradients = torch.zeros_like(flat)
            start = 0
            for one, value in values:
                end = start + value.numel()
                view = flat[start:end].view(value.shape).requires_grad_()
                view.grad = gradients[start:end].view(value.shape)
                self.views[one.name] = view
                start = end
            self.flat[kind], self.gradients[kind] = flat, gradients

    def clear(self) -> None:
        """Set the gradients to zero."""
        for one in self.gradients.values():
            one.zero_()


class Decoder:
    """Some layers of the model on one rank.

    slots: of each expert over all EP ranks [MoE layers, experts], ranks one after another. expert: of each slot.
    counted: rows of each expert that this rank's tokens asked for, by layer, of the last forward pass.
    """

    def __init__(
        self,
        job: TrainingJob,
        layout: Layout,
        weights: Weights,
        ways: dict[GroupKind, Way],
        slots: NDArray[np.int64],
        device: Any,
    ) -> None:
        torch = need_torch()
        self.job, self.layout, self.weights, self.ways = job, layout, weights, ways
        self.slot = [torch.as_tensor(row, device=device) for row in slots]
        self.per_rank = job.shape.experts // ways["ep"].size
        first = ways["ep"].place * self.per_rank
        by_slot = [row.argsort(kind="stable") for row in slots]
        self.expert = [torch.as_tensor(row, device=device) for row in by_slot]
        self.held = [row[first : first + self.per_rank].tolist() for row in by_slot]
        self.bias = [
            torch.as_tensor(gate_bias(job, layer), dtype=torch.float32, device=device)
            for layer in range(job.shape.layers)
        ]
        self.gather, self.scatter, self.exchange = functions()
        self.counted: dict[int, Any] = {}
        length, width = job.sequence_length, job.shape.head_dim
        angle = torch.arange(length)[:, None] / ROPE_BASE ** (torch.arange(0, width, 2) / width)
        self.cosine, self.sine = (
            torch.cat([part, part], dim=-1)[:, None].to(device) for part in (angle.cos(), angle.sin())
        )
        self.entropy = entropy_function()

    def parameter(self, name: str) -> Any:
        """A parameter by name."""
        return self.weights.views[name]

    def embed(self, ids: Any) -> Any:
        """Token ids [sequences, length] -> rows of this TP rank [local, hidden]."""
        torch = need_torch()
        table, way = self.parameter("embedding"), self.ways["tp"]
        flat = ids.reshape(-1)
        if way.size == 1:
            return torch.nn.functional.embedding(flat, table)
        local = flat - way.place * table.shape[0]
        outside = (local < 0) | (local >= table.shape[0])
        rows = torch.nn.functional.embedding(local.masked_fill(outside, 0), table)
        return self.scatter(rows.masked_fill(outside[:, None], 0.0), way)

    def layer(self, layer: int, x: Any) -> Any:
        """One layer: rows of this TP rank [local, hidden], in and out."""
        x = x + self._attention(layer, self._norm(f"{layer}.attention_norm", x))
        rows = self._norm(f"{layer}.norm", x)
        return x + (self._dense(layer, rows) if layer == 0 else self._experts(layer, rows))

    def loss(self, x: Any, targets: Any) -> Any:
        """The sum of the cross entropy over the tokens of this micro-batch, over all tokens of the global batch."""
        torch = need_torch()
        rows = self.gather(self._norm("last_norm", x), self.ways["tp"])
        logits = torch.nn.functional.linear(rows, self.parameter("head"))
        total = self.entropy(logits, targets.reshape(-1), self.ways["tp"])
        return total / (self.job.global_batch * self.job.sequence_length)

    def _norm(self, name: str, x: Any) -> Any:
        return need_torch().nn.functional.rms_norm(x, (x.shape[-1],), self.parameter(name), EPSILON)

    def _attention(self, layer: int, rows: Any) -> Any:
        functional, way, shape = need_torch().nn.functional, self.ways["tp"], self.job.shape
        whole = self.gather(rows, way)
        heads, keys = shape.heads // way.size, shape.kv_heads // way.size
        mixed = functional.linear(whole, self.parameter(f"{layer}.qkv"))
        mixed = mixed.view(self.job.micro_batch, self.job.sequence_length, heads + 2 * keys, shape.head_dim)
        turned = self._rope(mixed[:, :, : heads + keys])
        q, k, v = turned[:, :, :heads], turned[:, :, heads:], mixed[:, :, heads + keys :]
        done = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=keys != heads
        )
        flat = done.transpose(1, 2).reshape(whole.shape[0], heads * shape.head_dim)
        return self.scatter(functional.linear(flat, self.parameter(f"{layer}.out")), way)

    def _rope(self, x: Any) -> Any:
        return rotated(x, self.cosine, self.sine)

    def _dense(self, layer: int, rows: Any) -> Any:
        whole = self.gather(rows, self.ways["tp"])
        done = swiglu(whole, self.parameter(f"{layer}.up"), self.parameter(f"{layer}.down"))
        return self.scatter(done, self.ways["tp"])

    def _experts(self, layer: int, rows: Any) -> Any:
        torch = need_torch()
        way, top_k = self.ways["ep"], self.job.shape.top_k
        logits = torch.nn.functional.linear(rows, self.parameter(f"{layer}.gate")) + self.bias[layer]
        best = logits.topk(top_k, dim=-1)
        share = torch.softmax(best.values, dim=-1)
        slots = self.slot[layer - 1][best.indices].reshape(-1)
        self.counted[layer] = counted(best.indices, self.job.shape.experts)
        order = slots.argsort(stable=True)
        token = order // top_k
        counts = self.counted[layer].index_select(0, self.expert[layer - 1]).view(way.size, self.per_rank)
        arriving = counts if way.size == 1 else all_counts(counts, way)
        # The only time the host waits for a device: what it needs to know of sizes comes over at once.
        sizes = way.meet(torch.stack([counts, arriving]).cpu)
        sent, got = sizes.sum(dim=2).tolist()
        came = self.exchange(rows.index_select(0, token), sent, got, way)
        done = self._grouped(layer, came, arriving, sizes[1].sum(dim=0).tolist())
        back = self.exchange(done, got, sent, way)
        weighted = back * share.reshape(-1).index_select(0, order)[:, None]
        return torch.zeros_like(rows).index_add(0, token, weighted)

    def _grouped(self, layer: int, came: Any, arriving: Any, sizes: list[int]) -> Any:
        """Every local expert on its rows, which come in order of (source, expert).

        arriving: [sources, local experts] rows. sizes: of each local expert, from all sources.
        """
        torch, held = need_torch(), self.held[layer - 1]
        if len(arriving) == 1:  # in order as they come
            return self._each(layer, held, came.split(sizes))
        each = torch.arange(self.per_rank, device=came.device).repeat(len(arriving))
        local = each.repeat_interleave(arriving.reshape(-1), output_size=len(came))
        order = local.argsort(stable=True)
        done = self._each(layer, held, came.index_select(0, order).split(sizes))
        return done.index_select(0, order.argsort())

    def _each(self, layer: int, experts: Sequence[int], parts: Sequence[Any]) -> Any:
        """Each expert on its rows, joined."""
        done = [
            swiglu(part, self.parameter(f"{layer}.{expert}.up"), self.parameter(f"{layer}.{expert}.down"))
            for part, expert in zip(parts, experts, strict=True)
        ]
        return need_torch().cat(done)


def counted(ids: Any, experts: int) -> Any:
    """How often each expert stands among ids: int64 [experts]. On a GPU `bincount` would have the host wait for it."""
    torch, flat = need_torch(), ids.reshape(-1)
    zeros = torch.zeros(experts, dtype=torch.int64, device=ids.device)
    return zeros.scatter_add_(0, flat, torch.ones_like(flat))


def all_counts(counts: Any, way: Way) -> Any:
    """How many rows come from each rank for each local expert: [ranks, local experts]."""
    torch = need_torch()
    arriving = torch.empty_like(counts, memory_format=torch.contiguous_format)
    way.meet(lambda: torch.distributed.all_to_all_single(arriving, counts.contiguous(), group=way.group))
    return arriving


def swiglu(rows: Any, up: Any, down: Any) -> Any:
    """down(silu(gate) * up) of rows [n, hidden]."""
    functional = need_torch().nn.functional
    gate_part, up_part = functional.linear(rows, up).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate_part) * up_part, down)


def rotated(x: Any, cosine: Any, sine: Any) -> Any:
    """Rotary positions: x [sequences, length, heads, width]."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + need_torch().cat([-second, first], dim=-1) * sine


def entropy_function() -> Any:
    """The cross entropy of logits whose columns are divided over a TP group, summed over rows: f(logits, ids, way)."""
    torch = need_torch()

    base: Any = torch.autograd.Function

    class Entropy(base):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(ctx: Any, logits: Any, targets: Any, way: Way) -> Any:
            most = logits.amax(dim=-1)
            if way.size > 1:
                largest = torch.distributed.ReduceOp.MAX
                way.meet(lambda: torch.distributed.all_reduce(most, op=largest, group=way.group))
            local = targets - way.place * logits.shape[-1]
            outside = (local < 0) | (local >= logits.shape[-1])
            local = local.masked_fill(outside, 0)
            share = (logits - most[:, None]).exp()
            own = (logits.gather(-1, local[:, None])[:, 0] - most).masked_fill(outside, 0.0)
            both = torch.stack([share.sum(dim=-1), own])
            if way.size > 1:
                way.meet(lambda: torch.distributed.all_reduce(both, group=way.group))
            ctx.save_for_backward(share.div_(both[0][:, None]), local, outside)
            return (both[0].log() - both[1]).sum()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            share, local, outside = ctx.saved_tensors
            share.scatter_add_(-1, local[:, None], -(~outside).to(share.dtype)[:, None])
            return share.mul_(gradient), None, None

    return Entropy.apply
