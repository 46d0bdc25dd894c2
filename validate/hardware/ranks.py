"""Starting the ranks as processes, watching them, and ending all of them when one fails, dies or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim import errors
from moesim.errors import CheckFailed, MoesimError
from moesim.units import GIB, MIB

POLL_S = 0.05
# After the first rank fails, how long the others may take to fail too, so that the cause can be told from its echoes.
GRACE_S = 1.0
# A rank writes a sign of life five times a second; this long without one, and it is stopped or stuck in one call.
SILENCE_S = 5.0
# CUDA's first calls keep Python from running its other threads, for many seconds on a node of eight GPUs.
GPU_SILENCE_S = 60.0
SILENT = "it said nothing"
SLOW = "free the machine, or raise --stall-limit if it is only slow"
# The kind of word that a rank leaves whose allocation failed.
OUT_OF_MEMORY = "OutOfMemory"

# One thread for each rank; gloo over loopback, whatever the host's name resolves to; and glibc keeps freed memory (up
# to its largest mmap threshold, 32 MiB) instead of mapping it anew at every run, as the allocators of engines do
# (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD).
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "MALLOC_MMAP_THRESHOLD_": str(32 * MIB),
    "MALLOC_TRIM_THRESHOLD_": str(4 * GIB),
}


def silence_of(backend: str) -> float:
    """Seconds that ranks may show no sign of life."""
    return GPU_SILENCE_S if backend == "nccl" else SILENCE_S


@dataclass(frozen=True)
class Status:
    """A rank's last sign of life: when (this host's monotonic clock), at what, after how many steps, waiting or not."""

    pid: int
    time_s: float
    label: str
    count: int
    waiting: bool


def read_status(path: Path) -> Status | None:
    """The status a rank wrote last, None before the first."""
    try:
        return Status(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


class Watch:
    """Notices, from the ranks' statuses, that the run hangs, and which rank makes it hang."""

    def __init__(self, stall_limit_s: float, now_s: float, silence_s: float = SILENCE_S) -> None:
        self._limit_s = stall_limit_s
        self._silence_s = min(silence_s, stall_limit_s)
        self._counts: dict[int, int] = {}
        self._moved_s = now_s

    def hung(self, statuses: dict[int, Status | None], now_s: float) -> str | None:
        """One line naming the rank and the reason once the run has hung, else None. `statuses`: of the live ranks."""
        counts = {rank: -1 if status is None else status.count for rank, status in statuses.items()}
        if counts != self._counts:
            self._counts, self._moved_s = counts, now_s
        for rank, status in statuses.items():
            silent_s = now_s - status.time_s if status is not None else now_s - self._moved_s
            limit_s = self._limit_s if status is None else self._silence_s
            if silent_s > limit_s:
                doing = "before its first sign of life" if status is None else f"while {status.label}"
                return f"rank {rank} hangs: no sign of life for {silent_s:.0f} s, {doing}"
        if now_s - self._moved_s <= self._limit_s:
            return None
        seen = {rank: status for rank, status in statuses.items() if status is not None}
        busy = {rank: status for rank, status in seen.items() if not status.waiting} or seen
        rank = min(busy, key=lambda each: busy[each].count)
        waits = "waiting for the others" if busy[rank].waiting else "the others wait for it"
        return f"rank {rank} hangs: {self._limit_s:g} s without progress, while {busy[rank].label}; {waits}"


def commands(job: Path, folder: Path, ranks: int, module: str = "validate.hardware.worker") -> list[list[str]]:
    """The command line of each rank; `-P` keeps a user's folder called `validate` from standing in for ours."""
    worker = (sys.executable, "-P", "-m", module)
    return [
        [*worker, "--job", str(job), "--rank", str(rank), "--folder", str(folder), "--parent", str(os.getpid())]
        for rank in range(ranks)
    ]


@dataclass(frozen=True)
class Told:
    """How errors speak of a run: the command, and what helps where memory is short."""

    where: str = "validate hardware"
    smaller: str = "use a smaller layer, fewer tokens or fewer placements"


HARDWARE = Told()


def launch(
    lines: Sequence[Sequence[str]],
    folder: Path,
    *,
    stall_limit_s: float,
    tell: Callable[[str], None] = lambda _: None,
    told: Told = HARDWARE,
    silence_s: float = SILENCE_S,
) -> None:
    """Run one process for each command line until all are done; on any failure end them all, and raise.

    Raises the error that a rank reported, or CheckFailed that names the rank and says how it died or hung. `tell` gets
    what rank 0 is doing, now and then. silence_s: how long a rank may show no sign of life. No process is left behind,
    however this ends.
    """
    environment = os.environ | ENVIRONMENT
    ended_before = oom_kills()
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank, line in enumerate(lines):
            with (folder / f"rank{rank}.stderr").open("wb") as log:
                running.append(
                    subprocess.Popen(
                        list(line),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=environment,
                        start_new_session=True,
                    )
                )
        watch = Watch(stall_limit_s, time.monotonic(), silence_s)
        _watch(running, folder, watch, tell, ended_before, told)
    finally:
        for process in running:
            _end(process)


def _watch(
    running: list[subprocess.Popen[bytes]],
    folder: Path,
    watch: Watch,
    tell: Callable[[str], None],
    ended_before: int,
    told: Told,
) -> None:
    while True:
        codes = [process.poll() for process in running]
        if any(codes):
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline and any(process.poll() is None for process in running):
                time.sleep(POLL_S)
            codes = [process.poll() for process in running]
            raise cause(codes, folder, short_of_memory=oom_kills() > ended_before, told=told)
        if all(code == 0 for code in codes):
            return
        statuses = {rank: read_status(folder / f"rank{rank}.status") for rank, code in enumerate(codes) if code is None}
        reason = watch.hung(statuses, time.monotonic())
        if reason is not None:
            raise CheckFailed(reason, where=told.where, mend=SLOW)
        first = statuses.get(0)
        if first is not None:
            tell(first.label)
        time.sleep(POLL_S)


def oom_kills() -> int:
    """Processes that the kernel ended for want of memory since it started (proc_vmstat(5), oom_kill); 0 if unknown."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def free_bytes() -> float | None:
    """Memory that this machine has left, swap apart (proc_meminfo(5), MemAvailable); None where nothing tells it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return float(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration):
        return None


def cause(
    codes: Sequence[int | None], folder: Path, *, short_of_memory: bool = False, told: Told = HARDWARE
) -> MoesimError:
    """The error that explains why ranks ended with `codes` (None: still running, negative: killed by a signal).

    A rank whose allocation failed comes first, then a killed one (by SIGABRT, its own doing, only after others: gloo
    may end a rank for want of one that was killed), then one that reported an error of its own, then one that only
    lost the others. short_of_memory: the kernel ended some process for want of memory meanwhile.
    """
    words = {rank: _word(folder / f"rank{rank}.error") for rank, code in enumerate(codes) if code}
    for rank, word in words.items():
        if word is not None and word["kind"] == OUT_OF_MEMORY:
            return CheckFailed(
                f"rank {rank} ran out of memory while {word['label']}: {word['what']}",
                where=told.where,
                mend=told.smaller,
            )
    for rank, code in sorted(enumerate(codes), key=lambda item: item[1] == -signal.SIGABRT):
        if code is not None and code < 0:
            return _killed(rank, -code, folder, short_of_memory, told)
    for word in words.values():
        if word is not None and word["kind"] != "RuntimeError":
            kind = getattr(errors, str(word["kind"]), CheckFailed)
            found: MoesimError = kind(str(word["what"]), where=str(word["where"]), mend=str(word["mend"]))
            return found
    alone = sorted((bool(word["waiting"]), rank) for rank, word in words.items() if word is not None)
    rank = alone[0][1] if alone else next(rank for rank, code in enumerate(codes) if code)
    word = words[rank]
    what = f"{word['what']} (while {word['label']})" if word is not None else _last_line(folder / f"rank{rank}.stderr")
    return CheckFailed(f"rank {rank} failed: {what}", where=told.where, mend="mend that and run again")


def _killed(rank: int, number: int, folder: Path, short_of_memory: bool, told: Told) -> CheckFailed:
    status = read_status(folder / f"rank{rank}.status")
    doing = f" while {status.label}" if status is not None else ""
    why, mend = "", f"if it was the kernel for want of memory, {told.smaller}"
    if number == signal.SIGKILL and short_of_memory:
        why, mend = " (the kernel ended a process for want of memory then)", told.smaller
    elif number != signal.SIGKILL:  # it ended itself, and may have said why
        said = _last_line(folder / f"rank{rank}.stderr")
        why, mend = f" ({said})" if said != SILENT else "", "mend that and run again"
    what = f"rank {rank} was killed by {_signal_name(number)}{doing}{why}"
    return CheckFailed(what, where=told.where, mend=mend)


def _word(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1][:300] if lines else SILENT


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and whatever it started (it leads a process group of its own), and reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
