"""Rows that importers read one by one become tables of the store, and the description that goes with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiles.leave_out import errors_of, fit_experts
from profiles.record import FAMILIES, LATENCY
from profiles.store import empty, polars_schema
from profiles.whose import System

if TYPE_CHECKING:
    import polars as pl

UNKNOWN = "unknown"


def tables_of_rows(rows: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, pl.DataFrame]:
    """A table for each family, empty where there is no row; points that stand there more than once become their median.

    rows: family and row, the row with every column of its family.
    """
    import polars as pl

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in FAMILIES}
    for family, row in rows:
        found[family].append(row)
    tables = {}
    for name, shape in FAMILIES.items():
        if not found[name]:
            tables[name] = empty(shape)
            continue
        figures = [LATENCY, *shape.values]
        identity = [column for column in shape.columns if column not in figures]
        medians = (
            pl.DataFrame(found[name], schema=polars_schema(shape)).group_by(identity).agg(pl.col(figures).median())
        )
        tables[name] = medians.select(list(shape.columns)).sort(identity)
    return tables


def description(
    tables: dict[str, pl.DataFrame], system: System, engine: str, files: Sequence[Path], **told: Any
) -> dict[str, Any]:
    """`profile.json`: where the rows come from, the leave-out errors that they allow, and what the importer tells."""
    fitted = fit_experts(tables["experts"])
    return {
        **system.told(),
        "engine": engine,
        "files": told_files(files),
        "rows": {name: table.height for name, table in tables.items() if table.height},
        **told,
        "errors": errors_of(tables, fitted),
        "physics": fitted["parameters"],
    }


def told_files(files: Sequence[Path]) -> list[dict[str, str]]:
    """Name and digest of each file that rows come from."""
    return [{"name": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()} for path in files]
