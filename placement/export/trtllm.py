"""TensorRT-LLM's static load balancer file (its rules: moesim/spec/maps/trtllm.py) and its launch flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moesim.engine.speculative import draft_tokens
from moesim.errors import Infeasible
from moesim.files import write_text
from moesim.spec.hf import load_model
from moesim.spec.maps.trtllm import ASSIGNMENTS, check, parse
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario
from placement.export.instance import Told
from placement.export.memory import memory_share
from placement.export.stages import partition, running_in_a_batch

FILE = "moe_load_balancer.yaml"


def render(placement: ExpertPlacement, mtp_layers: int = 0) -> str:
    """The file's text: each layer's slots on one line, as flow-style YAML.

    mtp_layers: multi-token-prediction layers that the engine asks for beyond the model's own; no loads tell of them, so
    they get TensorRT-LLM's own layout (`_init_load_balancer`, tensorrt_llm/_torch/modules/fused_moe/interface.py).
    """
    rows = dict(zip(placement.layer_ids.tolist(), placement.physical_to_logical.tolist(), strict=True))
    first = np.arange(placement.ranks) * placement.experts // placement.ranks
    default = (first[:, None] + np.arange(placement.slots_per_rank)) % placement.experts
    rows |= {placement.absolute_layers + extra: default.ravel().tolist() for extra in range(mtp_layers)}
    lines = [f"num_slots: {placement.slots}", "layer_updates_per_iter: 0", f"{ASSIGNMENTS}:"]
    lines += [f"  {layer}: [{', '.join(map(str, row))}]" for layer, row in rows.items()]
    return "\n".join(lines) + "\n"


def write(placement: ExpertPlacement, path: Path, scenario: Scenario | None = None) -> None:
    """Write the map, after checking it by TensorRT-LLM's rules, whole or not at all. Raises BadInput.

    A scenario that drafts with multi-token prediction gets those layers too: the engine fails on a layer it lacks.
    """
    drafts = scenario is not None and scenario.serving is not None and draft_tokens(scenario.serving) > 0
    text = render(placement, load_model(scenario.model).mtp_layers if scenario is not None and drafts else 0)
    check(parse(text), experts=placement.experts, ranks=placement.ranks, where=str(path))
    write_text(path, text)


def takes_map(placement: ExpertPlacement, scenario: Scenario | None) -> bool:
    """Whether the engine loads a map for this plan; without one it lays experts out contiguous, without replicas.

    Its load balancer asserts attention DP on more than one GPU (`_init_load_balancer`, as above). Raises Infeasible for
    a placement that needs the map where the engine takes none.
    """
    parallel = None if scenario is None else scenario.parallel
    attention_dp = placement.ranks if parallel is None else parallel.attention_dp
    if attention_dp > 1 and placement.ranks > 1:
        return True
    if placement.redundant or (placement.physical_to_logical != np.arange(placement.slots)).any():
        raise Infeasible(
            f"TensorRT-LLM loads a map under attention DP and EP only, not at DP {attention_dp}, EP {placement.ranks}",
            where="parallel",
            mend="plan with attention_dp over 1, or with contiguous experts and no replicas",
            reason="engine_layout",
        )
    return False


def options(placement: ExpertPlacement, scenario: Scenario | None) -> str:
    """The extra options file of `trtllm-serve`: parallelism, batch limits (per attention-DP rank there as here).

    Its max_batch_size is of one batch; with pipeline stages several are under way (PyExecutor, `num_micro_batches`).
    """
    data: dict[str, Any] = {"moe_expert_parallel_size": placement.ranks}
    tp = placement.ranks
    attention_dp = True
    if scenario is not None and scenario.parallel is not None:
        parallel = scenario.parallel
        tp = parallel.tp * parallel.attention_dp
        attention_dp = parallel.attention_dp > 1
        if parallel.pp > 1:
            data["pipeline_parallel_size"] = parallel.pp
        layers = partition(scenario, "trtllm")
        if layers is not None:
            data["pp_partition"] = layers
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
        data["max_batch_size"] = running_in_a_batch(scenario)
        data["max_num_tokens"] = batching.max_batch_tokens_per_dp_rank
        data["enable_chunked_prefill"] = batching.chunked_prefill
        data["kv_cache_config"] = {
            "free_gpu_memory_fraction": round(memory_share(placement, scenario, "free"), 4),
            "enable_block_reuse": batching.prefix_cache,
        }
        drafts = draft_tokens(scenario.serving)
        if drafts:
            data["speculative_config"] = {"decoding_type": "MTP", "num_nextn_predict_layers": drafts}
    if takes_map(placement, scenario):
        data["moe_config"] = {"load_balancer": FILE}
    return str(yaml.safe_dump(data, sort_keys=False))


def launch(placement: ExpertPlacement, scenario: Scenario | None, told: Told | None = None) -> list[str]:
    """Lines of a launch command (`trtllm-serve --help`); everything else is in the options file."""
    del placement
    model = scenario.model if scenario is not None else (told or Told()).model or "MODEL"
    return [f"trtllm-serve {model}", "--backend pytorch", f"--extra_llm_api_options {OPTIONS_FILE}"]


OPTIONS_FILE = "extra_llm_api_options.yaml"
