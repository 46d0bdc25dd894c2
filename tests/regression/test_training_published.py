"""Predicted against published training rates: the documented table is what the code says, and no price was fitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.engine.training import simulate_training
from moesim.graph.training_flops import training_flops_per_token
from moesim.output.training_metrics import training_json
from moesim.spec.hf import load_model
from tests.published_training import PublishedRow, published_rows

DRAWS = 20


@pytest.fixture(scope="module")
def rows(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[PublishedRow]:
    return published_rows(shared_data / "published", tmp_path_factory.mktemp("clusters"))


def table_row(row: PublishedRow) -> str:
    result = training_json(simulate_training(row.scenario, draws=DRAWS))
    found, span = result["metrics"]["tflops_per_s_per_gpu"], result["intervals"]["tflops_per_s_per_gpu"]
    inside = "yes" if span["low"] <= row.tflops <= span["high"] else "no"
    label = row.label + (", overlapped" if row.overlaps else "")
    if row.scenario.training is not None and row.scenario.training.router == "trace":
        label += ", real router"
    predicted = f"{found:.0f} [{span['low']:.0f}, {span['high']:.0f}]"
    ratio = f"{found / row.tflops:.1f}"
    return f"| {row.number} | {label} | {row.gpu} | {row.tflops:g} | {predicted} | {ratio} | {inside} |"


def test_the_documented_table_is_what_the_code_says(rows: list[PublishedRow], repo: Path) -> None:
    text = (repo / "docs" / "explanation" / "training.md").read_text(encoding="utf-8")
    documented = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert documented == [table_row(row) for row in rows]


def test_flop_are_counted_as_the_runs_counted_them(rows: list[PublishedRow]) -> None:
    """Where step time and TFLOP/s were both reported, the model's FLOP bring one from the other within 2 %."""
    timed = [row for row in rows if row.step_s]
    assert len(timed) == 15
    for row in timed:
        training, parallel = row.scenario.training, row.scenario.parallel
        assert training is not None
        assert parallel is not None
        gpus = 256 if row.number == 1 else parallel.gpus
        tokens = training.global_batch * training.sequence_length
        flops = training_flops_per_token(load_model(row.scenario.model), training.sequence_length) * tokens
        assert flops / row.step_s / gpus / 1e12 == pytest.approx(row.tflops, rel=0.02), row.label


def test_what_the_page_says_of_the_table(rows: list[PublishedRow], repo: Path) -> None:
    """MFU of row 1, the cost of a real router (rows 2 and 3 differ in it alone), seconds of a micro-batch."""
    text = " ".join((repo / "docs" / "explanation" / "training.md").read_text(encoding="utf-8").split())
    runs = [simulate_training(rows[number].scenario, draws=0) for number in (0, 1, 2)]
    peak = runs[0].model.setup.cluster.gpu.peak("bf16") / 1e12
    mfu = runs[0].rates(runs[0].step.step_s)["mfu"]
    assert f"MFU {100 * mfu:.0f} % against {100 * rows[0].tflops / peak:.0f} % for row 1" in text
    predicted, reported = 1 - runs[1].step.step_s / runs[2].step.step_s, 1 - rows[2].tflops / rows[1].tflops
    assert predicted > 0
    assert f"a real router costs {100 * predicted:.0f} % against the {100 * reported:.0f} % reported" in text
    four, one = rows[11], rows[14]
    assert f"{1e3 * four.step_s / 32:.0f} and {1e3 * one.step_s / 128:.0f} ms" in text
