"""Ranks that come to harm, for the tests of every command that starts ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from validate.hardware import ranks

LOST_RANK = Path(__file__).with_name("lost_rank.py")
# Seconds without progress that end a run in tests, where only that shows the harm.
STALL_S = 12.0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def processes_with(word: str) -> list[int]:
    """Processes whose command line holds the word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if word in said and alive(int(path.parent.name)):
            found.append(int(path.parent.name))
    return found


def harmed(monkeypatch: pytest.MonkeyPatch, harm: str, phase: str) -> None:
    """From here on rank 1 of any command comes to harm at the first label that holds `phase`."""
    right = ranks.commands

    def commands(job: Path, folder: Path, count: int, module: str = "validate.hardware.worker") -> list[list[str]]:
        line = [sys.executable, "-P", str(LOST_RANK), module, harm, phase]
        return [[*line, *one[4:]] for one in right(job, folder, count, module)]

    monkeypatch.setattr(ranks, "commands", commands)
