"""From the options of `validate silicon` to its predictions and score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.files import write_text
from validate.silicon.intervals import with_intervals
from validate.silicon.page import write_page
from validate.silicon.price import Asked, Prediction, predict_all, predictions_csv
from validate.silicon.profiles import cached_profiles, sample_path
from validate.silicon.record import FOLDER, price_for_record, recorded_widths
from validate.silicon.rows import read_rows
from validate.silicon.score import score_table
from validate.silicon.summary import Summary, summarized


def run(
    *,
    rows: Path | None,
    out: Path | None,
    profiles: Path | None,
    say: Callable[[str], None],
    progress: Callable[[float], None] | None,
    workers: int = 1,
    scale: Mapping[str, float] | None = None,
    record: Path | None = None,
    report: Path | None = None,
) -> dict[str, Any]:
    """Price the rows and score those that were measured; writes predictions where asked. Raises BadInput, MissingPart.

    profiles: a folder with a profile for each system; without, those of the installed aiconfigurator-core, imported
    once into the user's cache. workers: processes. scale: costs made wrong on purpose, part -> factor. record: folder
    of the record that says how wide intervals are. report: the page, for which shares by cause are priced, too.
    """
    table = rows if rows is not None else sample_path()
    read = read_rows(table)
    if not read:
        raise BadInput("the table has no rows", where=str(table), mend="give rows as silicon_sample.csv has them")
    folder = profiles if profiles is not None else cached_profiles(read, say, workers)
    asked = Asked(scale=scale or {})
    if report is None:
        found = predict_all(read, folder, progress, asked, workers)
    else:
        found = price_for_record(read, folder, workers, progress, asked)
    return result_of(summarized(found), table, FOLDER if record is None else record, out, report)


def result_of(told: Summary, table: Path, record: Path, out: Path | None, report: Path | None) -> dict[str, Any]:
    """What is told of predictions, JSON-ready; writes them, and the page, where asked. Raises BadInput."""
    if out is not None:
        write_text(out, predictions_csv(told.found))
    if report is not None:
        write_page(report, told, table)
    widths = recorded_widths(record) or told.widths
    return {
        "rows": len(told.found),
        "priced": _priced(told.found),
        **told.as_dict(),
        "predictions": [with_intervals(one, widths) for one in told.found],
        "out": None if out is None else str(out),
        "report": None if report is None else str(report),
    }


def _priced(found: Sequence[Prediction]) -> int:
    return sum(one.status == "ok" for one in found)


def told(result: dict[str, Any]) -> str:
    """The result for a person."""
    if "text" in result:
        return "\n".join([str(result["text"]), *([f"report: {result['report']}"] if result.get("report") else [])])
    lines = [f"{result['priced']} of {result['rows']} rows priced.", score_table(result["score"])]
    lines += [f"{what}: {result[key]}" for key, what in (("out", "predictions"), ("report", "report")) if result[key]]
    return "\n".join(lines)


def scales(given: Sequence[str]) -> dict[str, float]:
    """Factors by part of `PART=FACTOR` options. Raises BadInput."""
    found = {}
    for text in given:
        name, _, factor = text.partition("=")
        try:
            found[name.strip()] = float(factor)
        except ValueError:
            raise BadInput(
                f"{text!r} is not PART=FACTOR", where="--scale", mend="write for instance --scale experts=1.5"
            ) from None
    return found
