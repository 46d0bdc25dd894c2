"""vLLM's launch flags; it loads no static map, so no map is written.

`EPLBConfig` of vllm/config/parallel.py (vllm-project/vllm, commit 00193b82b0e2 of 2026) has no key for one; a map
computed offline is asked for or proposed in 34297, 41141, 49572 and 53022, all open. What a release can start with are
two layouts: contiguous (`linear`, with replicas slot s mod experts: `build_initial_global_physical_to_logical_map` in
vllm/distributed/eplb/eplb_state.py) and, since pull request 23745, `--expert-placement-strategy round_robin`, which
falls back to linear (`determine_expert_placement_strategy`) with replicas, with EPLB, for a model without expert
groups, or under an all-to-all backend other than deepep_low_latency. Everything else its own balancer
(`--enable-eplb`) lays out while it serves.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moesim.engine.speculative import draft_tokens
from moesim.errors import BadInput
from moesim.spec.hf import load_model
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario
from placement.export.instance import Told
from placement.export.memory import memory_share
from placement.export.stages import partition

GATE = "no release of vLLM loads a static expert map yet (vllm-project/vllm issues 34297 and 49572)"
BACKENDS = {"normal": "deepep_high_throughput", "low_latency": "deepep_low_latency", "auto": "deepep_low_latency"}

# Defaults of vLLM's EPLBConfig (vllm/config/parallel.py of vllm-project/vllm).
WINDOW_SIZE = 1000
STEP_INTERVAL = 3000


def write(placement: ExpertPlacement, path: Path) -> None:
    """Always raises BadInput, which names the version gate."""
    del placement
    raise BadInput(GATE, where=str(path), mend="use --format sglang or trtllm; `moesim export` writes vLLM's flags")


def parallel_lines(placement: ExpertPlacement, scenario: Scenario | None, told: Told | None = None) -> list[str]:
    """`vllm serve` with its parallelism and batch limits, which vLLM counts per DP engine, as a scenario does.

    EP is not given: with --enable-expert-parallel it is TP x DP.
    """
    lines = [f"vllm serve {scenario.model if scenario is not None else (told or Told()).model or 'MODEL'}"]
    if scenario is None or scenario.parallel is None:
        lines.append(f"--data-parallel-size {placement.ranks}")
    else:
        parallel = scenario.parallel
        lines += [f"--tensor-parallel-size {parallel.tp}", f"--data-parallel-size {parallel.attention_dp}"]
        if parallel.decode_cp > 1:
            lines.append(f"--decode-context-parallel-size {parallel.decode_cp}")
        if parallel.pp > 1:
            lines.append(f"--pipeline-parallel-size {parallel.pp}")
        layers = partition(scenario, "vllm")
        if layers is not None:
            lines[0] = f"VLLM_PP_LAYER_PARTITION={','.join(map(str, layers))} {lines[0]}"
    if placement.ranks > 1:
        lines.append("--enable-expert-parallel")
    if scenario is not None and scenario.serving is not None:
        batching = scenario.serving.batching
        lines.append(f"--max-num-batched-tokens {batching.max_batch_tokens_per_dp_rank}")
        lines.append(f"--max-num-seqs {batching.max_running_requests_per_dp_rank}")
        lines.append(f"--gpu-memory-utilization {round(memory_share(placement, scenario, 'all'), 4):g}")
        lines.append("--enable-prefix-caching" if batching.prefix_cache else "--no-enable-prefix-caching")
        if not batching.chunked_prefill:
            lines.append("--no-enable-chunked-prefill")
        drafts = draft_tokens(scenario.serving)
        if drafts:
            config = {"method": "mtp", "num_speculative_tokens": drafts}
            lines.append(f"--speculative-config '{json.dumps(config)}'")
    return lines


def starts_with(placement: ExpertPlacement, scenario: Scenario | None) -> str | None:
    """The strategy that lets vLLM start with this very placement: linear, round_robin, or None where it cannot."""
    slots = np.arange(placement.slots)
    if (placement.physical_to_logical == slots % placement.experts).all():
        return "linear"
    dealt = np.argsort(slots % placement.ranks, kind="stable")
    if placement.redundant or (placement.physical_to_logical != dealt).any() or scenario is None:
        return None
    dispatch = scenario.policies.dispatch
    low_latency = BACKENDS[dispatch.mode] == "deepep_low_latency"
    tables = low_latency if dispatch.backend == "deepep" else dispatch.backend == "allgather_reducescatter"
    return "round_robin" if tables and load_model(scenario.model).moe.groups > 1 else None


def note(placement: ExpertPlacement, scenario: Scenario | None) -> str:
    """What an operator must know of the layout that vLLM starts with."""
    if starts_with(placement, scenario) is not None:
        return "vLLM starts with this very placement"
    each = f"every {STEP_INTERVAL} steps" if placement.redundant else "never, as there are no replicas"
    return f"{GATE}: flags only, no map; vLLM starts contiguous, and its own balancer moves experts {each}"


def launch(placement: ExpertPlacement, scenario: Scenario | None, told: Told | None = None) -> list[str]:
    """Lines of a launch command; with replicas, vLLM's own balancer gets that many."""
    lines = parallel_lines(placement, scenario, told)
    if starts_with(placement, scenario) == "round_robin":
        lines.append("--expert-placement-strategy round_robin")
    if scenario is not None and scenario.policies.dispatch.backend == "deepep":
        lines.append(f"--all2all-backend {BACKENDS[scenario.policies.dispatch.mode]}")
    if scenario is not None and scenario.policies.schedule == "two_batch":
        lines.append("--enable-dbo")
    if scenario is not None and scenario.policies.schedule == "whole_graph":
        lines.append(f"--compilation-config '{json.dumps({'cudagraph_mode': 'FULL'})}'")
    if placement.redundant:
        config = {
            "window_size": WINDOW_SIZE,
            "step_interval": STEP_INTERVAL,
            "num_redundant_experts": placement.redundant,
        }
        lines += ["--enable-eplb", f"--eplb-config '{json.dumps(config)}'"]
    return lines
