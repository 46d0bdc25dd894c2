"""The committed record of what is predicted of every measured row: predictions, shares by cause, and of which table.

Measured figures stay in the package that ships them; the record holds ids, predictions and what they are made of. It is
written by `moesim validate silicon --update` and read by `--check`, by the table in docs/accuracy.md and by the report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, CheckFailed
from moesim.files import read_text, whole_file, write_json
from profiles.importers.aiconfigurator import find_package
from profiles.store import read_parquet
from validate.silicon.causes import FRONT_END, PARTS, Causes
from validate.silicon.intervals import Width, calibrate, width_of
from validate.silicon.price import AS_IT_IS, Asked, Prediction, predict_all, run_in
from validate.silicon.rows import SiliconRow, clean
from validate.silicon.scored import halves

FOLDER = Path(__file__).parents[1] / "data"
TABLE, DESCRIPTION = "silicon.parquet", "silicon.json"
FORMAT = "moesim-silicon-record"
MAKE = "run `make accuracy` (or `moesim validate silicon --update`) and commit what it writes"
_SHARES = [f"{figure} {part}" for figure in ("ttft", "tpot") for part in (*PARTS, FRONT_END)]
_MORE = ("waiting", "prompts", "ttft_sigma", "tpot_sigma")
DIGITS = 4  # of shares, after the point
FIGURES = 7  # significant, of times


@dataclass(frozen=True)
class Record:
    """What is on record. table: sha256 of the table of rows; version: of the package that ships it; by id."""

    table: str
    version: str
    predictions: dict[str, Prediction]


def price_for_record(
    rows: Sequence[SiliconRow],
    profiles: Path,
    workers: int = 1,
    progress: Callable[[float], None] | None = None,
    asked: Asked = AS_IT_IS,
) -> list[Prediction]:
    """A prediction for each row, in order; with causes where a score counts the row (which takes twice as long)."""
    scored = clean(rows)
    runs = [run_in(row, profiles) for row in rows]
    known = {run_in(row, profiles) for row in scored}
    rest = [row for run, row in zip(runs, rows, strict=True) if run not in known]
    share = len(scored) / max(len(rows), 1)

    def part(start: float, length: float) -> Callable[[float], None] | None:
        return None if progress is None else lambda done: progress(start + length * done)

    told = predict_all(scored, profiles, part(0.0, share), replace(asked, causes=True), workers)
    told += predict_all(rest, profiles, part(share, 1.0 - share), asked, workers)
    priced = {run_in(one.row, profiles): one for one in told}
    return [replace(priced[run], row=row) for run, row in zip(runs, rows, strict=True)]


def write_record(folder: Path, found: Sequence[Prediction], table: Path) -> None:
    """Write the record of predictions of the rows of `table`, each file whole or not at all. Raises BadInput."""
    import polars as pl

    columns: dict[str, list[Any]] = {
        "id": [one.row.id for one in found],
        "reason": [one.reason for one in found],
        "ttft_ms": [_rounded(one.ttft_s) for one in found],
        "tpot_ms": [_rounded(one.tpot_s) for one in found],
    }
    for name in (*_SHARES, *_MORE):
        columns[name] = [None if one.causes is None else round(_share(one.causes, name), DIGITS) for one in found]
    types: dict[str, Any] = dict.fromkeys((*_SHARES, *_MORE), pl.Float32)
    types |= dict.fromkeys(("ttft_ms", "tpot_ms"), pl.Float64)
    with whole_file(folder / TABLE) as path:
        pl.DataFrame(columns, schema_overrides=types).write_parquet(
            path, compression="zstd", compression_level=19, statistics=False
        )
    told = {
        "format": FORMAT,
        "package_version": find_package(None)[1],
        "table_sha256": table_digest(table),
        "rows": len(found),
        "intervals": {name: width.as_dict() for name, width in calibrate(halves(found)["even"]).items()},
    }
    write_json(folder / DESCRIPTION, told, indent=1)


def read_record(rows: Sequence[SiliconRow], table: Path, folder: Path = FOLDER) -> Record:
    """The record of these rows of `table`. Raises BadInput, and CheckFailed where it is of another table."""
    told = _description(folder)
    if told.get("table_sha256") != table_digest(table):
        raise CheckFailed(
            f"the record is of the table of aiconfigurator-core {told.get('package_version')}, not of this one",
            where=str(table), mend=f"install that version, or {MAKE}",
        )  # fmt: skip
    stored = read_parquet(folder / TABLE)
    lacking = [name for name in ("id", "reason", "ttft_ms", "tpot_ms", *_SHARES, *_MORE) if name not in stored.columns]
    if lacking:
        raise BadInput(f"the column {lacking[0]!r} is missing", where=str(folder / TABLE), mend=MAKE)
    by_id = {row.id: row for row in rows}
    found = {str(line["id"]): line for line in stored.iter_rows(named=True)}
    if by_id.keys() != found.keys():
        raise CheckFailed("the record holds other rows than the table", where=str(folder / TABLE), mend=MAKE)
    predictions = {name: _prediction(by_id[name], line) for name, line in found.items()}
    return Record(str(told["table_sha256"]), str(told.get("package_version")), predictions)


def _description(folder: Path) -> dict[str, Any]:
    """What a record says of itself. Raises BadInput."""
    if not (folder / DESCRIPTION).is_file():
        raise BadInput("no record of predictions", where=str(folder), mend=MAKE)
    try:
        told = json.loads(read_text(folder / DESCRIPTION, what="record of predictions"))
    except ValueError:
        told = None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise BadInput(f"not a {FORMAT}", where=str(folder / DESCRIPTION), mend=MAKE)
    return told


def recorded_widths(folder: Path = FOLDER) -> dict[str, Width]:
    """How wide intervals are by the record, for rows that are not on it; empty where there is none. Raises BadInput."""
    if not (folder / DESCRIPTION).is_file():
        return {}
    try:
        return {str(name): width_of(told) for name, told in _description(folder).get("intervals", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput("its intervals are damaged", where=str(folder / DESCRIPTION), mend=MAKE) from None


def table_digest(table: Path) -> str:
    """The sha256 of a table of rows. Raises BadInput."""
    return hashlib.sha256(read_text(table, what="table of runs").encode()).hexdigest()


def sampled(record: Record, most: int) -> list[SiliconRow]:
    """Rows of the record that were priced and are scored, about evenly from every cell, engine and system; in order.

    Of each (model, system, engine) in turn the row whose hash is least, until there are `most`: which rows these are
    depends on nothing that was measured or predicted.
    """
    cells: dict[tuple[str, str, str], list[SiliconRow]] = {}
    for one in record.predictions.values():
        if one.causes is not None:
            cells.setdefault((one.row.model, one.row.system, one.row.engine), []).append(one.row)
    ordered = [
        sorted(rows, key=lambda row: hashlib.sha256(row.id.encode()).digest()) for _, rows in sorted(cells.items())
    ]
    picked: list[SiliconRow] = []
    depth = 0
    while len(picked) < most and any(len(rows) > depth for rows in ordered):
        picked += [rows[depth] for rows in ordered if len(rows) > depth][: most - len(picked)]
        depth += 1
    chosen = {row.id for row in picked}
    return [one.row for one in record.predictions.values() if one.row.id in chosen]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{seconds * 1e3:.{FIGURES}g}")


def _share(causes: Causes, name: str) -> float:
    figure, _, part = name.partition(" ")
    value: float = getattr(causes, figure)[part] if part else getattr(causes, name)
    return value


def _prediction(row: SiliconRow, line: dict[str, Any]) -> Prediction:
    if line["reason"]:
        return Prediction(row, None, None, line["reason"])
    causes = None
    if line["waiting"] is not None:
        shares = {
            figure: {part: float(line[f"{figure} {part}"]) for part in (*PARTS, FRONT_END)}
            for figure in ("ttft", "tpot")
        }
        causes = Causes(shares["ttft"], shares["tpot"], *(float(line[name]) for name in _MORE))
    return Prediction(row, line["ttft_ms"] * 1e-3, line["tpot_ms"] * 1e-3, causes=causes)
