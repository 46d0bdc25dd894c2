"""Laws of split contexts: the cache of a context is there once for each copy that is left, and no GPU holds more."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.roofline import Roofline
from moesim.engine.memory import ledger
from moesim.errors import Infeasible
from moesim.graph.batch import step_batch
from moesim.graph.decode_context import exchanged
from moesim.graph.pricing import Pricer
from moesim.spec.hf import load_model
from moesim.spec.parallel import ParallelSpec
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice, DispatchSpec, PoliciesSpec, PrecisionSpec
from moesim.spec.workload import BatchingSpec, MemorySpec
from tests.costs_cluster import h200
from tests.priced_steps import setup

MODELS = {
    name: load_model(name)
    for name in ("deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-235B-A22B", "Qwen/Qwen3-30B-A3B", "moonshotai/Kimi-K2-Instruct")
}
H200 = load_cluster(ClusterChoice(system="h200_sxm", nodes=4))


def copies(name: str, tp: int) -> int:
    """How often a TP group keeps a context."""
    spec = MODELS[name].attention
    return tp // min(tp, 1 if spec.kind == "mla" else spec.kv_heads)


NAMES = st.sampled_from(sorted(MODELS))
GROUPS = st.sampled_from([(8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (4, 8)])  # TP and attention DP


@settings(max_examples=60, deadline=None)
@given(name=NAMES, group=GROUPS, running=st.integers(16, 512), pp=st.sampled_from([1, 2]))
def test_a_gpu_never_keeps_more_of_a_context_and_all_together_keep_whole_copies(
    name: str, group: tuple[int, int], running: int, pp: int
) -> None:
    model, (tp, dp) = MODELS[name], group
    several = copies(name, tp)
    before = None
    for parts in (one for one in (1, 2, 4, 8, 16) if several % one == 0):
        parallel = ParallelSpec(tp=tp, attention_dp=dp, ep=tp * dp, decode_cp=parts, pp=pp)
        layers = (range(model.layers // 2), range(model.layers // 2, model.layers)) if pp == 2 else None
        try:
            found = ledger(
                model, H200, parallel, PrecisionSpec(), model.moe.experts // min(tp * dp, model.moe.experts),
                BatchingSpec(max_running_requests_per_dp_rank=running, max_batch_tokens_per_dp_rank=8192),
                MemorySpec(), PoliciesSpec(dispatch=DispatchSpec(backend="allgather_reducescatter")),
                max_context_tokens=1, stages=layers,
            )  # fmt: skip
        except Infeasible:
            return
        binding = min(found.stages, key=lambda one: one.kv_capacity_tokens) if found.stages else None
        share = 1.0 if binding is None else len(binding.layers) / model.layers
        whole = model.kv_bytes_per_token("bf16") * share
        assert found.kv_bytes_per_token * tp == pytest.approx(whole * several / parts)
        assert sum(found.items.values()) == pytest.approx(found.limit_bytes)
        if before is not None:
            assert found.kv_bytes_per_token < before.kv_bytes_per_token
            added = found.fixed_bytes - before.fixed_bytes  # the group's communicator and buffers
            if before.items["kv_cache"] > 2.001 * added:  # half the bytes a token outweigh them
                assert found.kv_capacity_tokens > before.kv_capacity_tokens
        before = found


@settings(max_examples=60, deadline=None)
@given(
    name=NAMES,
    group=GROUPS,
    seqs=st.integers(1, 256),
    context=st.integers(64, 100_000),
    packed=st.booleans(),
)
def test_work_is_shared_and_exchanges_grow_with_the_group(
    name: str, group: tuple[int, int], seqs: int, context: int, packed: bool
) -> None:
    """Pairs of a query head and a token are as many on each GPU, cached bytes fewer, and what is sent more."""
    model, (tp, dp) = MODELS[name], group
    batch = step_batch(ranks=dp, decode_seqs=float(seqs), decode_kv=float(context))
    plain = setup(2, {})
    sent = []
    for parts in (one for one in (1, 2, 4, 8, 16) if copies(name, tp) % one == 0):
        parallel = ParallelSpec(tp=tp, attention_dp=dp, ep=tp * dp, decode_cp=parts)
        one = replace(plain, model=model, parallel=parallel, context_by_all_to_all=packed)
        pricer = Pricer(replace(one, placement=replace(plain.placement, ranks=1)), Roofline(h200(4)))
        operation = pricer._kernel("decode", batch.decode_seqs, batch.decode_seqs * 0 + 1, batch.decode_kv / parts, 0)
        assert operation.heads * float(operation.prefix_tokens[0, 0]) == pytest.approx(  # type: ignore[union-attr]
            model.attention.heads // tp * context
        )
        found = exchanged(one, batch)
        sent.append(sum(float(size[0, 0]) for _, size in (*found.before, *found.after)))
        assert pricer.exchanging(batch).seconds().min() >= 0.0
    assert sent[0] == 0.0
    assert all(less < more for less, more in pairwise(sent))
