"""vllm-ascend's expert map file.

Rules from vllm-project/vllm-ascend (`_expert_file_to_tensor` and `local2global` of its EPLB adaptor): the layers count
from 0 over MoE layers only; every device of every layer lists the same number of experts; a device's experts are kept
in a table by expert, so a second replica on one device would be lost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput, Infeasible
from moesim.files import write_text
from moesim.spec.placement_file import integer, integer_rows, read_json
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario
from placement.export import vllm

FILE = "expert_map.json"


def render(placement: ExpertPlacement) -> str:
    """The file's text: layers counted from 0 over the MoE layers."""
    table = placement.physical_to_logical.reshape(placement.layers, placement.ranks, placement.slots_per_rank)
    layers = [
        {
            "layer_id": layer,
            "device_count": placement.ranks,
            "device_list": [{"device_id": device, "device_expert": experts} for device, experts in enumerate(devices)],
        }
        for layer, devices in enumerate(table.tolist())
    ]
    return json.dumps({"moe_layer_count": placement.layers, "layer_list": layers}) + "\n"


def check(data: Any, *, experts: int, where: str) -> NDArray[np.int64]:
    """The map as [layers, devices, experts of a device]; raises BadInput or Infeasible where the engine would fail."""
    if not isinstance(data, dict):
        raise BadInput("not a mapping of keys", where=where, mend="give an expert map of vllm-ascend")
    layers = data.get("layer_list")
    count = integer(data.get("moe_layer_count"), where=where, key="moe_layer_count", low=1)
    if not isinstance(layers, list) or len(layers) != count:
        raise BadInput("layer_list does not hold moe_layer_count layers", where=where, mend="make them agree")
    rows: list[Any] = []
    devices = 0
    for index, layer in enumerate(layers):
        listed = layer.get("device_list") if isinstance(layer, dict) else None
        if not isinstance(listed, list) or not listed or layer.get("layer_id") != index:
            raise BadInput(f"layer {index} is out of order or has no devices", where=where, mend="write it again")
        devices = devices or len(listed)
        if len(listed) != devices or layer.get("device_count") != devices:
            raise BadInput(f"layer {index} has another number of devices", where=where, mend="make all layers agree")
        for position, device in enumerate(listed):
            if not isinstance(device, dict) or device.get("device_id") != position:
                raise BadInput(f"device {position} of layer {index} is out of order", where=where, mend="sort it")
            rows.append(device.get("device_expert"))
    table = integer_rows(rows, where=where, key="device_expert").reshape(count, devices, -1)
    if table.max() >= experts:
        raise BadInput(f"expert {table.max()} of {experts}", where=where, mend=f"ids lie between 0 and {experts - 1}")
    twice = np.argwhere(np.diff(np.sort(table, axis=-1), axis=-1) == 0)
    if len(twice):
        layer, device, _ = twice[0]
        raise Infeasible(
            f"layer {layer} lists an expert twice on device {device}, which vllm-ascend cannot hold",
            where=where,
            mend="use a solver that keeps replicas apart (greedy, robust), not eplb",
            reason="duplicates_on_one_gpu",
        )
    return table


def write(placement: ExpertPlacement, path: Path) -> None:
    """Write the map, after checking it by vllm-ascend's rules, whole or not at all."""
    text = render(placement)
    check(json.loads(text), experts=placement.experts, where=str(path))
    write_text(path, text)


def read(path: Path, *, experts: int, layer_ids: Sequence[int], absolute_layers: int) -> ExpertPlacement:
    """Read a map back; `layer_ids` names the absolute layers. Raises BadInput or Infeasible."""
    table = check(read_json(path, what="vllm-ascend map"), experts=experts, where=str(path))
    if len(layer_ids) != len(table):
        raise BadInput(
            f"{len(table)} layers for a model of {len(layer_ids)} MoE layers", where=str(path), mend="give its own map"
        )
    try:
        return ExpertPlacement(
            physical_to_logical=table.reshape(len(table), -1),
            layer_ids=np.asarray(layer_ids, dtype=np.int64),
            experts=experts,
            ranks=table.shape[1],
            absolute_layers=absolute_layers,
            solver="vllm-ascend file",
        )
    except BadInput as error:
        raise BadInput(error.what, where=str(path), mend=error.mend) from None


def launch(placement: ExpertPlacement, scenario: Scenario | None) -> list[str]:
    """Lines of a launch command (vllm-ascend's guide "Expert parallelism load balancer")."""
    lines = vllm.parallel_lines(placement, scenario)
    config = {"eplb_config": {"expert_map_path": FILE, "num_redundant_experts": placement.redundant}}
    return [*lines, f"--additional-config '{json.dumps(config)}'"]
