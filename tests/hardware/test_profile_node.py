"""`moesim profile node` on two gloo ranks: one command, one bundle, on a bare machine too; resumed; imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from profiles.bundle import read_bundle
from profiles.cli import app
from profiles.collective_points import KINDS
from profiles.store import open_profile

pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")
pytestmark = [pytest.mark.hardware, pytest.mark.slow]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}


def test_one_command_measures_a_machine_with_torch_and_numpy_only_and_imports(tmp_path: Path, repo: Path) -> None:
    """On a copy of the repository, in two goes: the time of the first is up before its first kernel."""
    bare = tmp_path / "copy"
    for name in ("moesim", "profiles"):
        shutil.copytree(repo / name, bare / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("pydantic", "polars", "typer", "simpy", "numba", "scipy", "yaml", "rich"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is not on a bare machine')\n")
    out = tmp_path / "node.zip"
    line = [sys.executable, str(bare / "profiles" / "node.py"), "--quick", "--out", str(out)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(blocked), "OMP_NUM_THREADS": "1"}

    def go(*more: str) -> str:
        done = subprocess.run(
            [*line, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=180
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "points left for later" in go("--budget", "2")
    lines, manifest = read_bundle(out)
    assert not manifest["complete"] and manifest["points_left"] > 0
    first = (tmp_path / "node.zip.parts" / "collectives.jsonl").read_bytes()
    assert first.count(b"\n") == len(lines) > 0
    told = go()
    assert "wrote" in told and "complete" in told
    assert (tmp_path / "node.zip.parts" / "collectives.jsonl").read_bytes().startswith(first)
    lines, manifest = read_bundle(out)
    assert manifest["complete"] and manifest["points_left"] == 0 and not manifest["wrong"]
    assert (manifest["backend"], manifest["ranks"], manifest["ranks_here"]) == ("gloo", 2, 2)
    assert manifest["command"] == "moesim profile node --device cpu --quick"
    assert str(tmp_path) not in str(manifest)
    families = {line.family for line in lines}
    assert {"collective", "uneven_all_to_all", "overlap", "ceiling", "experts", "gemm", "quantise"} <= families
    assert {line.key["kind"] for line in lines if line.family == "collective"} == set(KINDS)
    patterns = {line.extra["pattern"] for line in lines if line.family == "uneven_all_to_all"}
    assert patterns == {"kept", "kept_by_one", "one_way", "zipf_0.6", "zipf_1.2"}
    profile = tmp_path / "profile"
    arguments = ["import", "measured", str(out), "--system", "box", "--out", str(profile)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    opened = open_profile(str(profile), "box")
    assert {"collective", "uneven_all_to_all", "overlap", "experts", "gemm"} <= set(opened.families())
    assert opened.description["bundles"][0]["command"] == manifest["command"]
