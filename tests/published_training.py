"""Published training rows as scenarios; what a row leaves open is chosen as docs/explanation/training.md lists."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import yaml

from moesim.spec.scenario import Scenario

MODELS = {"Qwen3-235B-A22B": "Qwen/Qwen3-235B-A22B", "Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B"}
# GPUs of the rows that have a preset here; the others' figures come from the calibration data's table of hardware.
SYSTEMS = {"H100": "h100_sxm", "H100 p5": "h100_sxm"}
OTHERS = {"B300": "B300 SXM"}
GIGA = 1e9
MODULES = {"norm,act": ["layernorm", "moe_act"], "layernorm moe": ["layernorm", "moe"]}


@dataclass(frozen=True)
class PublishedRow:
    """One row of the table: its line (from 1), what it was, and what was reported (step_s 0 where it was not).

    overlaps: the run overlapped the exchanges with computation, which is not simulated.
    """

    number: int
    label: str
    gpu: str
    scenario: Scenario
    step_s: float
    tflops: float
    overlaps: bool


def published_rows(folder: Path, clusters: Path) -> list[PublishedRow]:
    """All rows of `training_results.csv`; clusters: a folder for the cluster files that are written for them."""
    with (folder / "training_results.csv").open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    files = {gpu: _cluster_file(folder / "hardware.csv", gpu, clusters) for gpu in OTHERS}
    return [
        PublishedRow(
            number=number,
            label=f"{row['model']}, {row['dispatcher']}, {row['seq']} x {row['mbs'] or '?'}",
            gpu=row["gpu"],
            scenario=_scenario(row, files),
            step_s=float(row["step_s"] or 0),
            tflops=float(row["tflops_per_gpu"]),
            overlaps=row["overlap"] == "on",
        )
        for number, row in enumerate(rows, 1)
    ]


def _cluster_file(hardware: Path, gpu: str, folder: Path) -> Path:
    """A cluster file of 8 nodes from the table of hardware: peaks, and two NICs of 400 Gb/s for each GPU."""
    with hardware.open(newline="", encoding="utf-8") as lines:
        facts = next(row for row in csv.DictReader(lines) if row["gpu"] == OTHERS[gpu])
    cluster = {
        "name": gpu.lower(),
        "gpu": {
            "name": facts["gpu"],
            "hbm_bytes": float(facts["HBM_GB"]) * GIGA,
            "hbm_bytes_per_s": float(facts["HBM_TBps"]) * 1e12,
            "flops_per_s": {"bf16": float(facts["bf16_TF_dense"]) * 1e12, "fp8": float(facts["fp8_TF_dense"]) * 1e12},
            "multiprocessors": 1,  # the table has none, and the roofline reads none
        },
        "nodes": 8,
        "nvlink_bytes_per_s": float(facts["NVLink_bidir_GBps"]) / 2 * GIGA,
        "nic_bytes_per_s": int(facts["NIC"].split("x")[0]) / 8 * 400 / 8 * GIGA,
        "pcie_bytes_per_s": 64 * GIGA,  # nothing here crosses PCIe: the presets' figure
    }
    path = folder / f"{gpu.lower()}.yaml"
    path.write_text(yaml.safe_dump(cluster))
    return path


def _scenario(row: dict[str, str], files: dict[str, Path]) -> Scenario:
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
            "cluster": files[row["gpu"]]
            if row["gpu"] in files
            else {"system": SYSTEMS[row["gpu"]], "nodes": int(row["n_gpus"]) // 8},
            "cost": {"source": "roofline"},
            "precision": {"dense": "bf16", "experts": "bf16", "dispatch": "bf16", "combine": "bf16"},
            "parallel": {"tp": tp, "pp": pp, "attention_dp": ep // tp, "ep": ep},
            "policies": {"dispatch": {"backend": "deepep" if "DeepEP" in row["dispatcher"] else "alltoall"}},
            "training": training,
        }
    )
