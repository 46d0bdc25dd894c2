"""Memory of expert weights beyond the weights themselves: buffers that they arrive in."""

from __future__ import annotations

from moesim.graph.storage import STAGED_LAYERS
from moesim.spec.model import ModelSpec
from moesim.spec.scenario import PoliciesSpec


def relayout_staging(whole: float, model: ModelSpec) -> float:
    """The buffer that experts arrive in while they are laid out anew: one layer's slots, of the weight bytes `whole`.

    vLLM (distributed/eplb, expert_buffer) and SGLang (eplb/expert_location_updater.py, temp_buffers) both hold tensors
    as large as one layer's local experts, whatever moves.
    """
    return whole / max(model.moe_layers, 1)


def stored_experts(whole: float, model: ModelSpec, slots_per_rank: int, policies: PoliciesSpec) -> dict[str, float]:
    """What of the experts' weight bytes `whole` is on the GPU, and the buffers that the rest arrives in.

    Offload and pre-gated prefetch stage two layers in turn, a cache one: any of a layer's experts may be picked.
    """
    layer = whole / max(model.moe_layers, 1)
    if policies.storage == "resident":
        return {"weights_experts": whole}
    if policies.expert_cache is None:
        return {"weights_experts": 0.0, "expert_staging": min(STAGED_LAYERS, model.moe_layers) * layer}
    kept = min(policies.expert_cache.experts_per_layer / slots_per_rank, 1.0)
    return {"weights_experts": kept * whole, "expert_staging": layer}
