"""`validate hardware --bundle`: validations and profile of a node in one file that imports anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesim.errors import BadInput, CheckFailed
from profiles.bundle import add_records
from profiles.node import Options, measure
from validate.hardware.worker import PREDICTIONS_FILE, RECORD_FILE

FOLDER = "validation/"
TRAINING_FOLDER = "training/"
LEAST_STALL_S = 300.0  # a point of the profile may take as long; see `profile node --stall-limit`
TRAINING_STALL_S = 120.0  # as `validate training` has it


def folder_of(bundle: Path) -> Path:
    """Where the validation of a bundle writes: beside the points of its profile, which wait there, too."""
    return bundle.with_name(bundle.name + ".parts") / "validation"


def training_folder_of(bundle: Path) -> Path:
    """Where the validation of training steps writes."""
    return folder_of(bundle).with_name("training")


def trained(
    bundle: Path, *, backend: str, ranks: int, quick: bool, seed: int, stall_s: float, say: Callable[[str], None]
) -> CheckFailed | None:
    """Run `validate training` on the same ranks, unless an earlier go did; why it failed, if it did.

    A node's profile is worth having all the same. Where no layout has as many ranks, or fits, it says so.
    """
    from profiles.launch import under_torchrun
    from validate.training.command import make_job, start
    from validate.training.job import TrainingJob

    folder = training_folder_of(bundle)

    def make(world: int | None, say: Callable[[str], None] = say) -> TrainingJob:
        return make_job(
            backend, world, say, ranks=() if world is not None else (ranks,), names=(), quick=quick, out=folder,
            stall_s=max(stall_s, TRAINING_STALL_S), seed=seed,
        )  # fmt: skip

    try:
        make(int(os.environ["WORLD_SIZE"]) if under_torchrun() else None, lambda line: None)  # on every rank alike
        start(backend, make, say, keep=True)
    except BadInput as error:
        (folder / RECORD_FILE).unlink(missing_ok=True)  # of an earlier go, with other options
        say(f"no steps of training: {error.line()}")
    except CheckFailed as error:
        say(f"no steps of training: {error.line()}")
        return error
    return None


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
    """Measure the node's profile, write the bundle, and put the validations' records into it; what a person reads.

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
        files = _files(FOLDER, folder_of(bundle))
        said = summary(record)
        told.append(f"{bundle} holds the validation: {RECORD_FILE} and {PREDICTIONS_FILE}")
        steps = _files(TRAINING_FOLDER, training_folder_of(bundle))
        if steps:
            files |= steps
            said["training"] = training_summary(json.loads(steps[TRAINING_FOLDER + RECORD_FILE]))
            told[-1] += ", and those of steps of training"
        add_records(bundle, files, said)
    if wrong is not None:
        raise wrong
    return told


def _files(inside: str, folder: Path) -> dict[str, bytes]:
    """The predictions and the record of a finished validation, by their names in a bundle; none where it has none."""
    if not (folder / RECORD_FILE).is_file():
        return {}
    return {inside + name: (folder / name).read_bytes() for name in (PREDICTIONS_FILE, RECORD_FILE)}


def training_summary(record: dict[str, Any]) -> dict[str, Any]:
    """The same about its steps of training."""
    compared = record["comparison"]
    return {
        "date": record["date"],
        "layouts": len(record["measured"]),
        "step_mape": compared["step"]["mape"],
        "reliability": compared["split_half"]["reliability"],
        "gradient_error": record["gradient_error"],
        "predictions_sha256": record["predictions"]["sha256"],
    }


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
