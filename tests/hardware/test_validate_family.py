"""`validate hardware --placements N --check`: a small run always; with MOESIM_WHOLE, twelve placements on goals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesim.cli import run
from validate.hardware.job import Job, copies_held

pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")
pytestmark = pytest.mark.hardware

WHOLE = pytest.mark.skipif(
    not os.environ.get("MOESIM_WHOLE"), reason="three minutes each, alone on two cores: set MOESIM_WHOLE=1"
)


def test_a_family_is_compared_and_the_exit_code_is_the_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--experts", "8", "--hidden", "32", "--intermediate", "32", "--top-k", "2", "--repeats", "5"]
    line = ["validate", "hardware", *small, "--tokens", "8", "--placements", "6", "--out", str(tmp_path)]
    code = run([*line, "--check"])
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "record.json").read_text())
    names = [entry["placement"] for entry in record["measured"]]
    assert names == ["contiguous", "planned", "hot_first", "all_on_rank_0", "all_everywhere", "thrice_on_rank_0"]
    goals = record["comparison"]["goals"]
    assert code == (0 if all(goal["holds"] for goal in goals) else 1)
    assert all(f"{goal['goal']}: {goal['told']}" in said for goal in goals)
    profile = json.loads((tmp_path / "predictions.json").read_text())["profile"]
    assert 0.0 < profile["alone"] <= 1.0
    lonely = [point for point in profile["points"] if point["operation"] == "experts_alone"]
    assert {point["rank"] for point in lonely} == {0, 1}
    for foretold, found in zip(record["predicted"], record["measured"], strict=True):
        assert foretold["layer_p10_s"] <= foretold["layer_s"] <= foretold["layer_p90_s"]
        layer = found["layer_s"]
        assert layer["median_low_s"] <= layer["median_s"] <= layer["median_high_s"]
        for ranks in found["operation_s"].values():
            assert len(ranks) == 2 and all(one["p10_s"] <= one["median_s"] <= one["p90_s"] for one in ranks)
    rows = {entry["placement"]: entry["rows_by_rank"] for entry in record["predicted"]}
    assert rows["all_everywhere"] == [16, 16]
    assert rows["all_on_rank_0"][0] > 28


def test_ranks_that_hold_different_numbers_of_experts_run_the_same_samples(tmp_path: Path) -> None:
    """Of this load one rank holds 8 experts over its placements and the other 7; samples by each would part them."""
    small = ["--experts", "8", "--hidden", "32", "--intermediate", "32", "--top-k", "2", "--repeats", "5"]
    line = ["validate", "hardware", *small, "--tokens", "8", "--seed", "2", "--stall-limit", "20"]
    assert run([*line, "--out", str(tmp_path)]) == 0
    held = copies_held(Job.read(json.loads((tmp_path / "job.json").read_text()), where="job"))
    assert sorted(one.total() for one in held) == [7, 8]


def whole(out: Path, *more: str) -> None:
    line = [sys.executable, "-P", "-m", "moesim", "validate", "hardware", "--placements", "12", "--repeats", "40"]
    done = subprocess.run(
        [*line, "--check", "--out", str(out), *more], capture_output=True, text=True, check=False, timeout=600
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr


@WHOLE
def test_twelve_placements_at_three_token_counts(tmp_path: Path) -> None:
    whole(tmp_path)


@WHOLE
@pytest.mark.data
def test_twelve_placements_of_deepseek_r1_routing(tmp_path: Path, shared_data: Path) -> None:
    loads = shared_data / "routing" / "deepseek_r1_decode_in1000out1000.json"
    tokens = ("--tokens", "16", "--tokens", "64", "--tokens", "256")
    layer = ("--loads", str(loads), "--layer", "20", "--hidden", "512", "--intermediate", "256", "--top-k", "8")
    whole(tmp_path, *layer, *tokens)
