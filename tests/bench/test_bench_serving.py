"""Memory of a long serving run, and the table against the executor; DESIGN's budgets, printed (pytest -s).

The hour of requests that DESIGN budgets is timed in test_bench_commands.py.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

import pytest

from moesim.engine.deployment import groundwork, resolve
from moesim.engine.simulate import simulate
from moesim.output.metrics import serving_metrics
from moesim.spec.scenario import load_scenario
from tests.scenarios import DEMO

HOUR = 23_608


def whole_run(requests: int, draws: int) -> tuple[dict[str, Any], float, float]:
    """`moesim simulate --json` of the demo's deployment over an hour's arrivals: its JSON, CPU seconds, peak bytes.

    The peak is that of the largest child so far, so call the largest run last.
    """
    rate = f"serving.workload.arrivals.poisson.requests_per_s={HOUR / 3600}"
    asked = [
        str(DEMO),
        "--json",
        "--draws",
        str(draws),
        "--set",
        f"serving.workload.requests={requests}",
        "--set",
        rate,
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    told = subprocess.run(
        [sys.executable, "-m", "moesim", "simulate", *asked],
        env={**os.environ, **threads},
        capture_output=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(told.stdout), seconds, after.ru_maxrss * 1024.0


@pytest.mark.slow
def test_memory_of_many_requests():
    result, seconds, peak = whole_run(100_000, 2)
    assert result["metrics"]["requests_completed"] == 100_000
    print(f"\nserving, 100,000 requests, 2 draws: {peak / 1e9:.2f} GB (budget 1.5 GB), {seconds:.1f} s CPU")
    assert peak < 1.5e9


@pytest.mark.slow
def test_table_against_maxplus():
    """2,000 requests of the demo, the same arrivals and routing for both."""
    deployment = resolve(groundwork(load_scenario(DEMO)))
    assert deployment.serving.workload.requests == 2000
    table, exact = (
        serving_metrics(simulate(deployment, draws=0, fidelity=fidelity).served, 32)
        for fidelity in ("table", "maxplus")
    )
    limits = {("tpot_s", "p50"): 0.01, ("ttft_s", "p50"): 0.02, ("tpot_s", "p99"): 0.05, ("ttft_s", "p99"): 0.05}
    for (name, statistic), limit in limits.items():
        error = table[name][statistic] / exact[name][statistic] - 1
        print(f"\ntable against maxplus, {name} {statistic}: {error:+.2%} (limit {limit:.0%})")
        assert abs(error) < limit
