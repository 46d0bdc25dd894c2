"""Validations on GPUs: skipped by name where there are none, or one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")

import torch

from moesim.cli import run
from tests.hardware.test_validate_training import ENVIRONMENT, small
from validate.training.job import ONE
from validate.training.rank import GRADIENT_LIMIT, contiguous, gradient_error
from validate.training.step import Stepper
from validate.training.ways import Made

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.hardware


@pytest.mark.skipif(GPUS > 0, reason="this machine has a GPU")
def test_without_a_gpu_it_is_a_missing_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "training", "--backend", "nccl"]) == 3
    said = capsys.readouterr()
    assert "nccl needs a GPU" in said.err and len(said.err.strip().splitlines()) == 1
    assert said.out == ""


@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
def test_a_gpu_finds_the_gradients_of_the_cpu(tmp_path: Path) -> None:
    job = small(tmp_path, "DP2")
    torch.set_float32_matmul_precision("highest")
    here = Stepper(job, ONE, Made(0), contiguous(job))
    there = Stepper(job, ONE, Made(0, device=torch.device("cuda", 0)), contiguous(job))
    here.run()
    moments = there.run()
    assert 0 < moments.piped_s < moments.reduced_s < moments.done_s
    assert gradient_error(there, {name: one.cuda() for name, one in here.gradients().items()}) < GRADIENT_LIMIT
    assert there.loss == pytest.approx(here.loss, rel=1e-5)


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("started_by", ["itself", "torchrun"])
def test_steps_on_gpus(started_by: str, tmp_path: Path) -> None:
    """Every layout of two ranks over NCCL, gradients checked."""
    line = ["-m", "moesim", "validate", "training", "--backend", "nccl", "--ranks", "2", "--quick", "--json"]
    if started_by == "torchrun":
        line = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *line]
    done = subprocess.run(
        [sys.executable, "-P", *line], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
        timeout=560,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert "gpu" in record["hardware"] and record["job"]["backend"] == "nccl"
    assert record["gradient_error"] < GRADIENT_LIMIT
    assert set(record["core_share"].values()) == {None}
