"""From an operation of the forward pass to those of its backward pass: gradient of the input, gradient of the weights.

No table holds backward kernels: a product is priced as the transposed product of the same cost model, everything else
by a ratio to its forward time that stands here beside its source. A price by ratio is tagged `formula` at best, one of
a transposed product `extrapolated` at best (its memory layout was not measured).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import CostModel, Tag, estimate
from moesim.cost.ops import (
    Attention,
    Collective,
    ExpertGemm,
    Gemm,
    MemoryBound,
    MlaAbsorb,
    MlaAttention,
    MoeExchange,
    Operation,
)
from moesim.errors import BadInput
from moesim.graph.priced_step import Part

Floats = NDArray[np.float64]

# FLOP of the attention kernel's backward pass over its forward pass: five products of the same size (scores once more,
# and the gradients of values, scores, queries and keys) against two (T. Dao, FlashAttention-2, arXiv:2307.08691,
# section 3.1 and section 4.1).
ATTENTION_BACKWARD_RATIO = 2.5
# Tensors that the backward pass of a memory-bound kernel moves over those of its forward pass, counted by hand.
# norm: residual and its sum, input's gradient and output (4) both ways. silu: gate, up, their product (3); product's
# gradient, gate, up, two gradients (5). embedding: a row read and written (4 bytes an element); the gradient read, the
# float32 gradient read and written (10). cross entropy: the gradient needs the stored softmax only.
BACKWARD_TENSORS: dict[str, float] = {
    "norm": 1.0,
    "latent norms": 1.0,
    "rope": 1.0,
    "top-k": 1.0,
    "silu": 5.0 / 3.0,
    "permute": 1.0,
    "embedding": 2.5,
    "cross entropy": 0.5,
}
# Bytes by which adding to a float32 gradient in place exceeds the product's own bf16 output: 4 read + 4 written - 2
# (Megatron-LM, gradient accumulation fusion: the product's epilogue adds to `main_grad`).
ACCUMULATION_BYTES = 6.0


@dataclass(frozen=True)
class Costed:
    """An operation, how often it is done (or its ratio to the operation's time), and the best tag it can have.

    beside_s: seconds on top that no cost model knows, broadcastable to the operation's price; they are assumed.
    """

    operation: Operation
    times: float = 1.0
    at_best: Tag = Tag.MEASURED
    beside_s: Floats | float = 0.0


def data_gradient(operation: Operation) -> tuple[Costed, ...]:
    """The operations that carry the gradient back through an operation, to its input. Raises BadInput for MlaAbsorb."""
    match operation:
        case Gemm():
            return (Costed(replace(operation, n=operation.k, k=operation.n), at_best=Tag.EXTRAPOLATED),)
        case ExpertGemm():  # both products transposed: as many FLOP, weights and rows
            return (Costed(operation, at_best=Tag.FORMULA),)
        case Attention() | MlaAttention():
            return (Costed(operation, times=ATTENTION_BACKWARD_RATIO, at_best=Tag.FORMULA),)
        case MemoryBound():
            return (Costed(operation, times=BACKWARD_TENSORS[operation.name], at_best=Tag.FORMULA),)
        case Collective():
            mirror = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather"}
            kind = mirror.get(operation.kind, operation.kind)
            return (Costed(replace(operation, kind=kind)),)  # type: ignore[arg-type]
        case MoeExchange():  # README of deepseek-ai/DeepEP: the backward pass of one is the other
            return (Costed(replace(operation, step="combine" if operation.step == "dispatch" else "dispatch")),)
        case MlaAbsorb():
            raise BadInput("absorbed latent attention has no backward pass", mend="train with expanded heads")


def weight_gradient(operation: Operation) -> tuple[Costed, ...]:
    """The operations that make the gradient of an operation's weights; none where it has none.

    A product's is [n, m] x [m, k] with the tokens inside, the narrower of its sides as rows.
    """
    match operation:
        case Gemm():
            tokens = float(np.max(operation.m))
            rows, columns = sorted((operation.n, operation.k))
            product = Gemm(m=np.full((1, 1), float(rows)), n=columns, k=round(tokens), dtype=operation.dtype)
            return (
                Costed(product, at_best=Tag.EXTRAPOLATED),
                _accumulation(float(operation.n) * operation.k),
            )
        case ExpertGemm():
            weights = operation.tokens.shape[-1] * 3.0 * operation.hidden * operation.intermediate
            return (Costed(operation, at_best=Tag.FORMULA), _accumulation(weights))
        case _:
            return ()


def _accumulation(weights: float) -> Costed:
    return Costed(MemoryBound(bytes=np.full((1, 1), ACCUMULATION_BYTES * weights), name="gradient accumulation"))


def priced(costs: CostModel, work: tuple[Costed, ...]) -> Part:
    """The price of some work. Raises OutsideProfile."""
    found = []
    for one in work:
        price = costs.estimate(one.operation)
        tags = np.maximum(price.tags, np.int8(one.at_best))
        seconds = price.seconds * one.times
        found.append(estimate(seconds, tags, price.family, price.rel_sigma, price.source))
        if np.any(one.beside_s):
            beside = np.broadcast_to(np.asarray(one.beside_s, dtype=np.float64), seconds.shape)
            found.append(estimate(beside, Tag.ASSUMED, price.family, price.rel_sigma, "training.host"))
    return Part(tuple(found))
