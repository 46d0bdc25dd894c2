"""Who evaluates which trial, where several processes share one study: locks that die with the process that holds them.

A claim saves work, it does not guard the result: a trial's plan and outcome follow from the trials before it, and of
two stored under one number the first counts. So claims may be lost (a network that broke) and nothing else is.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moesim.errors import BadInput, MissingPart, MoesimError

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine

# Keys beside the trials' numbers: opening a study; writing its journal; one seat for each process at work.
OPENING = 1 << 30
_SEAT, _SEATS = OPENING + 1, 16
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.02, 0.2
# PostgreSQL's advisory locks have two keys of 32 bits: this one, and a claim's.
_NAMESPACE = int.from_bytes(b"moes", "big")


class Locks(Protocol):
    """Named locks of one study that no two processes hold at once, and that a dead process holds no more."""

    def take(self, key: int) -> bool:
        """Whether the lock is this process's now. Raises MoesimError where locks can no longer be had."""
        ...

    def drop(self, key: int) -> None:
        """Let go of a lock that `take` gave."""
        ...


class NoLocks:
    """For a study that nobody else sees, and for storages without locks: everything is free to take."""

    def take(self, key: int) -> bool:
        """Yes."""
        return True

    def drop(self, key: int) -> None:
        """Nothing to let go of."""


class FileLocks:
    """Locks on the bytes of a file; they hold between processes of one machine, and over NFS where it has locks."""

    def __init__(self, path: Path) -> None:
        """The file is made when the first lock is taken."""
        self.path = path
        self.file = -1

    def take(self, key: int) -> bool:
        """Whether the lock is this process's now. Raises BadInput where the file cannot be made."""
        try:
            if self.file < 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, key)
        except (BlockingIOError, PermissionError) as error:
            if self.file >= 0:
                return False
            raise _unwritable(error, self.path) from None
        except OSError as error:
            raise (_lost(error) if self.file >= 0 else _unwritable(error, self.path)) from None
        return True

    def drop(self, key: int) -> None:
        """Let go of a lock."""
        fcntl.lockf(self.file, fcntl.LOCK_UN, 1, key)

    def close(self) -> None:
        """Let go of everything."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class PostgresLocks:
    """Advisory locks of a PostgreSQL session: they end with the connection. Needs a session, not a pooled one."""

    def __init__(self, url: str) -> None:
        """Raises BadInput where there is no database, MissingPart where its driver is not installed."""
        from sqlalchemy import create_engine
        from sqlalchemy.exc import SQLAlchemyError

        try:
            self.engine: Engine = create_engine(url, isolation_level="AUTOCOMMIT")
            self.session: Connection = self.engine.connect()
        except ImportError as error:
            raise MissingPart(
                f"no driver for PostgreSQL ({error})", where="--storage", mend="pip install '.[postgres]'"
            ) from None
        except SQLAlchemyError as error:
            raise BadInput(
                f"the database cannot be reached ({type(error).__name__})",
                where=hidden(url),
                mend="start it, or mend the URL",
            ) from None

    def take(self, key: int) -> bool:
        """Whether the lock is this process's now."""
        return bool(self._ask("pg_try_advisory_lock", key))

    def drop(self, key: int) -> None:
        """Let go of a lock."""
        self._ask("pg_advisory_unlock", key)

    def _ask(self, function: str, key: int) -> Any:
        from sqlalchemy import text
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return self.session.execute(text(f"SELECT {function}({_NAMESPACE}, {key})")).scalar()
        except SQLAlchemyError as error:
            raise _lost(error) from None

    def close(self) -> None:
        """Let go of everything."""
        self.session.close()
        self.engine.dispose()


def _unwritable(error: OSError, path: Path) -> BadInput:
    return BadInput(f"cannot write here ({error.strerror})", where=str(path), mend="choose another --out")


def _lost(error: Exception) -> MoesimError:
    return MoesimError(
        f"the search can no longer be shared ({type(error).__name__}); finished trials are kept",
        mend="mend the storage and go on with --resume",
    )


class Claims:
    """Trials that this process may evaluate."""

    def __init__(self, locks: Locks) -> None:
        self.locks = locks
        self.seat: int | None = None
        self.pause_s = _FIRST_WAIT_S

    @contextmanager
    def opening(self) -> Iterator[None]:
        """While a study is made or looked up, and its first facts are written: one process at a time."""
        while not self.locks.take(OPENING):
            time.sleep(_FIRST_WAIT_S)
        try:
            yield
        finally:
            self.locks.drop(OPENING)

    def sit(self) -> None:
        """Be counted among the processes at work; beyond 16 of them the rest are not."""
        self.seat = next((seat for seat in range(_SEAT, _SEAT + _SEATS) if self.locks.take(seat)), None)

    def leave(self) -> None:
        """Be counted no more."""
        if self.seat is not None:
            self.locks.drop(self.seat)
            self.seat = None

    def others(self) -> int:
        """Other processes at work on the same study now."""
        if isinstance(self.locks, NoLocks):
            return 0
        found = 0
        for seat in range(_SEAT, _SEAT + _SEATS):
            if seat == self.seat:
                continue
            if self.locks.take(seat):
                self.locks.drop(seat)
            else:
                found += 1
        return found

    def take(self, numbers: Sequence[int], at_least: int) -> list[int]:
        """Some of the trials that nobody evaluates: all when alone, else half of a fair share, but enough for the
        workers here (`at_least`).
        """
        others = self.others()
        room = len(numbers) if others == 0 else max(at_least, len(numbers) // (2 * (others + 1)))
        taken: list[int] = []
        for number in numbers:
            if len(taken) == room:
                break
            if self.locks.take(number):
                taken.append(number)
        if taken:
            self.pause_s = _FIRST_WAIT_S
        return taken

    def wait(self) -> None:
        """Let the others finish: a fiftieth of a second, a fifth after a while."""
        time.sleep(self.pause_s)
        self.pause_s = min(2 * self.pause_s, _LONGEST_WAIT_S)

    def drop(self, numbers: Sequence[int]) -> None:
        """Let go of trials, finished or not."""
        for number in numbers:
            self.locks.drop(number)


@contextmanager
def open_claims(out: Path, storage: str | None) -> Iterator[Claims]:
    """The claims of a run: on a file beside its journal or its SQLite database, in PostgreSQL, or none elsewhere."""
    locks = _locks(out, storage)
    try:
        yield Claims(locks)
    finally:
        if not isinstance(locks, NoLocks):
            locks.close()


def _locks(out: Path, storage: str | None) -> NoLocks | FileLocks | PostgresLocks:
    if storage is None:
        return FileLocks(out / "study.lock")
    if storage.startswith("postgresql"):
        return PostgresLocks(storage)
    path = Path(storage.removeprefix("sqlite:///"))
    if storage.startswith("sqlite:///") and path.name and path.parent.is_dir():
        return FileLocks(path.with_name(path.name + ".lock"))
    return NoLocks()


def hidden(storage: str) -> str:
    """A storage's URL without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(storage).render_as_string(hide_password=True)
    except ArgumentError:
        return storage
