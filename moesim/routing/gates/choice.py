"""From `policies.gate` to a gate with resolved parameters; what cannot be is refused by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from moesim.errors import BadInput
from moesim.routing.gates.gate import GateChoice
from moesim.routing.gates.registry import GATES
from moesim.spec.gate import GateSpec
from moesim.spec.model import MoeSpec

MODEL = "model"
WHERE = "policies.gate"


def gate_spec(gate: str | GateSpec) -> GateSpec | None:
    """The gate that is asked for; None for the model's own. Raises BadInput on unknown names and parameters."""
    spec = GateSpec(name=gate) if isinstance(gate, str) else gate
    if spec.name == MODEL:
        if spec.given():
            raise BadInput("the model's own gate takes no parameters", where=WHERE, mend="write `gate: model`")
        return None
    if spec.name not in GATES:
        raise BadInput(f"unknown gate {spec.name!r}", where=WHERE, mend=f"use model, {', '.join(GATES)}")
    takes = ("top_k", *GATES[spec.name].takes)
    for name in spec.given():
        if name not in takes:
            raise BadInput(f"gate {spec.name} takes no {name}", where=f"{WHERE}.{name}", mend=f"use {', '.join(takes)}")
    return spec


def choice_of(spec: GateSpec, moe: MoeSpec) -> GateChoice:
    """Resolve a gate's parameters against the model's own. Raises BadInput where the experts do not allow them."""
    grouped = "groups" in GATES[spec.name].takes
    values: dict[str, Any] = {"top_k": moe.top_k, "scoring": moe.scoring}
    if grouped:
        values |= {"groups": moe.groups, "top_groups": moe.top_groups}
    values |= spec.given()
    if spec.name == "base" and spec.top_k is None:
        values["top_k"] = 1
    if spec.name == "dense":
        values["top_k"] = moe.experts
    choice = GateChoice(**{entry.name: values[entry.name] for entry in fields(GateChoice) if entry.name in values})
    _check(spec, choice, moe.experts)
    return choice


def _check(spec: GateSpec, choice: GateChoice, experts: int) -> None:
    if spec.name == "dense" and spec.top_k not in (None, experts):
        raise BadInput("a dense gate uses every expert", where=f"{WHERE}.top_k", mend="leave it out")
    if spec.name == "base" and choice.top_k != 1:
        raise BadInput("a balanced assignment gives a token one expert", where=f"{WHERE}.top_k", mend="leave it out")
    if choice.top_k > experts:
        raise BadInput(
            f"top_k {choice.top_k} is more than the {experts} experts", where=f"{WHERE}.top_k", mend="lower it"
        )
    if "groups" not in GATES[spec.name].takes:
        return
    if choice.groups == 1:
        raise BadInput(
            f"gate {spec.name} needs groups, and the model has none", where=f"{WHERE}.groups", mend="give groups"
        )
    if experts % choice.groups:
        raise BadInput(
            f"{experts} experts do not divide into {choice.groups} groups",
            where=f"{WHERE}.groups",
            mend="use a divisor",
        )
    held = choice.top_groups * (experts // choice.groups)
    if choice.top_groups > choice.groups or held < choice.top_k:
        raise BadInput(
            f"{choice.top_groups} of {choice.groups} groups hold {held} experts for top_k {choice.top_k}",
            where=f"{WHERE}.top_groups",
            mend="open groups that hold at least top_k experts, and at most all",
        )
    if spec.name == "two_level" and choice.top_k % choice.top_groups:
        raise BadInput(
            f"top_k {choice.top_k} does not divide by {choice.top_groups} groups",
            where=f"{WHERE}.top_groups",
            mend="use a divisor of top_k",
        )
