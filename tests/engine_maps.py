"""What each engine does with a map file, written down from its source: a second opinion beside moesim's own checks.

Each function takes the file's text and what the engine is launched with, goes through the engine's own steps, and
returns what it ends up with: for every absolute MoE layer the experts that each rank holds, in slot order. It raises
`Refused` where the engine would raise, assert, or later fail on it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

Held = dict[int, list[list[int]]]


class Refused(Exception):
    """The engine would not run with this file."""


def _need(condition: bool, why: str) -> None:
    if not condition:
        raise Refused(why)


def sglang(text: str, flags: str, *, hidden_layers: int, moe_layers: list[int], experts: int) -> Held:
    """python/sglang/srt/eplb/expert_location.py: compute_initial_expert_location_metadata, init_by_mapping."""
    ep = int(_flag(flags, "--ep-size"))
    redundant = int(_flag(flags, "--ep-num-redundant-experts", "0"))
    _need(_flag(flags, "--init-expert-location").endswith(".json"), "the loader tells the format by the suffix")
    content = json.loads(text)
    _need(set(content) == {"physical_to_logical_map"}, "init_by_mapping takes this keyword alone")
    table = content["physical_to_logical_map"]
    physical = experts + redundant  # _init_common
    _need(physical % ep == 0, "num_physical_experts % ep_size == 0")
    _need(len({len(row) for row in table}) == 1, "torch.tensor of ragged rows")
    _need(len(table) == hidden_layers, "one row for each hidden layer")
    _need(len(table[0]) == physical, "the weights have num_physical_experts slots")
    for row in table:
        held: list[list[int]] = [[] for _ in range(experts)]
        for slot, expert in enumerate(row):  # _compute_logical_to_all_physical_map
            _need(type(expert) is int and 0 <= expert < experts, "index of a list of the logical experts")
            held[expert].append(slot)
        _need(all(held), "_fair_choices divides by the number of replicas")
    each = physical // ep
    return {layer: [table[layer][rank * each : (rank + 1) * each] for rank in range(ep)] for layer in moe_layers}


def trtllm(text: str, options: str, *, moe_layers: list[int], experts: int) -> Held:
    """tensorrt_llm/llmapi/llm_args.py: MoeLoadBalancerConfig; fused_moe/interface.py: _init_load_balancer."""
    ep = yaml.safe_load(options)["moe_expert_parallel_size"]
    content = yaml.safe_load(text)
    allowed = {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    _need(isinstance(content, dict) and set(content) <= allowed, "StrictBaseModel forbids other keys")
    slots, assignments = content.get("num_slots"), content.get("initial_global_assignments")
    _need(type(slots) is int, "num_slots: int")
    _need(type(content.get("layer_updates_per_iter", 0)) is int, "layer_updates_per_iter: int")
    _need(isinstance(assignments, dict), "Dict[int, List[int]]")
    _need(all(type(layer) is int for layer in assignments), "Dict[int, ...]")
    _need(slots % ep == 0, "num_slots must be divisible by ep_size")
    held: Held = {}
    for layer in moe_layers:
        _need(layer in assignments, "layer_idx not found in initial_global_assignments")
        row = assignments[layer]
        _need(isinstance(row, list) and all(type(expert) is int for expert in row), "List[int]")
        _need(len(row) == slots, "assignment length does not match num_slots")
        _need(slots >= experts, "num_slots >= num_experts")
        _need(set(row) == set(range(experts)), "set(assignments) == set(range(num_experts))")
        each = slots // ep
        held[layer] = [row[rank * each : (rank + 1) * each] for rank in range(ep)]
    return held


def vllm_ascend(text: str, flags: str, *, ep: int, moe_layers: list[int], experts: int) -> Held:
    """vllm_ascend/eplb/core/eplb_utils.py: expert_file_to_tensor, init_eplb_config, generate_log2phy_map."""
    config = json.loads(_flag(flags, "--additional-config"))["eplb_config"]
    content = json.loads(text)
    held: Held = {}
    for index, layer in enumerate(moe_layers):  # a layer's index counts MoE layers only
        _need(index < content["moe_layer_count"], "Invalid EPLB Table")
        devices = [device["device_expert"] for device in content["layer_list"][index]["device_list"]]
        _need(len(devices) == ep, "global_placement[rank] for each rank")
        _need(len({len(device) for device in devices}) == 1, "torch.tensor of ragged lists")
        physical = sum(map(len, devices))
        _need(physical - experts == config["num_redundant_experts"], "the configured redundancy sizes the weights")
        maps = []
        for device in devices:
            found = [-1] * experts
            for slot, expert in enumerate(device):
                _need(0 <= expert < experts, "index of expert_map")
                found[expert] = slot  # a second replica on one device overwrites the first
            _need(sum(slot != -1 for slot in found) == len(device), "a slot that no token reaches")
            maps.append(found)
        _need(all(any(one[expert] != -1 for one in maps) for expert in range(experts)), "valid_cnts.all()")
        held[layer] = devices
    _need(config["expert_map_path"].endswith(".json"), "expert_map_path is a .json")
    return held


def _flag(flags: str, name: str, default: str | None = None) -> str:
    found = re.search(rf"{re.escape(name)} ('[^']*'|\S+)", flags)
    if found is None:
        _need(default is not None, f"no {name}")
        assert default is not None
        return default
    return found[1].strip("'")


def loaded(engine: str, files: list[Path], *, ep: int, hidden_layers: int, moe_layers: list[int], experts: int) -> Held:
    """What an engine holds when launched with the files that `export` wrote (the map first, launch.txt last)."""
    text, flags = files[0].read_text(), files[-1].read_text().replace("\\\n", " ")
    if engine == "sglang":
        return sglang(text, flags, hidden_layers=hidden_layers, moe_layers=moe_layers, experts=experts)
    if engine == "trtllm":
        return trtllm(text, files[1].read_text(), moe_layers=moe_layers, experts=experts)
    return vllm_ascend(text, flags, ep=ep, moe_layers=moe_layers, experts=experts)


def held_by(placement: Any) -> Held:
    """The same of an ExpertPlacement."""
    table = placement.physical_to_logical.reshape(placement.layers, placement.ranks, -1).tolist()
    return dict(zip(placement.layer_ids.tolist(), table, strict=True))
