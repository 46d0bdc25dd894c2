"""What a layer does in training, piece by piece: the operations of its forward pass and of both gradients.

Tensor parallelism comes with sequence parallelism, as Megatron-LM demands of MoE models: between attention and
feed-forward each TP rank holds its share of the tokens, and products are framed by an all-gather and a reduce-scatter
(V. Korthikanti et al., arXiv:2205.05198, section 4.2.2). Context parallelism gathers keys and values, and gives each
rank as many pairs of query and key as the others (the first and the last chunks together, as Megatron-LM cuts them).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesim.cost.ops import (
    Attention,
    Collective,
    ExpertGemm,
    Gemm,
    MemoryBound,
    MlaAttention,
    MoeExchange,
    Operation,
)
from moesim.graph.backward import Costed, data_gradient, weight_gradient
from moesim.graph.pricing import WIDEST_GEMM_COLUMNS
from moesim.network.rank_groups import Group, RankGrid
from moesim.network.replicas import replica_shares
from moesim.network.traffic import equivalent_tokens
from moesim.network.uniform import visited
from moesim.spec.cluster import ClusterSpec
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import PoliciesSpec, PrecisionSpec
from moesim.spec.workload import TrainingSpec
from moesim.units import BYTES_PER_ELEMENT

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TrainingSetup:
    """All that stays fixed over a training step. placement: of the MoE layers over the EP ranks of an instance."""

    model: ModelSpec
    cluster: ClusterSpec
    parallel: ParallelSpec
    precision: PrecisionSpec
    policies: PoliciesSpec
    placement: ExpertPlacement
    training: TrainingSpec
    grid: RankGrid

    @property
    def rows(self) -> float:
        """Tokens of a micro-batch on one TP group: its share of the sequence under context parallelism."""
        return self.training.sequence_length / self.parallel.cp * self.training.micro_batch

    @property
    def local_rows(self) -> float:
        """Tokens of a micro-batch on one rank where sequence parallelism divides them."""
        return self.rows / self.parallel.tp

    @property
    def data_parallel(self) -> int:
        """Ranks over which the global batch is divided: attention DP of all instances."""
        return self.parallel.attention_dp * self.grid.instances

    @property
    def micro_batches(self) -> int:
        """Micro-batches that each pipeline runs for one global batch."""
        return self.training.global_batch // (self.training.micro_batch * self.data_parallel)

    @property
    def exchange_ranks(self) -> int:
        """Ranks that exchange tokens with one another, each with `local_rows` of them."""
        return self.parallel.ep * self.parallel.expert_tp

    @property
    def group_tokens(self) -> float:
        """Tokens of a micro-batch over all ranks that exchange them."""
        return self.local_rows * self.exchange_ranks


@dataclass(frozen=True)
class Piece:
    """One task of a layer by pass.

    operation: the key its time is reported under. group: the ranks that meet, none for computation. redo: module of
    selective recomputation -> what it computes again before the backward pass.
    """

    name: str
    operation: str
    forward: tuple[Costed, ...]
    data: tuple[Costed, ...]
    weight: tuple[Costed, ...] = ()
    group: Group | None = None
    redo: dict[str, tuple[Costed, ...]] = field(default_factory=dict)


def compute(name: str, operation: str, operations: list[Operation], module: str = "") -> Piece:
    """A piece of computation; module: that computes it again under selective recomputation."""
    forward = tuple(Costed(one) for one in operations)
    data = tuple(work for one in reversed(operations) for work in data_gradient(one))
    weight = tuple(work for one in operations for work in weight_gradient(one))
    return Piece(name, operation, forward, data, weight, redo={module: forward} if module else {})


def meet(name: str, operation: str, work: Operation, group: Group, module: str = "") -> Piece:
    """A collective of the forward pass, with its mirror image in the backward pass."""
    forward = (Costed(work),)
    return Piece(
        name, operation, forward, data_gradient(work), group=group, redo={module: forward} if module else {}
    )  # fmt: skip


class LayerPieces:
    """Lists the pieces of the layers, the embedding and the head of one setup."""

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup = setup
        self.size = BYTES_PER_ELEMENT[setup.precision.activations]
        # Gates and logits are never in fewer bits than the activations have.
        self.wide = "fp32" if setup.precision.activations == "fp32" else "bf16"
        nodes = setup.grid.nodes("ep")
        placement_nodes = nodes if setup.placement.ranks % nodes == 0 else 1
        self.shares = replica_shares(setup.placement, policy=setup.policies.dispatch.replica, nodes=placement_nodes)

    def attention(self, window: int) -> list[Piece]:
        """Norm, projections and the attention kernel; window: of this layer, 0 = none."""
        setup = self.setup
        model, precision, tp, cp = setup.model, setup.precision, setup.parallel.tp, setup.parallel.cp
        spec, rows = model.attention, setup.rows
        heads = max(1, spec.heads // tp)
        found = [compute("attention norm", "norms", [self._norm(setup.local_rows)], "layernorm")]
        found += self._tp("gather", "all_gather", rows)
        found.append(compute("projections", "attention_projections", self._projections()))
        kv_width = (heads if spec.kind == "mla" else max(1, spec.kv_heads // tp)) * (
            spec.head_dim + spec.value_head_dim
        )
        if cp > 1:
            whole = np.full((1, 1), rows * cp * kv_width * self.size)
            gather = Collective("all_gather", whole, **setup.grid.spread("cp"))
            found.append(meet("keys and values", "cp_collective", gather, "cp"))
        found.append(compute("attention", "attention", [self._kernel(heads, window)], "core_attn"))
        out = self._gemm(rows, model.hidden, heads * spec.value_head_dim, precision.projections)
        found.append(compute("output projection", "attention_projections", out))
        return found + self._tp("scatter", "reduce_scatter", rows)

    def dense(self) -> list[Piece]:
        """A dense feed-forward."""
        setup = self.setup
        found = [compute("norm", "norms", [self._norm(setup.local_rows)], "layernorm")]
        found += self._tp("gather", "all_gather", setup.rows, "mlp")
        swiglu = self._swiglu(setup.rows, setup.model.dense_intermediate // setup.parallel.tp)
        found.append(compute("dense", "dense", swiglu, "mlp"))
        return found + self._tp("scatter", "reduce_scatter", setup.rows)

    def moe(self, counts: Floats, kept: Floats | None = None) -> list[Piece]:
        """Gate, shared experts, dispatch, experts, combine.

        counts: rows of each expert [micro-batches, layers, experts] of an instance. kept: share of the picks that are
        sent [micro-batches, layers]; None = all.
        """
        setup = self.setup
        model, moe, local = setup.model, setup.model.moe, setup.local_rows
        gate = [
            *self._gemm(local, moe.experts, model.hidden, self.wide),
            self._memory(local * moe.experts * BYTES_PER_ELEMENT["fp32"] * 2, "top-k"),
        ]
        found = [
            compute("norm", "norms", [self._norm(local)], "layernorm"),
            compute("gate", "gate", gate, "moe"),
        ]
        if moe.shared_intermediate:
            found += self._tp("gather", "all_gather", setup.rows, "moe")
            swiglu = self._swiglu(setup.rows, moe.shared_intermediate // setup.parallel.tp)
            found.append(compute("shared expert", "shared_expert", swiglu, "moe"))
            found += self._tp("scatter", "reduce_scatter", setup.rows, "moe")
        loads = self.local_loads(counts)
        away = self._exchange("dispatch", counts, loads.sum(axis=-1), kept)
        back = self._exchange("combine", counts, loads.sum(axis=-1), kept)
        arrived = self._expert_tp("all_gather", loads)
        left = self._expert_tp("reduce_scatter", loads)
        copied, joined = self._copies("permute", kept), self._copies("unpermute", kept)
        return [*found, *copied, *away, *arrived, self._experts(loads), *left, *back, *joined]

    def embedding(self) -> list[Piece]:
        """The embedding's rows, scattered over TP ranks."""
        rows = self.setup.rows
        moved = self._memory(rows * self.setup.model.hidden * self.size * 2, "embedding")
        return [compute("embedding", "embedding", [moved]), *self._tp("scatter", "reduce_scatter", rows)]

    def head(self) -> list[Piece]:
        """Last norm, logits over TP's share of the vocabulary, and the loss."""
        setup = self.setup
        columns = -(-setup.model.vocabulary // setup.parallel.tp)
        logits = self._gemm(setup.rows, columns, setup.model.hidden, self.wide)
        # Logits read once for the maximum and once for the sum, the softmax written in float32.
        loss = self._memory(setup.rows * columns * (2 * self.size + BYTES_PER_ELEMENT["fp32"]), "cross entropy")
        return [
            compute("last norm", "norms", [self._norm(setup.local_rows)]),
            *self._tp("gather", "all_gather", setup.rows),
            compute("logits", "lm_head", [*logits, loss]),
        ]

    def local_loads(self, counts: Floats) -> Floats:
        """Tokens of each local expert: [micro-batches, layers, EP ranks, local slots]."""
        placement = self.setup.placement
        slots = placement.slot_loads(counts, self.shares)
        return slots.reshape(*slots.shape[:-1], placement.ranks, placement.slots_per_rank)

    def _memory(self, moved: float, name: str) -> MemoryBound:
        return MemoryBound(bytes=np.full((1, 1), moved), name=name)

    def _norm(self, rows: float) -> Operation:
        """RMSNorm with residual: two tensors read, two written."""
        return self._memory(rows * self.setup.model.hidden * self.size * 4, "norm")

    def _gemm(self, rows: float, n: int, k: int, dtype: str) -> list[Operation]:
        blocks = -(-n // WIDEST_GEMM_COLUMNS)
        return [Gemm(m=np.full((1, 1), rows), n=-(-n // blocks), k=k, dtype=dtype)] * blocks

    def _swiglu(self, rows: float, intermediate: int) -> list[Operation]:
        hidden, dtype = self.setup.model.hidden, self.setup.precision.dense
        return [
            *self._gemm(rows, 2 * intermediate, hidden, dtype),
            self._memory(rows * intermediate * self.size * 3, "silu"),
            *self._gemm(rows, hidden, intermediate, dtype),
        ]

    def _projections(self) -> list[Operation]:
        """Queries, keys and values; latent attention expands its heads (no absorption in training)."""
        setup, rows = self.setup, self.setup.rows
        spec, hidden, tp, dtype = (
            setup.model.attention,
            setup.model.hidden,
            setup.parallel.tp,
            setup.precision.projections,
        )
        heads = max(1, spec.heads // tp)
        if spec.kind == "gqa":
            kv_heads = max(1, spec.kv_heads // tp)
            columns = heads * spec.head_dim + kv_heads * (spec.head_dim + spec.value_head_dim)
            rope = self._memory(rows * (heads + kv_heads) * spec.head_dim * self.size * 2, "rope")
            return [*self._gemm(rows, columns, hidden, dtype), rope]
        latent = spec.kv_lora_rank + spec.qk_rope_head_dim
        nope = spec.head_dim - spec.qk_rope_head_dim
        if spec.q_lora_rank:
            query = self._gemm(rows, spec.q_lora_rank + latent, hidden, dtype)
            query += self._gemm(rows, heads * spec.head_dim, spec.q_lora_rank, dtype)
        else:
            query = self._gemm(rows, heads * spec.head_dim + latent, hidden, dtype)
        norms = self._memory(rows * (spec.q_lora_rank + latent) * self.size * 2, "latent norms")
        expand = self._gemm(rows, heads * (nope + spec.value_head_dim), spec.kv_lora_rank, dtype)
        return [*query, norms, *expand]

    def _kernel(self, heads: int, window: int) -> Operation:
        """The attention kernel of one rank's tokens, behind the mean prefix that balances the causal pairs over CP."""
        setup = self.setup
        spec, training = setup.model.attention, setup.training
        new = training.sequence_length / setup.parallel.cp
        sizes = {
            "batch": np.full((1, 1), float(training.micro_batch)),
            "new_tokens": np.full((1, 1), new),
            "prefix_tokens": np.full((1, 1), (training.sequence_length - new) / 2),
        }
        if spec.kind == "mla":
            return MlaAttention(
                phase="prefill",
                **sizes,
                heads=heads,
                kv_lora_rank=spec.kv_lora_rank,
                qk_nope_head_dim=spec.head_dim - spec.qk_rope_head_dim,
                qk_rope_head_dim=spec.qk_rope_head_dim,
                value_head_dim=spec.value_head_dim,
                dtype=setup.precision.activations,
                kv_dtype=setup.precision.activations,
            )
        return Attention(
            phase="prefill",
            **sizes,
            heads=heads,
            kv_heads=max(1, spec.kv_heads // setup.parallel.tp),
            head_dim=spec.head_dim,
            dtype=setup.precision.activations,
            kv_dtype=setup.precision.activations,
            window=window,
        )

    def _tp(self, name: str, kind: str, rows: float, module: str = "") -> list[Piece]:
        """A collective of sequence parallelism; none without TP."""
        tp = self.setup.parallel.tp
        if tp == 1:
            return []
        size = np.full((1, 1), rows * self.setup.model.hidden * self.size)
        work = Collective(kind, size, **self.setup.grid.spread("tp"))  # type: ignore[arg-type]
        return [meet(f"{name} (TP)", "tp_collective", work, "tp", module)]

    def _experts(self, loads: Floats) -> Piece:
        """Bringing rows into the experts' order, the grouped products, and back; loads: as `local_loads` gives them."""
        setup = self.setup
        moe, gathered = setup.model.moe, setup.policies.dispatch.backend == "allgather_reducescatter"
        width = moe.intermediate // setup.parallel.expert_tp
        products = ExpertGemm(
            tokens=loads,
            hidden=setup.model.hidden,
            intermediate=width,
            experts=moe.experts,
            top_k=moe.top_k,
            dtype=setup.precision.experts,
            # Grouped products over the rows that came; the fused kernel is measured with all ranks' tokens gathered.
            grouping="fused" if gathered else "grouped",
        )
        rows = loads.sum(axis=-1)
        permute = MemoryBound(bytes=rows * setup.model.hidden * self.size * 4, name="permute")
        piece = compute("experts", "experts", [permute, products], "moe")
        again = MemoryBound(bytes=rows * width * self.size * 3, name="silu")
        return Piece(
            piece.name, piece.operation, piece.forward, piece.data, piece.weight,
            redo={**piece.redo, "moe_act": (Costed(again),)},
        )  # fmt: skip

    def _copies(self, name: str, kept: Floats | None) -> list[Piece]:
        """What a plain all-to-all needs at home: a copy of each token for each pick, in order of their ranks, and back.

        Megatron-LM's all-to-all dispatcher permutes so before it sends and joins the picks after it has them back
        (megatron/core/transformer/moe/token_dispatcher.py, `MoEAlltoAllTokenDispatcher`); DeepEP's kernels read and
        write the tokens themselves. `_experts` counts the order of the experts on the rank where the rows come.
        """
        setup = self.setup
        if setup.parallel.ep == 1 or setup.policies.dispatch.backend != "alltoall":
            return []
        sent = setup.model.moe.top_k * (1.0 if kept is None else kept[..., None])
        moved = setup.local_rows * (1.0 + sent) * setup.model.hidden * self.size
        work = MemoryBound(bytes=np.atleast_2d(np.asarray(moved, dtype=np.float64)), name="permute")
        return [compute(name, "permute", [work], "moe")]

    def _expert_tp(self, kind: str, loads: Floats) -> list[Piece]:
        """The rows of an EP rank come together on its expert-TP ranks, or are summed there; the fullest counts."""
        if self.setup.parallel.expert_tp == 1:
            return []
        rows = loads.sum(axis=-1).max(axis=-1, keepdims=True)
        size = rows * self.setup.model.hidden * self.size
        grid = self.setup.grid
        work = Collective(kind, size, **grid.spread("expert_tp"))  # type: ignore[arg-type]
        return [meet("expert TP", "expert_tp_collective", work, "exchange", "moe")]

    def _exchange(self, step: str, counts: Floats, arriving: Floats, kept: Floats | None) -> list[Piece]:
        """Dispatch or combine of a layer: [micro-batches, layers, 1]; none on one EP rank."""
        setup = self.setup
        model, grid, ep = setup.model, setup.grid, setup.parallel.ep
        if ep == 1:
            return []
        backend = setup.policies.dispatch.backend
        if backend == "allgather_reducescatter":
            size = np.full((1, 1), setup.local_rows * ep * model.hidden * self.size)
            kind = "all_gather" if step == "dispatch" else "reduce_scatter"
            work: Operation = Collective(kind, size, **grid.spread("ep"))  # type: ignore[arg-type]
            return [meet(step, step, work, "exchange", "moe")]
        domains = grid.domains("ep")
        balanced = equivalent_tokens(
            mode="normal" if backend == "deepep" else "low_latency",
            tokens=np.full((len(counts), ep), setup.local_rows),
            rank_loads=arriving / setup.parallel.expert_tp,
            placement=setup.placement,
            counts=counts,
            top_k=model.moe.top_k,
            groups=model.moe.groups,
            top_groups=model.moe.top_groups,
            nodes=grid.nodes("ep") if ep % domains else domains,
            kept=kept,
        )[..., None]
        dtype = setup.precision.dispatch if step == "dispatch" else setup.precision.combine
        if backend == "alltoall":
            size = balanced * model.moe.top_k * model.hidden * BYTES_PER_ELEMENT[dtype]
            work = Collective("all_to_all", size, **grid.spread("ep"))
        else:
            work = MoeExchange(
                step="dispatch" if step == "dispatch" else "combine",
                mode="normal",
                tokens=balanced,
                hidden=model.hidden,
                top_k=model.moe.top_k,
                experts=model.moe.experts,
                ep=ep,
                nodes=grid.nodes("ep"),
                domains=grid.spread("ep")["domains"],
                dtype=dtype,
            )
        # Gradients travel in the type of the combine both ways: DeepEP's FP8 dispatch is for the forward pass.
        back = setup.precision.combine
        if isinstance(work, MoeExchange):
            forward = (self._posted(work),)
            data = tuple(self._posted(_typed(one.operation, back)) for one in data_gradient(work))
        else:
            forward = (Costed(work),)
            size = balanced * model.moe.top_k * model.hidden * BYTES_PER_ELEMENT[back]
            data = (Costed(Collective("all_to_all", size, **grid.spread("ep"))),)
        return [Piece(step, step, forward, data, group="exchange", redo={"moe": forward})]

    def _posted(self, exchange: MoeExchange) -> Costed:
        """A DeepEP exchange with what the CPU threads take that post its writes to other nodes' GPUs.

        None within an NVLink domain, where the GPUs write themselves.
        """
        host, spec, domains = self.setup.training.host, self.setup.model.moe, self.setup.grid.domains("ep")
        if domains == 1 or not host.posts:
            return Costed(exchange)
        copies = visited(domains, spec.experts, spec.top_k) * (domains - 1) / domains  # to domains but its own
        row_s = host.dispatch_row_s if exchange.step == "dispatch" else host.combine_row_s
        return Costed(exchange, beside_s=host.exchange_s + exchange.tokens * (copies * row_s))


def _typed(operation: Operation, dtype: str) -> MoeExchange:
    assert isinstance(operation, MoeExchange)
    return MoeExchange(**{**vars(operation), "dtype": dtype})
