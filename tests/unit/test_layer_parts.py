"""What the parts of a layer are made of: nothing that a dense layer does is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesim.engine.deployment import groundwork, resolve
from moesim.engine.stepmodel import price_light_steps
from moesim.graph.priced_step import PricedStep
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write


def light_decode(tmp_path: Path, parallel: dict[str, int], **changes: Any) -> PricedStep:
    data = small(
        model="deepseek-ai/DeepSeek-V3",
        precision={"dense": "fp8_block", "experts": "fp8_block"},
        placement={"solver": "contiguous"},
        parallel=parallel,
        **changes,
    )
    return price_light_steps(resolve(groundwork(load_scenario(write(tmp_path, data)))))["decode"]


def test_a_dense_layer_normalises_before_its_feed_forward(tmp_path: Path) -> None:
    priced = light_decode(tmp_path, {"attention_dp": 8, "ep": 8})
    assert [one.family for one in priced.dense.estimates] == ["memory_bound", "gemm", "memory_bound", "gemm"]


@pytest.mark.parametrize(("backend", "collectives"), [("deepep", 2), ("allgather_reducescatter", 1)])
def test_a_dense_layer_under_tp_gathers_what_deepep_scattered(backend: str, collectives: int, tmp_path: Path) -> None:
    policies = {"dispatch": {"backend": backend}}
    priced = light_decode(tmp_path, {"tp": 2, "attention_dp": 4, "ep": 8}, policies=policies)
    assert len(priced.dense_sync.estimates) == collectives
