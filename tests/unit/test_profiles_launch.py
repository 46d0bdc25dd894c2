"""What a local rank leaves for the command that started it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moesim.errors import MissingPart
from profiles.launch import LocalRank, _cause, serve


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "job.json").write_text('{"a": 1}')
    monkeypatch.setenv("MOESIM_RANKS", "2")
    return tmp_path


def arguments(folder: Path, rank: int) -> list[str]:
    return [str(folder), str(rank), str(os.getppid())]


def test_whoever_reads_the_progress_sees_a_whole_line(folder: Path) -> None:
    def work(one: LocalRank) -> str:
        assert (json.loads(one.job), one.rank, one.ranks) == ({"a": 1}, 0, 2)
        one.say("the first line")
        with (folder / "progress").open() as reader:
            one.say("another")
            assert reader.read() == "the first line"  # not emptied under the reader
        assert (folder / "progress").read_text() == "another"
        return "3"

    assert serve(arguments(folder, 0), work) == 0
    assert (folder / "result").read_text() == "3"
    assert serve(arguments(folder, 1), lambda one: "4") == 0
    assert (folder / "result").read_text() == "3"  # rank 0's alone


def test_an_error_is_left_for_the_parent(folder: Path) -> None:
    def work(one: LocalRank) -> str:
        raise MissingPart("no torch", where="--device", mend="install it")

    assert serve(arguments(folder, 1), work) == MissingPart.exit_code
    assert json.loads((folder / "1.error").read_text()) == {
        "kind": "MissingPart", "what": "no torch", "where": "--device", "mend": "install it",
    }  # fmt: skip
    assert not (folder / "result").exists()


def test_a_rank_that_something_killed_comes_before_one_that_ended_itself_for_want_of_it(tmp_path: Path) -> None:
    assert "rank 1 was killed by SIGKILL" in _cause([-6, -9], tmp_path, "x").line()
    assert "rank 0 was killed by SIGABRT" in _cause([-6, 1], tmp_path, "x").line()
