"""Prices single plans as aiconfigurator's own sweep does: run by its interpreter, JSON in, one line of JSON out.

Nothing here imports moesim. The `estimate` command cannot stand in for this: it prices expert parallelism within a node
by all-gather and reduce-scatter where the sweep takes DeepEP, and tells no plan of the sweep apart by operation. Names
are those of aiconfigurator 0.12 (`aiconfigurator.sdk.task_v2.Task`, `sdk.backends.factory`, `sdk.models`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import sys
from typing import Any


def main() -> None:
    """Read {"task": ..., "points": [...]} from stdin, write {"version": ..., "points": [...]}."""
    out, sys.stdout = sys.stdout, sys.stderr
    logging.disable(logging.WARNING)
    asked = json.load(sys.stdin)
    task = importlib.import_module("aiconfigurator.sdk.task_v2").Task(serving_mode="agg", **asked["task"])
    found = [_point(task, one) for one in asked["points"]]
    out.write(json.dumps({"version": importlib.metadata.version("aiconfigurator"), "points": found}) + "\n")


def _point(task: Any, point: dict[str, int]) -> dict[str, Any]:
    try:
        return _priced(task, point)
    except Exception as error:  # whatever aiconfigurator raises is the reason why it has no figure
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def _priced(task: Any, point: dict[str, int]) -> dict[str, Any]:
    make_backend = importlib.import_module("aiconfigurator.sdk.backends.factory").get_backend
    get_model = importlib.import_module("aiconfigurator.sdk.models").get_model
    layout = (point["tp"], 1, point["attention_dp"], point["expert_tp"], point["ep"], 1)
    config = task.build_model_config(role="agg", parallel=layout)
    model = get_model(task.model_path, config, task.backend_name)
    database = task._load_database(task.system_name, task.backend_name, task.backend_version)
    # A backend keeps what it priced by batch size alone: a new one for each layout.
    summary = make_backend(task.backend_name).run_agg(
        model, database, task.build_runtime_config(batch_size=point["batch"]), ctx_tokens=point["context_tokens"]
    )
    row, steps = summary.get_result_dict(), summary.get_per_ops_data() or {}
    scheduling = steps.get("scheduling", {})
    return {
        "ttft_ms": float(row["ttft"]),
        "tpot_ms": float(row["tpot"]),
        "tokens_per_s_per_gpu": float(row["tokens/s/gpu"]),
        "memory_gib": float(row["memory"]),
        "out_of_memory": bool(summary.check_oom()),
        "comm": dict(config.moe_comm_backend or {}),
        "kv_cache": getattr(config.kvcache_quant_mode, "name", None),
        "fmha": getattr(config.fmha_quant_mode, "name", None),
        "power_law": getattr(model, "_power_law_alpha", None),
        "mixed_step_ms": scheduling.get("mix_step_latency_ms"),
        "decode_step_ms": scheduling.get("genonly_step_latency_ms"),
        "mixed_steps": scheduling.get("num_mix_steps"),
        "decode_steps": scheduling.get("num_genonly_steps"),
        "mixed_by_operation_ms": _numbers(steps.get("mix_step")),
        "decode_by_operation_ms": _numbers(steps.get("genonly_step")),
    }


def _numbers(found: dict[str, Any] | None) -> dict[str, float]:
    return {name: float(value) for name, value in (found or {}).items()}


if __name__ == "__main__":
    main()
