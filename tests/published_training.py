"""Published training rows as scenarios; what a row leaves open is chosen as docs/explanation/training.md lists."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from moesim.spec.scenario import Scenario

MODELS = {"Qwen3-235B-A22B": "Qwen/Qwen3-235B-A22B", "Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B"}
# GPUs of the rows that have a preset here.
SYSTEMS = {"H100": "h100_sxm", "H100 p5": "h100_sxm"}
MODULES = {"norm,act": ["layernorm", "moe_act"], "layernorm moe": ["layernorm", "moe"]}


@dataclass(frozen=True)
class PublishedRow:
    """One row of the table: its line (from 1), what it was, and what was reported (step_s 0 where it was not)."""

    number: int
    label: str
    gpu: str
    scenario: Scenario | None
    step_s: float
    tflops: float


def published_rows(path: Path) -> list[PublishedRow]:
    """All rows; those on a GPU without a preset have no scenario."""
    with path.open(newline="", encoding="utf-8") as lines:
        return [_row(number, row) for number, row in enumerate(csv.DictReader(lines), 1)]


def _row(number: int, row: dict[str, str]) -> PublishedRow:
    label = f"{row['model']}, {row['dispatcher']}, seq {row['seq']}, mbs {row['mbs'] or '?'}, {row['balance']}"
    scenario = _scenario(row) if row["gpu"] in SYSTEMS else None
    return PublishedRow(number, label, row["gpu"], scenario, float(row["step_s"] or 0), float(row["tflops_per_gpu"]))


def _scenario(row: dict[str, str]) -> Scenario:
    tp, pp, ep, virtual = (int(row[name] or 1) for name in ("tp", "pp", "ep", "vpp"))
    recompute = {"selective": "selective", "off": "none"}.get(row["recompute"])
    training = {
        "sequence_length": int(row["seq"]),
        "micro_batch": int(row["mbs"] or 1),
        "global_batch": int(row["gbs"]),
        "recompute": recompute or "selective",
        "pipeline": {"schedule": "interleaved" if virtual > 1 else "1f1b", "virtual_stages": virtual},
        "router": "trace" if "real router" in row["balance"] else "balanced",
        "optimizer": {"overlap_gradients": True, "overlap_parameters": True},
        "memory": {"fraction": 1.0},
    }
    if recompute is None:
        training["recompute_modules"] = MODULES[row["recompute"]]
    return Scenario.model_validate(
        {
            "model": MODELS[row["model"]],
            "cluster": {"system": SYSTEMS[row["gpu"]], "nodes": int(row["n_gpus"]) // 8},
            "cost": {"source": "roofline"},
            "precision": {"dense": "bf16", "experts": "bf16", "dispatch": "bf16", "combine": "bf16"},
            "parallel": {"tp": tp, "pp": pp, "attention_dp": ep // tp, "ep": ep},
            "policies": {"dispatch": {"backend": "deepep" if "DeepEP" in row["dispatcher"] else "alltoall"}},
            "training": training,
        }
    )
