"""What recorded loads become under another gate than the model's own: the routing that a scenario then draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesim.errors import BadInput
from moesim.routing.gates.choice import WHERE, choice_of, gate_spec
from moesim.routing.gates.gate import GateChoice
from moesim.routing.gates.hashed import hashed_experts
from moesim.routing.gates.registry import GATES
from moesim.routing.gates.routed import Floats, TokenScores
from moesim.routing.gates.scores import counts_of_groups, preferences
from moesim.routing.successive import successive_inclusion
from moesim.routing.trace import RoutingCounts
from moesim.spec.gate import GateSpec
from moesim.spec.model import ModelSpec

# Tokens whose scores are drawn for each layer. An expert of mean load gets SAMPLE x top_k / experts of their picks (128
# for DeepSeek-V3), whose scatter (9 %) adds to the spread of its share in quadrature.
SAMPLE = 4096


def gate_model(gate: str | GateSpec, model: ModelSpec) -> tuple[ModelSpec, GateChoice | None]:
    """The model as it is under a gate, with the gate's top_k and groups, and the resolved gate; None: its own.

    Raises BadInput for a gate that a serving step cannot run under.
    """
    spec = gate_spec(gate)
    if spec is None:
        return model, None
    if GATES[spec.name].refused:
        raise BadInput(
            f"gate {spec.name} is not simulated in a step: {GATES[spec.name].refused}",
            where=WHERE,
            mend=f"use model, {', '.join(name for name, kind in GATES.items() if not kind.refused)}",
        )
    choice = choice_of(spec, model.moe)
    moe = {"top_k": choice.top_k, "groups": choice.groups, "top_groups": choice.top_groups, "scoring": choice.scoring}
    return model.model_copy(update={"moe": model.moe.model_copy(update=moe)}), choice


def gate_loads(
    loads: Sequence[RoutingCounts], gate: str | GateSpec, model: ModelSpec, rng: np.random.Generator
) -> tuple[tuple[RoutingCounts, ...], ModelSpec]:
    """Loads and model as they are under `gate`, from loads recorded under the model's own.

    Every load becomes an aggregate of shares: how single steps strayed under the model's gate says nothing here. A
    top-p gate sets the model's top_k to the mean number of its picks, rounded. Raises BadInput (see `gate_model`).
    """
    gated, choice = gate_model(gate, model)
    if choice is None:
        return tuple(loads), model
    spec = gate_spec(gate)
    assert spec is not None
    noise = rng.gumbel(size=(SAMPLE, model.moe.experts))
    odds = np.exp(noise)
    known: dict[bytes, RoutingCounts] = {}  # generated workloads are often all alike
    for load in loads:
        key = load.profile().tobytes()
        if key not in known:
            known[key] = _gated(load, spec, choice, model, (noise, odds), rng)
    found = tuple(
        replace(
            known[load.profile().tobytes()],
            name=load.name,
            phase=load.phase,
            weight=load.weight,
            prompt_tokens=load.prompt_tokens,
        )
        for load in loads
    )
    if GATES[spec.name].law == "variable":
        picks = float(np.mean([load.picks for load in found if load.picks is not None]))
        moe = gated.moe.model_copy(update={"top_k": max(1, round(picks))})
        gated = gated.model_copy(update={"moe": moe})
    return found, gated


def _gated(
    load: RoutingCounts, spec: GateSpec, choice: GateChoice, model: ModelSpec, sample: tuple[Floats, Floats],
    rng: np.random.Generator,
) -> RoutingCounts:  # fmt: skip
    profile, law = load.profile(), GATES[spec.name].law
    if law == "even" or spec.name == "bias_corrected":  # the bias settles where all counts are the same
        chance = np.full(profile.shape, choice.top_k / profile.shape[1])
    elif spec.name == "hash":
        chance = np.tile(hashed_chances(model.vocabulary, profile.shape[1], choice.top_k), (len(profile), 1))
    else:
        chance = np.stack([_chances(row, spec, choice, model, sample, rng, load.name) for row in profile])
    return replace(
        load, counts=chance[None], per_step=False, law=law, picks=float(chance.sum(axis=1).mean()), records=None
    )


def _chances(
    shares: Floats, spec: GateSpec, choice: GateChoice, model: ModelSpec, sample: tuple[Floats, Floats],
    rng: np.random.Generator, where: str,
) -> Floats:  # fmt: skip
    """Mean picks of each expert by one token [experts]; sample: Gumbel noise [tokens, experts]; its exp."""
    noise, odds = sample
    preference = preferences(shares, model.moe, odds, where=where)
    if spec.name in ("softmax_topk", "sigmoid_topk"):  # both pick the largest logits
        return successive_inclusion(np.exp(preference), choice.top_k)
    if spec.name in ("group_limited", "device_limited"):
        counts = counts_of_groups(spec.name == "group_limited", preference, odds, choice)
    else:
        counts = GATES[spec.name].gate(TokenScores(preference + noise), choice, rng).counts()
    return np.asarray(counts / len(noise))


def hashed_chances(vocabulary: int, experts: int, top_k: int) -> Floats:
    """Chance [experts] that a token goes to each expert of a hash gate, with token frequencies by Zipf's law.

    Assumed: the token of rank r has a share in proportion to 1 / r (Zipf, Human Behavior and the Principle of Least
    Effort, 1949), and ranks are scattered over the ids as over any hash.
    """
    frequency = 1.0 / np.arange(1.0, vocabulary + 1.0)
    spread = np.repeat(frequency / frequency.sum(), top_k)
    ids = hashed_experts(np.arange(vocabulary), experts, top_k)
    return np.asarray(np.bincount(ids.ravel(), weights=spread, minlength=experts), dtype=np.float64)
