"""`validate hardware --bundle` on two gloo ranks: one command, one file with profile and validation, imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moesim.cli import run
from moesim.errors import CheckFailed
from moesim.files import write_json
from profiles.bundle import read_bundle, read_records
from profiles.cli import app as profile_app
from profiles.store import open_profile
from tests.unit.test_profiles_bundle import bundle as small_bundle
from tests.unit.test_validate_compact import training
from validate.hardware import bundled
from validate.hardware import run as hardware
from validate.records import store as records
from validate.training import command

pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")
pytestmark = pytest.mark.hardware

WHOLE = pytest.mark.skipif(not os.environ.get("MOESIM_WHOLE"), reason="four minutes: MOESIM_WHOLE=1")
SMALL = ["--experts", "8", "--hidden", "32", "--intermediate", "32", "--top-k", "2", "--repeats", "5"]
CASES = ["--tokens", "8", "--placements", "4"]


def test_the_validation_is_put_into_the_bundle_and_is_not_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a made profile and a made record of steps of training, which have tests of their own."""
    asked: list[Any] = []
    steps: list[Any] = []
    made = training()
    made["comparison"]["step"] = {"mape": 0.25}

    def train(backend: str, make: Any, say: Any, *, keep: bool) -> None:
        steps.append((backend, make(None), keep))
        if len(steps) == 4:
            raise CheckFailed("rank 1 was killed")
        folder = Path(steps[-1][1].out)
        write_json(folder / "record.json", made)
        write_json(folder / "predictions.json", {"layouts": []})

    def sweep(options: Any, say: Any) -> list[str]:
        asked.append(options)
        small_bundle(options.out)
        if len(asked) == 3:
            raise CheckFailed("a kernel is wrong")
        return ["wrote it"]

    monkeypatch.setattr(bundled, "measure", sweep)
    monkeypatch.setattr(command, "start", train)
    out = tmp_path / "node.zip"
    line = ["validate", "hardware", *SMALL, *CASES, "--bundle", str(out), "--quick"]
    assert run(line) == 0
    said = capsys.readouterr().out
    assert "wrote it" in said and "node.zip holds the validation" in said and "steps of training" in said
    (backend, job, keep) = steps[0]
    assert (backend, {one.ranks for one in job.layouts}, job.repeats, keep) == ("gloo", {2}, 2, True)
    assert (asked[0].device, asked[0].ranks, asked[0].quick) == ("cpu", 2, True)
    kept = read_records(out)
    record = kept["validation/record.json"]
    assert kept["validation/predictions.json"]["cases"] == record["predicted"]
    assert len(record["measured"]) == 4
    told = read_bundle(out)[1]["validation"]
    assert (told["cases"], told["training"]["layouts"]) == (4, 2)
    assert kept["training/record.json"] == made
    added = records.add([out], tmp_path / "records")
    assert [one.record.command for one in added] == ["validate hardware", "validate training"]
    monkeypatch.setattr(hardware, "run", lambda job: pytest.fail("the validation ran again"))
    assert run([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == record
    assert run(line) == 1  # a wrong kernel fails the command, and the bundle has its validation all the same
    assert "a kernel is wrong" in capsys.readouterr().err
    assert read_records(out)["validation/record.json"] == record
    shutil.rmtree(Path(job.out))
    assert run(line) == 1  # nor is the profile lost where steps of training fail
    assert "rank 1 was killed" in capsys.readouterr().err
    assert set(read_records(out)) == {"validation/record.json", "validation/predictions.json"}
    assert "training" not in read_bundle(out)[1]["validation"]


@pytest.mark.parametrize("wrong", [["--quick"], ["--budget", "5"], ["--bundle", "a.zip", "--out", "b"]])
def test_options_of_a_bundle_without_one_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "hardware", *wrong]) == 2
    assert "--bundle" in capsys.readouterr().err


def imported(out: Path, folder: Path) -> None:
    lines, manifest = read_bundle(out)
    assert manifest["complete"] and len(lines) > 50
    assert {"collective", "uneven_all_to_all", "experts"} <= {line.family for line in lines}
    arguments = ["import", "measured", str(out), "--system", "box", "--out", str(folder / "profile")]
    assert CliRunner().invoke(profile_app, arguments, catch_exceptions=False).exit_code == 0
    told = open_profile(str(folder / "profile"), "box").description["bundles"][0]["validation"]
    record = read_records(out)["validation/record.json"]
    assert told["layer_mape"] == record["comparison"]["layer"]["mape"]
    layer, steps = records.add([out], folder / "records")
    assert len(layer.record.cases) == 4
    assert len(steps.record.cases) == 6 and steps.record.checks[0].holds


@WHOLE
@pytest.mark.parametrize("started_by", ["itself", "torchrun"])
def test_the_whole_command_measures_predicts_and_bundles(started_by: str, tmp_path: Path) -> None:
    out = tmp_path / "node.zip"
    line = ["-m", "moesim", "validate", "hardware", *SMALL, *CASES, "--bundle", str(out), "--quick"]
    if started_by == "torchrun":
        line = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *line]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-P", *line], capture_output=True, text=True, check=False, timeout=560, cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "node.zip holds the validation" in done.stdout
    imported(out, tmp_path)
