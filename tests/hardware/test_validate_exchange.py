"""`moesim validate exchange` on two gloo ranks as a user runs it: predictions first, then the skews."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import cli
from profiles.capture import read_lines
from validate.exchange.run import ExchangeJob, predict, refuse_known, tables, ten_cases
from validate.hardware.job import synthetic_profile
from validate.hardware.run import EXPERTS

pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")
pytestmark = pytest.mark.hardware
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "moesim.cli", "validate", "exchange", "--quick", *more]
    return subprocess.run(line, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=180)


def test_predictions_come_first_from_a_profile_without_the_skews(tmp_path: Path) -> None:
    done = run(tmp_path, "--json")
    assert done.returncode in (0, 1), done.stderr  # 1: on a busy machine a pair may come out the wrong way round
    record = json.loads(done.stdout)
    folder = tmp_path / "runs" / "validate-exchange"
    assert record == json.loads((folder / "record.json").read_text())
    text = (folder / "predictions.json").read_bytes()
    assert hashlib.sha256(text).hexdigest() == record["predictions"]["sha256"]
    assert record["predictions"]["written"] < record["measured_from"]
    predicted = json.loads(text)["cases"]
    assert [one["seconds"] for one in predicted] == [one["predicted_s"] for one in record["cases"]]
    assert len(record["cases"]) == 10
    pairs = record["comparison"]["beyond_twice_the_spread"]
    assert pairs["pairs"] == 45
    assert done.returncode == int(pairs["agreed"] < pairs["decided"])
    lines = read_lines([folder / "profile.jsonl"])
    assert {line.extra.get("pattern", "even") for line in lines} == {"even", "kept", "kept_by_one", "one_way"}
    # The predictions are what that file says, and nothing else.
    job = asked_job(record)
    counts = [case.counts(job.size) for case in job.cases]
    refuse_known(lines, job, counts, (0, 0))
    assert predict(tables(lines), job, counts, (0, 0))["seconds"] == [one["seconds"] for one in predicted]


def asked_job(record: dict[str, Any]) -> ExchangeJob:
    profile = synthetic_profile(EXPERTS, np.random.default_rng([record["seed"], 9]))
    cases = ten_cases(profile, record["ranks"], source="synthetic routing")
    return ExchangeJob(record["backend"], cases, record["bytes"], record["repeats"], record["seed"], "")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--ranks", "1"], 2, "exchanges nothing"),
        (["--size", "much"], 2, "no size"),
        (["--placement", "map.json"], 2, "there are no loads"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["validate", "exchange", "--quick", *arguments]) == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
