"""A rank killed, stopped, stuck or out of memory, in each phase: named with the reason, in time; nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import CheckFailed, Infeasible
from tests.harm import STALL_S, alive, harmed, processes_with
from validate.hardware import ranks
from validate.hardware import run as hardware
from validate.hardware.job import Job, LayerShape, PlacedCase
from validate.hardware.ranks import read_status

pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")
pytestmark = pytest.mark.hardware

WHOLE = bool(os.environ.get("MOESIM_WHOLE"))
PHASES = {
    "making": "making the weights of expert",
    "profile": "profiling gate and permute",
    "check": "checking wide",
    "measure": "measuring wide at 64 tokens, repeat 3 of 5",
}
REASONS = {
    "killed": "rank 1 was killed by SIGKILL while {phase}",
    "stopped": "rank 1 hangs: no sign of life for",
    "spinning": "rank 1 hangs: 12 s without progress, while {phase}",
    "sleeping": "rank 1 hangs: 12 s without progress, while {phase}",
    "numpy": "rank 1 ran out of memory while {phase}",
    "torch": "rank 1 ran out of memory while {phase}",
    "aborted": "rank 1 was killed by SIGABRT while {phase}",
}
# In the usual run each harm once, in turning phases; in the whole run all of them in all phases.
USUAL = [("killed", "measure"), ("stopped", "check"), ("numpy", "making"), ("torch", "profile")]


def job_of(out: Path, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "backend": "gloo",
        "ranks": 2,
        "shape": LayerShape(hidden=16, intermediate=24, experts=4, top_k=2),
        "tokens": (64,),
        "profile": (0.4, 0.3, 0.2, 0.1),
        "profile_source": "test",
        "placements": (
            PlacedCase(name="plain", slots=(0, 1, 2, 3), replicas=0),
            PlacedCase(name="wide", slots=(0, 1, 2, 3, 0, 1), replicas=2),
        ),
        "repeats": 5,
        "out": str(out),
        "stall_limit_s": 60.0,
    }
    return Job(**(given | changes))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own for temporary files; nothing may be left in it."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("harm", "phase"), [(harm, phase) for harm in REASONS for phase in PHASES] if WHOLE else USUAL)
def test_a_lost_rank_is_named_and_nothing_is_left(
    harm: str, phase: str, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harmed(monkeypatch, harm, PHASES[phase])
    (tmp_path / "run").mkdir()
    for name in ("record.json", "predictions.json", "unfinished.json"):
        (tmp_path / "run" / name).write_text("of an earlier run")
    begun = time.monotonic()
    with pytest.raises(CheckFailed) as caught:
        stuck = harm in ("spinning", "sleeping")
        hardware.run(job_of(tmp_path / "run", stall_limit_s=STALL_S if stuck else 60.0))
    took = time.monotonic() - begun
    line = caught.value.line()
    print(f"{harm} while {phase}: {took:.1f} s: {line}")
    assert REASONS[harm].format(phase=PHASES[phase]) in line and "\n" not in line
    assert caught.value.exit_code == 1
    # Start-up and the phases before, then the limit of this harm.
    assert took < 30.0 + (STALL_S if "hangs" in REASONS[harm] else 0.0)
    assert processes_with(str(scratch)) == []
    left = {path.name for path in (tmp_path / "run").iterdir()}
    if phase == "measure":
        assert left == {"job.json", "predictions.json", "unfinished.json"}
        kept = json.loads((tmp_path / "run" / "unfinished.json").read_text())
        assert kept["ended"] == caught.value.what and (kept["repeats"], kept["of_repeats"]) == (2, 5)
        assert [len(entry["layer_samples_s"]) for entry in kept["measured"]] == [2, 2]
        assert np.asarray([entry["layer_s"]["median_s"] for entry in kept["measured"]]).min() > 0
        assert "2 of 5 repeats are in unfinished.json" in line
    else:
        assert left == {"job.json", "predictions.json"} if phase == "check" else {"job.json"}
        assert "nothing is kept" in line


def test_a_killed_command_leaves_no_rank_not_even_a_stopped_one_and_no_folder(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "job.json").write_text(job_of(tmp_path / "run", repeats=2000).model_dump_json())
    script = (
        "import sys; from pathlib import Path; from validate.hardware import run as hardware;"
        "from validate.hardware.job import Job;"
        "hardware.run(Job.model_validate_json(Path(sys.argv[1]).read_text()))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", script, str(tmp_path / "job.json")], env=os.environ | {"TMPDIR": str(scratch)}
    )
    pids: list[int] = []
    for _ in range(1200):
        found = [read_status(path) for path in scratch.glob("*/rank*.status")]
        pids = [one.pid for one in found if one is not None and "profiling" in one.label]
        if len(pids) == 2:
            break
        time.sleep(0.05)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGSTOP)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not any(alive(pid) for pid in pids) and list(scratch.iterdir()) == []:
            return
        time.sleep(0.1)
    raise AssertionError(f"left: {[pid for pid in pids if alive(pid)]}, {list(scratch.iterdir())}")


def test_weights_that_do_not_fit_are_refused_before_anything_starts(tmp_path: Path) -> None:
    job = job_of(tmp_path, shape=LayerShape(hidden=2**20, intermediate=2**20, experts=4, top_k=2))
    # Rank 0 holds experts 0 and 1 once, 2 for `wide`; rank 1 holds 2, 3, 0 and 1.
    assert hardware.weight_bytes(job) == 3 * 2**40 * 4 * 7
    assert hardware.weight_bytes(job, shared=True) == 3 * 2**40 * 4 * 4  # in one process each of the four is there once
    with pytest.raises(Infeasible, match="memory are free"):
        hardware.run(job)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_the_kernel_is_short_of_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter([3, 4])
    monkeypatch.setattr(ranks, "oom_kills", lambda: next(counted))
    line = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    with pytest.raises(CheckFailed, match=r"rank 0 was killed by SIGKILL \(the kernel ended a process for want of"):
        ranks.launch([line], tmp_path, stall_limit_s=30.0)
    monkeypatch.undo()
    assert ranks.oom_kills() >= 0
