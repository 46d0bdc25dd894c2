"""`validate hardware --bundle`: validation and profile of a node in one file that imports anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesim.errors import CheckFailed
from profiles.bundle import add_records
from profiles.node import Options, measure
from validate.hardware.job import Job
from validate.hardware.worker import PREDICTIONS_FILE, RECORD_FILE

FOLDER = "validation/"
LEAST_STALL_S = 300.0  # a point of the profile may take as long; see `profile node --stall-limit`


def folder_of(bundle: Path) -> Path:
    """Where the validation of a bundle writes: beside the points of its profile, which wait there, too."""
    return bundle.with_name(bundle.name + ".parts") / "validation"


def finished(job: Job) -> dict[str, Any] | None:
    """The record of this very job that an earlier go of the command left, None where there is none."""
    try:
        record: dict[str, Any] = json.loads((Path(job.out) / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if record.get("job") == job.model_dump(mode="json", exclude={"out"}) else None


def profile_and_bundle(
    record: dict[str, Any] | None,
    *,
    bundle: Path,
    backend: str,
    ranks: int | None,
    quick: bool,
    budget_s: float | None,
    loads: Path | None,
    stall_s: float,
    say: Callable[[str], None],
) -> list[str]:
    """Measure the node's profile, write the bundle, and put the validation's record into it; what a person reads.

    record: of the validation, None on ranks but the first. Load files of other formats than JSON, which the profile
    does not take, are the validation's alone. Raises CheckFailed, BadInput, MissingPart; a bundle that was written
    before that has its record.
    """
    taken = loads if loads is not None and loads.suffix == ".json" else None
    if loads is not None and taken is None:
        say(f"{loads.name} is no JSON: the profile is measured without it")
    options = Options(
        bundle,
        "cuda" if backend == "nccl" else "cpu",
        ranks,
        quick,
        budget_s,
        taken,
        None,
        stall_s,
    )
    wrong: CheckFailed | None = None
    told: list[str] = []
    try:
        told = measure(options, say=say)
    except CheckFailed as error:
        wrong = error
    if record is not None and bundle.is_file():
        folder = folder_of(bundle)
        files = {FOLDER + name: (folder / name).read_bytes() for name in (PREDICTIONS_FILE, RECORD_FILE)}
        add_records(bundle, files, summary(record))
        told.append(f"{bundle} holds the validation: {RECORD_FILE} and {PREDICTIONS_FILE}")
    if wrong is not None:
        raise wrong
    return told


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """What a bundle's manifest, and the profile made of it, say about its validation."""
    compared = record["comparison"]
    return {
        "date": record["date"],
        "cases": len(record["measured"]),
        "layer_mape": compared["layer"]["mape"],
        "reliability": compared["split_half"]["reliability"],
        "goals": compared["goals"],
        "predictions_sha256": record["predictions"]["sha256"],
    }
