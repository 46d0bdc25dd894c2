"""`validate silicon --update`, `--check` and `--recorded`: the record and the table of it made, held to, and told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, CheckFailed
from validate.silicon import table as silicon_table
from validate.silicon.check import drift, words
from validate.silicon.command import result_of
from validate.silicon.page import write_page
from validate.silicon.price import Asked, Prediction, predict_all
from validate.silicon.profiles import cached_profiles, sample_path
from validate.silicon.record import FOLDER, MAKE, price_for_record, read_record, sampled, write_record
from validate.silicon.rows import SiliconRow, read_rows
from validate.silicon.summary import markdown, summarized

Say = Callable[[str], None]
Progress = Callable[[float], None] | None


def kept(
    *, update_first: bool, check_then: bool, rows: Path | None, profiles: Path | None, workers: int, docs: Path | None,
    record: Path | None, scale: Mapping[str, float], most: int, report: Path | None, say: Say, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Update the record, check against it, or both in turn; the last one's result. Raises BadInput, MissingPart.

    docs: the page with the generated part; without one the checkout's where the command runs in one, else none.
    report: an HTML page of what is on record then.
    """
    if docs is None and silicon_table.DOCS.is_file():
        docs = silicon_table.DOCS
    folder = FOLDER if record is None else record
    result: dict[str, Any] = {}
    if update_first:
        if scale:
            raise BadInput("the record is of the costs as they are", where="--scale", mend="leave it out with --update")
        result = update(
            rows=rows, profiles=profiles, workers=workers, docs=docs, say=say, progress=progress, folder=folder
        )
    if check_then:
        result = check(
            rows=rows, profiles=profiles, workers=workers, docs=docs, scale=scale, most=most, say=say,
            progress=progress, folder=folder,
        )  # fmt: skip
    if report is not None:
        table, read = _table(rows)
        write_page(report, summarized(_all(read, table, folder)), table)
    return {**result, "report": None if report is None else str(report)}


def recorded(
    *, rows: Path | None, record: Path | None, out: Path | None, report: Path | None, scale: Mapping[str, float]
) -> dict[str, Any]:
    """What is on record, told as if it had just been priced. Raises BadInput, and CheckFailed for another table."""
    if scale:
        raise BadInput("the record is of the costs as they are", where="--scale", mend="leave it out with --recorded")
    folder = FOLDER if record is None else record
    table, read = _table(rows)
    return result_of(summarized(_all(read, table, folder)), table, folder, out, report)


def update(
    *, rows: Path | None, profiles: Path | None, workers: int, docs: Path | None, say: Say, progress: Progress,
    folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Price every row with its causes, write the record and the table of it. Raises BadInput, MissingPart.

    rows: a table like the package's, which is the default. docs: the page with the generated part; None for none.
    """
    table, read = _table(rows)
    found = price_for_record(read, _profiles(profiles, read, say, workers), workers, progress)
    write_record(folder, found, table)
    told = summarized(_all(read, table, folder))
    text = markdown(told)
    if docs is not None:
        silicon_table.put(docs, text)
    return {"rows": len(read), "priced": sum(not one.reason for one in found), **told.as_dict(), "text": text}


def check(
    *, rows: Path | None, profiles: Path | None, workers: int, docs: Path | None, scale: Mapping[str, float], most: int,
    say: Say, progress: Progress, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """Hold some rows, priced again, and the table to the record. Raises BadInput, MissingPart.

    scale: costs made wrong on purpose, part -> factor. most: rows that are priced again. Returns what was found, with
    `holds` and the words for a person in `text`.
    """
    table, read = _table(rows)
    record = read_record(read, table, folder)
    again = sampled(record, most)
    fresh = predict_all(again, _profiles(profiles, again, say, workers), progress, Asked(scale=scale), workers)
    moved = drift(fresh, [record.predictions[row.id] for row in again])
    lines = [words(moved) + ("" if moved.holds else f"; if that is meant, {MAKE}")]
    holds = moved.holds
    if docs is not None:
        try:
            silicon_table.check(docs, markdown(summarized(list(record.predictions.values()))))
            lines.append(f"{docs}: its table is the record's.")
        except CheckFailed as error:
            holds = False
            lines.append(error.line())
    return {"holds": holds, "drift": moved.as_dict(), "text": "\n".join(lines)}


def _table(rows: Path | None) -> tuple[Path, list[SiliconRow]]:
    table = sample_path() if rows is None else rows
    return table, read_rows(table)


def _profiles(profiles: Path | None, rows: Sequence[SiliconRow], say: Say, workers: int) -> Path:
    return cached_profiles(rows, say, workers) if profiles is None else profiles


def _all(rows: Sequence[SiliconRow], table: Path, folder: Path) -> list[Prediction]:
    """The predictions as the record has them: what is told of them is the same when it is read again."""
    return list(read_record(rows, table, folder).predictions.values())
