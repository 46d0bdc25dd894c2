"""vllm-ascend's expert map file, as `eplb_config.expert_map_path` names it.

Rules from vllm-project/vllm-ascend, vllm_ascend/eplb/core/eplb_utils.py (`expert_file_to_tensor`, `init_eplb_config`):
the layers count from 0 over MoE layers only; the lists of a layer's devices become one tensor, so all are as long; the
number of redundant experts is the sum of their lengths less the experts; a device's experts are kept in a table by
expert, so a second replica on one device would be lost; every expert must be on some device (`generate_log2phy_map`).
Devices are taken by their place in the list, layers likewise; the names here are checked against both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.spec.maps.frame import MapFrame
from moesim.spec.maps.values import every_expert, integer, integer_rows
from moesim.spec.plan import ExpertPlacement

ENGINE = "vllm-ascend"
LAYERS = "layer_list"


def check(data: Any, *, experts: int, where: str) -> NDArray[np.int64]:
    """The map as [layers, devices, experts of a device]; raises BadInput where the engine would fail."""
    if not isinstance(data, dict):
        raise BadInput("not a mapping of keys", where=where, mend="give an expert map of vllm-ascend")
    layers = data.get(LAYERS)
    count = integer(data.get("moe_layer_count"), where=where, key="moe_layer_count", low=1)
    if not isinstance(layers, list) or len(layers) != count:
        raise BadInput(f"{LAYERS} does not hold moe_layer_count layers", where=where, mend="make them agree")
    rows: list[Any] = []
    devices = 0
    for index, layer in enumerate(layers):
        listed = layer.get("device_list") if isinstance(layer, dict) else None
        if not isinstance(listed, list) or not listed or not _is(layer.get("layer_id"), index):
            raise BadInput(f"layer {index} is out of order or has no devices", where=where, mend="write it again")
        devices = devices or len(listed)
        if len(listed) != devices or not _is(layer.get("device_count"), devices):
            raise BadInput(f"layer {index} has another number of devices", where=where, mend="make all layers agree")
        for position, device in enumerate(listed):
            if not isinstance(device, dict) or not _is(device.get("device_id"), position):
                raise BadInput(f"device {position} of layer {index} is out of order", where=where, mend="sort it")
            rows.append(device.get("device_expert"))
    table = integer_rows(rows, where=where, key="device_expert").reshape(count, devices, -1)
    every_expert(table.reshape(count, -1), experts, list(range(count)), where=where)
    found = twice(table)
    if found is not None:
        raise BadInput(
            f"layer {found[0]} lists an expert twice on device {found[1]}, which vllm-ascend cannot hold",
            where=where,
            mend="give a map that keeps the replicas of an expert apart",
        )
    return table


def _is(value: Any, number: int) -> bool:
    return type(value) is int and value == number


def twice(table: NDArray[np.int64]) -> tuple[int, int] | None:
    """The first (layer, device) of a map [layers, devices, experts] that holds an expert twice, if one does."""
    found = np.argwhere(np.diff(np.sort(table, axis=-1), axis=-1) == 0)
    return (int(found[0][0]), int(found[0][1])) if len(found) else None


def placement_of(data: Any, frame: MapFrame, *, where: str) -> ExpertPlacement:
    """The placement that a file's content says; its devices are the ranks. Raises BadInput."""
    table = check(data, experts=frame.experts, where=where)
    if len(table) != len(frame.layer_ids):
        raise BadInput(
            f"{len(table)} layers for a model of {len(frame.layer_ids)} MoE layers",
            where=where,
            mend="give a map of this model",
        )
    if frame.ranks is not None and table.shape[1] != frame.ranks:
        raise BadInput(
            f"{table.shape[1]} devices for {frame.ranks} ranks", where=where, mend="give a map for that many ranks"
        )
    return ExpertPlacement(
        physical_to_logical=np.ascontiguousarray(table.reshape(len(table), -1)),
        layer_ids=np.asarray(frame.layer_ids, dtype=np.int64),
        experts=frame.experts,
        ranks=int(table.shape[1]),
        absolute_layers=frame.absolute_layers,
        solver="vllm-ascend file",
    )
