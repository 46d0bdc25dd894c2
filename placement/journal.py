"""The journal of a run: Optuna's, with a lock that dies with its holder and a tail that a crash may have cut."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

_BLOCK = 65536


class JournalLock(JournalFileOpenLock):
    """One writer at a time. What a killed writer left of its last line is cut before the next one writes.

    Optuna's own lock is a file that a killed writer leaves behind for 30 s, and a line appended to the rest of another
    would make the journal unreadable.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self.journal = journal
        self.file: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock, then mend the journal's end."""
        self.file = os.open(self.journal.with_suffix(".writing"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX)
            _cut_to_whole_lines(self.journal)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Let the next writer in."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


def _cut_to_whole_lines(path: Path) -> None:
    """Cut a file behind its last line end; readers take no line without one."""
    with path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def journal_storage(folder: Path) -> JournalStorage:
    """The journal of a run folder, made where there is none. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.journal"
    return JournalStorage(JournalFileBackend(str(path), JournalLock(path)))


def remove_journal(folder: Path) -> None:
    """Remove a run folder's journal with its locks; whoever holds one of them has it until it ends."""
    for name in ("study.journal", "study.writing", "study.lock"):
        (folder / name).unlink(missing_ok=True)
