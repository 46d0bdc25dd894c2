"""A profile on disk: a folder of Parquet files, one a family, and `profile.json`; written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import BadInput
from profiles.record import FAMILIES, LATENCY, NUMBER, TEXT, Family

if TYPE_CHECKING:
    import polars as pl

DATA = Path(__file__).parent / "data"
FORMAT = "moesim-profile"
SCHEMA_VERSION = 1
DESCRIPTION = "profile.json"


@dataclass(frozen=True)
class Profile:
    """A profile opened for reading; tables are read when they are asked for."""

    folder: Path

    @cached_property
    def description(self) -> dict[str, Any]:
        """`profile.json`: format, sources, and the leave-out errors of each family. Raises BadInput."""
        path = self.folder / DESCRIPTION
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError:
            raise BadInput(
                "no profile here (profile.json cannot be read)",
                where=str(self.folder),
                mend="make one with `moesim profile import`, or name `default`",
            ) from None
        except ValueError:
            raise BadInput("not valid JSON", where=str(path), mend="import the profile again") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise BadInput(f"not a {FORMAT}", where=str(path), mend="import the profile again")
        if content.get("schema_version") != SCHEMA_VERSION:
            raise BadInput(
                f"schema version {content.get('schema_version')!r} is not {SCHEMA_VERSION}",
                where=str(path),
                mend="import the profile again with this version of moesim",
            )
        return content

    def families(self) -> list[str]:
        """Names of the families that have a table here."""
        _ = self.description
        return [name for name in FAMILIES if (self.folder / f"{name}.parquet").is_file()]

    def table(self, name: str) -> pl.DataFrame:
        """The rows of one family, checked; empty where the profile has none. Raises BadInput."""
        path = self.folder / f"{name}.parquet"
        family = FAMILIES[name]
        if not path.is_file():
            _ = self.description
            return empty(family)
        return checked(read_parquet(path), family, where=path)

    def errors(self, name: str) -> dict[str, float]:
        """Leave-out errors of one family: `median`, `p68`, `p90` of |ln(predicted / measured)|, `points`."""
        found = self.description.get("errors", {}).get(name, {})
        return {str(key): float(value) for key, value in found.items()} if isinstance(found, dict) else {}


def open_profile(name: str, system: str) -> Profile:
    """A profile by name: `default` is the one shipped for `system`, anything else a folder. Raises BadInput."""
    if name != "default":
        profile = Profile(Path(name))
        _ = profile.description
        return profile
    folder = DATA / system
    if not (folder / DESCRIPTION).is_file():
        shipped = ", ".join(shipped_systems()) or "none"
        raise BadInput(
            f"no profile ships for the system {system!r} (shipped: {shipped})",
            where="cost.profiles",
            mend=f"run `moesim profile import aiconfigurator --system {system} --engine sglang --out DIR` "
            "and name DIR, or set cost.source: roofline",
        )
    return Profile(folder)


def shipped_systems() -> list[str]:
    """Systems that a default profile ships for."""
    return sorted(path.parent.name for path in DATA.glob(f"*/{DESCRIPTION}"))


def polars_schema(family: Family) -> dict[str, Any]:
    """Polars types of a family's columns."""
    import polars as pl

    types = {TEXT: pl.String, NUMBER: pl.Float64}
    return {name: types.get(kind, pl.Int64) for name, kind in family.columns.items()}


def empty(family: Family) -> pl.DataFrame:
    """A table of the family without rows."""
    import polars as pl

    return pl.DataFrame(schema=polars_schema(family))


# One at a time turns the terminal off and on again.
_READING = threading.Lock()


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep native code from the terminal: where a damaged file makes Polars panic, it prints a traceback of its own."""
    with _READING, contextlib.ExitStack() as after:
        with contextlib.suppress(OSError):  # a process may have no standard error at all
            kept = os.dup(2)
            after.callback(os.close, kept)
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            after.callback(os.dup2, kept, 2)
        yield


def read_parquet(path: Path) -> pl.DataFrame:
    """Read a Parquet file; what is broken in it becomes one BadInput."""
    import polars as pl

    try:
        with _quiet_stderr():
            return pl.read_parquet(path, use_statistics=False)
    except BaseException as error:
        # Polars raises its PanicException, a BaseException, on some damaged files.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise BadInput("not a readable Parquet file", where=str(path), mend="fetch or import it again") from None


def checked(table: pl.DataFrame, family: Family, *, where: Path | str) -> pl.DataFrame:
    """The table with the family's columns and types; sizes and latencies must be finite and above zero.

    Raises BadInput that names the column and the first bad row.
    """
    import polars as pl

    lacking = [name for name in family.columns if name not in table.columns]
    if lacking:
        raise BadInput(f"the column {lacking[0]!r} is missing", where=str(where), mend="import the profile again")
    try:
        table = table.select(pl.col(name).cast(kind) for name, kind in polars_schema(family).items())
    except pl.exceptions.PolarsError:
        raise BadInput("a column has the wrong type", where=str(where), mend="import the profile again") from None
    for name in (*family.point, LATENCY):
        bad = table.select(
            (pl.col(name).is_null() | ~pl.col(name).is_finite() | (pl.col(name) <= 0)).arg_true().alias("row")
        )["row"]
        if len(bad):
            value = table[name][int(bad[0])]
            raise BadInput(
                f"{name} is {value} in row {int(bad[0])}", where=str(where), mend="values must be finite and above zero"
            )
    return table


def write_profile(folder: Path, tables: dict[str, pl.DataFrame], description: dict[str, Any]) -> None:
    """Write a profile whole or not at all: into a folder beside, synced, then renamed into place.

    Raises BadInput when a table does not fit its family or the place cannot be written; what stood there stays.
    """
    folder = Path(folder)
    ready = {name: checked(table, FAMILIES[name], where=name) for name, table in tables.items() if table.height}
    if not ready:
        raise BadInput("nothing to write: no table holds a row", where=str(folder), mend="check the source folder")
    if folder.exists() and not (folder / DESCRIPTION).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput("this is not a profile", where=str(folder), mend="choose an empty folder or another name")
    content = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **description}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise BadInput(
            f"cannot write here ({error.strerror})", where=str(folder), mend="choose another folder"
        ) from None
    try:
        for name, table in ready.items():
            order = [*FAMILIES[name].key, "engine", "version", *FAMILIES[name].point]
            path = fresh / f"{name}.parquet"
            table.sort(order).write_parquet(path, compression="zstd", compression_level=19, statistics=False)
            _sync(path)
        path = fresh / DESCRIPTION
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _sync(path)
        fresh.chmod(0o755)
        _swap(fresh, folder)
    except OSError as error:
        raise BadInput(
            f"cannot write here ({error.strerror})", where=str(folder), mend="free space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, folder: Path) -> None:
    """Rename `fresh` to `folder`; an older profile there is moved aside first and put back if that fails."""
    if not folder.exists():
        fresh.replace(folder)
        return
    aside = fresh.with_suffix(".old")
    folder.replace(aside)
    try:
        fresh.replace(folder)
    except OSError:
        aside.replace(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as written, contextlib.suppress(OSError):
        os.fsync(written.fileno())
