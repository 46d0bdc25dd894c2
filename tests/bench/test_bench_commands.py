"""CPU time and memory of whole commands, compiled code warm: the budgets of starting and of the serving loop."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = ("torch", "optuna", "plotly", "numba")
MOST_BYTES = 1.5e9
# 60 simulated minutes of Poisson arrivals, DeepSeek-V3 on 32 H200.
REQUESTS, MINUTES = 23_608, 60
Run = Callable[..., tuple[str, float, float]]


@pytest.fixture
def run(repo: Path) -> Run:
    """Run Python with arguments from the repository root: what it printed, CPU seconds, peak memory in bytes."""

    def go(*arguments: str) -> tuple[str, float, float]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *arguments], cwd=repo, env=environment, capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr[-2000:]
        cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return done.stdout, cpu_s, after.ru_maxrss * 1024.0

    return go


@pytest.mark.parametrize(
    ("code", "budget_s"), [("import moesim", 0.3), ("from moesim.cli import run; run(['--help'])", 0.5)]
)
def test_starting(run: Run, code: str, budget_s: float) -> None:
    loaded = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
    printed, cpu_s, _ = run("-c", f"{code}\n{loaded}")
    print(f"{code}: {cpu_s:.2f} s CPU (budget {budget_s} s)")
    assert printed.splitlines()[-1] == "[]"
    assert cpu_s < budget_s


@pytest.mark.parametrize(("draws", "budget_s"), [(("--draws", "0"), 5.0), ((), 20.0)])
def test_an_hour_of_requests(run: Run, draws: tuple[str, ...], budget_s: float) -> None:
    rate = REQUESTS / (MINUTES * 60.0)
    command = ("-m", "moesim", "simulate", "notebooks/scenarios/demo.yaml", "--fidelity", "table", "--json")
    load = ("--set", f"serving.workload.arrivals.poisson.requests_per_s={rate}")
    run(*command, *load, "--set", "serving.workload.requests=50", "--draws", "2")  # what is not compiled yet, is now
    printed, cpu_s, peak = run(*command, *load, "--set", f"serving.workload.requests={REQUESTS}", *draws)
    found = json.loads(printed)
    words = "no draws" if draws else "the default intervals"
    print(f"{REQUESTS:,} requests, {words}: {cpu_s:.1f} s CPU (budget {budget_s} s), {peak / 1e6:.0f} MB")
    assert found["metrics"]["requests_completed"] == REQUESTS
    assert bool(found["intervals"]) == (not draws)
    assert cpu_s < budget_s
    assert peak < MOST_BYTES
