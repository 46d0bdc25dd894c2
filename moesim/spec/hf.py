"""Reading a model from a Hugging Face `config.json`: one spec out of the field names of many architectures."""

from __future__ import annotations

import difflib
import functools
import json
from importlib import resources
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.files import kind_of, read_text
from moesim.spec.base import Spec
from moesim.spec.model import AttentionSpec, ModelSpec, MoeSpec

# The names under which architectures keep the same fact, most specific first.
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk")
EXPERT_WIDTH = ("moe_intermediate_size", "intermediate_size")
DENSE_WIDTH = ("dense_intermediate_size", "intermediate_size")
SHARED_COUNT = ("n_shared_experts", "num_shared_experts")
SHARED_WIDTH = ("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim")
GROUPS = ("n_group", "num_expert_group")
MTP = ("num_nextn_predict_layers", "num_mtp_modules")
SCORING = ("scoring_func", "moe_router_activation_func")

# Keys whose presence means that the spec would describe another model than the file does: better refused than wrong.
UNSUPPORTED: dict[str, str] = {
    "hybrid_override_pattern": "layers of state-space (Mamba) kind",
    "hybrid_layer_pattern": "two kinds of attention of different width",
    "linear_attn_config": "layers of linear attention",
    "linear_num_value_heads": "layers of linear attention",
    "mamba_num_heads": "layers of state-space (Mamba) kind",
    "moe_latent_size": "experts that work in a compressed width",
    "routed_expert_hidden_size": "experts that work in a compressed width",
    "interleave_moe_layer_step": "Llama 4's interleaved layers",
    "compress_ratios": "attention over a compressed context",
    "global_head_dim": "two kinds of attention of different width",
}
FULL_ATTENTION = ("full_attention", "deepseek_sparse_attention")
SLIDING_ATTENTION = "sliding_attention"
MAX_LAYERS = 10_000  # a bound on what a damaged file can make us allocate; the deepest public model has 126 layers


class BundledModel(Spec):
    """A model whose facts are part of the distribution."""

    id: str
    source: str
    aliases: tuple[str, ...] = ()
    published_parameters: float | None = None
    published_source: str = ""
    config: dict[str, Any]


@functools.cache
def _shelf() -> dict[str, BundledModel]:
    found = {}
    folder = resources.files("moesim.spec") / "models"
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".json"):
            model = BundledModel.read(json.loads(entry.read_text(encoding="utf-8")), where=entry.name)
            found[model.id] = model
    return found


def bundled() -> list[str]:
    """Ids of the models whose facts are part of the distribution, in order of name."""
    return sorted(_shelf())


def bundled_model(model_id: str) -> BundledModel:
    """The facts and sources of a bundled model. Raises BadInput for an unknown id."""
    wanted = model_id.strip().lower()
    for model in _shelf().values():
        if wanted in (model.id.lower(), *(alias.lower() for alias in model.aliases)):
            return model
    near = difflib.get_close_matches(model_id, bundled(), n=1, cutoff=0.5)
    guess = f"did you mean {near[0]}? " if near else ""
    raise BadInput(
        f"unknown model {model_id!r}",
        where="model",
        mend=f"{guess}use a bundled id ({', '.join(bundled())}) or a path to a config.json",
    )


def load_model(name_or_path: str) -> ModelSpec:
    """Read a bundled model by id or alias (in any case), or a `config.json` by its path or its folder's.

    Raises BadInput that names the file and the key.
    """
    path = Path(name_or_path)
    kind = kind_of(path)
    if name_or_path.endswith(".json") or kind == "file":
        return _load_file(path)
    if kind == "folder" and kind_of(path / "config.json") == "file":
        return _load_file(path / "config.json")
    model = bundled_model(name_or_path)
    return from_hf(model.config, id=model.id, source=model.source)


def _load_file(path: Path) -> ModelSpec:
    text = read_text(path, what="model config")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not valid JSON: {error}", where=str(path), mend="give a Hugging Face config.json") from None
    if not isinstance(config, dict):
        raise BadInput("a model config is a JSON object", where=str(path), mend="give a Hugging Face config.json")
    name = config.get("_name_or_path")
    return from_hf(config, id=name if isinstance(name, str) and name else path.parent.name or "model", source=str(path))


def from_hf(config: dict[str, Any], *, id: str, source: str) -> ModelSpec:
    """Turn a Hugging Face config into a ModelSpec; a multimodal config is read through its `text_config`.

    source: where the config comes from; it names the place in errors. Raises BadInput for a missing or wrong key, for a
    model without routed experts and for architectures that the spec cannot describe.
    """
    fields = _Fields(config, source)
    if "num_hidden_layers" not in config and isinstance(config.get("text_config"), dict):
        fields = _Fields(config["text_config"], f"{source}: text_config")
    fields.refuse_unsupported()
    experts = fields.optional(EXPERTS)
    if not experts or experts < 2:
        raise BadInput(
            "this is not a mixture-of-experts model",
            where=fields.where,
            mend=f"its config needs one of {', '.join(EXPERTS)}",
        )
    layers = fields.required(("num_hidden_layers",))
    if not 0 < layers <= MAX_LAYERS:
        raise fields.wrong("num_hidden_layers", f"a number from 1 to {MAX_LAYERS}")
    moe_layers = _moe_layers(fields, layers)
    moe = MoeSpec.read(_moe(fields, experts, moe_layers), where=source)
    attention = AttentionSpec.read(_attention(fields, layers), where=source)
    has_dense = len(moe_layers) < layers
    return ModelSpec.read(
        {
            "id": id,
            "source": source,
            "layers": layers,
            "hidden": fields.required(("hidden_size",)),
            "vocabulary": fields.required(("vocab_size",)),
            "dense_intermediate": fields.required(DENSE_WIDTH) if has_dense else 0,
            "tied_embeddings": bool(fields.values.get("tie_word_embeddings") or False),
            "attention": attention,
            "moe": moe,
            "mtp_layers": (fields.optional(MTP) or 0) if fields.values.get("use_mtp", True) else 0,
        },
        where=source,
    )


class _Fields:
    """Typed look-ups in a config, with errors that name the file and the key."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def wrong(self, key: str, right: str) -> BadInput:
        given = repr(self.values.get(key))
        given = given if len(given) <= 60 else given[:57] + "..."
        return BadInput(f"{key} is {given}", where=self.where, mend=f"it must be {right}")

    def optional(self, names: tuple[str, ...]) -> int | None:
        """The first of `names` that is there and not null, a whole number not below 0."""
        for key in names:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise self.wrong(key, "a whole number, not below 0")
            return value
        return None

    def required(self, names: tuple[str, ...]) -> int:
        value = self.optional(names)
        if value is None:
            raise BadInput(f"{' or '.join(names)} is missing", where=self.where, mend="add it to the config")
        return value

    def flags(self, key: str, length: int) -> list[Any] | None:
        """A list with one entry for each layer, or None where the key is absent or no list."""
        value = self.values.get(key)
        if not isinstance(value, list):
            return None
        if len(value) < length:
            raise self.wrong(key, f"a list of {length} entries, one for each layer")
        return value[:length]

    def refuse_unsupported(self) -> None:
        for key, kind in UNSUPPORTED.items():
            if self.values.get(key):
                raise BadInput(
                    f"the model has {kind} ({key}), which moesim does not describe yet",
                    where=self.where,
                    mend="use a model with uniform attention and experts",
                )


def _moe_layers(fields: _Fields, layers: int) -> tuple[int, ...]:
    """Absolute indices of the MoE layers, by whichever convention the config follows."""
    kinds = fields.flags("mlp_layer_types", layers)
    if kinds is not None:
        return tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse")
    listed = fields.flags("moe_layer_freq", layers)
    if listed is not None:
        return tuple(layer for layer, flag in enumerate(listed) if flag)
    if "decoder_sparse_step" in fields.values or "mlp_only_layers" in fields.values:  # Qwen2-MoE, Qwen3-MoE
        step = fields.optional(("decoder_sparse_step",))
        step = 1 if step is None else step
        dense = fields.values.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise fields.wrong("mlp_only_layers", "a list of layers")
        return tuple(layer for layer in range(layers) if step and layer not in dense and (layer + 1) % step == 0)
    first = fields.optional(("first_k_dense_replace",)) or 0
    frequency = fields.optional(("moe_layer_freq",))
    if frequency == 0:
        raise fields.wrong("moe_layer_freq", "1 or more")
    return tuple(layer for layer in range(first, layers) if layer % (frequency or 1) == 0)


def _moe(fields: _Fields, experts: int, layer_ids: tuple[int, ...]) -> dict[str, Any]:
    intermediate = fields.required(EXPERT_WIDTH)
    shared = fields.optional(SHARED_COUNT)
    width = fields.optional(SHARED_WIDTH)
    if width is None:
        width = (shared or 0) * intermediate
    scoring: Any = next((fields.values[key] for key in SCORING if fields.values.get(key) is not None), "softmax")
    if scoring not in ("softmax", "sigmoid"):
        raise fields.wrong(next(key for key in SCORING if key in fields.values), "softmax or sigmoid")
    groups = fields.optional(GROUPS) or 1
    if not layer_ids:
        raise BadInput("no layer has experts", where=fields.where, mend="check first_k_dense_replace and its kin")
    return {
        "experts": experts,
        "top_k": fields.required(TOP_K),
        "intermediate": intermediate,
        "shared_experts": (shared or 1) if width else 0,
        "shared_intermediate": width,
        "layer_ids": layer_ids,
        "groups": groups,
        "top_groups": fields.optional(("topk_group",)) or groups,
        "scoring": scoring,
    }


def _attention(fields: _Fields, layers: int) -> dict[str, Any]:
    heads = fields.required(("num_attention_heads",))
    if fields.optional(("kv_lora_rank",)):
        rope = fields.required(("qk_rope_head_dim",))
        return {
            "kind": "mla",
            "heads": heads,
            "kv_heads": fields.optional(("num_key_value_heads",)) or heads,
            "head_dim": fields.required(("qk_nope_head_dim",)) + rope,
            "value_head_dim": fields.required(("v_head_dim",)),
            "q_lora_rank": fields.optional(("q_lora_rank",)) or 0,
            "kv_lora_rank": fields.required(("kv_lora_rank",)),
            "qk_rope_head_dim": rope,
            "index_heads": fields.optional(("index_n_heads",)) or 0,
            "index_head_dim": fields.optional(("index_head_dim",)) or 0,
            "index_top_k": fields.optional(("index_topk",)) or 0,
        }
    head_dim = fields.optional(("head_dim",))
    if not head_dim:
        hidden = fields.required(("hidden_size",))
        if not heads or hidden % heads:
            raise BadInput(
                f"hidden_size {hidden} does not divide by num_attention_heads {heads}",
                where=fields.where,
                mend="add head_dim to the config",
            )
        head_dim = hidden // heads
    window, windowed = _window(fields, layers)
    return {
        "kind": "gqa",
        "heads": heads,
        "kv_heads": fields.optional(("num_key_value_heads",)) or heads,
        "head_dim": head_dim,
        "value_head_dim": fields.optional(("v_head_dim",)) or head_dim,
        "window": window,
        "windowed_layers": windowed,
        # MiniMax-M2 and M2.5; other models normalise each head by itself.
        "norm_across_heads": fields.values.get("use_qk_norm") is True
        and fields.values.get("qk_norm_type") == "per_layer",
    }


def _window(fields: _Fields, layers: int) -> tuple[int, tuple[int, ...]]:
    """Sliding window in tokens and the layers that use it."""
    kinds = fields.flags("layer_types", layers)
    for kind in kinds or ():
        if kind not in (*FULL_ATTENTION, SLIDING_ATTENTION):
            raise BadInput(
                f"layer_types names {str(kind)[:40]!r}, which moesim does not describe yet",
                where=fields.where,
                mend=f"use a model whose layers are {', '.join(FULL_ATTENTION)} or {SLIDING_ATTENTION}",
            )
    window = fields.optional(("sliding_window",)) or 0
    if not window or fields.values.get("use_sliding_window") is False:
        return 0, ()
    if kinds is None:
        return window, tuple(range(layers))
    windowed = tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING_ATTENTION)
    return (window, windowed) if windowed else (0, ())
