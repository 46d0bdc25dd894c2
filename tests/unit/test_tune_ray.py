"""Ray clusters on this machine: the trials of one process, whatever is lost meanwhile. Needs the extra `ray`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import run
from tests.scenarios import small, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install '.[ray]'"),
]
TRIALS = 14
# One actor's process is killed at its third plan, once; actors import what the driver's PYTHONPATH says.
DYING = """
import os
from placement import objective
real, seen = objective.Evaluator.evaluate, []
def dying(self, plan):
    seen.append(plan)
    if len(seen) == 3:
        try:
            os.close(os.open(os.environ["MOESIM_TEST_DIES"], os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), 9)
        except FileExistsError:
            pass
    return real(self, plan)
objective.Evaluator.evaluate = dying
"""


def scenario(folder: Path) -> Path:
    data = small(search={"solvers": ["greedy", "contiguous"], "redundant_experts": [0, 8]})
    data["serving"]["workload"]["requests"] = 40
    return write(folder, data)


def arguments(path: Path, out: Path, *more: str) -> list[str]:
    return ["tune", str(path), "--trials", str(TRIALS), "--out", str(out), "--json", *more]


def test_two_actors_of_which_one_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenario(tmp_path)
    assert run(arguments(path, tmp_path / "one")) == 0
    whole: dict[str, Any] = json.loads(capsys.readouterr().out)
    # Actors find RemoteEvaluator in placement.ray_workers; a module that they import first makes it die.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif any('default_worker' in word for word in sys.orig_argv):\n"
        + "".join(f"    {line}\n" for line in DYING.strip().splitlines())
    )
    died = tmp_path / "died"
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "MOESIM_TEST_DIES": str(died)}
    command = [sys.executable, "-m", "moesim", *arguments(path, tmp_path / "two", "--ray", "local", "--workers", "2")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert died.exists()
    told = json.loads(done.stdout)
    assert told["run"]["workers"] == 2
    for key in ("trial_list", "best", "gain", "alternatives", "pareto", "verdict"):
        assert told[key] == whole[key]


def test_a_cluster_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    asked = arguments(scenario(tmp_path), tmp_path / "run", "--ray", "auto")
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "moesim", *asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 2, done.stderr[-2000:]
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
