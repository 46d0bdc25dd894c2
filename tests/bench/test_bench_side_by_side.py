"""moesim and aiconfigurator search one task on the same tables: plans, figures and CPU time, printed (pytest -s).

Runs where aiconfigurator is installed, in an environment of its own: on the PATH, or named by AICONFIGURATOR.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesim.errors import MoesimError
from validate.side_by_side.sweep import find_executable
from validate.side_by_side.told import told

# DeepSeek-V3 on 32 GPUs as the demo has it, in a closed loop.
TASK = (
    "serving.workload.arrivals={concurrency: 1024}",
    "serving.workload.requests=2048",
    "objective.slo={ttft_p99_ms: 20000, tpot_p99_ms: 100}",
    "search.schedules=[sequential,two_batch]",
    "search.solvers=[greedy,robust]",
    "search.redundant_experts=[0,32]",
)


@pytest.fixture
def executable() -> Path:
    named = os.environ.get("AICONFIGURATOR")
    try:
        return find_executable(None if named is None else Path(named))
    except MoesimError as error:
        pytest.skip(f"aiconfigurator is not installed: {error.line()}")


@pytest.mark.slow
def test_both_tools_on_one_task(repo: Path, tmp_path: Path, executable: Path) -> None:
    command = [sys.executable, "-m", "validate.side_by_side", "notebooks/scenarios/demo.yaml", "--json"]
    command += ["--executable", str(executable), "--out", str(tmp_path / "side")]
    command += [word for one in TASK for word in ("--set", one)]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    print("\n" + told(result))
    assert result["choices"]["aiconfigurator"] and result["choices"]["moesim"]
    assert result["aiconfigurator"]["cpu_s"] > 0 and result["moesim"]["cpu_s"] > 0
    # The same rules priced its sweep's rows one by one: what is taken apart is what it chose by.
    assert result["aiconfigurator"]["sweep_and_prices_differ"] < 1e-3
    assert {one["chosen_by"] for one in result["plans"]} == {"aiconfigurator", "moesim"}
    for view in ("assumed", "own"):
        assert result["agreement"][view]["plans"] >= 5
        assert result["agreement"][view]["spearman"] is not None
    for one in result["apart"]:
        for kind in ("decode", "mixed"):
            step = one[kind]
            parts = sum(theirs for _, theirs, _ in step["by_group"])
            assert parts == pytest.approx(step["aiconfigurator_s"], rel=1e-6)
            if not one["overlaps"]:
                assert sum(ours for _, _, ours in step["by_group"]) == pytest.approx(step["moesim_s"], rel=1e-6)
