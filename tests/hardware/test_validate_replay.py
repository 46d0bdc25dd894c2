"""`validate replay`: ranks played in turn by one process, from the routes to the record."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import cli
from moesim.errors import CheckFailed
from validate.hardware import layer
from validate.hardware.group import Beat
from validate.hardware.job import Job
from validate.hardware.run import make_job
from validate.records.store import compact
from validate.replay import ranks as replay_ranks
from validate.replay import run as replay
from validate.replay.alone import Alone
from validate.replay.profile import layer_s

pytest.importorskip("torch")
pytestmark = pytest.mark.hardware


def job(out: Path, **changes: Any) -> Job:
    asked: dict[str, Any] = {
        "backend": "gloo", "ranks": 4, "hidden": 32, "intermediate": 16, "experts": 16, "top_k": 2, "tokens": (5, 12),
        "loads": None, "layer": None, "placements": (), "count": 5, "slots": None, "replica": "local_first",
        "kernel": "auto", "repeats": 4, "seed": 3, "out": out, "stall_limit_s": 60.0,
    }  # fmt: skip
    return make_job(**{**asked, **changes})


def staged(asked: Job) -> replay_ranks.Stage:
    import torch

    with torch.inference_mode():
        return replay_ranks.set_up(asked, torch.device("cpu"), Beat(None), {})


def silent(line: str) -> None:
    """Say nothing."""


@pytest.mark.parametrize("kernel", ["loop", "grouped"])
@pytest.mark.parametrize("replica", ["local_first", "equal"])
def test_every_row_reaches_its_rank_and_outputs_are_right(tmp_path: Path, kernel: str, replica: str) -> None:
    import torch

    asked = job(tmp_path, kernel=kernel, replica=replica)
    stage = staged(asked)
    with torch.inference_mode():
        for index, ((placement, tokens), table) in enumerate(zip(asked.cases(), stage.counts, strict=True)):
            assert table.shape == (4, len(placement.slots))
            assert (table.sum(axis=1) == tokens * 2).all()
            local = len(placement.slots) // 4
            for rank in range(4):
                rows, counts = stage.arrived(index, rank)
                assert np.array_equal(np.asarray(counts), table[:, rank * local : (rank + 1) * local])
                assert len(rows) == np.sum(counts)
        assert replay_ranks.check(stage, silent) < 1e-5


def test_a_wrong_expert_is_found_before_anything_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    stage = staged(job(tmp_path))
    right = layer.run_experts
    monkeypatch.setattr(replay_ranks, "run_experts", lambda *given: right(*given) * 1.01)
    with torch.inference_mode(), pytest.raises(CheckFailed, match="differs from the float32 reference"):
        replay_ranks.check(stage, silent)


def test_a_rank_that_is_alone_exchanges_nothing() -> None:
    import torch

    alone = Alone(2, 4, torch.device("cpu"), Beat(None))
    assert alone.gather(np.arange(3.0)).tolist() == [[0.0, 1.0, 2.0]]
    with pytest.raises(NotImplementedError):
        alone.exchange(torch.zeros(2, 2), [1, 1], [1, 1])


def test_the_layer_waits_for_its_slowest_rank_before_and_after_the_experts() -> None:
    """By hand: gate + permute 3 and 5, experts 7 and 2, unpermute 1 and 4."""
    assert layer_s(np.asarray([[1.0, 2.0, 7.0, 1.0], [2.0, 3.0, 2.0, 4.0]])) == 5.0 + 7.0 + 4.0


def played(asked: Job, scatter: float, scale: Callable[[int], float]) -> dict[str, Any]:
    """The comparison of made-up runs whose case c takes scale(c) of what is foretold."""
    rng = np.random.default_rng(1)
    cases = len(asked.cases())
    foretold = rng.uniform(1.0, 2.0, (cases, 4, 4)) * np.linspace(1.0, 3.0, cases)[:, None, None]
    noise = rng.lognormal(sigma=scatter, size=(cases, 4, 40, 4))
    factor = np.asarray([scale(case) for case in range(cases)])[:, None, None, None]
    return replay.compare(asked, foretold, foretold[:, :, None] * noise * factor, "cpu")


def test_goals_hold_for_what_was_foretold_and_fail_for_what_was_not(tmp_path: Path) -> None:
    asked = job(tmp_path, tokens=(8,))
    right = played(asked, 0.01, lambda case: 1.0)
    assert all(goal["holds"] for goal in right["goals"])
    assert right["rank"]["mape"] < 0.01
    assert right["split_half"]["reliability"] > 0.9
    wrong = played(asked, 0.01, lambda case: 1.0 / (1.0 + case) ** 2)
    assert [goal["holds"] for goal in wrong["goals"]] == [False, False, False]


def test_the_command_writes_predictions_first_and_a_whole_record(tmp_path: Path, capsys: Any) -> None:
    small = ["--ranks", "2", "--experts", "8", "--hidden", "32", "--intermediate", "16", "--top-k", "2"]
    words = ["validate", "replay", *small, "--tokens", "6", "--placements", "3", "--repeats", "4", "--json"]
    assert cli.run([*words, "--out", str(tmp_path / "out")]) == 0
    told = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert told == record
    assert record["predictions"]["written"] < record["measured_from"]
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [case["layer_s"] for case in predictions["cases"]] == [case["layer_s"] for case in record["predicted"]]
    assert "not run" in record["communication"]
    sizes = {point["tokens"] for point in predictions["points"] if "tokens" in point}
    assert sizes.isdisjoint({6})
    assert replay.table(record).count("\n") > 10
    (shown,) = compact(record).evidence("it")
    assert (shown.claim, shown.traits["gpu"], shown.cases) == ("expert_time", "CPU", 3)


@pytest.mark.parametrize("words", [["--ranks", "1", "--placements", "3"], ["--ranks", "2", "--placements", "1"]])
def test_where_nothing_differs_no_correlation_is_told(words: list[str], tmp_path: Path, capsys: Any) -> None:
    small = ["--experts", "4", "--hidden", "16", "--intermediate", "8", "--top-k", "2", "--tokens", "4"]
    out = str(tmp_path)
    assert cli.run(["validate", "replay", *small, *words, "--repeats", "4", "--check", "--out", out]) == 1
    assert "rank correlation not told" in capsys.readouterr().out
    assert json.loads((tmp_path / "record.json").read_text())["comparison"]["rank_correlation"] == {"4": None}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_memory_that_runs_out_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(replay_ranks, "set_up", full)
    with pytest.raises(CheckFailed, match="out of memory"):
        replay.run(job(tmp_path), silent)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--device", "cuda"], 3, "GPU"),
        (["--ranks", "3"], 1, "do not divide"),
        (["--tokens", "0"], 2, "tokens"),
        (["--experts", "0"], 2, "0 experts"),
        (["--hidden", "200000", "--intermediate", "200000"], 1, "memory are free"),
    ],
)
def test_refusals(words: list[str], code: int, said: str, capsys: Any, tmp_path: Path) -> None:
    import torch

    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.run(["validate", "replay", *words, "--out", str(tmp_path)]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("MOESIM_WHOLE"), reason="three quiet minutes: MOESIM_WHOLE=1")
def test_ten_placements_on_eight_ranks(tmp_path: Path) -> None:
    assert cli.run(["validate", "replay", "--check", "--out", str(tmp_path)]) == 0
