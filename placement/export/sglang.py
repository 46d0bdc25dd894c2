"""SGLang's expert location file (its rules: moesim/spec/maps/sglang.py) and its launch flags."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moesim.engine.rules import engine_rules
from moesim.engine.speculative import draft_tokens
from moesim.files import write_text
from moesim.spec.maps.sglang import KEY, check
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario
from placement.export.instance import Told, instances_of
from placement.export.memory import memory_share
from placement.export.stages import partition

FILE = "expert_location.json"


def render(placement: ExpertPlacement) -> str:
    """The file's text: one row for every absolute layer; dense ones get SGLang's own trivial row (slot mod experts)."""
    trivial = np.arange(placement.slots, dtype=np.int64) % placement.experts
    rows = np.tile(trivial, (placement.absolute_layers, 1))
    rows[placement.layer_ids] = placement.physical_to_logical
    return json.dumps({KEY: rows.tolist()}) + "\n"


def write(placement: ExpertPlacement, path: Path) -> None:
    """Write the map, after checking it by SGLang's rules, whole or not at all. Raises BadInput."""
    text = render(placement)
    check(
        json.loads(text),
        experts=placement.experts,
        ranks=placement.ranks,
        layers=placement.absolute_layers,
        where=str(path),
    )
    write_text(path, text)


def pipeline_lines(scenario: Scenario) -> list[str]:
    """What a plan says of its pipeline stages beyond their number and split."""
    if scenario.serving is None or scenario.parallel is None or scenario.parallel.pp == 1:
        return []
    asked = scenario.serving.pipeline
    lines = []
    if asked.running_requests_per_dp_rank is not None:
        lines.append(f"--pp-max-micro-batch-size {asked.running_requests_per_dp_rank}")
    if asked.batches is not None and asked.batches > scenario.parallel.pp:
        lines.append(f"--pp-async-batch-depth {asked.batches - scenario.parallel.pp}")
    return lines


def launch(
    placement: ExpertPlacement, scenario: Scenario | None, *, role: str = "", told: Told | None = None
) -> list[str]:
    """Lines of a launch command (docs/advanced_features/server_arguments.md of sgl-project/sglang).

    role: `prefill` or `decode` (pd_disaggregation.md, as above); a prefill server only reads prompts, so DeepEP's mode
    `auto` is `normal` there.

    Under DP attention SGLang divides --chunked-prefill-size and --max-running-requests by the dp size, so the limits
    of one attention-DP rank are multiplied here. tp counts all GPUs of a stage: attention runs at tp / dp.

    --ep-dispatch-algorithm goes with a map alone: without EP SGLang fuses the shared expert of DeepSeek-V3 as one more
    id behind the routed ones (python/sglang/srt/layers/moe/topk.py, models/deepseek_v2.py), and both algorithms look
    ids up in a table of the routed ones (eplb/expert_location_dispatch.py); without the flag no id is translated.
    """
    lines = ["python -m sglang.launch_server"]
    told = told or Told()
    model = told.model if scenario is None else scenario.model
    if model is not None:
        lines.append(f"--model-path {model}")
    lines += ["--trust-remote-code", f"--ep-size {placement.ranks}"]
    if scenario is not None and scenario.parallel is not None:
        parallel = scenario.parallel
        dp = parallel.attention_dp
        lines.append(f"--tp-size {parallel.tp * dp}")
        if parallel.decode_cp > 1:
            lines.append(f"--dcp-size {parallel.decode_cp}")
        if parallel.pp > 1:
            lines.append(f"--pp-size {parallel.pp}")
        if dp > 1:
            lines += [f"--dp-size {dp}", "--enable-dp-attention", "--enable-dp-lm-head"]
            if parallel.tp == 1:
                lines.append("--moe-dense-tp-size 1")
    else:
        ranks = placement.ranks
        lines += [f"--tp-size {ranks}", f"--dp-size {ranks}", "--enable-dp-attention", "--enable-dp-lm-head"]
        lines.append("--moe-dense-tp-size 1")
    if placement.redundant:
        lines.append(f"--ep-num-redundant-experts {placement.redundant}")
    if placement.ranks > 1:
        lines.append(f"--init-expert-location {FILE}")
    if role:
        lines.append(f"--disaggregation-mode {role}")
    nodes = (told.nodes or 1) if scenario is None else instances_of(placement, scenario).nodes
    if nodes > 1:
        lines += [f"--nnodes {nodes}", "--node-rank $NODE_RANK", "--dist-init-addr $MASTER_ADDRESS:5000"]
    static = scenario is None or scenario.policies.dispatch.replica == "local_first"
    if placement.ranks > 1:
        lines.append(f"--ep-dispatch-algorithm {'static' if static else 'dynamic'}")
    if scenario is None:
        return lines
    dispatch = scenario.policies.dispatch
    mode = "normal" if role == "prefill" and dispatch.mode == "auto" else dispatch.mode
    low_latency = dispatch.backend == "deepep" and mode != "normal"
    if low_latency:
        limit = engine_rules("sglang").low_latency_tokens
        lines[0] = f"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK={limit} {lines[0]}"
    layers = partition(scenario, "sglang")
    if layers is not None:
        lines[0] = f"SGLANG_PP_LAYER_PARTITION={','.join(map(str, layers))} {lines[0]}"
    if scenario.policies.dispatch.backend == "deepep":
        lines += ["--moe-a2a-backend deepep", f"--deepep-mode {mode}"]
    if scenario.policies.schedule == "two_batch":
        lines.append("--enable-two-batch-overlap")
    if scenario.serving is not None:
        batching = scenario.serving.batching
        dp = scenario.parallel.attention_dp if scenario.parallel is not None else placement.ranks
        chunk = batching.max_batch_tokens_per_dp_rank * dp if batching.chunked_prefill else -1
        lines.append(f"--chunked-prefill-size {chunk}")
        running = batching.max_running_requests_per_dp_rank
        if low_latency:
            tp = scenario.parallel.tp if scenario.parallel is not None else 1
            running = min(running, engine_rules("sglang").low_latency_tokens * tp)
            lines.append(f"--cuda-graph-max-bs {running}")
        lines.append(f"--max-running-requests {running * dp}")
        lines += pipeline_lines(scenario)
        lines.append(f"--mem-fraction-static {memory_share(placement, scenario, 'static'):.3f}")
        if not batching.prefix_cache:
            lines.append("--disable-radix-cache")
        drafts = draft_tokens(scenario.serving)
        if drafts:
            lines += ["--speculative-algorithm EAGLE", f"--speculative-num-steps {drafts}"]
            lines += ["--speculative-eagle-topk 1", f"--speculative-num-draft-tokens {drafts + 1}"]
    return lines
