"""Who is named when ranks fail, die or hang; with small processes in place of real ranks."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from moesim.errors import BadInput, CheckFailed
from validate.hardware.ranks import Status, Watch, cause, launch, read_status, silence_of

BEATING = """
import sys, time
from pathlib import Path
from validate.hardware.group import Beat
beat = Beat(Path(sys.argv[1]), parent=int(sys.argv[2]))
beat.at(sys.argv[3])
beat.waiting = sys.argv[3] == "meeting"
time.sleep(60)
"""


def status(count: int, *, time_s: float = 0.0, waiting: bool = False, label: str = "working") -> Status:
    return Status(pid=1, time_s=time_s, label=label, count=count, waiting=waiting)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_progress_keeps_the_watch_quiet() -> None:
    watch = Watch(10.0, 0.0)
    for moment in range(100):
        assert watch.hung({0: status(moment, time_s=moment), 1: status(3, time_s=moment)}, float(moment)) is None


def test_a_silent_rank_is_named() -> None:
    reason = Watch(60.0, 0.0).hung({0: status(1, time_s=9.0, waiting=True), 1: status(1, time_s=1.0)}, 9.0)
    assert reason is not None and reason.startswith("rank 1 hangs: no sign of life for 8 s")


def test_ranks_on_gpus_may_be_silent_for_longer() -> None:
    watch = Watch(120.0, 0.0, silence_of("nccl"))
    assert watch.hung({0: status(1, time_s=1.0)}, 50.0) is None
    assert "no sign of life for 61 s" in str(watch.hung({0: status(1, time_s=1.0)}, 62.0))
    assert "no sign of life" in str(Watch(120.0, 0.0, silence_of("gloo")).hung({0: status(1, time_s=1.0)}, 50.0))


def test_the_rank_that_does_not_wait_is_named() -> None:
    watch = Watch(10.0, 0.0)
    seen = {0: status(7, time_s=11.0, waiting=True), 1: status(7, time_s=11.0, label="spinning")}
    assert watch.hung(seen, 0.0) is None
    reason = watch.hung(seen, 11.0)
    assert reason is not None and "rank 1" in reason and "spinning" in reason and "the others wait for it" in reason


def test_when_all_wait_the_one_that_is_behind_is_named() -> None:
    watch = Watch(10.0, 0.0)
    seen = {0: status(7, time_s=11.0, waiting=True), 1: status(6, time_s=11.0, waiting=True)}
    watch.hung(seen, 0.0)
    assert "rank 1" in str(watch.hung(seen, 11.0))


def test_a_rank_that_never_says_anything_is_named() -> None:
    watch = Watch(2.0, 0.0)
    assert watch.hung({0: None}, 0.0) is None
    assert "before its first sign of life" in str(watch.hung({0: None}, 3.0))


def test_a_killed_rank_comes_before_those_that_lost_it(tmp_path: Path) -> None:
    (tmp_path / "rank0.error").write_text(
        '{"kind": "RuntimeError", "what": "connection closed", "where": "", "mend": "", "label": "x", "waiting": true}'
    )
    found = cause([1, -9], tmp_path)
    assert isinstance(found, CheckFailed) and "rank 1 was killed by SIGKILL" in found.line()


def test_a_rank_that_something_killed_comes_before_one_that_ended_itself_for_want_of_it(tmp_path: Path) -> None:
    assert "rank 1 was killed by SIGKILL" in cause([-6, -9], tmp_path).line()
    assert "rank 1 was killed by SIGABRT" in cause([1, -6], tmp_path).line()


def test_an_error_of_its_own_keeps_its_kind(tmp_path: Path) -> None:
    (tmp_path / "rank1.error").write_text(
        '{"kind": "BadInput", "what": "no such thing", "where": "here", "mend": "mend", "label": "x", "waiting": false}'
    )
    found = cause([1, 2], tmp_path)
    assert isinstance(found, BadInput) and found.line() == "here: no such thing; mend"


def test_a_rank_that_failed_by_itself_comes_before_one_that_waited(tmp_path: Path) -> None:
    word = '{{"kind": "RuntimeError", "what": "{}", "where": "", "mend": "", "label": "x", "waiting": {}}}'
    (tmp_path / "rank0.error").write_text(word.format("connection closed", "true"))
    (tmp_path / "rank1.error").write_text(word.format("out of memory", "false"))
    assert "rank 1 failed: out of memory" in cause([1, 1], tmp_path).line()


def test_a_rank_out_of_memory_comes_before_one_that_died_of_it(tmp_path: Path) -> None:
    (tmp_path / "rank0.error").write_text(
        '{"kind": "OutOfMemory", "what": "no room", "where": "", "mend": "", "label": "measuring x", "waiting": true}'
    )
    assert "rank 0 ran out of memory while measuring x: no room" in cause([1, -6], tmp_path).line()


def test_failed_allocations_are_told_from_other_errors() -> None:
    from validate.hardware.process import out_of_memory

    class OutOfMemoryError(RuntimeError):
        """As torch names the one of a GPU."""

    assert out_of_memory(MemoryError()) and out_of_memory(OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert out_of_memory(RuntimeError("std::bad_alloc"))
    assert out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not out_of_memory(RuntimeError("Connection closed by peer"))


def test_a_rank_that_fails_without_a_word_is_quoted(tmp_path: Path) -> None:
    line = [sys.executable, "-c", "import sys; sys.exit('something broke')"]
    with pytest.raises(CheckFailed, match="rank 0 failed: something broke"):
        launch([line, [sys.executable, "-c", "import time; time.sleep(60)"]], tmp_path, stall_limit_s=30.0)


def test_a_run_of_ranks_that_end_well_just_ends(tmp_path: Path) -> None:
    launch([[sys.executable, "-c", ""]] * 2, tmp_path, stall_limit_s=30.0)


@pytest.mark.hardware
def test_a_rank_stuck_in_its_own_code_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    lines = [
        [sys.executable, "-P", "-c", BEATING, str(tmp_path / f"rank{rank}.status"), str(os.getpid()), label]
        for rank, label in enumerate(("meeting", "counting sheep"))
    ]
    started = time.monotonic()
    with pytest.raises(CheckFailed, match="rank 1 hangs: 2 s without progress, while counting sheep"):
        launch(lines, tmp_path, stall_limit_s=2.0)
    assert time.monotonic() - started < 20.0
    for rank in range(2):
        left = read_status(tmp_path / f"rank{rank}.status")
        assert left is not None and gone(left.pid)
