"""What happens when an expert has too many tokens: the rule of a deployment, checked, its defaults filled in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import BadInput, Infeasible
from moesim.routing.capacity.formulas import MIN_CAPACITY, NO_LIMIT, capacity, decimal
from moesim.routing.gates.choice import gate_spec
from moesim.routing.gates.registry import GATES
from moesim.spec.scenario import PoliciesSpec

WHERE = "policies.capacity"
DROPLESS = "dropless"
# Which token loses its place, by rule; the first is the default. DeepSpeed's follows from top_k: top1gating draws at
# random (use_rts), top2gating goes by position, topkgating by probability (deepspeed/moe/sharded_moe.py). Megatron has
# moe_token_drop_policy "probs" or "position".
DROPS: dict[str, tuple[str, ...]] = {
    "gshard": ("position",),
    "switch": ("position",),
    "deepspeed": ("probability", "position", "random"),
    "megatron": ("probability", "position"),
    "survey": ("position", "probability", "random"),
}
# Rules whose dispatch is a dense [experts, capacity] buffer, so that empty places are computed and sent as well;
# Megatron has moe_pad_expert_input_to_capacity, off by default.
PADS = ("gshard", "switch", "deepspeed")


@dataclass(frozen=True)
class CapacityRule:
    """A resolved rule.

    rule: "dropless" or one of FORMULAS. drop: "position", "probability" or "random": who loses its place. by_choice: by
    position, all first choices come before any second one (GShard, DeepSpeed top-2); else tokens in their order.
    backup: where a pick that lost its place goes: None (dropped), "random" (one random expert, if it has room) or
    "next_best" (down the token's own order). pad: experts work on their whole capacity. even_sources: every rank sends
    all experts alike, so that nothing is over by chance.
    """

    rule: str = DROPLESS
    factor: float = 1.0
    drop: str = "position"
    by_choice: bool = True
    backup: str | None = None
    pad: bool = False
    min_capacity: int = MIN_CAPACITY
    max_capacity: int = NO_LIMIT
    even_sources: bool = False

    @property
    def dropless(self) -> bool:
        """Whether every pick is kept."""
        return self.rule == DROPLESS

    def capacity(self, tokens: ArrayLike, experts: int, top_k: int) -> NDArray[np.int64]:
        """Tokens that one expert takes from a source of `tokens` [...] tokens; see `formulas`."""
        return capacity(
            self.rule,
            tokens,
            experts=experts,
            top_k=top_k,
            factor=self.factor,
            min_capacity=self.min_capacity,
            max_capacity=self.max_capacity,
        )


def default_drop(rule: str, top_k: int) -> str:
    """Who loses its place under a rule, unless it says otherwise."""
    if rule == "deepspeed":
        return {1: "random", 2: "position"}.get(top_k, "probability")
    return DROPS[rule][0]


def capacity_rule(policies: PoliciesSpec, top_k: int) -> CapacityRule:
    """The rule of `policies.capacity` for a gate of top_k. Raises BadInput or Infeasible by key on what cannot be."""
    spec = policies.capacity
    # Megatron's moe_expert_capacity_factor None means dropless.
    if spec.rule == DROPLESS or (spec.rule == "megatron" and spec.factor is None):
        for key in ("factor", "drop", "pad", "backup", "min_capacity", "max_capacity"):
            if getattr(spec, key) not in (None, False):
                raise BadInput(
                    f"nothing is dropped or padded under {spec.rule} without a factor",
                    where=f"{WHERE}.{key}",
                    mend="leave it out, or choose another rule with a factor",
                )
        return CapacityRule()
    if spec.factor is None:
        raise BadInput(f"rule {spec.rule} needs a factor", where=f"{WHERE}.factor", mend="give one, such as 1.25")
    decimal(spec.factor)
    default = default_drop(spec.rule, top_k)
    drop = spec.drop or default
    allowed = (default,) if spec.rule == "deepspeed" else DROPS[spec.rule]
    if drop not in allowed:
        raise BadInput(
            f"rule {spec.rule} with top_k {top_k} drops by {' or '.join(allowed)}, not by {drop}",
            where=f"{WHERE}.drop",
            mend="leave it out, or use rule survey",
        )
    if spec.min_capacity is not None and spec.rule != "deepspeed":
        raise BadInput("only DeepSpeed's rule has a least capacity", where=f"{WHERE}.min_capacity", mend="leave it out")
    if spec.max_capacity is not None and spec.rule != "survey":
        raise BadInput("only the survey rule has a cap", where=f"{WHERE}.max_capacity", mend="leave it out")
    gate = gate_spec(policies.gate)
    pad = spec.rule in PADS if spec.pad is None else spec.pad
    if pad and policies.dispatch.backend == "deepep":
        raise Infeasible(
            f"rule {spec.rule} pads experts to their capacity, and DeepEP sends only tokens that were routed",
            where=f"{WHERE}.pad",
            mend="set it to false, or use backend alltoall",
            reason="backend_cannot_pad",
        )
    return CapacityRule(
        rule=spec.rule,
        factor=spec.factor,
        drop=drop,
        by_choice=spec.rule in ("gshard", "deepspeed"),
        backup=spec.backup,
        pad=pad,
        min_capacity=MIN_CAPACITY if spec.min_capacity is None else spec.min_capacity,
        max_capacity=NO_LIMIT if spec.max_capacity is None else spec.max_capacity,
        even_sources=gate is not None and GATES[gate.name].law == "even",
    )
