"""From the options of `validate silicon` to its predictions and score."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.files import write_text
from profiles.importers.aiconfigurator import find_package
from profiles.importers.aiconfigurator_profile import import_profile
from profiles.store import DESCRIPTION
from validate.silicon import Prediction, predict_all, predictions_csv, score
from validate.silicon_rows import read_rows

SAMPLE = "silicon_sample.csv"


def run(
    *,
    rows: Path | None,
    out: Path | None,
    profiles: Path | None,
    say: Callable[[str], None],
    progress: Callable[[float], None] | None,
) -> dict[str, Any]:
    """Price the rows and score those that were measured; writes predictions where asked. Raises BadInput, MissingPart.

    profiles: a folder with a profile for each system; without, those of the installed aiconfigurator-core, imported
    once into the user's cache.
    """
    table = rows if rows is not None else find_package(None)[0].parent / SAMPLE
    read = read_rows(table)
    if not read:
        raise BadInput("the table has no rows", where=str(table), mend="give rows as silicon_sample.csv has them")
    wanted = sorted({row.system for row in read if row.moe and row.aggregated})
    folder = profiles if profiles is not None else cached_profiles(wanted, say)
    found = predict_all(read, folder, progress)
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


def cached_profiles(systems: Sequence[str], say: Callable[[str], None]) -> Path:
    """The folder of imported profiles in the user's cache; those that are missing are imported (minutes each)."""
    data, version = find_package(None)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "moesim" / f"aiconfigurator-{version}"
    for system in systems:
        if not (data / system).is_dir() or (folder / system / DESCRIPTION).is_file():
            continue
        say(f"importing the tables of {system}, once ...")
        import_profile(folder / system, system=system, engine="all", source=None, priced=True, say=lambda line: None)
    return folder
