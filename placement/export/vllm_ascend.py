"""vllm-ascend's expert map file (its rules: moesim/spec/maps/vllm_ascend.py) and its launch flags."""

from __future__ import annotations

import json
from pathlib import Path

from moesim.errors import Infeasible
from moesim.files import write_text
from moesim.spec.maps.vllm_ascend import LAYERS, check, twice
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario
from placement.export import vllm
from placement.export.instance import Told

FILE = "expert_map.json"
# `init_eplb_config` of vllm_ascend/eplb/core/eplb_utils.py asks `supports_eplb` of the quantisation, and for EP over 1.
WEIGHTS = "vllm-ascend takes a map for w8a8_dynamic weights only"


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
    return json.dumps({"moe_layer_count": placement.layers, LAYERS: layers}) + "\n"


def write(placement: ExpertPlacement, path: Path) -> None:
    """Write the map, after checking it by vllm-ascend's rules, whole or not at all. Raises Infeasible or BadInput."""
    table = placement.physical_to_logical.reshape(placement.layers, placement.ranks, placement.slots_per_rank)
    if placement.ranks == 1:
        raise Infeasible(
            "vllm-ascend takes no map on one rank", where=str(path), mend="leave the map out", reason="engine_layout"
        )
    found = twice(table)
    if found is not None:
        raise Infeasible(
            f"layer {placement.layer_ids[found[0]]} lists an expert twice on device {found[1]}, which vllm-ascend "
            "cannot hold",
            where=str(path),
            mend="use a solver that keeps replicas apart (greedy, robust), not eplb",
            reason="duplicates_on_one_gpu",
        )
    text = render(placement)
    check(json.loads(text), experts=placement.experts, where=str(path))
    write_text(path, text)


def launch(placement: ExpertPlacement, scenario: Scenario | None, told: Told | None = None) -> list[str]:
    """Lines of a launch command (vllm-ascend's guide "Expert parallelism load balancer")."""
    lines = vllm.parallel_lines(placement, scenario, told)
    config = {"eplb_config": {"expert_map_path": FILE, "num_redundant_experts": placement.redundant}}
    return [*lines, f"--additional-config '{json.dumps(config)}'"]
