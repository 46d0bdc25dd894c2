"""All gates by name: what each does, what it may be told, and what its counts look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesim.routing.gates import balanced, dynamic, grouped, hashed, noisy, topk, topology
from moesim.routing.gates.gate import Gate

Law = Literal["top_k", "even", "variable"]


@dataclass(frozen=True)
class GateKind:
    """One gate.

    takes: its parameters beside top_k. law of an expert's count in a step: "top_k" (each token picks top_k), "even"
    (all experts get the same), "variable" (tokens differ in how many they pick). refused: why a serving step cannot run
    under it ("" where it can).
    """

    gate: Gate
    takes: tuple[str, ...] = ()
    law: Law = "top_k"
    refused: str = ""


_GROUPS = ("groups", "top_groups")
GATES: dict[str, GateKind] = {
    "softmax_topk": GateKind(topk.softmax_topk, ("normalise",)),
    "sigmoid_topk": GateKind(topk.sigmoid_topk, ("normalise",)),
    "bias_corrected": GateKind(topk.bias_corrected, ("scoring", "normalise")),
    "group_limited": GateKind(grouped.group_limited, (*_GROUPS, "scoring", "normalise")),
    "device_limited": GateKind(grouped.device_limited, (*_GROUPS, "scoring", "normalise")),
    "two_level": GateKind(grouped.two_level, (*_GROUPS, "normalise")),
    "noisy_topk": GateKind(noisy.noisy_topk, ("noise",)),
    "gumbel_topk": GateKind(noisy.gumbel_topk, ("temperature", "normalise")),
    "expert_choice": GateKind(balanced.expert_choice, law="even"),
    "base": GateKind(balanced.base_assignment, ("block",), law="even"),
    "hash": GateKind(hashed.hash_gate),
    "top_p": GateKind(dynamic.top_p, ("threshold", "max_k", "normalise"), law="variable"),
    "dense": GateKind(dynamic.dense, law="even"),
    "soft": GateKind(
        dynamic.soft, law="even", refused="its slots mix all tokens of a batch, so that no token is sent to an expert"
    ),
    "sample": GateKind(
        dynamic.sampled,
        ("scoring", "normalise"),
        refused="which tokens of a step share a request is not drawn",
    ),
    "topology": GateKind(
        topology.topology_bias,
        ("locality", "normalise"),
        refused="a step's bytes are priced as if a token's node did not matter to its experts",
    ),
}
