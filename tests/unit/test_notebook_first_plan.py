"""The notebook: it runs as a script and prints its figures, and marimo finds nothing to complain of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("marimo", reason="marimo comes with the dev extra")


def ran(repo: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=repo,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_notebook_runs_as_a_script_and_prints_key_figures(repo: Path) -> None:
    done = ran(repo, "notebooks/first_plan.py")
    assert done.returncode == 0, done.stderr
    assert "58 MoE layers of 256 experts, top 8" in done.stdout
    rates = {name: float(rate) for name, rate in re.findall(r"^(\w+) +([\d.]+) output tokens/s/GPU", done.stdout, re.M)}
    assert set(rates) == {"contiguous", "planned"}
    balance = dict(re.findall(r"^(\w+) .*max/mean rank load ([\d.]+)", done.stdout, re.M))
    assert 1.0 <= float(balance["planned"]) < float(balance["contiguous"])
    assert re.search(r"^front: ", done.stdout, re.M)
    assert re.search(
        r"median TPOT saved by the planned placement: [+-][\d.]+% \[[+-][\d.]+%, [+-][\d.]+%\]", done.stdout
    )
    assert "not validated on hardware" in done.stdout


def test_marimo_finds_nothing_to_complain_of(repo: Path) -> None:
    done = ran(repo, "-m", "marimo", "check", "--strict", "notebooks/first_plan.py")
    assert done.returncode == 0, done.stdout + done.stderr
