"""Runs that show a deployment at its load, and runs that only fill and drain it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine.batcher import Limits
from moesim.engine.serving import Load, Served, serve
from moesim.output.steady import fault_of
from tests.scenarios import small, write

LIMITS = Limits(1000, 64, 100_000, True, False)


def served(arrival_s: np.ndarray, step_s: float) -> Served:
    count = len(arrival_s)
    load = Load(np.full(count, 10), np.full(count, 20), arrival_s=arrival_s)
    return serve(load, LIMITS, ranks=1, instances=1, step_time=lambda plan: step_s)


def test_a_steady_run_has_no_fault() -> None:
    assert fault_of(served(np.arange(300) * 1.0, 0.05), 1.0) is None


def test_a_burst_that_ends_before_the_first_answer_is_too_short() -> None:
    fault = fault_of(served(np.arange(50) * 0.01, 1.0), 100.0)
    assert fault is not None
    assert "too short" in fault
    assert "at least" in fault


def test_a_batch_that_grows_to_the_end_is_told() -> None:
    # Two requests in each step of a second, which then take over twenty: the batch fills for half of the run.
    fault = fault_of(served(np.arange(120) * 0.5, 1.0), 2.0)
    assert fault is not None
    assert "still grows" in fault


def test_simulate_and_its_json_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data: dict[str, Any] = small()
    data["serving"]["workload"]["arrivals"] = {"poisson": {"requests_per_s": 1e6}}
    path = str(write(tmp_path, data))
    assert run(["simulate", path, "--draws", "0"]) == 0
    assert "Not steady" in capsys.readouterr().out
    assert run(["simulate", path, "--draws", "0", "--json"]) == 0
    load = json.loads(capsys.readouterr().out)["load"]
    assert load["steady"] is False
    assert load["offered_output_tokens_per_s_per_gpu"] > load["served_output_tokens_per_s_per_gpu"]
