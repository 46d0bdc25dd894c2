"""Collectives on two gloo ranks as a user runs them: points, resuming, uneven splits, ranks that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from profiles.capture import read_lines
from profiles.collective_points import KINDS

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")
pytestmark = pytest.mark.hardware

ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "moesim.cli", "profile", "collectives", "--out", str(out), "--repeats", "5", *more]


def run(out: Path, *more: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(out, *more), cwd=out.parent, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code, done.stderr
    return done


def alive(folder: Path) -> list[int]:
    """Rank processes whose working folder is this test's."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").readlink() == folder and b"profiles.collectives" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found


def none_left(folder: Path) -> bool:
    until = time.monotonic() + 10
    while alive(folder) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(folder)


def test_two_ranks_measure_every_kind_and_go_on(tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    run(out, "--kinds", "all_to_all,all_reduce", "--to", "4KB")
    first = out.read_bytes()
    done = run(out, "--to", "8KB")
    assert out.read_bytes().startswith(first)
    lines = read_lines([out])
    points = [(line.key["kind"], line.size["bytes"]) for line in lines]
    assert sorted(points) == sorted((kind, size) for kind in KINDS for size in (1024.0, 2048.0, 4096.0, 8192.0))
    assert all(line.key["gpus"] == 2 and line.key["nodes"] == 1 and line.key["path"] == "gloo" for line in lines)
    assert all(line.p10_s <= line.latency_s <= line.p90_s for line in lines)
    assert "send_recv gloo 2 1" in done.stdout
    assert none_left(tmp_path)


def test_measured_collectives_price_a_scenario(tmp_path: Path) -> None:
    import numpy as np

    from moesim.cost.ops import Collective
    from moesim.cost.roofline import Roofline
    from profiles.costs import StoreCosts
    from profiles.store import open_profile
    from tests.costs_cluster import h200

    out = tmp_path / "c.jsonl"
    run(out, "--kinds", "all_to_all", "--from", "64KB", "--to", "64KB")
    line = [sys.executable, "-m", "moesim.cli", "profile", "import", "measured", "c.jsonl", "--system", "box"]
    subprocess.run([*line, "--out", "p"], cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True)
    costs = StoreCosts((open_profile(str(tmp_path / "p"), "box"),), "moesim", False, Roofline(h200(1)))
    priced = costs.estimate(Collective("all_to_all", np.array([65536.0]), 2, 1))
    assert priced.seconds[0] == pytest.approx(read_lines([out])[0].latency_s, rel=1e-12)
    assert priced.tags[0] == 0


def test_uneven_splits_are_their_own_points(tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    run(out, "--kinds", "all_to_all", "--from", "1KB", "--to", "1KB", "--skew", "2")
    (line,) = read_lines([out])
    assert line.family == "uneven_all_to_all"
    assert line.key["distribution"] == "zipf_2"
    assert line.extra["shares"] == pytest.approx([0.8, 0.2])


def test_one_rank_runs(tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    run(out, "--ranks", "1", "--to", "1KB")
    assert len(read_lines([out])) == len(KINDS)


def test_under_torchrun(tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    arguments = command(out, "--kinds", "all_gather", "--to", "2KB")
    done = subprocess.run(
        [*line, *arguments], cwd=tmp_path, env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.size["bytes"] for line in read_lines([out])] == [1024.0, 2048.0]
    assert all(line.key["gpus"] == 2 for line in read_lines([out]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_nccl_without_a_gpu_is_a_missing_part(tmp_path: Path) -> None:
    said = run(tmp_path / "c.jsonl", "--backend", "nccl", "--ranks", "1", code=3).stderr
    assert "NCCL needs a CUDA GPU" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "c.jsonl").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU, and none is here")
def test_nccl_at_world_size_one(tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    run(out, "--backend", "nccl", "--ranks", "1", "--to", "1MB")
    lines = read_lines([out])
    assert {line.key["kind"] for line in lines} == set(KINDS)
    assert all(line.run["nccl"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kinds", "gossip"], "unknown kind"),
        (["--backend", "mpi"], "unknown backend"),
        (["--from", "2MB", "--to", "1KB"], "is less than"),
        (["--to", "a lot"], "no size"),
        (["--kinds", "all_reduce", "--skew", "1"], "only all_to_all"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    said = run(tmp_path / "c.jsonl", *arguments, code=2).stderr
    assert words in said
    assert said.count("\n") == 1


def test_a_killed_rank_ends_all_and_a_killed_command_leaves_none(tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    long = command(out, "--from", "1KB", "--to", "64MB")
    for victim in ("rank", "command"):
        process = subprocess.Popen(
            long, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        before = out.stat().st_size if out.exists() else 0
        until = time.monotonic() + 60
        while time.monotonic() < until and (not out.exists() or out.stat().st_size <= before):
            time.sleep(0.01)
        assert len(alive(tmp_path)) == 2
        target = alive(tmp_path)[0] if victim == "rank" else process.pid
        os.kill(target, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        if victim == "rank":
            assert process.returncode == 1
            assert "was killed by SIGKILL" in said.splitlines()[-1]
        assert none_left(tmp_path)
    finished = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert len({json.dumps([one["key"], one["size"]]) for one in finished}) == len(finished)
