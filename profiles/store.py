"""A profile on disk: a folder of Parquet files, one a family, and `profile.json`; written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import BadInput
from profiles.record import COUNT, FAMILIES, NUMBER, TEXT, Family

if TYPE_CHECKING:
    import polars as pl

    from profiles.products import Product

DATA = Path(__file__).parent / "data"
FORMAT = "moesim-profile"
SCHEMA_VERSION = 1
DESCRIPTION = "profile.json"
LARGEST = 1e30  # above any rate or time that a fit can give


@dataclass(frozen=True)
class Profile:
    """A profile opened for reading; tables are read when they are asked for."""

    folder: Path

    @cached_property
    def description(self) -> dict[str, Any]:
        """`profile.json`: format, sources, and the leave-out errors of each family. Raises BadInput."""
        path = self.folder / DESCRIPTION
        try:
            content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except OSError:
            raise BadInput(
                "no profile here (profile.json cannot be read)",
                where=str(self.folder),
                mend="make one with `moesim profile import`, or name `default`",
            ) from None
        except (ValueError, RecursionError):
            raise BadInput("not valid JSON", where=str(path), mend="import the profile again") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise BadInput(f"not a {FORMAT}", where=str(path), mend="import the profile again")
        if content.get("schema_version") != SCHEMA_VERSION or content["schema_version"] is True:
            raise BadInput(
                f"schema version {content.get('schema_version')!r} is not {SCHEMA_VERSION}",
                where=str(path),
                mend="import the profile again with this version of moesim",
            )
        fault = _fault_of_figures(content)
        if fault:
            raise BadInput(fault, where=str(path), mend="import the profile again")
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

    @cached_property
    def devices(self) -> tuple[str, ...]:
        """The devices that its rows name, in order of name; a broken table is refused where it is asked."""
        found: set[str] = set()
        for name in self.families():
            with contextlib.suppress(BadInput):
                table = read_parquet(self.folder / f"{name}.parquet", columns=["device"])
                found |= {str(device) for device in table["device"].unique() if device is not None}
        return tuple(sorted(found))

    @cached_property
    def products(self) -> dict[str, Product]:
        """What was found of each kernel of dense products, by `lookup.product_name`. Raises BadInput."""
        from profiles.products import Product  # compiled code: only where prices are asked

        stored = self.description.get("products", {})
        try:
            return {str(name): Product.from_dict(one) for name, one in stored.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise BadInput(
                "products do not hold rules and surcharges",
                where=str(self.folder / DESCRIPTION),
                mend="import the profile again",
            ) from None

    def errors(self, name: str) -> dict[str, float]:
        """Leave-out errors of one family: `median`, `p68`, `p90` of |ln(predicted / measured)|, `points`."""
        found = self.description.get("errors", {}).get(name, {})
        return {str(key): float(value) for key, value in found.items()}


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


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _fault_of_figures(content: dict[str, Any]) -> str:
    """What is wrong with the figures of `profile.json` that prices use; empty where nothing is.

    errors: family -> quantile -> figure. physics: kernel -> `parameters` and `limits`, name -> figure.
    """
    errors, physics = content.get("errors", {}), content.get("physics", {})
    if not isinstance(errors, dict) or not isinstance(physics, dict):
        return "errors and physics must be objects"
    tables = {f"errors.{name}": table for name, table in errors.items()}
    for name, kernel in physics.items():
        if not isinstance(kernel, dict) or not {"parameters", "limits"} <= kernel.keys():
            return f"physics.{name[:40]} lacks parameters or limits"
        tables |= {f"physics.{name}.{part}": kernel[part] for part in ("parameters", "limits")}
    for where, table in tables.items():
        if not isinstance(table, dict):
            return f"{where[:60]} is not an object"
        for key, value in table.items():
            number = not isinstance(value, bool) and isinstance(value, int | float)
            if not number or not 0 <= value < LARGEST or (where.endswith(".limits") and not _is_count(key)):
                return f"{f'{where}.{key}'[:80]} is no figure from 0 on"
    return ""


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def polars_schema(family: Family) -> dict[str, Any]:
    """Polars types of a family's columns."""
    import polars as pl

    types = {TEXT: pl.String, NUMBER: pl.Float64}
    return {name: types.get(kind, pl.Int64) for name, kind in family.columns.items()}


def empty(family: Family) -> pl.DataFrame:
    """A table of the family without rows."""
    import polars as pl

    return pl.DataFrame(schema=polars_schema(family))


_STDERR = threading.Lock()


@contextlib.contextmanager
def _panics_unheard() -> Iterator[None]:
    """Keep off the terminal what Polars' threads print when they panic; the panic itself still comes as an exception.

    They write to the file descriptor, so nothing but that can be turned away; one thread at a time.
    """
    with _STDERR:
        try:
            sys.stderr.flush()
            kept = os.dup(2)
        except (OSError, ValueError, AttributeError):  # no stderr, nothing to hear
            yield
            return
        try:
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def read_parquet(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """Read a Parquet file, whole or these columns of it; what is broken in it becomes one BadInput."""
    import polars as pl

    try:
        with _panics_unheard():
            return pl.read_parquet(path, columns=columns, use_statistics=False)
    except BaseException as error:
        # Polars raises its PanicException, a BaseException, on some damaged files.
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise BadInput("not a readable Parquet file", where=str(path), mend="fetch or import it again") from None


def checked(table: pl.DataFrame, family: Family, *, where: Path | str) -> pl.DataFrame:
    """The table with the family's columns and types; sizes and latencies finite and above zero, counts not negative.

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
    for name, kind in family.columns.items():
        column = pl.col(name)
        odd = column.is_null()
        if kind == COUNT:
            odd = odd | (column < 0)
        elif kind == NUMBER:
            odd = odd | ~column.is_finite() | (column <= 0)
        bad = table.select(odd.arg_true().alias("row"))["row"]
        if len(bad):
            mend = "values must be finite and above zero" if kind == NUMBER else "import the profile again"
            raise BadInput(f"{name} is {table[name][int(bad[0])]} in row {int(bad[0])}", where=str(where), mend=mend)
    return table


# Levels of zstd: the smallest files, and files that are written in a tenth of the time.
SMALLEST, QUICKEST = 19, 1


def write_profile(
    folder: Path, tables: dict[str, pl.DataFrame], description: dict[str, Any], level: int = SMALLEST
) -> None:
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
            table.sort(order).write_parquet(path, compression="zstd", compression_level=level, statistics=False)
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
