"""What a run had measured when it was lost: kept while it goes on, told when it ends too early."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.files import write_json
from validate.hardware.job import Job

Floats = NDArray[np.float64]

# Rank 0 writes the moments of all ranks after each round of the cases; a finished run leaves neither file.
MOMENTS_FILE, UNFINISHED_FILE = "moments.json", "unfinished.json"


def keep(out: Path, moments: Floats, *, repeats: int, started: str) -> None:
    """Write the moments so far, whole: [ranks, cases, repeats so far, operations + 1], of `repeats` in all."""
    write_json(out / MOMENTS_FILE, {"measured_from": started, "of_repeats": repeats, "moments": moments.tolist()})


def forget(out: Path) -> None:
    """Remove what an earlier or a finished run left."""
    for name in (MOMENTS_FILE, UNFINISHED_FILE):
        (out / name).unlink(missing_ok=True)


def tell(out: Path, job: Job, reason: str) -> str | None:
    """Turn the kept moments into `unfinished.json`: every case's medians, and why the run ended; says so in words.

    None where no round was finished. The predictions stay in a file of their own.
    """
    from validate.hardware.record import measured_json

    try:
        kept: dict[str, Any] = json.loads((out / MOMENTS_FILE).read_text(encoding="utf-8"))
        moments = np.asarray(kept["moments"], dtype=np.float64)
        measured = measured_json(job, moments)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    write_json(
        out / UNFINISHED_FILE,
        {
            "schema_version": 1,
            "kind": "validate-hardware-unfinished",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "ended": reason,
            "job": job.model_dump(mode="json", exclude={"out"}),
            "measured_from": kept["measured_from"],
            "repeats": moments.shape[2],
            "of_repeats": kept["of_repeats"],
            "measured": measured,
        },
        indent=1,
    )
    (out / MOMENTS_FILE).unlink(missing_ok=True)
    return f"{moments.shape[2]} of {kept['of_repeats']} repeats are in {UNFINISHED_FILE}"
