"""Priced steps with durations written down, for schedules that are checked by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moesim.cost.estimate import Estimate, Tag, estimate
from moesim.cost.host import HostTime
from moesim.graph.batch import step_batch
from moesim.graph.priced_step import LayerSetup, Part, PricedStep
from moesim.graph.storage import ExpertStorage
from moesim.spec.hf import load_model
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import PoliciesSpec, PrecisionSpec

EXPERTS = 8


def one_price(seconds: Any, family: str = "gemm") -> Estimate:
    """One estimate; a number stands for [1, 1]."""
    return estimate(np.atleast_2d(np.asarray(seconds, dtype=np.float64)), Tag.ASSUMED, family, 0.0, "by hand")


def part(seconds: Any) -> Part:
    """A part of one estimate; a number stands for [1, 1]."""
    return Part((one_price(seconds),))


def setup(
    layers: int,
    policies: Mapping[str, Any],
    *,
    ranks: int = 2,
    nodes: int = 1,
    storage: ExpertStorage | None = None,
) -> LayerSetup:
    """A setup of `layers` MoE layers over attention DP and EP ranks; nothing about the model but its layers matters."""
    model = tiny(layers)
    experts = max(EXPERTS, ranks)
    slots = np.tile(np.arange(experts), (layers, 1))
    return LayerSetup(
        model=model,
        parallel=ParallelSpec(attention_dp=ranks, ep=ranks),
        precision=PrecisionSpec(),
        policies=PoliciesSpec.read(dict(policies), where="test"),
        placement=ExpertPlacement(slots, np.arange(layers), experts, ranks, layers),
        nodes=nodes,
        gpus_per_node=8,
        step=HostTime(0.0),
        layer=HostTime(0.0),
        overhead_rel_sigma=0.0,
        storage=storage,
    )


def tiny(layers: int) -> ModelSpec:
    """DeepSeek-V3 with other numbers of layers and experts."""
    whole = load_model("deepseek-ai/DeepSeek-V3")
    moe = whole.moe.model_copy(update={"layer_ids": tuple(range(layers)), "experts": EXPERTS, "groups": 1})
    return whole.model_copy(update={"layers": layers, "moe": moe})


def by_hand(*, steps: int = 1, ranks: int = 2, **changes: Any) -> PricedStep:
    """One step: attention 2, gate 1, shared expert 2 up and 1 down, dispatch 4, experts 6, combine 4 seconds."""
    parts: dict[str, Any] = {
        "projections": part(1.0),
        "attention": part(1.0),
        "gate": part(1.0),
        "shared": Part((one_price([[1.5]]), one_price([[0.5]], "memory_bound"), one_price([[1.0]]))),
        "dispatch": part(4.0),
        "experts": part(6.0),
        "combine": part(4.0),
    }
    batch = step_batch(ranks=ranks, decode_seqs=np.full((steps, ranks), 4.0), decode_kv=10.0)
    return PricedStep(batch=batch, mode="normal", **(parts | changes))
