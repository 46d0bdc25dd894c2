"""Import measurements of this machine: lines of `moesim profile kernels` and `collectives` become a profile.

Rows carry the engine `moesim`; their version is torch's, or NCCL's for its collectives, as kernels come and go with
those. Points measured more than once become their median; baselines and families without a table stay in the file and
are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim import __version__
from moesim.errors import BadInput
from profiles.capture import Line
from profiles.groups import PRETEND, PRETENDED
from profiles.importers.gathered import tables_of_rows, told_files
from profiles.leave_out import errors_of, fit_experts
from profiles.record import FAMILIES, LATENCY, MEASURED_ENGINE
from profiles.whose import System

if TYPE_CHECKING:
    import polars as pl

PACKAGE = "moesim"


def tables_of(lines: Sequence[Line], system: System) -> dict[str, pl.DataFrame]:
    """A table for each family, empty where nothing was measured. Raises BadInput.

    Refused: lines of two devices in one family and version, as their points would be taken for one machine's, and
    lines of another GPU than the system's. What ran on a processor is taken at the system's word.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    devices: dict[tuple[str, str, str], str] = {}
    for line in lines:
        if not priced(line):
            continue
        if line.run.get(PRETENDED):
            raise BadInput(
                f"{line.family} was measured on hosts that were pretended", where="profile import measured",
                mend=f"measure again without {PRETEND}",
            )  # fmt: skip
        system.refuse_other(line.device, "profile import measured")
        version = _version(line)
        held = devices.setdefault((line.family, str(line.key.get("path", "")), version), line.device)
        if held != line.device:
            raise BadInput(
                f"{line.family} was measured on {held} and on {line.device}",
                where="profile import measured",
                mend="import the files of each machine into a folder of its own",
            )
        rows.append((line.family, _row(line, version, system.name)))
    if not rows:
        raise BadInput(
            "no line belongs to a table of the store", where="profile import measured",
            mend=f"measure one of: {', '.join(name for name, family in FAMILIES.items() if family.measured_by)}",
        )  # fmt: skip
    return tables_of_rows(rows)


def priced(line: Line) -> bool:
    """Whether the line belongs to a table: a family of the store, and no baseline."""
    return line.family in FAMILIES and not line.baseline


def _version(line: Line) -> str:
    nccl = line.run.get("nccl")
    return str(nccl) if line.kernel == "nccl" and nccl else str(line.run["torch"])


def _row(line: Line, version: str, system: str) -> dict[str, Any]:
    return {
        **line.key,
        **line.size,
        **line.values,
        LATENCY: line.latency_s,
        "system": system,
        "engine": MEASURED_ENGINE,
        "version": version,
        "kernel": line.kernel,
        "device": line.device,
        "package": PACKAGE,
        "package_version": __version__,
        "tag": "measured",
    }


def describe(
    lines: Sequence[Line], tables: dict[str, pl.DataFrame], system: System, files: Sequence[Path]
) -> dict[str, Any]:
    """`profile.json`: where the rows come from, what stays out, leave-out errors and the experts' physics."""
    fitted = fit_experts(tables["experts"])
    spread: dict[str, list[float]] = {}
    for line in lines:
        spread.setdefault(line.family, []).append((line.p90_s - line.p10_s) / line.latency_s)
    conditions = sorted({(line.device, line.run["torch"], line.run["date"][:10]) for line in lines})
    return {
        **system.told(),
        "engine": MEASURED_ENGINE,
        "source": {"package": PACKAGE, "version": __version__, "licence": "measured here"},
        "measured": [{"device": device, "torch": torch, "date": date} for device, torch, date in conditions],
        "files": told_files(files),
        "rows": {name: table.height for name, table in tables.items() if table.height},
        "without_table": dict(
            Counter(f"{line.family}{' (baseline)' if line.baseline else ''}" for line in lines if not priced(line))
        ),
        "spread": {name: round(float(np.median(found)), 4) for name, found in spread.items()},
        "errors": errors_of(tables, fitted),
        "physics": fitted["parameters"],
    }
