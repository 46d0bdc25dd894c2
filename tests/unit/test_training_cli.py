"""`simulate` of a scenario that trains, as a user runs it."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import run
from tests.scenarios import write
from tests.training_scenarios import training

METRICS = ("step_s", "tokens_per_s", "tokens_per_s_per_gpu", "tflops_per_s_per_gpu", "mfu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, training())


def simulated(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["simulate", str(path), "--json", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    found: dict[str, Any] = json.loads(printed)
    return found


def test_the_example_runs(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """notebooks/scenarios/training.yaml with the default intervals; and on the shipped profile, whose tags it tells."""
    example = repo / "notebooks" / "scenarios" / "training.yaml"
    result = simulated(example, capsys)
    store = ("--set", "cost.source=store", "--set", "cost.extrapolate=allow", "--draws", "0")
    measured = simulated(example, capsys, *store)["provenance"]
    assert result["provenance"] == {"formula": 1.0}
    assert result["validation"][0]["claim"] == "training_step"
    assert measured["measured"] > 0
    assert measured["extrapolated"] > 0
    assert result["schema_version"] == 1
    for name in METRICS:
        found = result["intervals"][name]
        assert found["low"] < result["metrics"][name] < found["high"]
        assert found["level"] == 0.9
    metrics, step, memory = result["metrics"], result["step"], result["memory"]
    assert metrics["tokens_per_s"] == pytest.approx(256 * 4096 / metrics["step_s"])
    assert metrics["mfu"] == pytest.approx(metrics["tflops_per_s_per_gpu"] / 989.4)
    assert set(step) >= {"by_operation_s", "exposed_communication_s", "by_rank_s"}
    assert sum(step["by_operation_s"].values()) == pytest.approx(metrics["step_s"])
    assert len(step["by_rank_s"]) == 32
    assert result["routing"]["per_step_max_over_mean"] >= result["routing"]["max_over_mean"] > 1
    assert result["routing"]["dropped_fraction"] == 0
    assert memory["peak_bytes"] == pytest.approx(sum(memory["ledger"].values()))
    assert memory["peak_bytes"] <= memory["limit_bytes"]
    assert len(memory["by_stage"]) == 2
    assert sum(result["provenance"].values()) == pytest.approx(1.0)
    assert set(result["provenance"]) <= {"measured", "interpolated", "extrapolated", "formula", "assumed"}
    assert set(result["run"]) >= {"seed", "wall_s", "cpu_s", "steps", "events"}


def test_same_seed_same_result(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, same, other = (simulated(path, capsys, "--draws", "3", "--seed", seed) for seed in ("4", "4", "5"))
    for result in (one, same, other):
        result.pop("run")
    assert one == same
    assert one["metrics"] != other["metrics"]


def test_no_draws_no_intervals(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulated(path, capsys, "--draws", "0")["intervals"] == {}


def test_a_key_set_on_the_command_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = simulated(path, capsys, "--draws", "0")
    full = simulated(path, capsys, "--draws", "0", "--set", "training.recompute=full")
    assert full["step"]["by_operation_s"]["recompute"] > plain["step"]["by_operation_s"]["recompute"]
    assert full["memory"]["ledger"]["activations"] < plain["memory"]["ledger"]["activations"]
    split = simulated(path, capsys, "--draws", "0", "--set", "training.pipeline.schedule=zero_bubble")
    assert set(split["step"]["by_pass_s"]) == {"forward", "backward", "weight"}
    assert split["step"]["bubble_share"] < plain["step"]["bubble_share"]


def test_tables_and_page_for_a_person(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert run(["simulate", str(path), "--draws", "3", "--report", str(page)]) == 0
    printed = capsys.readouterr().out
    for shown in ("MFU", "experts", "pipeline_bubble", "8 micro-batches", "Memory"):
        assert shown in printed
    text = page.read_text(encoding="utf-8")
    assert "moesim training report" in text
    assert text.count("<section") == 5
    assert "stage 1" in text
    assert "http" not in text.split("</style>")[1].split("<pre>")[0]


def test_the_timeline_of_the_pipeline(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two stages, 8 micro-batches: a slice for each pass, none over another, the last one ends the step."""
    trace = tmp_path / "trace.json.gz"
    result = simulated(path, capsys, "--draws", "0", "--timeline", str(trace))
    events = json.loads(gzip.decompress(trace.read_bytes()))
    slices = [event for event in events["traceEvents"] if event["ph"] == "X"]
    assert sum(event["name"].startswith(("forward", "backward")) for event in slices) == 2 * 2 * 8
    by_stage: dict[int, list[tuple[float, float]]] = {}
    for event in slices:
        by_stage.setdefault(event["pid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(by_stage) == 2
    for spans in by_stage.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    last = max(end for spans in by_stage.values() for _, end in spans)
    assert last == pytest.approx(1e6 * result["metrics"]["step_s"], abs=2)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--set", "training.global_batch=33"], 1, "training.global_batch: a global batch of 33"),
        (["--set", "training.recompute=some"], 2, "training.recompute"),
        (["--set", "training.recompute_modules=[]"], 2, "training.recompute_modules"),
        (["--set", "training.pipeline.schedule=gpipe"], 2, "training.pipeline.schedule"),
        (["--set", "policies.capacity.rule=switch"], 2, "policies.capacity.factor: rule switch needs a factor"),
        (["--set", "cost.source=store"], 2, "not measured"),
        (["--set", "training.memory.fraction=0.01"], 1, "needs"),
        (["--fidelity", "des"], 2, "--fidelity: training runs on maxplus alone"),
    ],
)
def test_refused_in_one_line(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, told: str
) -> None:
    assert run(["simulate", str(path), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert told in captured.err
    assert captured.err.count("\n") == 1


def test_doctor_knows_training(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "8 micro-batches, 1f1b, 2 chunks" in printed
    assert "in stage 0" in printed
