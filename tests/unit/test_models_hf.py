"""Models read from Hugging Face configs: bundled facts, field variants, errors that name file and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesim.errors import BadInput
from moesim.spec.hf import bundled, bundled_model, from_hf, load_model

IDS = [
    "MiniMaxAI/MiniMax-M2.5",
    "Qwen/Qwen3-235B-A22B",
    "Qwen/Qwen3-30B-A3B",
    "allenai/OLMoE-1B-7B-0924",
    "deepseek-ai/DeepSeek-R1",
    "deepseek-ai/DeepSeek-V3",
    "mistralai/Mixtral-8x7B-v0.1",
    "moonshotai/Kimi-K2-Instruct",
    "openai/gpt-oss-120b",
    "zai-org/GLM-5",
]


def small(**changes: Any) -> dict[str, Any]:
    """A small grouped-query MoE config in Qwen3's manner; a value of None removes the key."""
    config = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "vocab_size": 100,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        **changes,
    }
    return {key: value for key, value in config.items() if value is not None}


def read(**changes: Any) -> Any:
    return from_hf(small(**changes), id="small", source="small/config.json")


def test_bundled_ids() -> None:
    assert bundled() == IDS


@pytest.mark.parametrize("model_id", IDS)
def test_parameters_match_the_published_total(model_id: str) -> None:
    facts = bundled_model(model_id)
    assert facts.published_parameters is not None
    assert facts.published_source
    assert load_model(model_id).parameters() == pytest.approx(facts.published_parameters, rel=0.01)


def test_deepseek_v3_shape() -> None:
    model = load_model("deepseek-ai/DeepSeek-V3")
    assert model.moe.layer_ids == tuple(range(3, 61))
    assert (model.moe.experts, model.moe.top_k, model.moe.groups, model.moe.top_groups) == (256, 8, 8, 4)
    assert (model.moe.shared_experts, model.moe.shared_intermediate) == (1, 2048)
    assert model.moe.scoring == "sigmoid"
    assert (model.attention.kind, model.attention.head_dim, model.attention.kv_lora_rank) == ("mla", 192, 512)
    assert model.mtp_layers == 1
    assert model.kv_bytes_per_token("bf16") == 61 * 576 * 2 == 70_272


def test_gpt_oss_windows_alternate() -> None:
    model = load_model("gpt-oss-120b")
    assert model.attention.window == 128
    assert model.attention.windowed_layers == tuple(range(0, 36, 2))


def test_glm5_keeps_an_indexer_key_beside_the_latent() -> None:
    # FP8 key of 128 elements and one float32 scale: 132 bytes a layer.
    model = load_model("zai-org/GLM-5")
    assert model.kv_bytes_per_token("bf16") == 78 * (576 * 2 + 132)


MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip


def test_an_indexer_is_read_and_absent_where_the_config_names_none() -> None:
    def indexer(model: Any) -> tuple[int, int, int]:
        return model.attention.index_heads, model.attention.index_head_dim, model.attention.index_top_k

    assert indexer(load_model("zai-org/GLM-5")) == (32, 128, 2048)
    assert indexer(load_model("deepseek-ai/DeepSeek-V3")) == (0, 0, 0)
    sizes = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64}
    assert indexer(read(**MLA, **sizes)) == (2, 16, 64)
    assert indexer(read(**MLA, **{**sizes, "index_topk": None})) == (2, 16, 0)  # all tokens are left to attention


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_qk_norm": True, "qk_norm_type": "per_layer"}, True),
        ({"use_qk_norm": True, "qk_norm_type": "per_head"}, False),
        ({"use_qk_norm": False, "qk_norm_type": "per_layer"}, False),
        ({"use_qk_norm": True}, False),
        ({"qk_norm_type": "per_layer"}, False),
        ({}, False),
    ],
)
def test_which_models_normalise_across_heads(changes: dict[str, Any], expected: bool) -> None:
    assert read(**changes).attention.norm_across_heads is expected


def test_bundled_models_that_normalise_across_heads() -> None:
    assert [name for name in IDS if load_model(name).attention.norm_across_heads] == ["MiniMaxAI/MiniMax-M2.5"]


@pytest.mark.parametrize("name", ["DEEPSEEK-AI/deepseek-v3", "DeepSeek-V3", " deepseek_v3 "])
def test_ids_and_aliases_in_any_case(name: str) -> None:
    assert load_model(name).id == "deepseek-ai/DeepSeek-V3"


def test_unknown_id_lists_the_bundled_ones() -> None:
    with pytest.raises(BadInput, match=r"unknown model 'DeepSeek-V9'.*deepseek-ai/DeepSeek-V3"):
        load_model("DeepSeek-V9")


@pytest.mark.parametrize("key", ["num_local_experts", "n_routed_experts", "num_experts"])
def test_names_of_the_expert_count(key: str) -> None:
    assert read(**{"num_experts": None, key: 32}).moe.experts == 32


@pytest.mark.parametrize("key", ["num_experts_per_tok", "num_experts_per_token", "experts_per_token"])
def test_names_of_top_k(key: str) -> None:
    assert read(**{"num_experts_per_tok": None, key: 2}).moe.top_k == 2


def test_expert_width_falls_back_to_intermediate_size() -> None:
    assert read(moe_intermediate_size=None).moe.intermediate == 96


def test_head_dim_falls_back_to_hidden_over_heads() -> None:
    assert read().attention.head_dim == 8
    assert read(head_dim=16).attention.head_dim == 16


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0, 1, 2, 3)),
        ({"first_k_dense_replace": 1}, (1, 2, 3)),
        ({"moe_layer_freq": 2}, (0, 2)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2,)),
        ({"moe_layer_freq": [0, 1, 1, 0]}, (1, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": []}, (1, 3)),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 3]}, (1, 2)),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}, (1, 2)),
    ],
)
def test_which_layers_have_experts(changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    model = read(**changes)
    assert model.moe.layer_ids == expected
    assert model.dense_intermediate == (96 if len(expected) < 4 else 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0, 0)),
        ({"n_shared_experts": 2}, (2, 64)),
        ({"shared_expert_intermediate_size": 48}, (1, 48)),
        ({"shared_intermediate_size": 0}, (0, 0)),
        ({"n_shared_experts": None}, (0, 0)),
    ],
)
def test_shared_experts(changes: dict[str, Any], expected: tuple[int, int]) -> None:
    moe = read(**changes).moe
    assert (moe.shared_experts, moe.shared_intermediate) == expected


def test_sliding_window_needs_to_be_switched_on() -> None:
    assert read(sliding_window=128, use_sliding_window=False).attention.window == 0
    assert read(sliding_window=128).attention.windowed_layers == (0, 1, 2, 3)


def test_nested_text_config() -> None:
    model = from_hf({"model_type": "kimi_k25", "text_config": small()}, id="nested", source="n.json")
    assert model.moe.experts == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "not a mixture-of-experts model"),
        ({"num_experts": 1}, "not a mixture-of-experts model"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok or .* is missing"),
        ({"num_experts_per_tok": 17}, "top_k 17 is more than the 16 experts"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"moe_intermediate_size": [32, 16]}, r"moe_intermediate_size is \[32, 16\]"),
        ({"moe_layer_freq": [1, 1]}, "a list of 4 entries"),
        ({"moe_layer_freq": 0}, "moe_layer_freq is 0"),
        ({"moe_layer_freq": [0, 0, 0, 0]}, "no layer has experts"),
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
        ({"num_attention_heads": 7}, "hidden_size 64 does not divide by num_attention_heads 7"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"kv_lora_rank": 16}, "qk_rope_head_dim is missing"),
        ({"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ({"hybrid_override_pattern": "ME*E"}, "state-space"),
        ({"linear_attn_config": {"num_heads": 4}}, "linear attention"),
        ({"moe_latent_size": 16}, "compressed width"),
    ],
)
def test_faults_name_the_file_and_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        read(**changes)
    assert "small/config.json" in caught.value.line()


def test_a_config_from_a_file_or_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(small(_name_or_path="org/small")))
    assert load_model(str(path)) == load_model(str(tmp_path))
    assert load_model(str(path)).id == "org/small"


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"num_hidden_layers": NaN}'])
def test_broken_files_are_bad_input(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"config\.json"):
        load_model(str(path))


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read the model config"):
        load_model(str(tmp_path / "none.json"))
