"""Collectives on two gloo ranks as a user runs them: points, resuming, uneven splits, ranks that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moesim import cli
from profiles.capture import read_lines
from profiles.collective_points import KINDS
from profiles.groups import PRETEND

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")
pytestmark = pytest.mark.hardware

KILLS = 10 if os.environ.get("MOESIM_WHOLE") else 4
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "moesim.cli", "profile", "collectives", "--out", str(out), "--repeats", "5", *more]


def run(out: Path, *more: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    known = ENVIRONMENT | (environment or {})
    done = subprocess.run(
        command(out, *more), cwd=out.parent, env=known, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
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


def test_groups_inside_hosts_and_along_rails_are_rows_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    sizes = ("--from", "64KB", "--to", "64KB")
    uneven = ("--pattern", "kept", "--skew", "2")
    run(out, "--ranks", "4", "--kinds", "all_to_all,all_reduce", *sizes, *uneven, environment={PRETEND: "2"})
    lines = read_lines([out])
    groups = [(4, 2, "all"), (2, 1, "inside"), (2, 2, "rail")]
    even = [line for line in lines if line.family == "collective"]
    assert [(line.key["gpus"], line.key["nodes"], line.extra["group"]) for line in even] == groups
    skewed = [line for line in lines if line.extra.get("pattern") == "zipf_2"]  # of four ranks: only where all meet
    assert [(line.key["gpus"], line.size["bytes"]) for line in skewed] == [(4, 65536.0)]
    kept = [line.key for line in lines if line.extra.get("pattern") == "kept"]
    assert [(key["gpus"], key["nodes"]) for key in kept] == [(gpus, nodes) for gpus, nodes, _ in groups]
    assert all(key["busiest_bytes"] == key["off_node_bytes"] == 0 and key["kept_bytes"] == 65536 for key in kept)
    # 1, 1/4, 1/9, 1/16 of the buffer: rank 0 gets most, half of what others send it comes from the other host.
    weights = [1, 1 / 4, 1 / 9, 1 / 16]
    largest = 65536 / sum(weights)
    assert skewed[0].key["busiest_bytes"] == pytest.approx(3 * largest, rel=1e-3)
    assert skewed[0].key["off_node_bytes"] == pytest.approx(2 * largest, rel=1e-3)
    assert all(line.run["pretended_hosts"] == 2 for line in lines)


def test_beside_a_product_both_slowdowns_are_recorded_and_price_nothing(tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    done = run(out, "--kinds", "all_reduce", "--from", "64KB", "--to", "64KB", "--beside", "gemm")
    (line,) = read_lines([out])
    assert line.family == "overlap"
    assert line.key["work"] == "all_reduce" and str(line.key["beside"]).startswith("gemm fp32 m=")
    assert line.values["slowdown"] == pytest.approx(line.latency_s / line.extra["alone"]["latency_s"])
    assert line.values["beside_slowdown"] > 0.3  # a product does not get quicker by company, scatter aside
    assert "times as long, the product" in done.stdout


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
def test_nccl_without_a_gpu_is_a_missing_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c.jsonl"
    assert cli.run(["profile", "collectives", "--out", str(out), "--backend", "nccl", "--ranks", "1"]) == 3
    said = capsys.readouterr().err
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
        (["--pattern", "gossip"], "unknown pattern"),
        (["--beside", "lunch"], "unknown work"),
        (["--beside", "gemm", "--skew", "1"], "not measured beside"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["profile", "collectives", "--out", str(tmp_path / "c.jsonl"), *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_same_points(tmp_path: Path) -> None:
    """The whole command or one rank, by SIGKILL: no process or folder stays, no finished point is measured again."""
    out, scratch = tmp_path / "c.jsonl", tmp_path / "scratch"
    scratch.mkdir()
    line = command(out, "--from", "1KB", "--to", "4MB", "--repeats", "20")
    rng = np.random.default_rng(5)
    held = b""
    for number in range(KILLS):
        process = subprocess.Popen(
            line, cwd=tmp_path, env=ENVIRONMENT | {"TMPDIR": str(scratch)}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        until = time.monotonic() + 60
        while time.monotonic() < until and (not out.exists() or out.stat().st_size <= len(held)):
            time.sleep(0.005)
        time.sleep(float(rng.uniform(0, 0.08)))
        victim = "rank" if number % 2 else "command"
        ranks = alive(tmp_path)
        assert len(ranks) == 2, "the sweep is too short to be killed so often"
        os.kill(int(rng.choice(ranks)) if victim == "rank" else process.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
        if victim == "rank":
            assert process.returncode == 1
            assert "was killed by SIGKILL" in said.splitlines()[-1]
        assert none_left(tmp_path)
        assert list(scratch.iterdir()) == []
        now = out.read_bytes()
        assert now.startswith(held)  # what was finished stays as it was written
        held = now[: now.rfind(b"\n") + 1]
    done = run(out, "--from", "1KB", "--to", "4MB", "--repeats", "20")
    assert out.read_bytes().startswith(held)
    sizes = [float(2**power) for power in range(10, 23)]
    points = [(line.key["kind"], line.size["bytes"]) for line in read_lines([out])]
    assert sorted(points) == sorted((kind, size) for kind in KINDS for size in sizes)  # each once
    assert f"{len(points)} points" in done.stdout
