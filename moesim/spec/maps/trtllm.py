"""TensorRT-LLM's load balancer file, as `moe_config.load_balancer` names it.

Rules from NVIDIA/TensorRT-LLM: `MoeLoadBalancerConfig` in tensorrt_llm/llmapi/llm_args.py refuses any key but
num_slots, initial_global_assignments and layer_updates_per_iter; num_slots divides by the EP size; every absolute MoE
layer that the model asks for must be there (a multi-token-prediction layer too, NVIDIA/TensorRT-LLM#13974), with
num_slots entries; `_init_load_balancer` in tensorrt_llm/_torch/modules/fused_moe/interface.py asserts that a layer's
entries are exactly the experts. 0 layer updates per iteration = static.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.spec.maps.frame import MapFrame
from moesim.spec.maps.values import by_ranks, every_expert, integer, integer_rows, read_map_text, short
from moesim.spec.plan import ExpertPlacement
from moesim.spec.yaml_text import FAULTS, Distinct, yaml_fault

ENGINE = "TensorRT-LLM"
ASSIGNMENTS = "initial_global_assignments"
KEYS = ("num_slots", ASSIGNMENTS, "layer_updates_per_iter")


class _Loader(Distinct, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Maps are long: the compiled safe loader where PyYAML has it."""


def parse(text: str) -> Any:
    """A YAML document, by the rules of PyYAML's own safe loader, which the engine uses. Raises yaml.YAMLError."""
    tab = text.find("\t")
    if tab >= 0:  # the compiled loader would take some
        raise yaml.YAMLError(f"line {text.count(chr(10), 0, tab) + 1} holds a tab")
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> Any:
    """The content of a file; raises BadInput that names what is wrong with it."""
    text = read_map_text(path, what="TensorRT-LLM map")
    try:
        return parse(text)
    except FAULTS as error:
        raise BadInput(f"not valid YAML: {yaml_fault(error)}", where=str(path), mend="correct the YAML") from None


def check(data: Any, *, experts: int, ranks: int, where: str) -> dict[int, NDArray[np.int64]]:
    """The slots of each absolute layer, in order; raises BadInput where TensorRT-LLM would refuse the file."""
    if not isinstance(data, dict):
        raise BadInput("not a mapping of keys", where=where, mend="give a load balancer file of TensorRT-LLM")
    unknown = sorted(str(key) for key in data if key not in KEYS)
    if unknown:
        raise BadInput(
            f"TensorRT-LLM takes no key {short(unknown[0])} here", where=where, mend=f"use {', '.join(KEYS)}"
        )
    slots = integer(data.get("num_slots"), where=where, key="num_slots", low=1)
    integer(data.get("layer_updates_per_iter", 0), where=where, key="layer_updates_per_iter")
    assignments = data.get(ASSIGNMENTS)
    if not isinstance(assignments, dict) or not assignments:
        raise BadInput(f"{ASSIGNMENTS} is no mapping", where=where, mend="give layer: [experts]")
    for layer in assignments:
        integer(layer, where=where, key=f"a layer of {ASSIGNMENTS}")
    table = integer_rows(list(assignments.values()), where=where, key=ASSIGNMENTS)
    if table.shape[1] != slots:
        raise BadInput(f"{table.shape[1]} assignments for num_slots {slots}", where=where, mend="make them agree")
    by_ranks(slots, ranks, where=where)
    every_expert(table, experts, list(assignments), where=where)
    return {layer: table[row] for layer, row in sorted((layer, row) for row, layer in enumerate(assignments))}


def placement_of(data: Any, frame: MapFrame, *, where: str) -> ExpertPlacement:
    """The placement that a file's content says; rows of multi-token-prediction layers are checked and left out.

    Raises BadInput, also for a MoE layer that is missing and for a layer that the model does not route in.
    """
    ranks = frame.known_ranks(ENGINE, where)
    rows = check(data, experts=frame.experts, ranks=ranks, where=where)
    beside = range(frame.absolute_layers, frame.absolute_layers + frame.mtp_layers)
    strange = [layer for layer in rows if layer not in frame.layer_ids and layer not in beside]
    if strange:
        raise BadInput(f"layer {strange[0]} is no MoE layer of the model", where=where, mend="give a map of this model")
    lacking = [layer for layer in frame.layer_ids if layer not in rows]
    if lacking:
        raise BadInput(f"MoE layer {lacking[0]} is missing", where=where, mend="give every MoE layer of the model")
    return ExpertPlacement(
        physical_to_logical=np.stack([rows[layer] for layer in frame.layer_ids]),
        layer_ids=np.asarray(frame.layer_ids, dtype=np.int64),
        experts=frame.experts,
        ranks=ranks,
        absolute_layers=frame.absolute_layers,
        solver="trtllm file",
    )
