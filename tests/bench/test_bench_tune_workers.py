"""Wall-clock and CPU time of one search with 1 and 2 local workers, printed (`make bench`); nothing is gated on it.

That both find the same is a test of its own, on a small scenario (tests/unit/test_tune.py).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRIALS = 32


@pytest.mark.skipif(not os.environ.get("MOESIM_WHOLE"), reason="half a CPU minute, told and not gated: MOESIM_WHOLE=1")
def test_one_and_two_workers(repo: Path, tmp_path: Path) -> None:
    told = {}
    for workers in (1, 2):
        command = [sys.executable, "-m", "moesim", "tune", "notebooks/scenarios/demo.yaml", "--json"]
        command += ["--trials", str(TRIALS), "--workers", str(workers), "--out", str(tmp_path / str(workers))]
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, cwd=repo, env=os.environ, capture_output=True, text=True, check=True)
        after, wall_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begun
        cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        told[workers] = (json.loads(done.stdout), wall_s)
        search_s = told[workers][0]["run"]["search_s"]
        print(f"\n{workers} workers, {TRIALS} trials: {wall_s:.1f} s ({search_s:.1f} s of search), {cpu_s:.1f} s CPU")
    searches = [told[workers][0]["run"]["search_s"] for workers in (1, 2)]
    print(
        f"speed-up with 2 workers: {told[1][1] / told[2][1]:.2f} in all, {searches[0] / searches[1]:.2f} of the search"
    )
    assert told[1][0]["trial_list"] == told[2][0]["trial_list"]
    assert told[1][0]["best"] == told[2][0]["best"]
