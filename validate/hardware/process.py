"""One rank as a process that a command started: its signs of life, and the word that it leaves when it fails."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import CheckFailed, MoesimError
from moesim.files import write_text
from validate.hardware.group import Beat, continue_with_parent
from validate.hardware.ranks import OUT_OF_MEMORY


@dataclass(frozen=True)
class Seat:
    """What a rank was started with. job: file of the job. folder: where ranks meet and leave their state."""

    job: Path
    rank: int
    folder: Path


def serve(command: str, arguments: list[str] | None, work: Callable[[Seat, Beat], None]) -> int:
    """Be one rank of a command: do the work, telling what it is at; leave word of why it ended, where it failed.

    Returns the exit code. The process ends itself when its parent is gone.
    """
    parser = argparse.ArgumentParser(description=f"one rank of moesim {command}")
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where ranks meet and leave their state")
    parser.add_argument("--parent", type=int, required=True, help="process to outlive by at most a moment")
    given = parser.parse_args(arguments)
    seat = Seat(given.job, given.rank, given.folder)
    continue_with_parent()
    beat = Beat(seat.folder / f"rank{seat.rank}.status", parent=given.parent, folder=seat.folder)
    try:
        work(seat, beat)
    except MoesimError as error:
        _leave(seat, beat, error, type(error).__name__)
        return error.exit_code
    except Exception as error:
        _leave(seat, beat, CheckFailed(first_line(error)), OUT_OF_MEMORY if out_of_memory(error) else "RuntimeError")
        traceback.print_exc()
        return 1
    finally:
        beat.stop()
    return 0


def _leave(seat: Seat, beat: Beat, error: MoesimError, kind: str) -> None:
    """Leave word of why this rank ends; `waiting` tells a rank that failed from one that others left alone."""
    word = {
        "kind": kind,
        "what": error.what,
        "where": error.where,
        "mend": error.mend,
        "label": beat.label,
        "waiting": beat.waiting,
    }
    write_text(seat.folder / f"rank{seat.rank}.error", json.dumps(word))


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's and NumPy's error, torch's and C++'s on a CPU, torch's on a GPU.

    CUDA and its libraries have words of their own for it: CUDA and NCCL say "out of memory", cuBLAS "ALLOC_FAILED".
    """
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    words = ("can't allocate memory", "std::bad_alloc", "out of memory", "ALLOC_FAILED")
    return named or any(word in str(error) for word in words)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
