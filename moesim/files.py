"""Writing files whole or not at all: a temporary name in the same folder, synced, renamed."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from moesim.errors import BadInput


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed over `path`, else removed.

    Raises BadInput when the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise BadInput(
            f"cannot write here ({error.strerror})",
            where=str(path),
            mend="choose a folder that can be written",
        ) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise BadInput(
            f"cannot write here ({error.strerror})",
            where=str(path),
            mend="free space or choose another folder",
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write `content` (UTF-8) to `path` whole or not at all."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Write `content` as JSON (no NaN, no infinity) to `path` whole or not at all."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def read_text(path: Path, *, what: str) -> str:
    """Read a UTF-8 text file; `what` names its role in the error. Raises BadInput."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(
            f"cannot read the {what} ({error.strerror})",
            where=str(path),
            mend="give a path to a readable file",
        ) from None
    except UnicodeDecodeError:
        raise BadInput(f"the {what} is not UTF-8 text", where=str(path), mend="give a text file") from None
    except ValueError:  # a NUL in the name
        raise BadInput(f"the {what} has no name of a file", where=repr(str(path)), mend="give a path") from None


def kind_of(path: Path) -> Literal["file", "folder"] | None:
    """What lies at a path; None for nothing, and for a name that no file can have."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError):
        return None
    return "folder" if stat.S_ISDIR(mode) else "file"
