"""Training in float32, sends over measured links, and the copies that a plain all-to-all makes at home."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim.cost.links import NVLINK_FRACTION
from moesim.engine.training import TrainingModel, simulate_training, training_model
from moesim.engine.training_memory import MOMENTS_BYTES, OPTIMIZER_BYTES, optimizer_bytes
from moesim.engine.training_sync import stage_transfer
from moesim.errors import BadInput
from moesim.graph.training_layer import LayerPieces
from moesim.output.training_metrics import training_json
from moesim.spec.cluster import MeasuredFigure
from tests.costs_cluster import h200
from tests.training_scenarios import asked

FP32 = dict.fromkeys(("dense", "experts", "activations", "dispatch", "combine"), "fp32")


def cluster_file(folder: Path, **peaks: float) -> str:
    data = h200(2).model_dump(mode="json")
    data["gpu"]["flops_per_s"] |= peaks
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_float32_needs_a_peak_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"precision\.dense.*fp32 peak.*cluster file"):
        training_model(asked(precision=FP32), 0)
    plain = simulate_training(asked(), draws=0)
    found = simulate_training(asked(precision=FP32, cluster=cluster_file(tmp_path, fp32=6.7e13)), draws=0)
    assert found.step.step_s > plain.step.step_s
    # MFU is told against the peak of the type that computes.
    rates = found.rates(found.step.step_s)
    assert rates["mfu"] == pytest.approx(rates["tflops_per_s_per_gpu"] * 1e12 / 6.7e13)


def test_float32_weights_have_no_copy_beside_them(tmp_path: Path) -> None:
    assert (optimizer_bytes("bf16"), optimizer_bytes("fp32")) == (OPTIMIZER_BYTES, MOMENTS_BYTES)
    short = training_model(asked(), 0).memory.stages[0]
    full = training_model(asked(precision=FP32, cluster=cluster_file(tmp_path, fp32=6.7e13)), 0).memory.stages[0]
    assert full["weights_experts"] == 2 * short["weights_experts"]
    assert full["gradients_experts"] == short["gradients_experts"]
    assert full["optimizer_experts"] == pytest.approx(short["optimizer_experts"] * MOMENTS_BYTES / OPTIMIZER_BYTES)


def of(**changes: Any) -> TrainingModel:
    return training_model(asked(**changes), 0)


def test_a_send_between_stages_takes_a_datasheets_rate_in_part_and_a_measured_one_whole() -> None:
    setup = of(
        cluster={"system": "h200_sxm", "nodes": 1, "gpus_per_node": 8},
        parallel={"tp": 2, "pp": 2, "attention_dp": 2, "ep": 4},
    ).setup
    cluster = setup.cluster
    moved = setup.local_rows * setup.model.hidden * 2.0
    told = cluster.nvlink_latency_s + moved / (cluster.nvlink_bytes_per_s * NVLINK_FRACTION)
    assert stage_transfer(setup).seconds(None).item() == pytest.approx(told)
    measured = cluster.model_copy(update={"measured": {"nvlink_bytes_per_s": MeasuredFigure(rel_sigma=0.1, points=3)}})
    object.__setattr__(setup, "cluster", measured)
    whole = cluster.nvlink_latency_s + moved / cluster.nvlink_bytes_per_s
    assert stage_transfer(setup).seconds(None).item() == pytest.approx(whole)


def copies(model: TrainingModel, kept: np.ndarray[Any, Any] | None = None) -> list[tuple[str, float]]:
    found = LayerPieces(model.setup).moe(model.pool.counts, kept)
    return [(one.name, float(np.max(one.forward[0].operation.bytes))) for one in found if one.operation == "permute"]  # type: ignore[union-attr]


def test_a_plain_all_to_all_copies_tokens_before_and_after() -> None:
    model = of()
    setup = model.setup
    each = setup.local_rows * (1 + setup.model.moe.top_k) * setup.model.hidden * 2.0
    assert copies(model) == [("permute", each), ("unpermute", each)]
    names = [one.name for one in LayerPieces(setup).moe(model.pool.counts)]
    assert names.index("permute") < names.index("dispatch") < names.index("experts") < names.index("unpermute")
    # Only picks that are kept are copied; DeepEP's kernels copy none; and without EP nothing is sent.
    half = setup.local_rows * (1 + 0.5 * setup.model.moe.top_k) * setup.model.hidden * 2.0
    assert copies(model, np.full(model.pool.counts.shape[:2], 0.5)) == [("permute", half), ("unpermute", half)]
    assert copies(of(policies={"dispatch": {"backend": "deepep"}})) == []
    assert copies(of(parallel={"tp": 1, "pp": 2, "attention_dp": 1, "ep": 1})) == []


def test_the_copies_are_in_the_step() -> None:
    found = training_json(simulate_training(asked(), draws=0))["step"]["by_operation_s"]
    assert found["permute"] > 0
    assert sum(found.values()) == pytest.approx(training_json(simulate_training(asked(), draws=0))["metrics"]["step_s"])
