"""Starting local ranks as processes, watching them, and ending all of them when one fails, dies or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moesim import errors
from moesim.errors import CheckFailed, MoesimError

POLL_S = 0.05
GRACE_S = 1.0  # for the other ranks to fail too, so that the cause can be told from its echoes
WHERE = "profile collectives"
RESULT, PROGRESS = "result", "progress"
# One thread for each rank; below also gloo over loopback, whatever the host name resolves to.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def under_torchrun() -> bool:
    """Whether something else started the ranks, this process being one of them."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(
    module: str, job: dict[str, object], ranks: int, *, stall_s: float, say: Callable[[str], None], where: str = WHERE
) -> str:
    """Run `module` as one process for each rank until all are done; on any failure end them all, and raise.

    The rank processes get the job's path, their rank and the parent's process id. Rank 0 rewrites `progress` in the
    job's folder with what it does; `stall_s` without a change there counts as a hang. where: the command, for errors.
    Raises the error that a rank wrote, or CheckFailed that says which rank died, and how. No process is left behind,
    however this ends. Returns what a rank left as the `result`, if any did.
    """
    with tempfile.TemporaryDirectory(prefix="moesim-ranks-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        environment = os.environ | ENVIRONMENT | {"MOESIM_RANKS": str(ranks)}
        # -P keeps a user's folder called `profiles` from standing in for ours, which may be a copy, not installed.
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        if job["backend"] == "gloo":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        running: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                line = [sys.executable, "-P", "-m", module, str(folder), str(rank), str(os.getpid())]
                with (folder / f"{rank}.stderr").open("wb") as log:
                    running.append(
                        subprocess.Popen(
                            line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                            start_new_session=True,
                        )
                    )  # fmt: skip
            _watch(running, folder, stall_s, say, where)
            left = folder / RESULT
            return left.read_text(encoding="utf-8") if left.is_file() else ""
        finally:
            for process in running:
                _end(process)


def _watch(
    running: Sequence[subprocess.Popen[bytes]], folder: Path, stall_s: float, say: Callable[[str], None], where: str
) -> None:
    told, moved = "", time.monotonic()
    while True:
        codes = [process.poll() for process in running]
        if any(codes):
            until = time.monotonic() + GRACE_S
            while time.monotonic() < until and any(process.poll() is None for process in running):
                time.sleep(POLL_S)
            raise _cause([process.poll() for process in running], folder, where)
        if all(code == 0 for code in codes):
            return
        with contextlib.suppress(OSError):
            now = (folder / PROGRESS).read_text(encoding="utf-8")
            if now != told:
                told, moved = now, time.monotonic()
                say(now)
        if time.monotonic() - moved > stall_s:
            raise CheckFailed(
                f"no progress for {stall_s:g} s, {f'at {told}' if told else 'before the ranks met'}",
                where=where,
                mend="what is finished is in the file; run again, with a larger --stall-limit if it is only slow",
            )
        time.sleep(POLL_S)


def _cause(codes: Sequence[int | None], folder: Path, where: str) -> MoesimError:
    """The error that explains why ranks ended: one was killed, one told an error, or one only lost the others.

    A rank that ended itself (SIGABRT) may have done so for want of one that was killed.
    """
    for rank, code in sorted(enumerate(codes), key=lambda item: item[1] == -signal.SIGABRT):
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-code).name
                return CheckFailed(
                    f"rank {rank} was killed by {name}", where=where, mend="what is finished is in the file; run again"
                )
    for rank, code in enumerate(codes):
        path = folder / f"{rank}.error"
        if code and path.is_file():
            word = json.loads(path.read_text(encoding="utf-8"))
            found: MoesimError = getattr(errors, word["kind"])(word["what"], where=word["where"], mend=word["mend"])
            return found
    rank = next(rank for rank, code in enumerate(codes) if code)
    said = (folder / f"{rank}.stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return CheckFailed(
        f"rank {rank} failed: {said[-1][:200] if said else 'it said nothing'}", where=where, mend="run again"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and whatever it started (it leads a process group of its own), and reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_with(parent: int, folder: Path) -> None:
    """End this process soon after its parent is gone, and take the job's folder along: nothing outlives a command."""

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        shutil.rmtree(folder, ignore_errors=True)  # each rank tries; the first to come takes it all
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@dataclass(frozen=True)
class LocalRank:
    """One process that `launch` started. job: its text. store: the file where the ranks meet. say: tells progress."""

    job: str
    rank: int
    ranks: int
    store: str
    say: Callable[[str], None]


def serve(arguments: Sequence[str], work: Callable[[LocalRank], str]) -> int:
    """Be one local rank: do the work, leave rank 0's result or any rank's error to the parent; returns the exit code.

    arguments: the job's folder, the rank, and the parent that it must not outlive.
    """
    folder, rank = Path(arguments[0]), int(arguments[1])
    end_with(int(arguments[2]), folder)

    def say(line: str) -> None:
        _leave(folder, PROGRESS, line)

    try:
        text = (folder / "job.json").read_text(encoding="utf-8")
        found = work(LocalRank(text, rank, int(os.environ["MOESIM_RANKS"]), str(folder / "meet"), say))
    except MoesimError as error:
        tell(folder, rank, error)
        return error.exit_code
    if rank == 0:
        _leave(folder, RESULT, found)
    return 0


def _leave(folder: Path, name: str, text: str) -> None:
    """Put a text where the parent looks for it, whole at any moment."""
    fresh = folder / f"{name}.new"
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(folder / name)


def tell(folder: Path, rank: int, error: MoesimError) -> None:
    """Leave the error where the parent finds it."""
    word = {"kind": type(error).__name__, "what": error.what, "where": error.where, "mend": error.mend}
    (folder / f"{rank}.error").write_text(json.dumps(word), encoding="utf-8")
