"""`moesim validate training`: real steps on gloo ranks against predictions that were there before."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moesim import cli
from moesim.errors import CheckFailed

pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")

from tests.harm import STALL_S, harmed, processes_with
from validate.records import store
from validate.training import run as runner
from validate.training.company import started_ranks
from validate.training.job import LAYOUTS, ONE, Shape, TrainingJob
from validate.training.memory import needed_bytes
from validate.training.rank import GRADIENT_LIMIT, contiguous, gradient_error
from validate.training.step import Stepper
from validate.training.ways import Made

pytestmark = pytest.mark.hardware
WHOLE = bool(os.environ.get("MOESIM_WHOLE"))
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
SMALL = Shape(layers=6, hidden=32, heads=4, kv_heads=4, head_dim=8, dense_intermediate=48, experts=12, intermediate=16,
              vocabulary=48)  # fmt: skip


def small(out: Path, *names: str, **changes: object) -> TrainingJob:
    return TrainingJob(
        shape=SMALL,
        layouts=tuple(one for one in LAYOUTS if one.name in names),
        sequence_length=16, global_batch=4, repeats=4, warmup=0, out=str(out), stall_s=60.0,
    ).model_copy(update=changes)  # fmt: skip


def test_as_a_user_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [sys.executable, "-m", "moesim.cli", "validate", "training", "--layout", "TP2 EP2",
            "--layout", "PP2, interleaved", "--quick", "--global-batch", "2", "--json"]  # fmt: skip
    done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    folder = tmp_path / "runs" / "validate-training"
    assert record == json.loads((folder / "record.json").read_text())
    assert len(runner.table(record).splitlines()) > len(record["predicted"])
    text = (folder / "predictions.json").read_bytes()
    assert hashlib.sha256(text).hexdigest() == record["predictions"]["sha256"]
    assert json.loads(text)["layouts"] == record["predicted"]
    assert record["predictions"]["written"] < record["measured_from"]
    assert record["gradient_error"] < 1e-5
    assert record["host"] == json.loads(text)["host"]
    assert record["peak_bytes"]["2"] > needed_bytes(TrainingJob.read(record["job"], where="record"), ())
    told = record["host"]["2"]
    assert told["layer_s"] == pytest.approx(max(0.0, told["measured_s"] - told["priced_s"]) / 6)
    kept = store.compact(record)
    assert [one.predicted_s for one in kept.cases] == pytest.approx(
        [one["step_s"] for one in record["predicted"]], abs=1e-6
    )
    assert {one.traits["layout"] for one in kept.covers} == {
        "TP2 EP2 alltoall",
        "PP2 alltoall, interleaved by 3",
    }
    assert kept.checks[0].holds
    for foretold, found in zip(record["predicted"], record["measured"], strict=True):
        assert found["step_s"]["median_s"] > 0
        assert len(found["step_s"]["samples_s"]) == 2
        # The scenario in the folder is the prediction: `simulate` says the same again, from any place.
        scenario = str(folder / foretold["scenario"])
        assert cli.run(["simulate", scenario, "--json", "--draws", "0"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert again["metrics"]["step_s"] == pytest.approx(foretold["step_s"], rel=1e-12)
        assert again["provenance"]["measured"] > 0


def test_all_layouts_have_the_gradients_of_one_process(tmp_path: Path) -> None:
    """Two ranks here; with MOESIM_WHOLE=1 three and four as well, every layout."""
    names = [one.name for one in LAYOUTS if one.ranks == 2 or WHOLE]
    job = small(tmp_path, *names, global_batch=12, repeats=2)
    # Greedy layouts get experts in another order on every layer, as a solver would lay them.
    rng = np.random.default_rng(0)
    slots = {
        one.name: (rng.permuted(contiguous(job), axis=1) if one.placement == "greedy" else contiguous(job)).tolist()
        for one in job.layouts
    }
    for ranks in sorted({one.ranks for one in job.layouts}):
        mine = job.model_copy(update={"layouts": tuple(one for one in job.layouts if one.ranks == ranks)})
        own = {one.name: slots[one.name] for one in mine.layouts}
        found = started_ranks(mine, {"phase": "steps", "ranks": ranks, "slots": own}, lambda line: None)
        assert len(found["errors"]) == len(mine.layouts)
        assert np.asarray(found["errors"]).max() < 1e-4
        assert all(len(repeat) == ranks for moments in found["moments"] for repeat in moments)


def test_the_order_of_experts_changes_nothing_and_a_wrong_weight_shows(tmp_path: Path) -> None:
    """With experts in another order one process finds the same gradients; one gate's weight too many shows in them."""
    job = small(tmp_path, "DP2")
    straight = Stepper(job, ONE, Made(0), contiguous(job))
    turned = Stepper(job, ONE, Made(0), contiguous(job)[:, ::-1].copy())
    straight.run()
    turned.run()
    truth = {name: one.clone() for name, one in straight.gradients().items()}
    assert set(truth) == set(turned.gradients())
    assert gradient_error(turned, truth) < 1e-5
    assert turned.loss == pytest.approx(straight.loss, rel=1e-6)
    turned.weights.views["1.gate"].data[0, 0] += 5.0
    turned.run()
    assert gradient_error(turned, truth) > GRADIENT_LIMIT
    turned.weights.gradients["dense"][0] = np.nan
    assert gradient_error(turned, truth) == np.inf


def test_a_layout_with_wrong_gradients_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank's gradients of norms and gates are a little off: the run ends on both, and says under which layout."""
    job = small(tmp_path, "DP2 EP2")
    harmed(monkeypatch, "other_gradients", "checking against one process")
    with pytest.raises(CheckFailed, match=r"layout DP2 EP2: gradients differ .*nothing was timed"):
        started_ranks(
            job, {"phase": "steps", "ranks": 2, "slots": {"DP2 EP2": contiguous(job).tolist()}}, lambda line: None
        )


@pytest.mark.parametrize(
    ("harm", "phase", "reason"),
    [("killed", "measuring, repeat 2", "rank 1 was killed by SIGKILL while measuring, repeat 2")]
    + (
        [
            ("sleeping", "measuring, repeat 2", f"rank 1 hangs: {STALL_S:g} s without progress, while measuring"),
            ("torch", "checking against one process", "rank 1 ran out of memory while checking against one process"),
        ]
        if WHOLE
        else []
    ),
)
def test_a_lost_rank_is_named(
    harm: str, phase: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    harmed(monkeypatch, harm, phase)
    job = small(tmp_path / "run", "DP2 EP2", stall_s=STALL_S if harm == "sleeping" else 60.0)
    slots = {one.name: contiguous(job).tolist() for one in job.layouts}
    with pytest.raises(CheckFailed, match="rank 1") as caught:
        started_ranks(job, {"phase": "steps", "ranks": 2, "slots": slots}, lambda line: None)
    assert reason in caught.value.line()
    assert "validate training" in caught.value.line()
    assert list(scratch.iterdir()) == []
    assert processes_with(str(scratch)) == []
