"""The operations of one step of one deployment, priced: everything that a task graph needs to know of durations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import CostModel, estimate
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
from moesim.errors import OutsideProfile
from moesim.graph.batch import Floats, StepBatch
from moesim.graph.decode_context import Kind, exchanged
from moesim.graph.deepep_links import deepep_by_links, deepep_copies
from moesim.graph.exchanges import ALL_TO_ALLS, AllToAll, Step
from moesim.graph.priced_step import LayerSetup, Part, PricedStep
from moesim.graph.replica_choice import choice_estimates
from moesim.graph.stages import TENSORS_SENT
from moesim.network.choice import Replicas
from moesim.network.choice import prepare as prepare_replicas
from moesim.network.traffic import equivalent_tokens
from moesim.routing.capacity.on_counts import cap_counts
from moesim.routing.capacity.rule import capacity_rule
from moesim.units import BYTES_PER_ELEMENT

# Widest product that is priced whole: wider ones (vocabularies) are split into equal column blocks, as the measured
# grids end at 65,536 columns; the blocks of one product run one after the other at the same efficiency.
WIDEST_GEMM_COLUMNS = 65536


def capacity_sources(setup: LayerSetup, tokens: Floats) -> Floats:
    """Tokens [steps, sources] of each rank that keeps a capacity of its own, from those of attention-DP ranks.

    Where tokens are exchanged, a TP group's are split over its GPUs and each GPU is a source; else the group is one.
    """
    tp = setup.parallel.tp if setup.policies.dispatch.backend not in ("allreduce", "allgather_reducescatter") else 1
    return np.repeat(tokens / tp, tp, axis=1)


class Pricer:
    """Prices the parts of a step for one setup and one cost model; pure, apart from the cost model's own caches."""

    def __init__(self, setup: LayerSetup, costs: CostModel) -> None:
        self.setup = setup
        self.costs = costs
        nodes = setup.nodes if setup.placement.ranks % setup.nodes == 0 else 1  # TP over nodes is one EP rank
        self.capacity = capacity_rule(setup.policies, setup.model.moe.top_k)
        self.replicas: Replicas = prepare_replicas(setup.placement, policy=setup.policies.dispatch.replica, nodes=nodes)

    def price(
        self, batch: StepBatch, counts: NDArray[np.float64], *, mode: str, graphed: bool, attention: bool = True
    ) -> PricedStep:
        """Price one set of steps.

        counts: float64 [steps, layers, experts], tokens that want each expert, of the whole instance; the capacity rule
        makes them the rows that travel and are computed. mode: "normal"
        or "low_latency" (DeepEP), ignored by other backends. graphed: whether a captured graph hides kernel launches.
        attention: whether to price the attention kernel, and what goes with it where contexts are split.
        Raises OutsideProfile.
        """
        setup = self.setup
        rows = batch.padded_tokens
        kept = None
        if not self.capacity.dropless:
            wanted = counts.sum(axis=2)
            counts = self._capped(batch, counts)
            kept = counts.sum(axis=2) / np.where(wanted > 0, wanted, 1.0)
        slots = self.replicas.slot_loads(counts)
        local = slots.reshape(*slots.shape[:-1], setup.placement.ranks, setup.placement.slots_per_rank)
        arriving = local.sum(axis=-1)
        exchange = self._balanced_tokens(batch, counts, arriving, mode, kept)
        return PricedStep(
            batch=batch,
            mode=mode,
            head=self._memory(rows * setup.model.hidden * self._activation_bytes * 2, "embedding"),
            projections=self._projections(batch),
            attention=self.attention(batch) if attention else Part(),
            attention_sync=self._head_norm_sync(rows) + self._tensor_parallel_sync(rows),
            gate=self._gate(rows),
            shared=self._swiglu(self._local_rows(rows), setup.model.moe.shared_intermediate // self._shared_split),
            replica_choice=self._replica_choice(batch),
            dispatch=self._exchange("dispatch", batch, counts, exchange, arriving, mode),
            experts=self._experts(local, mode),
            combine=self._exchange("combine", batch, counts, exchange, arriving, mode),
            gather=self._gather(rows),
            dense=self._dense(rows),
            dense_sync=self._dense_sync(rows),
            tail=self._tail(batch),
            overhead=Part((setup.step.estimate(),)),
            eager=Part() if graphed else Part((setup.layer.estimate(),)),
            transfer=self.transfer(rows),
            arrival=self._arrival(rows),
            context_gather=self.context_gather(batch) if attention else Part(),
            context_merge=self.context_merge(batch) if attention else Part(),
        )

    def transfer(self, rows: Floats) -> Part:
        """What a stage sends to the next, of attention-DP ranks with `rows` [steps, dp]: [steps, hops, 1]."""
        stages = self.setup.stages
        if stages is None:
            return Part()
        share = self.setup.parallel.tp if stages.scattered else 1
        return Part((stages.transfer(self._stage_bytes(rows) / share),))

    def _arrival(self, rows: Floats) -> Part:
        """A TP group puts together what its ranks received a share of each."""
        stages = self.setup.stages
        if stages is None or not stages.scattered:
            return Part()
        return self._collective("all_gather", self._stage_bytes(rows), self.setup.parallel.tp)

    def _stage_bytes(self, rows: Floats) -> Floats:
        size = rows.max(axis=1, keepdims=True) * self.setup.model.hidden * self._activation_bytes
        return np.asarray(size * TENSORS_SENT)

    def slot_loads(self, batch: StepBatch, counts: NDArray[np.float64]) -> Floats:
        """Rows that each slot computes [steps, layers, slots] where a batch's tokens want counts [.., experts]."""
        return self.replicas.slot_loads(counts if self.capacity.dropless else self._capped(batch, counts))

    def _capped(self, batch: StepBatch, counts: NDArray[np.float64]) -> Floats:
        """Counts that the experts' capacity leaves."""
        source = capacity_sources(self.setup, batch.tokens)
        return cap_counts(counts, source, self.capacity, top_k=self.setup.model.moe.top_k).rows

    def rank_loads(self, batch: StepBatch, counts: NDArray[np.float64]) -> Floats:
        """Rows that each EP rank computes [steps, layers, ep]; arguments as in `slot_loads`."""
        plan = self.setup.placement
        slots = self.slot_loads(batch, counts)
        return np.asarray(slots.reshape(*slots.shape[:-1], plan.ranks, plan.slots_per_rank).sum(axis=-1))

    @property
    def _activation_bytes(self) -> float:
        return BYTES_PER_ELEMENT[self.setup.precision.activations]

    @property
    def _scattered(self) -> bool:
        """Whether the tokens of a TP group are scattered over its ranks for the MoE layer (DeepEP under TP)."""
        return self.setup.policies.dispatch.scatters and self.setup.parallel.tp > 1

    @property
    def _shared_split(self) -> int:
        return 1 if self.setup.policies.dispatch.scatters else self.setup.parallel.tp

    def _local_rows(self, rows: Floats) -> Floats:
        return rows / self.setup.parallel.tp if self._scattered else rows

    def _one(self, operation: Operation) -> Part:
        return Part((self.costs.estimate(operation),))

    def _memory(self, bytes_moved: Floats, name: str) -> Part:
        return self._one(MemoryBound(bytes=bytes_moved, name=name))

    def _gemm(self, rows: Floats, n: int, k: int, dtype: str) -> Part:
        blocks = -(-n // WIDEST_GEMM_COLUMNS)
        block = self._one(Gemm(m=rows, n=-(-n // blocks), k=k, dtype=dtype))
        return Part(block.estimates * blocks)

    def _norm(self, rows: Floats) -> Part:
        """RMSNorm with residual: two tensors read, two written."""
        return self._memory(rows * self.setup.model.hidden * self._activation_bytes * 4, "norm")

    def _projections(self, batch: StepBatch) -> Part:
        setup, rows = self.setup, batch.padded_tokens
        spec, hidden, tp, dtype = (
            setup.model.attention,
            setup.model.hidden,
            setup.parallel.tp,
            setup.precision.projections,
        )
        heads = max(1, spec.heads // tp)
        out = self._gemm(rows, hidden, heads * spec.value_head_dim, dtype)
        if spec.kind == "gqa":
            kv_heads = max(1, spec.kv_heads // tp)
            qkv = self._gemm(
                rows, heads * spec.head_dim + kv_heads * (spec.head_dim + spec.value_head_dim), hidden, dtype
            )
            width = (heads + kv_heads) * spec.head_dim * self._activation_bytes
            parts = self._norm(rows) + qkv + self._memory(rows * width * 2, "rope") + out
            if spec.norm_across_heads:  # squares, then the scaling: two passes, as the sum of ranks lies between them
                parts = parts + self._memory(rows * width, "squares") + self._memory(rows * width * 2, "head norm")
            return parts
        latent = spec.kv_lora_rank + spec.qk_rope_head_dim
        nope = spec.head_dim - spec.qk_rope_head_dim
        if spec.q_lora_rank:
            query = self._gemm(rows, spec.q_lora_rank + latent, hidden, dtype)
            query = query + self._gemm(rows, heads * spec.head_dim, spec.q_lora_rank, dtype)
        else:
            query = self._gemm(rows, heads * spec.head_dim + latent, hidden, dtype)
        small_norms = self._memory(rows * (spec.q_lora_rank + latent) * self._activation_bytes * 2, "latent norms")
        parts = self._norm(rows) + query + small_norms + out + self._indexer(rows)
        if batch.decode_seqs.any():
            for side, head_dim in (("pre", nope), ("post", spec.value_head_dim)):
                operation = MlaAbsorb(
                    side="pre" if side == "pre" else "post",
                    tokens=batch.decode_seqs,
                    heads=heads,
                    kv_lora_rank=spec.kv_lora_rank,
                    head_dim=head_dim,
                    dtype=setup.precision.activations,
                )
                parts = parts + self._one(operation)
        if batch.prefill_seqs.any():
            expand = heads * (nope + spec.value_head_dim)
            parts = parts + self._gemm(batch.prefill_tokens, expand, spec.kv_lora_rank, dtype)
        return parts

    def _indexer(self, rows: Floats) -> Part:
        """Queries, keys and head weights of a sparse-attention indexer, which every TP rank computes whole.

        Queries come from the compressed ones. Small passes: norm and rotation of keys, rotation and quantisation of
        queries, head weights (DeepSeek-V3.2's inference/model.py, SGLang's nsa_indexer.py).
        """
        spec, dtype = self.setup.model.attention, self.setup.precision.projections
        if not spec.index_head_dim:
            return Part()
        width, element = spec.index_heads * spec.index_head_dim, self._activation_bytes
        query = self._gemm(rows, width, spec.q_lora_rank or self.setup.model.hidden, dtype)
        key = self._gemm(rows, spec.index_head_dim, self.setup.model.hidden, dtype)
        weights = self._gemm(rows, spec.index_heads, self.setup.model.hidden, self.setup.precision.activations)
        passes = self._memory(rows * spec.index_head_dim * element * 2, "index keys")
        passes = passes + self._memory(rows * width * element * 2, "index queries")
        return query + key + weights + passes + self._memory(rows * spec.index_heads * element * 2, "index weights")

    def _index_scores(self, seqs: Floats, prefix: Floats) -> Part:
        """An indexer's scores of decoding sequences against their caches, and the choice of the best: [steps, dp].

        The cache holds a byte for each element; scores are written and read as fp32.
        """
        spec = self.setup.model.attention
        if not spec.index_head_dim:
            return Part()
        tokens = seqs * prefix
        scores = self._memory(tokens * (spec.index_head_dim + BYTES_PER_ELEMENT["fp32"]), "index scores")
        return scores + self._memory(tokens * BYTES_PER_ELEMENT["fp32"], "index top-k")

    def attention(self, batch: StepBatch) -> Part:
        """The attention kernels of one layer, with the passes over split contexts: [steps, attention-DP ranks]."""
        part = Part()
        if batch.decode_seqs.any():
            ones, kept = np.ones_like(batch.decode_seqs), self.setup.model.attention.index_top_k
            read = np.minimum(batch.decode_kv, kept) if kept else batch.decode_kv
            if self.setup.parallel.decode_cp > 1:
                read = read / self.setup.parallel.decode_cp
            part = part + self._kernels("decode", batch.decode_seqs, ones, read)
            part = part + self._index_scores(batch.decode_seqs, batch.decode_kv)
        if batch.prefill_seqs.any():
            part = part + self._kernels("prefill", batch.prefill_seqs, batch.prefill_new, batch.prefill_prefix)
        for name, moved in exchanged(self.setup, batch).passes:
            part = part + self._memory(moved, name)
        return part

    def context_gather(self, batch: StepBatch) -> Part:
        """What the ranks of a split context gather before their attention kernel: [steps, attention-DP ranks]."""
        return self._among_context(exchanged(self.setup, batch).before)

    def context_merge(self, batch: StepBatch) -> Part:
        """How they merge their partial outputs after it: [steps, attention-DP ranks]."""
        return self._among_context(exchanged(self.setup, batch).after)

    def attending(self, batch: StepBatch) -> Part:
        """All of a layer's attention between its projections, one thing after the other: [steps, ranks]."""
        return self.attention(batch) + self.exchanging(batch)

    def exchanging(self, batch: StepBatch) -> Part:
        """What of it ranks that share contexts spend exchanging; nothing where none do."""
        return self.context_gather(batch) + self.context_merge(batch)

    def _among_context(self, moved: tuple[tuple[Kind, Floats], ...]) -> Part:
        part = Part()
        for kind, size in moved:
            part = part + self._collective(kind, size, self.setup.parallel.decode_cp)
        return part

    def _kernels(self, phase: str, batch: Floats, new: Floats, prefix: Floats) -> Part:
        """The mean layer's kernel: layers with a sliding window and layers without, each by its share."""
        model = self.setup.model
        windowed = len(model.attention.windowed_layers) / model.layers if model.attention.window else 0.0
        shares = {0: 1.0 - windowed, model.attention.window: windowed} if windowed else {0: 1.0}
        part = Part()
        for window, share in shares.items():
            if share > 0.0:
                one = self.costs.estimate(self._kernel(phase, batch, new, prefix, window))
                part = part + Part((replace(one, seconds=one.seconds * share),))
        return part

    def _kernel(self, phase: str, batch: Floats, new: Floats, prefix: Floats, window: int) -> Operation:
        setup = self.setup
        spec, tp = setup.model.attention, setup.parallel.tp
        kind = "prefill" if phase == "prefill" else "decode"
        heads = max(1, spec.heads // tp)
        if kind == "decode":  # the query heads of all ranks that share a context
            heads *= setup.parallel.decode_cp
        if spec.kind == "mla":
            return MlaAttention(
                phase=kind,  # type: ignore[arg-type]
                batch=batch,
                new_tokens=new,
                prefix_tokens=prefix,
                heads=heads,
                kv_lora_rank=spec.kv_lora_rank,
                qk_nope_head_dim=spec.head_dim - spec.qk_rope_head_dim,
                qk_rope_head_dim=spec.qk_rope_head_dim,
                value_head_dim=spec.value_head_dim,
                dtype=setup.precision.activations,
                kv_dtype=setup.precision.kv_cache,
            )
        return Attention(
            phase=kind,  # type: ignore[arg-type]
            batch=batch,
            new_tokens=new,
            prefix_tokens=prefix,
            heads=heads,
            kv_heads=max(1, spec.kv_heads // tp),
            head_dim=spec.head_dim,
            dtype=setup.precision.activations,
            kv_dtype=setup.precision.kv_cache,
            window=window,
        )

    def _collective(self, kind: str, bytes_moved: Floats, gpus: int) -> Part:
        nodes = -(-gpus // self.setup.gpus_per_node)
        return self._one(Collective(kind=kind, bytes=bytes_moved, gpus=gpus, nodes=nodes))  # type: ignore[arg-type]

    def _tensor_parallel_sync(self, rows: Floats) -> Part:
        """After attention: all-reduce over the TP group, or reduce-scatter where DeepEP wants the tokens split."""
        tp = self.setup.parallel.tp
        if tp == 1:
            return Part()
        size = rows.max(axis=1, keepdims=True) * self.setup.model.hidden * self._activation_bytes
        return self._collective("reduce_scatter" if self._scattered else "all_reduce", size, tp)

    def _head_norm_sync(self, rows: Floats) -> Part:
        """Where queries and keys are normalised over all heads, TP ranks sum two fp32 numbers a token between them."""
        tp = self.setup.parallel.tp
        if tp == 1 or not self.setup.model.attention.norm_across_heads:
            return Part()
        return self._collective("all_reduce", rows.max(axis=1, keepdims=True) * 2 * BYTES_PER_ELEMENT["fp32"], tp)

    def _gather(self, rows: Floats) -> Part:
        """After the MoE layer: the TP group's tokens come together again where each rank sent a part of them."""
        parted = self._scattered or (self.setup.policies.dispatch.backend == "alltoall" and self.setup.parallel.tp > 1)
        if not parted:
            return Part()
        size = rows.max(axis=1, keepdims=True) * self.setup.model.hidden * self._activation_bytes
        return self._collective("all_gather", size, self.setup.parallel.tp)

    def _dense_sync(self, rows: Floats) -> Part:
        """Around a dense layer: the tokens that attention left scattered (DeepEP under TP) come together, then sum."""
        tp = self.setup.parallel.tp
        if tp == 1 or not self.setup.model.dense_layers:
            return Part()
        size = rows.max(axis=1, keepdims=True) * self.setup.model.hidden * self._activation_bytes
        gather = self._gather(rows) if self._scattered else Part()
        return gather + self._collective("all_reduce", size, tp)

    def _gate(self, rows: Floats) -> Part:
        model = self.setup.model
        local = self._local_rows(rows)
        scores = self._memory(local * model.moe.experts * BYTES_PER_ELEMENT["fp32"] * 2, "top-k")
        return self._norm(local) + self._gemm(local, model.moe.experts, model.hidden, "bf16") + scores

    def _swiglu(self, rows: Floats, intermediate: int) -> Part:
        """Gate and up as one product, activation, down: the dense layers' and the shared experts' feed-forward."""
        if intermediate == 0:
            return Part()
        hidden, dtype = self.setup.model.hidden, self.setup.precision.dense
        activation = self._memory(rows * intermediate * self._activation_bytes * 3, "silu")
        return (
            self._gemm(rows, 2 * intermediate, hidden, dtype)
            + activation
            + self._gemm(rows, hidden, intermediate, dtype)
        )

    def _dense(self, rows: Floats) -> Part:
        """A dense layer after attention: its norm and its feed-forward."""
        model = self.setup.model
        if not model.dense_layers:
            return Part()
        return self._norm(rows) + self._swiglu(rows, model.dense_intermediate // self.setup.parallel.tp)

    def _experts(self, local: Floats, mode: str) -> Part:
        """Grouped products of each EP rank; local: [steps, layers, ep, local slots] tokens."""
        setup = self.setup
        grouping = f"deepep_{mode}" if setup.policies.dispatch.backend == "deepep" else "fused"
        return self._one(
            ExpertGemm(
                tokens=local,
                hidden=setup.model.hidden,
                intermediate=setup.model.moe.intermediate // setup.parallel.expert_tp,
                experts=setup.model.moe.experts,
                top_k=setup.model.moe.top_k,
                dtype=setup.precision.experts,
                grouping=grouping,  # type: ignore[arg-type]
            )
        )

    def _balanced_tokens(
        self, batch: StepBatch, counts: NDArray[np.float64], arriving: Floats, mode: str, kept: Floats | None = None
    ) -> Floats | None:
        """Tokens per GPU of the balanced exchange that loads its busiest endpoint as this one does: [steps, layers]."""
        setup = self.setup
        backend, split = setup.policies.dispatch.backend, setup.parallel.expert_tp
        if backend not in ("deepep", "alltoall", "tp_dedup"):
            return None
        tp, moe = setup.parallel.tp, setup.model.moe
        by_expert = mode == "low_latency" or backend in ALL_TO_ALLS
        return equivalent_tokens(
            mode="low_latency" if by_expert else "normal",
            tokens=np.repeat(batch.tokens / tp, tp // split, axis=1),  # of one place in each rank's group of experts
            rank_loads=arriving / split,
            placement=setup.placement,
            counts=counts,
            top_k=moe.top_k,
            groups=moe.groups,
            top_groups=moe.top_groups,
            nodes=setup.domains,
            kept=kept,
        )

    def _exchange(
        self, step: Step, batch: StepBatch, counts: Floats, balanced: Floats | None, arriving: Floats, mode: str
    ) -> Part:
        setup = self.setup
        backend = setup.policies.dispatch.backend
        model, parallel = setup.model, setup.parallel
        if backend in ALL_TO_ALLS:
            return self._all_to_all(step, batch, balanced, arriving)
        if balanced is None:
            size = batch.padded_tokens.max(axis=1, keepdims=True) * model.hidden * self._activation_bytes
            if backend == "allreduce":
                alone = step == "dispatch" or parallel.gpus == 1
                return Part() if alone else self._by_layer(self._collective("all_reduce", size, parallel.gpus))
            if step == "combine":
                return self._by_layer(self._collective("reduce_scatter", size * parallel.attention_dp, parallel.gpus))
            size = size * setup.precision.gathered_share
            return self._by_layer(self._collective("all_gather", size * parallel.attention_dp, parallel.gpus))
        dtype = setup.precision.dispatch if step == "dispatch" else setup.precision.combine
        operation = MoeExchange(
            step=step,
            mode="low_latency" if mode == "low_latency" else "normal",
            tokens=balanced[..., None],
            hidden=model.hidden,
            top_k=model.moe.top_k,
            experts=model.moe.experts,
            ep=parallel.ep,
            nodes=setup.nodes,
            dtype=dtype,
        )
        try:
            return self._one(operation)
        except OutsideProfile:
            if setup.network is None or not setup.network.measured:
                raise
        copies = deepep_copies(
            setup.network,
            model,
            setup.placement,
            operation.mode,
            sent=np.repeat(batch.tokens / parallel.tp, parallel.tp, axis=1),
            arriving=arriving,
            counts=counts,
        )
        return Part((deepep_by_links(setup.network, model, setup.precision, step, operation.mode, copies),))

    def _all_to_all(self, step: Step, batch: StepBatch, balanced: Floats | None, arriving: Floats) -> Part:
        setup, tp = self.setup, self.setup.parallel.tp
        over = AllToAll(
            model=setup.model,
            parallel=setup.parallel,
            dispatch=setup.policies.dispatch,
            precision=setup.precision,
            network=setup.network,
            nodes=setup.nodes,
            gpus_per_node=setup.gpus_per_node,
        )
        sent = np.repeat(batch.tokens / tp, tp, axis=1)
        return Part(over.estimates(self.costs, step, sent, arriving, balanced))

    def _replica_choice(self, batch: StepBatch) -> Part:
        setup = self.setup
        rows = self._local_rows(batch.padded_tokens).max(axis=1, keepdims=True)
        return Part(
            choice_estimates(
                self.costs,
                self.replicas,
                picks=rows * setup.model.moe.top_k,
                solve_s=setup.policies.dispatch.replica_solve_s,
                host_rel_sigma=setup.overhead_rel_sigma,
                gpus=(setup.parallel.gpus, setup.gpus_per_node),
            )
        )

    @staticmethod
    def _by_layer(part: Part) -> Part:
        """Give a part that is alike in all layers a layer axis: [steps, 1] -> [steps, 1, 1]."""
        return Part(
            tuple(
                estimate(
                    one.seconds[:, None, :],
                    one.tags[..., None, :] if one.tags.ndim > 1 else one.tags,
                    one.family,
                    one.rel_sigma,
                    one.source,
                )
                for one in part.estimates
            )
        )

    def _tail(self, batch: StepBatch) -> Part:
        """Final norm and logits of the sequences that end the step with a token, over TP's share of the vocabulary."""
        model = self.setup.model
        sequences = batch.decode_seqs + batch.prefill_seqs
        return self._norm(sequences) + self._gemm(
            sequences, model.vocabulary // self.setup.parallel.tp, model.hidden, "bf16"
        )
