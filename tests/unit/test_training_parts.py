"""The parts of the training loop: backward operations, FLOP, rank groups, end of step, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import plugins
from moesim.cost.estimate import Tag
from moesim.cost.ops import (
    Attention,
    Collective,
    ExpertGemm,
    Gemm,
    MemoryBound,
    MlaAbsorb,
    MlaAttention,
    MoeExchange,
)
from moesim.cost.roofline import Roofline
from moesim.engine.training import TrainingModel, simulate_training, training_model
from moesim.errors import BadInput, Infeasible, MoesimError
from moesim.graph.backward import BACKWARD_TENSORS, Costed, data_gradient, priced, weight_gradient
from moesim.graph.training_flops import forward_flops_per_token, training_flops_per_token
from moesim.network.rank_groups import RankGrid
from moesim.spec.hf import bundled, load_model
from moesim.spec.parallel import ParallelSpec
from tests.costs_cluster import h200
from tests.training_scenarios import asked

ONE = np.ones((1, 1))
GEMM = Gemm(m=512 * ONE, n=3072, k=2048, dtype="bf16")


def flops(operation: Any) -> float:
    return 2.0 * float(np.max(operation.m)) * operation.n * operation.k


def test_transposed_products_have_the_forward_flop() -> None:
    (data,) = data_gradient(GEMM)
    assert (data.operation.n, data.operation.k) == (2048, 3072)  # type: ignore[union-attr]
    product, accumulation = weight_gradient(GEMM)
    assert product.operation == replace(GEMM, m=product.operation.m, n=3072, k=512)  # type: ignore[union-attr]
    assert float(product.operation.m.max()) == 2048  # type: ignore[union-attr]
    assert flops(data.operation) == flops(product.operation) == flops(GEMM)
    assert float(accumulation.operation.bytes.max()) == 6 * 2048 * 3072  # type: ignore[union-attr]
    assert data.at_best == product.at_best == Tag.EXTRAPOLATED


def test_attention_and_experts_backward() -> None:
    costs = Roofline(h200(1))
    kernel = Attention(
        phase="prefill", batch=ONE, new_tokens=4096 * ONE, prefix_tokens=0 * ONE,
        heads=32, kv_heads=4, head_dim=128, dtype="bf16", kv_dtype="bf16",
    )  # fmt: skip
    forward = costs.estimate(kernel).seconds
    back = priced(costs, data_gradient(kernel)).estimates[0]
    assert back.seconds == pytest.approx(2.5 * forward)
    assert (back.tags == Tag.FORMULA).all()
    assert weight_gradient(kernel) == ()
    experts = ExpertGemm(
        tokens=np.full((1, 1, 2, 4), 100.0), hidden=2048, intermediate=768, experts=8, top_k=2, dtype="bf16",
        grouping="fused",
    )  # fmt: skip
    both = [*data_gradient(experts), *weight_gradient(experts)]
    assert [one.operation for one in both[:2]] == [experts, experts]
    assert float(both[2].operation.bytes.max()) == 6 * 4 * 3 * 2048 * 768  # type: ignore[union-attr]


def test_collectives_and_exchanges_turn_round() -> None:
    gather = Collective("all_gather", 1e6 * ONE, 8, 1)
    assert data_gradient(gather)[0].operation == replace(gather, kind="reduce_scatter")
    assert data_gradient(data_gradient(gather)[0].operation)[0].operation == gather
    swap = Collective("all_to_all", 1e6 * ONE, 8, 1)
    assert data_gradient(swap)[0].operation == swap
    dispatch = MoeExchange("dispatch", "normal", ONE, 7168, 8, 256, 8, 1, "bf16")
    assert data_gradient(dispatch)[0].operation == replace(dispatch, step="combine")
    with pytest.raises(BadInput, match="no backward pass"):
        data_gradient(MlaAbsorb("pre", ONE, 8, 512, 128, "bf16"))


@pytest.mark.parametrize("name", bundled())
def test_every_bundled_model_trains(name: str) -> None:
    """On 512 H200 in 4 stages: latent and windowed attention, dense layers, shared experts, tied embeddings."""
    ep = min(load_model(name).moe.experts, 128)
    run = simulate_training(
        asked(
            model=name,
            cluster={"system": "h200_sxm", "nodes": 64},
            parallel={"pp": 4, "attention_dp": ep, "ep": ep},
            training={"global_batch": 1024, "recompute": "full", "router": "balanced"},
        ),
        draws=0,
    )
    assert 0.0 < run.rates(run.step.step_s)["mfu"] < 1.0
    names = {work.operation.name for work in forward_work(run.model) if isinstance(work.operation, MemoryBound)}
    assert names <= set(BACKWARD_TENSORS)


def forward_work(model: TrainingModel) -> list[Costed]:
    layers = model.layers
    groups = (layers.embedding, *layers.attention.values(), layers.dense, layers.moe, layers.head)
    return [work for group in groups for one in group for work in one.piece.forward]


def test_flop_of_a_token_by_hand() -> None:
    """OLMoE: 16 layers, width 2048, 16 heads of 128, 8 of 64 experts of width 1024, 50,304 words."""
    layer = 4 * 2048**2 + 2048 * 64 + 8 * 3 * 2048 * 1024
    weights = 16 * layer + 50304 * 2048
    pairs = 16 * 2 * 16 * (128 + 128) * (1024 + 1) / 2
    model = load_model("allenai/OLMoE-1B-7B-0924")
    assert forward_flops_per_token(model, 1024) == 2 * weights + pairs
    assert training_flops_per_token(model, 1024) == 3 * (2 * weights + pairs)


def test_windows_cut_the_pairs() -> None:
    """gpt-oss: every second layer sees 128 tokens: 128 - 128 x 127 / (2 x 4096) a token, not 2048.5."""
    model = load_model("openai/gpt-oss-120b")
    spec = model.attention
    plain = model.model_copy(update={"attention": spec.model_copy(update={"windowed_layers": ()})})
    cut = len(spec.windowed_layers) * (4097 / 2 - sum(min(i, spec.window) for i in range(1, 4097)) / 4096)
    difference = forward_flops_per_token(plain, 4096) - forward_flops_per_token(model, 4096)
    assert difference == pytest.approx(2 * spec.heads * (spec.head_dim + spec.value_head_dim) * cut)


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": {"tp": 2, "pp": 2, "attention_dp": 2, "ep": 4}},
        {"parallel": {"tp": 2, "attention_dp": 1, "ep": 1, "expert_tp": 2}},
        {"model": "deepseek-ai/DeepSeek-V3", "parallel": {"pp": 8, "attention_dp": 64, "ep": 64}},
    ],
)
def test_work_priced_is_the_models_own(changes: dict[str, Any]) -> None:
    """The FLOP of all priced operations of an instance's micro-batch are the model's, by its closed formula.

    The attention kernel's backward pass computes the scores once more: 2.5 times forward, where the formula counts 2.
    """
    own = {"recompute": "none", "router": "balanced", "global_batch": 512}
    model = training_model(asked(cluster={"system": "h200_sxm", "nodes": 64}, training=own, **changes), seed=0)
    setup, layers = model.setup, model.layers
    spec, length = setup.model.attention, setup.training.sequence_length
    total = 0.0
    listed = [one.piece for layer in range(setup.model.layers) for one in layers.layer(layer)]
    for piece in [*listed, *(one.piece for one in layers.head)]:
        for work in (*piece.forward, *piece.data, *piece.weight):
            operation = work.operation
            if isinstance(operation, Gemm):
                total += flops(operation)
            elif isinstance(operation, ExpertGemm):
                tokens = operation.tokens.sum() / setup.model.moe_layers / setup.parallel.ep
                total += 6 * tokens * operation.hidden * operation.intermediate
            elif isinstance(operation, Attention | MlaAttention):
                width = operation.heads * (spec.head_dim + spec.value_head_dim)
                total += length * (length + 1) * width * min(work.times, 2.0)
    ranks = setup.parallel.tp * setup.parallel.attention_dp
    tokens = length * setup.parallel.attention_dp
    assert total * ranks == pytest.approx(tokens * training_flops_per_token(setup.model, length), rel=1e-9)


def test_groups_of_megatrons_own_example() -> None:
    """16 GPUs, TP 2, PP 4: the groups that megatron/core/parallel_state.py lists for them."""
    grid = RankGrid(ParallelSpec(tp=2, pp=4, attention_dp=2, ep=4), 1, 8)
    assert grid.members("tp").tolist() == [[2 * i, 2 * i + 1] for i in range(8)]
    assert grid.members("pp").tolist() == [[i, i + 4, i + 8, i + 12] for i in range(4)]
    assert grid.members("dp_cp").tolist() == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert grid.members("ep").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert (grid.nodes("tp"), grid.nodes("pp"), grid.nodes("ep")) == (1, 2, 1)


def test_groups_of_experts_are_their_own() -> None:
    """Two instances of TP 4 x DP 2 with EP 4 x expert-TP 2: experts ignore the attention's groups."""
    grid = RankGrid(ParallelSpec(tp=4, attention_dp=2, ep=4, expert_tp=2), 2, 8)
    assert grid.members("expert_tp").tolist()[:2] == [[0, 1], [2, 3]]
    assert grid.members("ep").tolist() == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert grid.members("expert_dp").tolist() == [[i, i + 8] for i in range(8)]
    assert grid.members("dp_cp").tolist() == [[i, i + 4, i + 8, i + 12] for i in range(4)]
    assert (grid.gpus("expert_dp"), grid.nodes("expert_dp"), grid.nodes("ep")) == (2, 2, 1)


def test_rank_order_moves_groups_over_nodes() -> None:
    plan = ParallelSpec(tp=2, pp=2, attention_dp=4, ep=8)
    near, far = (
        RankGrid(plan.model_copy(update={"rank_order": order}), 1, 8)
        for order in (("tp", "cp", "dp", "pp"), ("tp", "pp", "cp", "dp"))
    )
    assert (near.nodes("ep"), near.nodes("pp")) == (1, 2)
    assert (far.nodes("ep"), far.nodes("pp")) == (2, 1)
    for grid in (near, far):
        for group in ("tp", "cp", "dp_cp", "pp", "ep", "expert_tp", "expert_dp", "exchange"):
            assert sorted(grid.members(group).ravel().tolist()) == list(range(16))  # type: ignore[arg-type]
            assert grid.even(group)  # type: ignore[arg-type]


def test_the_end_of_a_step() -> None:
    """Without overlap all of the reduction shows; with it, what the last backward pass does not hide."""
    model = training_model(asked(), seed=0)
    sync = model.sync[0]
    whole = float(sync.reduce.seconds().max())
    assert sync.exposed_reduce_s(None, 1e9, overlap=False) == whole
    assert sync.exposed_reduce_s(None, 0.25 * whole, overlap=True) == pytest.approx(
        max(0.75 * whole, whole / sync.buckets)
    )
    assert sync.exposed_reduce_s(None, 1e9, overlap=True) == pytest.approx(whole / sync.buckets)
    alone = training_model(asked(training={"optimizer": {"distributed": False}}), seed=0).sync[0]
    assert alone.gather.estimates == ()
    assert float(alone.optimizer.seconds().max()) > float(sync.optimizer.seconds().max())


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"policies": {"capacity": {"rule": "gshard"}}}, BadInput, "rule gshard needs a factor"),
        (
            {"policies": {"capacity": {"rule": "switch", "factor": 1.0}, "dispatch": {"backend": "deepep"}}},
            MoesimError,
            "DeepEP sends only tokens that were routed",
        ),
        ({"policies": {"gate": "soft"}}, BadInput, "policies.gate"),
        ({"policies": {"schedule": "two_batch"}}, BadInput, "policies.schedule"),
        ({"policies": {"dispatch": {"backend": "allreduce"}}}, BadInput, "no allreduce dispatcher"),
        ({"policies": {"dispatch": {"mode": "low_latency"}}}, BadInput, "no backward pass"),
        ({"placement": {"solver": "greedy", "redundant_experts": 4}}, BadInput, "replicas of experts"),
        ({"objective": {"slo": {"tpot_p99_ms": 50}}}, BadInput, "objective"),
        ({"precision": {"dense": "int4"}}, BadInput, "training in int4"),
        ({"precision": {"dense": "bf16", "experts": "bf16", "activations": "fp8"}}, BadInput, "activations in fp8"),
        ({"parallel": {"tp": 3, "attention_dp": 1, "ep": 3}}, Infeasible, "do not divide the cluster"),
        ({"parallel": {"tp": 16, "ep": 1, "expert_tp": 16}, "model": "Qwen/Qwen3-30B-A3B"}, None, ""),
        ({"parallel": {"tp": 2, "attention_dp": 1, "ep": 1, "expert_tp": 2},
          "policies": {"dispatch": {"backend": "deepep"}}}, Infeasible, "deepep needs whole experts"),
        ({"training": {"global_batch": 33}}, Infeasible, "does not divide into micro-batches"),
        ({"training": {"sequence_length": 1023}}, Infeasible, "1023 tokens do not divide"),
        ({"training": {"pipeline": {"virtual_stages": 2}}}, BadInput, "no virtual stages"),
        ({"training": {"pipeline": {"schedule": "interleaved", "virtual_stages": 9}}}, BadInput, "cannot fill"),
        ({"training": {"pipeline": {"schedule": "interleaved"}, "global_batch": 20}}, BadInput, "do not divide by 2"),
        ({"training": {"pipeline": {"layers": [4, 4]}}}, BadInput, "not 2 of 16"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], kind: type[MoesimError] | None, text: str) -> None:
    if kind is None:
        training_model(asked(**changes), seed=0)
        return
    with pytest.raises(kind, match=text):
        training_model(asked(**changes), seed=0)


def test_the_store_refuses_what_it_has_not_measured() -> None:
    with pytest.raises(BadInput, match="not measured"):
        training_model(asked(cost={"source": "store"}), seed=0)
    allowed = simulate_training(asked(cost={"source": "store", "extrapolate": "allow"}), draws=0)
    assert allowed.step.step_s > 0


def test_context_parallelism_divides_attention_evenly() -> None:
    """CP 2 gives each rank half the causal pairs, and gathers keys and values."""
    whole = training_model(asked(parallel={"pp": 2, "attention_dp": 4, "ep": 4}), seed=0)
    halves = training_model(asked(parallel={"cp": 2, "pp": 2, "attention_dp": 2, "ep": 4}), seed=0)
    kernels = []
    for model in (whole, halves):
        pieces = {one.piece.name: one for one in model.layers.attention[0]}
        kernels.append(pieces["attention"].piece.forward[0].operation)
        assert ("keys and values" in pieces) == (model is halves)
    pairs = [float((k.new_tokens * (k.prefix_tokens + (k.new_tokens + 1) / 2)).max()) for k in kernels]  # type: ignore[union-attr]
    assert pairs[1] == pytest.approx(pairs[0] / 2)


def test_experts_of_the_shipped_profile_as_the_docs_say(repo: Path) -> None:
    """How far the kernels that stand in for training's are from the roofline."""
    text = " ".join((repo / "docs" / "explanation" / "training.md").read_text(encoding="utf-8").split())
    ratios = []
    for name, dtype in (("Qwen/Qwen3-30B-A3B", "bf16"), ("deepseek-ai/DeepSeek-V3", "fp8_block")):
        model = load_model(name)
        scenario = asked(model=name, cost={"source": "store", "extrapolate": "allow"}, parallel=None)
        operation = ExpertGemm(
            tokens=np.full((1, 1, 1, 8), 1024.0), hidden=model.hidden, intermediate=model.moe.intermediate,
            experts=model.moe.experts, top_k=8, dtype=dtype, grouping="grouped",
        )  # fmt: skip
        store = plugins.load(plugins.COSTS, "store", where="cost")(scenario, model, h200(2)).estimate(operation)
        pair = [float(one.seconds.max()) * 1e3 for one in (store, Roofline(h200(2)).estimate(operation))]
        ratios.append(pair[0] / pair[1])
        if dtype == "bf16":
            assert f"({pair[0]:.3f} against {pair[1]:.3f} ms" in text
    assert f"{ratios[0]:.0f} times slower than the roofline" in text
    assert f"it is {ratios[1]:.1f} times" in text
