"""Small scenarios that tests share."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from moesim.cli import run

DEMO = Path(__file__).resolve().parent.parent / "notebooks" / "scenarios" / "demo.yaml"


def small(**changes: Any) -> dict[str, Any]:
    """OLMoE on one node of 8 GPUs, priced by formula: runs in tenths of a second."""
    data: dict[str, Any] = {
        "schema_version": 1,
        "model": "allenai/OLMoE-1B-7B-0924",
        "cluster": {"system": "h200_sxm", "nodes": 1, "gpus_per_node": 8},
        "engine": {"name": "sglang", "version": "0.5.14"},
        "precision": {"dense": "bf16", "experts": "bf16", "dispatch": "bf16", "combine": "bf16"},
        "cost": {"source": "roofline"},
        "routing": {"synthetic": {"kind": "lognormal", "sigma": 0.7, "workloads": 4}},
        "parallel": {"attention_dp": 8, "ep": 8},
        "placement": {"solver": "greedy", "redundant_experts": 8},
        "serving": {
            "workload": {"isl": 256, "osl": 24, "requests": 120, "arrivals": {"poisson": {"requests_per_s": 400}}},
            "batching": {"max_batch_tokens_per_dp_rank": 2048, "max_running_requests_per_dp_rank": 64},
        },
    }
    data.update(changes)
    return data


def write(folder: Path, data: dict[str, Any], name: str = "scenario.yaml") -> Path:
    """Write a scenario file."""
    path = folder / name
    path.write_text(yaml.safe_dump(data))
    return path


def printed(arguments: list[str]) -> dict[str, Any]:
    """The JSON that a command prints, for fixtures of a module, which have no capsys."""
    with redirect_stdout(StringIO()) as out:
        assert run(arguments) == 0
    found: dict[str, Any] = json.loads(out.getvalue())
    return found
