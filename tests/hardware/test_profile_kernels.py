"""Sweeps of kernels as a user runs them: on a bare machine, killed at any moment, and priced from at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import cli
from profiles.capture import read_lines
from profiles.sweep import QUICK, Reach, plan

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")
pytestmark = pytest.mark.hardware

ONLY = ("gemm", "experts", "norm", "attention_decode", "kv_write")
SMALL = ("--quick", "--repeats", "200", *(word for family in ONLY for word in ("--only", family)))
KILLS = 10 if os.environ.get("MOESIM_WHOLE") else 4
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "moesim.cli", "profile", "kernels", "--out", str(out), *SMALL, *more]


def expected(reach: Reach) -> set[str]:
    return {json.dumps([p.family, p.key, p.size], sort_keys=True) for p in plan(reach) if p.family in ONLY}


def found(path: Path) -> list[str]:
    return [json.dumps([line.family, line.key, line.size], sort_keys=True) for line in read_lines([path])]


def test_killed_at_random_it_ends_with_the_same_points(tmp_path: Path) -> None:
    out = tmp_path / "sweep.jsonl"
    rng = np.random.default_rng(3)
    held = b""
    for _ in range(KILLS):
        process = subprocess.Popen(
            command(out), cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Wait until it measures, so that kills fall into the sweep and not into the import of torch.
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if out.exists() and out.stat().st_size > len(held):
                break
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.05)))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the sweep is too short to be killed so often"
        now = out.read_bytes()
        assert now.startswith(held)  # what was finished stays as it was written
        held = now[: now.rfind(b"\n") + 1]
    lines = held.split(b"\n")[:-1]
    done = subprocess.run(command(out), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    points = found(out)
    assert set(points) == expected(QUICK)
    assert len(points) == len(set(points))
    assert f"kept {len(lines)}" in done.stdout
    again = subprocess.run(command(out), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert f"measured 0 points, kept {len(points)}" in again.stdout


def test_the_script_runs_where_only_torch_and_numpy_are(tmp_path: Path, repo: Path) -> None:
    """On a copy of the repository, from another folder, with everything else that moesim needs made unimportable."""
    bare = tmp_path / "copy"
    for name in ("moesim", "profiles"):
        shutil.copytree(repo / name, bare / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("pydantic", "polars", "typer", "simpy", "numba", "scipy", "yaml", "rich"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is not on a bare machine')\n")
    out = tmp_path / "bare.jsonl"
    line = [sys.executable, str(bare / "profiles" / "kernels.py"), "--quick", "--only", "norm", "--out", str(out)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(blocked)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_lines([out])) == len(QUICK.rows)


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    return cli.run(["profile", "kernels", *arguments]), capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--quick", "--device", "abacus"], 2, "unknown device"),
        (["--quick", "--only", "nothing"], 2, "unknown family"),
        (["--point", "gemm n=1"], 2, "lacks"),
        pytest.param(
            ["--quick", "--device", "cuda"],
            3,
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
        ),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = told([*arguments, "--out", str(tmp_path / "x.jsonl")], capsys)
    assert status == code
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "x.jsonl").exists()


def test_a_file_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "notes.txt"
    out.write_text("a line\n")
    status, said = told(["--quick", "--only", "norm", "--out", str(out)], capsys)
    assert status == 2
    assert f"{out}:1: not a JSON object" in said
    assert out.read_text() == "a line\n"


def test_a_wrong_kernel_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesim.errors import CheckFailed
    from profiles.kernels import Options, measure, verdict
    from profiles.torch_kernels import Builder, Case

    right = Builder.case

    def wrong(self: Any, point: Any) -> Case:
        made = right(self, point)
        return Case(made.run, lambda: 0.5) if point.size["tokens"] == 16 else made

    monkeypatch.setattr(Builder, "case", wrong)
    done = measure(Options(quick=True, families=("norm",)), tmp_path / "x.jsonl")
    assert (done.measured, len(done.wrong)) == (2, 1)
    assert len(read_lines([tmp_path / "x.jsonl"])) == 2
    with pytest.raises(CheckFailed, match="1 kernels were wrong"):
        verdict(done)


def test_every_case_of_the_quick_sweep_is_right(tmp_path: Path) -> None:
    """Every family, each against float32, in bf16 as swept and in float32, where rounding hides less."""
    from profiles.asked import asked
    from profiles.kernels import case_of
    from profiles.torch_kernels import TOLERANCE, Builder, dtype_of

    builder = Builder(torch, "cpu")
    points = [p for p in plan(QUICK) if p.family != "ceiling" and max(p.size.values()) <= 64]
    points += [
        one
        for family, words in {
            "gemm": "n=40 k=24 m=9",
            "experts": "hidden=32 intermediate=16 experts=12 top_k=3 local_experts=5 routed=40 distribution=zipf_1",
            "attention_prefill": "heads=6 kv_heads=2 head_dim=16 batch=2 new_tokens=33",
            "attention_decode": "heads=6 kv_heads=2 head_dim=16 batch=2 kv_tokens=33",
            "mla_prefill": "heads=3 kv_lora_rank=64 qk_nope_head_dim=32 qk_rope_head_dim=16 value_head_dim=32 batch=2"
            " new_tokens=17",
            "mla_decode": "heads=3 kv_lora_rank=64 qk_nope_head_dim=32 qk_rope_head_dim=16 value_head_dim=32 batch=2"
            " kv_tokens=17",
            "mla_absorb": "side=post heads=3 kv_lora_rank=64 head_dim=32 tokens=5",
        }.items()
        for one in asked(f"{family} {words} dtype=fp32")
    ]
    with torch.inference_mode():
        for point in points:
            error = case_of(torch, builder, point).error
            assert error is not None
            assert error() <= TOLERANCE[dtype_of(point)], point
