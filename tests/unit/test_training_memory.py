"""The training ledger against the parameters that a model's config implies, and activations counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesim.engine.memory import attention_parameters, weights
from moesim.engine.training import training_model
from moesim.engine.training_memory import (
    HOT_QUANTILE,
    dense_parameters,
    expert_parameters,
    expert_row_bytes,
    layer_bytes,
)
from moesim.errors import Infeasible
from moesim.graph.pipeline import layers_of_chunks
from moesim.spec.hf import bundled, bundled_model, load_model
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import PoliciesSpec, PrecisionSpec
from tests.training_scenarios import asked

PLANS = [
    ParallelSpec(),
    ParallelSpec(pp=3, attention_dp=8, ep=8),
    ParallelSpec(tp=4, pp=4, attention_dp=2, ep=8),
    ParallelSpec(tp=2, cp=2, pp=2, attention_dp=2, ep=4, expert_tp=2),
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.label())
@pytest.mark.parametrize("name", bundled())
def test_parameter_bytes_are_what_the_config_implies(name: str, plan: ParallelSpec) -> None:
    """All ranks' bf16 weights, copies taken away, within 3 % of the published total (the must-show line)."""
    model, facts = load_model(name), bundled_model(name)
    assert facts.published_parameters is not None
    whole, _ = attention_parameters(model)
    total = 0.0
    for chunk in layers_of_chunks(model.layers, plan.pp):
        moe = sum(layer in model.moe.layer_ids for layer in chunk)
        copied = whole * len(chunk) + model.hidden * model.moe.experts * moe  # every TP rank holds these
        total += sum(dense_parameters(model, plan, chunk).values()) * plan.tp - copied * (plan.tp - 1)
        total += expert_parameters(model, plan, chunk) * plan.ep * plan.expert_tp
    if model.tied_embeddings and plan.pp > 1:
        total -= model.vocabulary * model.hidden
    assert 2 * total == pytest.approx(2 * facts.published_parameters, rel=0.03)
    assert total == pytest.approx(model.parameters(), rel=1e-12)


@pytest.mark.parametrize("name", bundled())
def test_the_serving_ledger_holds_the_same_parameters(name: str) -> None:
    """Serving weights of one GPU in bf16; latent attention's second up-projection, for absorbed decode, is in them."""
    facts = bundled_model(name)
    assert facts.published_parameters is not None
    precision = PrecisionSpec(dense="bf16", experts="bf16")
    items = weights(load_model(name), ParallelSpec(), precision, load_model(name).moe.experts, PoliciesSpec())
    assert sum(items.values()) == pytest.approx(2 * facts.published_parameters, rel=0.03)


def test_a_recomputed_layer_lives_once() -> None:
    """What `moe` and `full` free comes back one layer at a time: the hottest rank's rows of one layer."""
    for own in ({"recompute": "selective", "recompute_modules": ["moe"]}, {"recompute": "full"}):
        model = training_model(asked(training=own), seed=0)
        rows = model.setup.placement.rank_loads(model.pool.counts)
        hot = np.quantile(rows.max(axis=(1, 2)), HOT_QUANTILE) * expert_row_bytes(model.setup, keep_all=True)
        assert model.memory.stages[0]["working_set"] >= 1.25 * hot


def test_bytes_a_parameter() -> None:
    """bf16 weights, float32 gradients and 12 bytes of Adam over the data-parallel ranks: 6 + 12 / d (Megatron-LM)."""
    model = training_model(asked(), seed=0)
    grid = model.setup.grid
    assert (grid.gpus("dp_cp"), grid.gpus("expert_dp")) == (4, 2)
    for items in model.memory.stages:
        dense = sum(items.get(f"weights_{name}", 0.0) for name in ("embeddings", "attention", "gates", "shared"))
        assert items["gradients_dense"] == 2 * dense
        assert items["optimizer_dense"] == 6 * dense / 4
        assert items["gradients_experts"] == 2 * items["weights_experts"]
        assert items["optimizer_experts"] == 6 * items["weights_experts"] / 2
    whole = training_model(asked(training={"optimizer": {"distributed": False}}), seed=0)
    assert whole.memory.stages[0]["optimizer_dense"] == 4 * model.memory.stages[0]["optimizer_dense"]
    half = training_model(asked(training={"optimizer": {"gradients": "bf16"}}), seed=0)
    assert half.memory.stages[0]["gradients_dense"] == model.memory.stages[0]["gradients_dense"] / 2


def test_activations_of_a_layer_by_hand() -> None:
    """OLMoE: width 2048, 16 heads of 128 on 16, 64 experts of width 1024; 1024 tokens, TP 2."""
    setup = training_model(asked(training={"recompute": "none"}), seed=0).setup
    rows, local, heads = 1024, 512, 8
    norms = 4 * local * 2048 * 2  # two inputs, two normalised
    attention = rows * heads * 128 * 3 * 2 + rows * heads * (128 * 2 + 4)
    gate = local * 64 * 2 * 4
    assert layer_bytes(setup, 0) == norms + attention + gate
    assert expert_row_bytes(setup) == 2 * (2048 + 3 * 1024)


@pytest.mark.parametrize(
    ("own", "item", "share"),
    [
        ({"recompute": "selective", "recompute_modules": ["moe"]}, "activations_experts", 0.0),
        ({"recompute": "selective", "recompute_modules": ["moe_act"]}, "activations_experts", 4 / 5),
        ({"recompute": "full"}, "activations_experts", 0.0),
    ],
)
def test_recomputation_frees_what_it_computes_again(own: dict[str, Any], item: str, share: float) -> None:
    plain = training_model(asked(training={"recompute": "none"}), seed=0).memory.stages[0]
    again = training_model(asked(training=own), seed=0).memory.stages[0]
    assert again.get(item, 0.0) == pytest.approx(share * plain[item])
    assert sum(again.values()) < sum(plain.values())


def test_the_hottest_rank_counts() -> None:
    """Dropless: rows of the hottest rank over its stage's layers at a high quantile, for all that is in flight."""
    model = training_model(asked(), seed=0)
    rows = model.setup.placement.rank_loads(model.pool.counts)
    layers = model.chunks[0]
    hot = np.quantile(2 * rows[:, layers.start : layers.stop].sum(axis=1).max(axis=1), HOT_QUANTILE)
    found = model.memory.stages[0]["activations_experts"]
    assert found == pytest.approx(hot * expert_row_bytes(model.setup))
    even = training_model(asked(training={"router": "balanced"}), seed=0)
    assert found > even.memory.stages[0]["activations_experts"]


def test_too_much_is_refused_with_its_largest_items() -> None:
    with pytest.raises(Infeasible, match=r"pipeline stage 0 needs .* may use .*activations_experts") as caught:
        training_model(asked(training={"micro_batch": 4, "sequence_length": 32768}), seed=0)
    assert caught.value.reason == "out_of_memory"
