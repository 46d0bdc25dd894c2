"""`moesim profile check`: how wrong prices between measured points are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option, echo

SYSTEM = Annotated[str, Option("--system", help="System whose shipped profile `default` means.")]
JSON = Annotated[bool, Option("--json", help="Print one JSON object on stdout.")]


def check(
    profile: Annotated[str, Argument(help="`default` or a profile folder.")] = "default",
    system: SYSTEM = "h200_sxm",
    stored: Annotated[
        bool, Option("--stored", help="Show the errors kept in the profile instead of new ones.")
    ] = False,
    leave_out: Annotated[
        str | None, Option("--leave-out", help="every-second (sizes) or distribution (skew), over whole tables.")
    ] = None,
    tables: Annotated[
        Path | None, Option("--tables", help="For --leave-out: folder of an unpacked aiconfigurator-core.")
    ] = None,
    systems: Annotated[
        str, Option("--systems", help="For --leave-out: comma-separated.")
    ] = "h100_sxm,h200_sxm,b200_sxm",
    as_json: JSON = False,
) -> None:
    """Leave measured points out, predict them from the others, and print the error by family.

    With --leave-out, over every table of several systems; exits 1 where a family misses its threshold.
    """
    if leave_out is not None:
        _check_tables(leave_out, tables, systems, as_json)
        return
    from profiles.leave_out import errors_of, fit_experts
    from profiles.record import FAMILIES
    from profiles.store import open_profile

    opened = open_profile(profile, system)
    rows = {name: opened.table(name) for name in FAMILIES}
    errors: dict[str, dict[str, float]] = (
        opened.description.get("errors", {}) if stored else errors_of(rows, fit_experts(rows["experts"]))
    )
    if as_json:
        echo(json.dumps({"profile": str(opened.folder), "errors": errors}))
        return
    echo(f"{'family':<28}{'median':>9}{'68 %':>9}{'90 %':>9}{'points':>9}")
    for name, error in sorted(errors.items()):
        cells = "".join(f"{error[column]:>9.1%}" for column in ("median", "p68", "p90"))
        echo(f"{name:<28}{cells}{error['points']:>9.0f}")
    if not errors:
        raise Exit(1)


def _check_tables(protocol: str, tables: Path | None, systems: str, as_json: bool) -> None:
    from moesim.errors import BadInput
    from profiles import every_second, skew_out
    from profiles.importers.aiconfigurator import find_package
    from profiles.raw_tables import read_points

    if protocol not in ("every-second", "distribution"):
        raise BadInput(f"unknown protocol {protocol!r}", where="--leave-out", mend="use every-second or distribution")
    data, version = find_package(tables)
    names = [name.strip() for name in systems.split(",") if name.strip()]
    found = read_points(data, names)
    if protocol == "distribution":
        lines = skew_out.summary(found)
        told = skew_out.report(lines)
    else:
        lines = every_second.summary(every_second.leave_out(points) for points in found)
        told = every_second.report(lines)
    if as_json:
        families = [
            {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in line.items()}
            for line in lines
        ]
        echo(json.dumps({"package_version": version, "systems": names, "families": families}))
    else:
        echo("\n".join(told))
    if not all(line.get("holds", True) for line in lines):
        raise Exit(1)
