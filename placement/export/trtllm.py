"""TensorRT-LLM's static load balancer file and its launch flags.

Rules from NVIDIA/TensorRT-LLM: `MoeLoadBalancerConfig` in tensorrt_llm/llmapi/llm_args.py is strict (num_slots,
initial_global_assignments, layer_updates_per_iter and no other key); num_slots divides by the EP size; every absolute
MoE layer the model asks for must be there, with num_slots entries; 0 layer updates per iteration = static.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moesim.errors import BadInput, Infeasible
from moesim.files import read_text, write_text
from moesim.spec.placement_file import integer, integer_rows
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario, yaml_fault
from placement.export.memory import memory_share

FILE = "moe_load_balancer.yaml"
KEYS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")


def render(placement: ExpertPlacement) -> str:
    """The file's text: each layer's slots on one line, as flow-style YAML."""
    lines = [f"num_slots: {placement.slots}", "layer_updates_per_iter: 0", "initial_global_assignments:"]
    for layer, row in zip(placement.layer_ids.tolist(), placement.physical_to_logical.tolist(), strict=True):
        lines.append(f"  {layer}: [{', '.join(map(str, row))}]")
    return "\n".join(lines) + "\n"


def check(data: Any, *, experts: int, ranks: int, where: str) -> None:
    """Raise BadInput or Infeasible where TensorRT-LLM would refuse the file."""
    if not isinstance(data, dict):
        raise BadInput("not a mapping of keys", where=where, mend="give a load balancer file of TensorRT-LLM")
    unknown = sorted(str(key) for key in data if key not in KEYS)
    if unknown:
        raise BadInput(f"TensorRT-LLM takes no key {unknown[0]!r} here", where=where, mend=f"use {', '.join(KEYS)}")
    slots = integer(data.get("num_slots"), where=where, key="num_slots", low=1)
    integer(data.get("layer_updates_per_iter", 0), where=where, key="layer_updates_per_iter")
    assignments = data.get("initial_global_assignments")
    if not isinstance(assignments, dict) or not assignments:
        raise BadInput("initial_global_assignments is no mapping", where=where, mend="give layer: [experts]")
    for layer in assignments:
        integer(layer, where=where, key="a layer of initial_global_assignments")
    table = integer_rows(list(assignments.values()), where=where, key="initial_global_assignments")
    if table.shape[1] != slots:
        raise BadInput(f"{table.shape[1]} assignments for num_slots {slots}", where=where, mend="make them agree")
    if slots % ranks:
        raise Infeasible(
            f"num_slots {slots} does not divide by EP {ranks}",
            where=where,
            mend="change num_slots",
            reason="slots_not_divisible",
        )
    if table.max() >= experts:
        raise BadInput(f"expert {table.max()} of {experts}", where=where, mend=f"ids lie between 0 and {experts - 1}")


def _load(text: str) -> Any:
    """Maps are long: the compiled safe loader where PyYAML has it."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def write(placement: ExpertPlacement, path: Path) -> None:
    """Write the map, after checking it by TensorRT-LLM's rules, whole or not at all."""
    text = render(placement)
    check(_load(text), experts=placement.experts, ranks=placement.ranks, where=str(path))
    write_text(path, text)


def read(path: Path, *, experts: int, ranks: int, absolute_layers: int) -> ExpertPlacement:
    """Read a map back. Raises BadInput or Infeasible."""
    text = read_text(path, what="TensorRT-LLM map")
    try:
        data = _load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"not valid YAML: {yaml_fault(error)}", where=str(path), mend="correct the YAML") from None
    check(data, experts=experts, ranks=ranks, where=str(path))
    assignments = dict(sorted(data["initial_global_assignments"].items()))
    layer_ids = np.asarray(list(assignments), dtype=np.int64)
    if layer_ids.max() >= absolute_layers:
        raise BadInput(
            f"layer {layer_ids.max()} of {absolute_layers}", where=str(path), mend="give a map of this model"
        )
    try:
        return ExpertPlacement(
            physical_to_logical=np.asarray(list(assignments.values()), dtype=np.int64),
            layer_ids=layer_ids,
            experts=experts,
            ranks=ranks,
            absolute_layers=absolute_layers,
            solver="trtllm file",
        )
    except BadInput as error:
        raise BadInput(error.what, where=str(path), mend=error.mend) from None


def options(placement: ExpertPlacement, scenario: Scenario | None) -> str:
    """The extra options file of `trtllm-serve`: parallelism, batch limits (per attention-DP rank there as here)."""
    data: dict[str, Any] = {"moe_expert_parallel_size": placement.ranks}
    tp = placement.ranks
    attention_dp = True
    if scenario is not None and scenario.parallel is not None:
        parallel = scenario.parallel
        tp = parallel.tp * parallel.attention_dp
        attention_dp = parallel.attention_dp > 1
        if parallel.pp > 1:
            data["pipeline_parallel_size"] = parallel.pp
        if parallel.expert_tp > 1:
            data["moe_tensor_parallel_size"] = parallel.expert_tp
        if attention_dp and parallel.tp > 1:
            raise Infeasible(
                f"attention at TP {parallel.tp} x DP {parallel.attention_dp} is no layout of TensorRT-LLM",
                mend="under attention DP its attention runs at TP 1: plan with tp: 1, or export to another engine",
                reason="engine_layout",
            )
    data["tensor_parallel_size"] = tp
    data["enable_attention_dp"] = attention_dp
    if scenario is not None and scenario.serving is not None:
        batching = scenario.serving.batching
        data["max_batch_size"] = batching.max_running_requests_per_dp_rank
        data["max_num_tokens"] = batching.max_batch_tokens_per_dp_rank
        data["enable_chunked_prefill"] = batching.chunked_prefill
        data["kv_cache_config"] = {
            "free_gpu_memory_fraction": round(memory_share(placement, scenario, "free"), 4),
            "enable_block_reuse": batching.prefix_cache,
        }
    data["moe_config"] = {"load_balancer": FILE}
    return str(yaml.safe_dump(data, sort_keys=False))


def launch(placement: ExpertPlacement, scenario: Scenario | None) -> list[str]:
    """Lines of a launch command (`trtllm-serve --help`); everything else is in the options file."""
    del placement
    model = scenario.model if scenario is not None else "MODEL"
    return [f"trtllm-serve {model}", "--backend pytorch", f"--extra_llm_api_options {OPTIONS_FILE}"]


OPTIONS_FILE = "extra_llm_api_options.yaml"
