"""From the options of `validate silicon` to its predictions and score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.files import write_text
from validate.silicon import Asked, Prediction, predict_all, predictions_csv, score, score_table
from validate.silicon_profiles import cached_profiles, sample_path
from validate.silicon_rows import read_rows


def run(
    *,
    rows: Path | None,
    out: Path | None,
    profiles: Path | None,
    say: Callable[[str], None],
    progress: Callable[[float], None] | None,
    workers: int = 1,
    scale: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Price the rows and score those that were measured; writes predictions where asked. Raises BadInput, MissingPart.

    profiles: a folder with a profile for each system; without, those of the installed aiconfigurator-core, imported
    once into the user's cache. workers: processes. scale: costs made wrong on purpose, part -> factor.
    """
    table = rows if rows is not None else sample_path()
    read = read_rows(table)
    if not read:
        raise BadInput("the table has no rows", where=str(table), mend="give rows as silicon_sample.csv has them")
    folder = profiles if profiles is not None else cached_profiles(read, say, workers)
    found = predict_all(read, folder, progress, Asked(scale=scale or {}), workers)
    if out is not None:
        write_text(out, predictions_csv(found))
    return {
        "rows": len(read),
        "priced": _priced(found),
        "score": score(found),
        "out": None if out is None else str(out),
    }


def _priced(found: Sequence[Prediction]) -> int:
    return sum(one.status == "ok" for one in found)


def told(result: dict[str, Any]) -> str:
    """The result for a person."""
    if "text" in result:
        return str(result["text"])
    lines = [f"{result['priced']} of {result['rows']} rows priced.", score_table(result["score"])]
    return "\n".join([*lines, f"predictions: {result['out']}"] if result["out"] else lines)


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
