"""Two processes on one study, in PostgreSQL, SQLite or a run folder: the trials of one alone, none done twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from moesim.cli import run
from placement.claims import Claims, FileLocks, Locks, NoLocks, PostgresLocks, hidden
from placement.journal import journal_storage
from tests.postgres_server import postgres_url
from tests.scenarios import printed, small, write

TRIALS = 22
# The command with slower trials, each noted in a file of its process.
CHILD = """
import os, sys, time
from moesim.cli import run
from placement.objective import Evaluator
real = Evaluator.evaluate
def slow(self, plan):
    time.sleep(0.15)
    with open(sys.argv[1], "a") as noted:
        noted.write(plan.label() + "\\n")
    return real(self, plan)
Evaluator.evaluate = slow
sys.exit(run(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_url() as url:
        yield url


def scenario(folder: Path) -> Path:
    data = small(search={"solvers": ["greedy", "contiguous"], "redundant_experts": [0, 8]})
    data["serving"]["workload"]["requests"] = 40
    return write(folder, data)


def start(path: Path, noted: Path, *more: str) -> subprocess.Popen[str]:
    asked = ["tune", str(path), "--trials", str(TRIALS), "--resume", "--json", *more]
    command = [sys.executable, "-c", CHILD, str(noted), *asked]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    printed, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    found: dict[str, Any] = json.loads(printed)
    return found


def noted_by(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def same(result: dict[str, Any], whole: dict[str, Any]) -> None:
    for key in ("trial_list", "best", "gain", "alternatives", "pareto", "verdict"):
        assert result[key] == whole[key]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds alone."""
    folder = tmp_path_factory.mktemp("alone")
    return printed(["tune", str(scenario(folder)), "--trials", str(TRIALS), "--out", str(folder / "run"), "--json"])


def where(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[list[str], list[str], Any]:
    """Arguments of two processes on one study, and the storage as Optuna opens it."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    if kind == "folder":
        return ["--out", one], ["--out", one], lambda: journal_storage(Path(one))
    url = request.getfixturevalue("postgres") if kind == "postgres" else f"sqlite:///{tmp_path}/study.db"
    shared = ["--storage", url]
    return [*shared, "--out", one], [*shared, "--out", two], lambda: optuna.storages.get_storage(url)


def numbers(storage: Any) -> list[int]:
    """Numbers of all stored trials; the study is gone afterwards."""
    (study,) = storage.get_all_studies()
    found = sorted(trial.user_attrs["number"] for trial in storage.get_all_trials(study._study_id))
    storage.delete_study(study._study_id)
    if hasattr(storage, "_backend") and hasattr(storage._backend, "engine"):
        storage.remove_session()
        storage._backend.engine.dispose()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["postgres", "folder", "sqlite"])
def test_two_processes_share_one_study(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest, whole: dict[str, Any]
) -> None:
    first, second, storage = where(kind, tmp_path, request)
    path, notes = scenario(tmp_path), [tmp_path / "noted1", tmp_path / "noted2"]
    both = [start(path, note, *asked) for note, asked in zip(notes, (first, second), strict=True)]
    for process in both:
        same(finished(process), whole)
    assert numbers(storage()) == list(range(TRIALS))
    shares = [noted_by(note) for note in notes]
    assert len(shares[0] + shares[1]) == len({*shares[0], *shares[1]}) == TRIALS  # nothing evaluated twice
    with capsys.disabled():
        print(f"\n{kind}: two processes evaluated {len(shares[0])} and {len(shares[1])} of {TRIALS} trials")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["postgres", "folder"])
def test_what_a_killed_process_had_claimed_is_done_by_the_other(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, whole: dict[str, Any]
) -> None:
    first, second, storage = where(kind, tmp_path, request)
    path, notes = scenario(tmp_path), [tmp_path / "noted1", tmp_path / "noted2"]
    victim, other = (start(path, note, *asked) for note, asked in zip(notes, (first, second), strict=True))
    until = time.monotonic() + 60
    while not noted_by(notes[0]) and victim.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    same(finished(other), whole)
    assert victim.returncode == -signal.SIGKILL
    assert numbers(storage()) == list(range(TRIALS))
    assert {*noted_by(notes[0]), *noted_by(notes[1])} == {trial["label"] for trial in whole["trial_list"]}


def test_locks_of_a_file_end_with_their_process(tmp_path: Path) -> None:
    path = tmp_path / "study.lock"
    holding = (
        "import sys, time; from pathlib import Path; from placement.claims import FileLocks\n"
        "locks = FileLocks(Path(sys.argv[1])); print(locks.take(3), flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", holding, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    locks = FileLocks(path)
    assert not locks.take(3)
    assert locks.take(4)
    holder.kill()
    holder.communicate()
    assert locks.take(3)
    locks.close()


def test_locks_of_postgres_end_with_their_session(postgres: str) -> None:
    one, two = PostgresLocks(postgres), PostgresLocks(postgres)
    assert one.take(3)
    assert not two.take(3)
    assert two.take(4)
    one.close()
    until = time.monotonic() + 30
    while not (taken := two.take(3)) and time.monotonic() < until:
        time.sleep(0.05)  # the server ends a session after its client has left
    two.close()
    assert taken


class Shared:
    """Locks of several processes in one."""

    def __init__(self, held: dict[int, int], who: int) -> None:
        self.held, self.who = held, who

    def take(self, key: int) -> bool:
        return self.held.setdefault(key, self.who) == self.who

    def drop(self, key: int) -> None:
        del self.held[key]


def test_claims_leave_work_to_others() -> None:
    held: dict[int, int] = {}
    locks: list[Locks] = [Shared(held, 0), Shared(held, 1)]
    one, two = (Claims(each) for each in locks)
    one.sit()
    assert (one.others(), one.take(range(8), 1)) == (0, list(range(8)))
    one.drop(range(8))
    two.sit()
    assert (one.others(), two.others()) == (1, 1)
    assert one.take(range(8), 1) == [0, 1]
    assert two.take(range(8), 3) == [2, 3, 4]
    two.leave()
    assert one.others() == 0
    assert Claims(NoLocks()).take(range(5), 1) == list(range(5))


def test_a_database_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install '.[postgres]'")
    url = f"postgresql+psycopg://somebody:secret@/x?host={tmp_path}"
    asked = ["--trials", "2", "--storage", url, "--out", str(tmp_path / "run")]
    assert run(["tune", str(scenario(tmp_path)), *asked]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "secret" not in line
    assert hidden("nonsense") == "nonsense"


def test_a_driver_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    asked = ["--trials", "2", "--storage", "postgresql+psycopg:///x", "--out", str(tmp_path / "run")]
    assert run(["tune", str(scenario(tmp_path)), *asked]) == 3
    assert "pip install '.[postgres]'" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["scenario.yaml"]
