"""A search loses nothing: killed at random moments, interrupted, without room on the disk, without a worker.

Killed moments are drawn in CPU time of the killed process (seeded), from its imports' end to its own, so that they
fall on opening, space, search, full runs, finalists and files alike however busy the machine is.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from placement import tuner
from placement.journal import journal_storage
from tests.scenarios import printed, small, write

# Twenty in the whole check, which takes two minutes.
TRIALS, KILLS = 14, 20 if os.environ.get("MOESIM_WHOLE") else 6
# The command as a child that says when its imports are done; it takes first looks even at few trials.
CHILD = """
import sys
from pathlib import Path
from moesim.cli import run
from placement import executors, tune_command, tuner
from moesim.engine import serving, stepmodel
tuner.FIRST_LOOK_ABOVE = 4
{extra}
Path(sys.argv[1]).touch()
sys.exit(run(sys.argv[2:]))
"""
# Slower trials: an interrupt lands among them.
SLOW = """
import time
from placement.objective import Evaluator
real = Evaluator.evaluate
def slow(self, plan):
    time.sleep(0.1)
    return real(self, plan)
Evaluator.evaluate = slow
"""
# Each worker process but those of a second pool dies at its third plan.
DYING = """
import os
from placement.objective import Evaluator
real, seen = Evaluator.evaluate, []
def dying(self, plan):
    seen.append(plan)
    if len(seen) == 3 and os.environ.get("MOESIM_TEST_DIES"):
        try:
            os.close(os.open(os.environ["MOESIM_TEST_DIES"], os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), 9)
        except FileExistsError:
            pass
    return real(self, plan)
Evaluator.evaluate = dying
"""


@pytest.fixture(autouse=True)
def first_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "FIRST_LOOK_ABOVE", 4)


def scenario(folder: Path) -> Path:
    data = small(search={"solvers": ["greedy", "contiguous"], "redundant_experts": [0, 8]})
    data["serving"]["workload"]["requests"] = 40
    return write(folder, data)


def arguments(path: Path, out: Path, *more: str) -> list[str]:
    return ["tune", str(path), "--trials", str(TRIALS), "--out", str(out), "--json", *more]


def tuned(path: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert run(arguments(path, out, *more)) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a search finds that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "FIRST_LOOK_ABOVE", 4)
        return printed(arguments(scenario(folder), folder / "run"))


def child(marker: Path, asked: list[str], extra: str = "", **options: Any) -> subprocess.Popen[str]:
    """Start the command in a process of its own and wait for its imports."""
    marker.unlink(missing_ok=True)
    command = [sys.executable, "-c", CHILD.format(extra=extra), str(marker), *asked]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    while not marker.exists() and started.poll() is None:
        time.sleep(0.005)
    return started


def cpu_s(process: subprocess.Popen[str]) -> float:
    """CPU time of a running process so far; infinite when it has ended."""
    try:
        return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]) * 1e-9
    except (OSError, IndexError):
        return float("inf")


def stored(out: Path) -> list[tuple[int, dict[str, str], str]]:
    """What the journal holds: number, parameters and outcome of each finished trial."""
    if not (out / "study.journal").exists():
        return []
    storage = journal_storage(out)
    found = []
    for study in storage.get_all_studies():
        for trial in storage.get_all_trials(study._study_id):
            outcome = json.dumps(trial.user_attrs["outcome"], sort_keys=True)
            found.append((trial.user_attrs["number"], trial.params, outcome))
    return found


def same(result: dict[str, Any], whole: dict[str, Any]) -> None:
    for key in ("trial_list", "best", "gain", "alternatives", "pareto", "verdict"):
        assert result[key] == whole[key]


def phase(out: Path, kept: int) -> str:
    if not (out / "study.journal").exists():
        return "start"
    if kept < TRIALS:
        return "search" if kept else "opening"
    return "writing" if (out / "placement.json").exists() else "full runs, finalists"


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: dict[str, Any]) -> None:
    path, marker = scenario(tmp_path), tmp_path / "imported"
    before, own = resource.getrusage(resource.RUSAGE_CHILDREN), time.process_time()
    # How long a child lives: the moments are spread over it.
    undisturbed = child(marker, arguments(path, tmp_path / "undisturbed"))
    begun = ended = cpu_s(undisturbed)
    while undisturbed.poll() is None:
        now = cpu_s(undisturbed)
        ended = now if np.isfinite(now) and now > ended else ended
        time.sleep(0.005)
    undisturbed.communicate()
    # One in each of equal parts, short of its end, as the next one may take less.
    shares = (np.arange(KILLS) + np.random.default_rng(7).uniform(size=KILLS)) / KILLS
    moments = 0.8 * (ended - begun) * shares
    phases: Counter[str] = Counter()
    for index, moment in enumerate(moments):
        out = tmp_path / f"killed{index}"
        victim = child(marker, arguments(path, out))
        start = cpu_s(victim)
        while victim.poll() is None and cpu_s(victim) - start < moment:
            time.sleep(0.001)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        kept = stored(out)
        killed = victim.returncode == -signal.SIGKILL
        phases[phase(out, len(kept)) if killed else "ended before"] += 1
        resumed = tuned(path, out, capsys, "--resume")
        assert resumed["run"]["resumed_trials"] == len(kept)
        assert stored(out)[: len(kept)] == kept  # finished trials all there
        assert sorted(number for number, _, _ in stored(out)) == list(range(TRIALS))  # none twice
        assert len({json.dumps(one) for _, one, _ in stored(out)}) == TRIALS
        same(resumed, whole)
        assert not list(out.glob(".*.tmp")) or killed
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    with capsys.disabled():
        print(
            f"\nkilled at {KILLS} moments: {dict(phases)}; "
            f"{spent:.0f} s CPU in children, {time.process_time() - own:.0f} s to resume"
        )
    assert sum(count for name, count in phases.items() if name != "ended before") >= KILLS - KILLS // 4
    assert len(phases) >= 3


def test_ctrl_c_ends_with_the_best_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: dict[str, Any]
) -> None:
    path, out = scenario(tmp_path), tmp_path / "run"
    victim = child(tmp_path / "imported", arguments(path, out), SLOW)
    while len(stored(out)) < 3 and victim.poll() is None:
        time.sleep(0.05)
    victim.send_signal(signal.SIGINT)
    said, line = victim.communicate(timeout=60)
    assert victim.returncode == 130
    assert line.count("\n") == 1
    assert "--resume" in line
    told = json.loads(said)
    assert told["interrupted"]
    assert 3 <= told["trials"] < TRIALS
    assert json.loads((out / "result.json").read_text())["best"] == told["best"]
    assert (out / "plan.yaml").exists()
    resumed = tuned(path, out, capsys, "--resume")
    assert resumed["run"]["resumed_trials"] == told["trials"]
    same(resumed, whole)


def test_ctrl_c_before_anything_is_found(tmp_path: Path) -> None:
    victim = child(
        tmp_path / "imported",
        arguments(scenario(tmp_path), tmp_path / "run"),
        SLOW.replace("0.1", "20"),
        env=os.environ,
    )
    while not (tmp_path / "run" / "study.journal").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    victim.send_signal(signal.SIGINT)
    said, line = victim.communicate(timeout=60)
    assert (victim.returncode, said) == (130, "")
    assert line.count("\n") == 1


@pytest.mark.parametrize("most_bytes", [1500, 6000, 12_000])
def test_a_full_disk_loses_nothing(
    most_bytes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: dict[str, Any]
) -> None:
    """No file may grow beyond so many bytes: the journal breaks off in the middle of a line."""
    path, out = scenario(tmp_path), tmp_path / "run"
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({most_bytes}, resource.RLIM_INFINITY))"
    victim = child(tmp_path / "imported", arguments(path, out), limit)
    said, line = victim.communicate(timeout=60)
    assert victim.returncode == 1, line
    assert line.count("\n") == 1
    assert "--resume" in line
    assert said == ""
    assert (out / "study.journal").stat().st_size == most_bytes
    kept = stored(out)
    resumed = tuned(path, out, capsys, "--resume")
    assert stored(out)[: len(kept)] == kept
    same(resumed, whole)


def test_a_killed_worker_is_replaced(tmp_path: Path, whole: dict[str, Any]) -> None:
    path, out = scenario(tmp_path), tmp_path / "run"
    # Spawned workers import the main module anew: a script, whose top level they run, too.
    script = tmp_path / "dying.py"
    guarded = CHILD.replace("Path(sys.argv[1])", "if __name__ == '__main__':\n    Path(sys.argv[1])")
    script.write_text(guarded.format(extra=DYING).replace("\nsys.exit(", "\n    sys.exit("))
    died = tmp_path / "died"
    command = [sys.executable, str(script), str(tmp_path / "imported"), *arguments(path, out, "--workers", "2")]
    done = subprocess.run(
        command, env={**os.environ, "MOESIM_TEST_DIES": str(died)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert died.exists()
    same(json.loads(done.stdout), whole)
    assert sorted(number for number, _, _ in stored(out)) == list(range(TRIALS))
