"""`validate fabric`: calibrate, predict every lab, and only then build and measure them."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.files import write_json
from profiles.device import device_name
from validate.fabric import calibrate as fabric_calibrate
from validate.fabric import net as fabric_net
from validate.fabric import record as fabric_record
from validate.fabric.predict import busiest_link, by_executor, seconds_of
from validate.fabric.rank import Case
from validate.fabric.run import check_parts, named, run_cell
from validate.fabric.spec import WHERE, LabSpec, RoutedSpec, bundled, read_lab
from validate.foretold import now, write_predictions
from validate.hardware.job import file_profile

CALIBRATION_FILE, PREDICTIONS_FILE, RECORD_FILE = "calibration.json", "predictions.json", "record.json"
# `--quick`: enough to see that everything works.
QUICK_BYTES, QUICK_REPEATS = 400_000, 4


def cases_of(lab: LabSpec) -> list[Case]:
    """Every pattern flat and two-level, then the pairs at once."""
    alone = [Case((name,), scheme, lab.bytes_per_rank) for name in lab.patterns for scheme in fabric_record.SCHEMES]
    return alone + [Case(tuple(pair), "flat", lab.bytes_per_rank) for pair in lab.concurrent]


def labs_of(
    given: Sequence[str], *, quick: bool, repeats: int | None, loads: Path | None, layer: int | None
) -> list[LabSpec]:
    """The labs that were asked for; all that ship where none was. Raises BadInput."""
    labs = [read_lab(one) for one in given or bundled()]
    if loads is not None:
        experts = len(file_profile(loads, layer)[0])
        for lab in labs:
            if experts % lab.ranks:
                raise BadInput(
                    f"{experts} experts do not divide by the {lab.ranks} ranks of lab {lab.name!r}", where="--loads",
                    mend="name the labs to run, without this one",
                )  # fmt: skip
        routed = RoutedSpec(loads=loads.absolute(), layer=layer)
        labs = [lab.model_copy(update={"routed": routed}) for lab in labs]
    elif layer is not None:
        raise BadInput("there are no loads to take a layer of", where="--layer", mend="pass --loads, too")
    if quick:
        least = {lab.name: lab.row_bytes * lab.ranks for lab in labs}
        labs = [
            lab.model_copy(
                update={
                    "bytes_per_rank": max(min(lab.bytes_per_rank, QUICK_BYTES), least[lab.name]),
                    "repeats": QUICK_REPEATS,
                }
            )
            for lab in labs
        ]
    if repeats is not None:
        labs = [lab.model_copy(update={"repeats": repeats}) for lab in labs]
    names = [lab.name for lab in labs]
    for lab in labs:
        if names.count(lab.name) > 1:
            raise BadInput(f"two labs are called {lab.name!r}", where=WHERE, mend="rename one")
        if fabric_calibrate.same_fabric(lab):
            raise BadInput(
                f"lab {lab.name!r} is a fabric that calibrates", where=WHERE, mend="change its rate or its shape"
            )
    return labs


def run(
    labs: Sequence[LabSpec], *, out: Path, calibration: Path | None, stall_s: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Predict, then measure all labs; writes calibration, predictions and record to `out`, and returns the record.

    Raises MissingPart where this machine cannot, CheckFailed when an exchange delivers wrong rows or a rank, a link or
    the lab itself fails.
    """
    check_parts()
    out.mkdir(parents=True, exist_ok=True)
    (out / RECORD_FILE).unlink(missing_ok=True)
    if calibration is None:
        figures, behind = fabric_calibrate.measure(stall_s=stall_s, say=say)
        write_json(out / CALIBRATION_FILE, fabric_calibrate.to_json(figures, behind, now()), indent=1)
    else:
        figures = fabric_calibrate.read(calibration)
    say("predicting")
    cases = [cases_of(lab) for lab in labs]
    predicted = [[seconds_of(lab, case, figures) for case in own] for lab, own in zip(labs, cases, strict=True)]
    bound = [[busiest_link(lab, case, figures) for case in own] for lab, own in zip(labs, cases, strict=True)]
    executed = [[by_executor(lab, case, figures) for case in own] for lab, own in zip(labs, cases, strict=True)]
    written = write_predictions(
        out / PREDICTIONS_FILE,
        {
            "figures": vars(figures),
            "labs": [
                {
                    "lab": lab.model_dump(mode="json"),
                    "cases": [
                        {
                            "patterns": case.patterns,
                            "scheme": case.scheme,
                            "seconds": seconds,
                            "bounded_by": link,
                            "des_seconds": des,
                        }
                        for case, seconds, link, des in zip(own, foretold, links, ran, strict=True)
                    ],
                }
                for lab, own, foretold, links, ran in zip(labs, cases, predicted, bound, executed, strict=True)
            ],
        },
    )
    begun, entries = now(), []
    for lab, own, foretold, links, ran in zip(labs, cases, predicted, bound, executed, strict=True):
        started, clock = now(), time.monotonic()
        found = run_cell(lab, own, stall_s=stall_s, say=named(lab.name, say))
        found |= {"measured_from": started, "wall_s": time.monotonic() - clock}
        entries.append(fabric_record.lab_entry(lab, own, foretold, links, ran, found))
    record = {
        "schema_version": 1, "kind": "validate-fabric", "date": now(), "hardware": hardware(), "versions": versions(),
        "settings": {lab.name: fabric_net.settings(lab) for lab in labs},
        "calibration": {
            "source": "measured before, on the spot" if calibration is None else calibration.name,
            "figures": vars(figures),
        },
        "predictions": written, "measured_from": begun, "labs": entries,
        "comparison": fabric_record.comparison(entries, seed=0),
    }  # fmt: skip
    write_json(out / RECORD_FILE, record, indent=1)
    return record


def hardware() -> dict[str, Any]:
    """What the labs ran on; of the machine nothing that names its owner."""
    return {
        "cpu": device_name(None, "cpu"),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    said = subprocess.run(["ip", "-V"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "python": platform.python_version(), "moesim": version("moesim"), "torch": version("torch"),
        "kernel": platform.release(), "iproute2": said.rpartition("-")[2].split(",")[0],
    }  # fmt: skip
