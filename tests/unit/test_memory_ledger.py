"""The memory ledger against hand computation, published sizes and its own laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.deepep_memory import (
    deepep_buffer_bytes,
    deepep_low_latency_bytes,
    deepep_nvlink_bytes,
    deepep_rdma_bytes,
)
from moesim.engine.memory import MemoryLedger, kv_bytes_per_token, ledger, weights
from moesim.engine.memory_limits import share
from moesim.errors import Infeasible
from moesim.graph.stages import split_layers
from moesim.spec.hf import load_model
from moesim.spec.parallel import ParallelSpec
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice, DispatchSpec, PoliciesSpec, PrecisionSpec
from moesim.spec.workload import BatchingSpec, MemorySpec
from moesim.units import GIB

DEEPSEEK = load_model("deepseek-ai/DeepSeek-V3")
QWEN = load_model("Qwen/Qwen3-235B-A22B")
H200 = load_cluster(ClusterChoice(system="h200_sxm", nodes=4))
DEEPEP = PoliciesSpec()
ALLREDUCE = PoliciesSpec(dispatch=DispatchSpec(backend="allreduce"))
EP32 = ParallelSpec(attention_dp=32, ep=32)
FP8 = 1 + 4 / 128**2  # one float32 scale for a block of 128 x 128 weights


def of(parallel: ParallelSpec = EP32, slots: int = 8, **changes: Any) -> MemoryLedger:
    given: dict[str, Any] = {
        "model": DEEPSEEK,
        "cluster": H200,
        "precision": PrecisionSpec(),
        "batching": BatchingSpec(),
        "memory": MemorySpec(),
        "policies": DEEPEP,
        "max_context_tokens": 4500,
        **changes,
    }
    return ledger(parallel=parallel, slots_per_rank=slots, **given)


def test_weights_of_deepseek_v3_at_ep32_by_hand() -> None:
    found = weights(DEEPSEEK, EP32, PrecisionSpec(), 9, DEEPEP)
    projections = (
        7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * (128 + 128) + 128 * 128 * 7168
    )  # q down and up, kv down and up, output
    absorbed = 512 * 128 * (128 + 128) * 2  # the kv up-projection again, in bf16
    assert found["weights_attention"] == pytest.approx(61 * (projections * FP8 + absorbed))
    assert found["weights_dense"] == pytest.approx(3 * 3 * 7168 * 18432 * FP8)
    assert found["weights_shared"] == pytest.approx(58 * 3 * 7168 * 2048 * FP8)
    assert found["weights_experts"] == pytest.approx(58 * 9 * 3 * 7168 * 2048 * FP8)
    assert found["weights_gates"] == 58 * 7168 * 256 * 2
    assert found["weights_embeddings"] == 2 * 129280 * 7168 * 2
    assert sum(found.values()) / 1e9 == pytest.approx(44.1, abs=0.05)


@pytest.mark.parametrize("parallel", [ParallelSpec(tp=8, ep=8), ParallelSpec(tp=8, expert_tp=8)])
@pytest.mark.parametrize("name", ["deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-235B-A22B", "mistralai/Mixtral-8x7B-v0.1"])
def test_all_gpus_together_hold_the_model_once(parallel: ParallelSpec, name: str) -> None:
    model = load_model(name)
    precision = PrecisionSpec(dense="bf16", experts="bf16")
    slots = model.moe.experts // parallel.ep
    held = 8 * sum(weights(model, parallel, precision, slots, ALLREDUCE).values())
    assert held == pytest.approx(2 * model.parameters(), rel=0.03)
    assert held >= 2 * model.parameters()


def test_redundant_experts_weigh() -> None:
    more = of(slots=9).items["weights_experts"] - of(slots=8).items["weights_experts"]
    assert more == pytest.approx(58 * 3 * 7168 * 2048 * FP8)


def test_mla_cache_is_repeated_over_tp_and_grouped_query_is_divided() -> None:
    precision = PrecisionSpec()
    assert kv_bytes_per_token(DEEPSEEK, ParallelSpec(), precision) == 70_272
    assert kv_bytes_per_token(DEEPSEEK, ParallelSpec(tp=8, ep=8), precision) == 70_272
    whole = 94 * 4 * 256 * 2
    assert kv_bytes_per_token(QWEN, ParallelSpec(), precision) == whole
    assert kv_bytes_per_token(QWEN, ParallelSpec(tp=2, ep=2), precision) == whole / 2
    assert kv_bytes_per_token(QWEN, ParallelSpec(tp=8, ep=8), precision) == whole / 4  # 4 KV heads
    assert kv_bytes_per_token(QWEN, ParallelSpec(), precision, layers=range(47)) == whole / 2


def test_shared_experts_are_repeated_under_deepep_and_divided_otherwise() -> None:
    parallel = ParallelSpec(tp=8, ep=8)
    whole = weights(DEEPSEEK, parallel, PrecisionSpec(), 32, DEEPEP)["weights_shared"]
    split = weights(DEEPSEEK, parallel, PrecisionSpec(), 32, ALLREDUCE)["weights_shared"]
    assert whole == pytest.approx(8 * split)


def test_mtp_adds_a_layer_of_weights_and_of_cache() -> None:
    plain, with_mtp = of(), of(mtp=True)
    assert with_mtp.items["weights_mtp"] > plain.items["weights_experts"] / 58
    assert with_mtp.kv_bytes_per_token == pytest.approx(plain.kv_bytes_per_token * 62 / 61)


def test_items_sum_to_the_limit_and_the_cache_is_counted_in_tokens() -> None:
    found = of(memory=MemorySpec(fraction=0.8, reserved_bytes=1e9))
    assert found.limit_bytes == pytest.approx(H200.gpu.hbm_bytes * 0.8 - 1e9)
    assert sum(found.items.values()) == pytest.approx(found.limit_bytes)
    assert found.kv_capacity_tokens == int(found.items["kv_cache"] / 70_272)
    assert found.fixed_bytes == pytest.approx(found.limit_bytes - found.items["kv_cache"])
    written = found.to_dict()
    assert written["ledger"] == found.items
    assert set(found.assumed) <= set(found.items)


TP8 = ParallelSpec(tp=8, attention_dp=1, ep=8)


@pytest.mark.parametrize("of_what", ["all", "static", "free"])
def test_the_fraction_is_a_share_of_what_each_engine_means(of_what: Any) -> None:
    """By hand from the ledger's own items; and the share that a ledger has in each meaning gives the ledger again."""
    found = of(TP8, 32, policies=ALLREDUCE, memory=MemorySpec(fraction=0.82, fraction_of=of_what, reserved_bytes=1e9))
    items, hbm = dict(found.items), H200.gpu.hbm_bytes
    cache = items.pop("kv_cache")
    fixed = sum(items.values())
    weights_alone = sum(size for name, size in items.items() if name.startswith("weights_"))
    expected = {
        "all": 0.82 * hbm - fixed,
        "static": 0.82 * (hbm - items["runtime"] - items["nccl_buffers"]) - weights_alone,
        "free": 0.82 * (hbm - fixed),
    }
    assert cache == pytest.approx(expected[of_what] - 1e9)
    assert sum(found.items.values()) == pytest.approx(found.limit_bytes)
    for other in ("all", "static", "free"):
        memory = MemorySpec(fraction=share(found.items, hbm, other), fraction_of=other)  # type: ignore[arg-type]
        again = of(TP8, 32, policies=ALLREDUCE, memory=memory)
        assert again.items["kv_cache"] == pytest.approx(cache)


def test_a_static_fraction_never_takes_what_activations_need() -> None:
    most = of(TP8, 32, policies=ALLREDUCE, memory=MemorySpec(fraction=1.0, fraction_of="static"))
    assert most.limit_bytes == H200.gpu.hbm_bytes
    with pytest.raises(Infeasible, match="need"):
        of(TP8, 32, policies=ALLREDUCE, memory=MemorySpec(fraction=0.5, fraction_of="static"))
    with pytest.raises(Infeasible, match="need"):
        of(ParallelSpec(tp=2, ep=2), 128, policies=ALLREDUCE, memory=MemorySpec(fraction=0.9, fraction_of="free"))


def test_low_latency_buffer_as_deepep_documents_it() -> None:
    # 288 slots, 128 tokens; a message is 7168 bf16 and 56 scales of 4 bytes; two send and two receive buffers.
    message = 2 * 7168 + 56 * 4
    expected = 4 * 288 * 128 * message
    assert deepep_low_latency_bytes(7168, 288, 128, local=9) == pytest.approx(expected, rel=1e-5)


def test_normal_buffers() -> None:
    assert deepep_rdma_bytes(7168, 8) == 0
    nvlink = 10 * 8 * 288 * (2 * 7168 + 8 + 128 * 8 + 128 * 4 + 128 * 4)
    assert deepep_nvlink_bytes(7168, 32) == pytest.approx(nvlink, rel=1e-4)
    rdma = 2 * 10 * 4 * 140 * (2 * 7168 + 8 + 128 * 8 + 128 * 4 + 128 * 4 + 16) + 2**20
    assert deepep_rdma_bytes(7168, 32) == pytest.approx(rdma, rel=1e-4)


def test_the_rdma_buffer_is_shared_and_grows_in_steps() -> None:
    both = deepep_buffer_bytes(7168, 32, 288, low_latency_tokens=128)
    only_low = deepep_buffer_bytes(7168, 32, 288, normal=False, low_latency_tokens=128)
    assert only_low % 2**29 == 0
    assert both == only_low + deepep_nvlink_bytes(7168, 32)


def test_modes_decide_which_buffers_exist() -> None:
    normal = of(policies=PoliciesSpec(dispatch=DispatchSpec(mode="normal")))
    assert "low_latency_tensors" not in normal.items
    assert "communication_buffers" in normal.items
    none = of(parallel=ParallelSpec(tp=8, ep=8), slots=32, policies=ALLREDUCE)
    assert not {"communication_buffers", "low_latency_tensors"} & set(none.items)
    assert "cuda_graphs" not in of(batching=BatchingSpec(cuda_graph_sizes="none")).items
    listed = of(batching=BatchingSpec(cuda_graph_sizes=(8, 16)))
    assert listed.items["cuda_graphs"] == 512 * 2**20 + 16 * 2 * 2**20


def test_too_many_weights_are_infeasible_with_a_mend() -> None:
    with pytest.raises(
        Infeasible, match=r"weights and buffers need .*weights_experts .*fewer than 32 redundant"
    ) as caught:
        of(
            parallel=ParallelSpec(attention_dp=8, ep=8),
            slots=36,
            batching=BatchingSpec(max_batch_tokens_per_dp_rank=32768),
        )
    assert caught.value.reason == "out_of_memory"
    assert caught.value.exit_code == 1


def test_a_cache_that_cannot_hold_one_request_is_infeasible() -> None:
    with pytest.raises(Infeasible, match=r"one request needs 2000000") as caught:
        of(max_context_tokens=2_000_000)
    assert caught.value.reason == "out_of_memory"


def test_large_batches_are_named_when_they_are_what_does_not_fit() -> None:
    with pytest.raises(Infeasible, match="lower max_batch_tokens_per_dp_rank"):
        of(batching=BatchingSpec(max_batch_tokens_per_dp_rank=262_144))


@settings(max_examples=60, deadline=None)
@given(
    ep=st.sampled_from([8, 16, 32, 64, 128, 160]),
    tokens=st.sampled_from([64, 128, 256]),
    hidden=st.sampled_from([2048, 4096, 7168]),
)
def test_more_slots_or_tokens_never_need_less(ep: int, tokens: int, hidden: int) -> None:
    smaller = deepep_buffer_bytes(hidden, ep, 4 * ep, low_latency_tokens=tokens)
    assert deepep_buffer_bytes(hidden, ep, 5 * ep, low_latency_tokens=tokens) >= smaller
    assert deepep_buffer_bytes(hidden, ep, 4 * ep, low_latency_tokens=2 * tokens) >= smaller


@settings(max_examples=60, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 4, 8]),
    dp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2]),
    redundant=st.integers(0, 2),
    tokens=st.integers(128, 16384),
)
def test_items_are_never_negative_and_replicas_never_free(
    tp: int, dp: int, pp: int, redundant: int, tokens: int
) -> None:
    parallel = ParallelSpec(tp=tp, attention_dp=dp, pp=pp, ep=tp * dp)
    slots = -(-QWEN.moe.experts // parallel.ep)
    batching = BatchingSpec(max_batch_tokens_per_dp_rank=tokens)
    roomy = H200.model_copy(update={"gpu": H200.gpu.model_copy(update={"hbm_bytes": 4e12})})
    given = {"model": QWEN, "cluster": roomy, "batching": batching, "stages": split_layers(QWEN.layers, pp, "vllm")}
    base = of(parallel, slots, **given)
    more = of(parallel, slots + redundant, **given)
    assert min(base.items.values()) >= 0
    assert (more.kv_capacity_tokens < base.kv_capacity_tokens) == (redundant > 0)


@pytest.mark.parametrize(
    ("parallel", "slots", "policies", "observed_gib"),
    [
        # vLLM on 8 devices with TP 8, "Pre-loading model weights ... took 79.41 GiB" (HabanaAI/vllm-fork#809).
        (ParallelSpec(tp=8, expert_tp=8), 256, ALLREDUCE, 79.41),
        # SGLang on 8 H200 with attention DP 8 and DeepEP, "mem usage=105.59 GB" (sgl-project/sglang#6017). The log
        # leaves the number of replicas out; the recipe of the thread is 32 redundant experts, and no other multiple of
        # 8 comes within 1 %.
        (ParallelSpec(attention_dp=8, ep=8), 36, DEEPEP, 105.59),
    ],
)
def test_weights_as_engines_report_them(
    parallel: ParallelSpec, slots: int, policies: PoliciesSpec, observed_gib: float
) -> None:
    predicted = sum(weights(DEEPSEEK, parallel, PrecisionSpec(), slots, policies).values()) / GIB
    assert predicted == pytest.approx(observed_gib, rel=0.01)


def test_the_documented_ledgers(repo: Path) -> None:
    text = (repo / "docs" / "explanation" / "memory.md").read_text(encoding="utf-8")
    plans = [
        of(EP32, 9, max_context_tokens=6000),
        of(ParallelSpec(attention_dp=8, ep=8), 32, max_context_tokens=6000),
        of(ParallelSpec(tp=8, ep=8), 32, policies=ALLREDUCE, max_context_tokens=6000),
    ]
    measures = {
        "weights": lambda plan: f"{plan.weight_bytes / 1e9:.1f}",
        "of which experts": lambda plan: f"{plan.items['weights_experts'] / 1e9:.1f}",
        "activations": lambda plan: f"{plan.items['activations'] / 1e9:.1f}",
        "KV cache": lambda plan: f"{plan.items['kv_cache'] / 1e9:.1f}",
        "tokens an attention-DP rank can keep": lambda plan: f"{plan.kv_capacity_tokens:,}",
    }
    for name, measure in measures.items():
        assert f"| {name} | {' | '.join(measure(plan) for plan in plans)} |" in text
