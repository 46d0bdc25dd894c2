"""`moesim profile check`: how wrong prices between measured points are."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option, echo

if TYPE_CHECKING:
    from profiles.check_tables import LeftOut

SYSTEM = Annotated[str, Option("--system", help="System whose shipped profile `default` means.")]
JSON = Annotated[bool, Option("--json", help="Print one JSON object on stdout.")]
PROTOCOLS = ("every-second", "distribution")
EP_SIZE = "ep-size"
GROUPINGS = ("family", "system")


def check(
    profile: Annotated[str, Argument(help="`default` or a profile folder.")] = "default",
    system: SYSTEM = "h200_sxm",
    stored: Annotated[
        bool, Option("--stored", help="Show the errors kept in the profile instead of new ones.")
    ] = False,
    leave_out: Annotated[
        str | None,
        Option("--leave-out", help="every-second (sizes) or distribution (skew), over whole tables; ep-size."),
    ] = None,
    published: Annotated[
        Path | None, Option("--rows", help="For --leave-out ep-size: CSV of published exchanges instead.")
    ] = None,
    tables: Annotated[
        Path | None, Option("--tables", help="For --leave-out: folder of an unpacked aiconfigurator-core.")
    ] = None,
    systems: Annotated[
        str, Option("--systems", help="For --leave-out: comma-separated.")
    ] = "h100_sxm,h200_sxm,b200_sxm",
    by: Annotated[str, Option("--by", help="For --leave-out: family, or system for each system's lines as well.")] = (
        "family"
    ),
    report: Annotated[Path | None, Option("--report", help="Write a page with pictures (HTML) here.")] = None,
    as_json: JSON = False,
) -> None:
    """Leave measured points out, predict them from the others, and print the error by family.

    With --leave-out, over every table of several systems; exits 1 where a family misses its threshold.
    """
    from moesim.errors import BadInput

    if by not in GROUPINGS:
        raise BadInput(f"unknown grouping {by!r}", where="--by", mend=f"use {' or '.join(GROUPINGS)}")
    if published is not None and leave_out != EP_SIZE:
        raise BadInput("rows of exchanges tell of EP sizes only", where="--rows", mend=f"add --leave-out {EP_SIZE}")
    if stored and leave_out is not None:
        raise BadInput("what is stored is one profile's", where="--stored", mend="leave --leave-out away")
    if leave_out == EP_SIZE:
        if report is not None:
            raise BadInput(f"{EP_SIZE} has no page", where="--report", mend="leave it away; --json has every figure")
        _check_ep_sizes(published, profile, system, as_json)
        return
    if leave_out is not None:
        _check_tables(Asked(leave_out, tables, systems, by, report, as_json))
        return
    if by != "family":
        raise BadInput("a profile is of one system", where="--by", mend="add --leave-out every-second")
    _check_profile(profile, system, stored, report, as_json)


def _check_ep_sizes(published: Path | None, profile: str, system: str, as_json: bool) -> None:
    from profiles import ep_out, ep_out_table

    if published is None:
        ep_out_table.run(profile, system, as_json, echo)
    elif not ep_out.run(published, as_json, echo):
        raise Exit(1)


def _check_profile(profile: str, system: str, stored: bool, report: Path | None, as_json: bool) -> None:
    from profiles.leave_out import errors_of, fit_experts
    from profiles.record import FAMILIES
    from profiles.store import open_profile

    opened = open_profile(profile, system)
    rows = {name: opened.table(name) for name in FAMILIES}
    errors: dict[str, dict[str, float]] = (
        opened.description.get("errors", {}) if stored else errors_of(rows, fit_experts(rows["experts"]))
    )
    own = str(opened.description.get("system", system))
    if report is not None:
        from moesim.files import write_text
        from profiles.check_page import Check, profile_page

        given = [profile, *([] if profile != "default" else ["--system", system]), *(["--stored"] if stored else [])]
        about = Check("inner", f"profile {opened.folder.name}", (own,), _today(), _command([*given], report))
        write_text(report, profile_page(errors, about))
        echo(f"wrote {report}", err=True)
    if as_json:
        echo(json.dumps({"profile": str(opened.folder), "system": own, "errors": errors}))
    else:
        echo(f"{'family':<28}{'median':>9}{'68 %':>9}{'90 %':>9}{'points':>9}")
        for name, error in sorted(errors.items()):
            cells = "".join(f"{error[column]:>9.1%}" for column in ("median", "p68", "p90"))
            echo(f"{name:<28}{cells}{error['points']:>9.0f}")
    if not errors:
        raise Exit(1)


@dataclass(frozen=True)
class Asked:
    """The options of a check over tables."""

    protocol: str
    tables: Path | None
    systems: str
    by: str
    report: Path | None
    as_json: bool

    def command(self) -> list[str]:
        """The arguments that ask for the same again."""
        folder = [] if self.tables is None else ["--tables", str(self.tables)]
        return ["--leave-out", self.protocol, *folder, "--systems", self.systems]


def _check_tables(asked: Asked) -> None:
    from moesim.errors import BadInput
    from profiles import check_tables
    from profiles.importers.aiconfigurator import find_package

    if asked.protocol not in PROTOCOLS:
        raise BadInput(
            f"unknown protocol {asked.protocol!r}", where="--leave-out", mend=f"use {', '.join(PROTOCOLS)} or {EP_SIZE}"
        )
    data, version = find_package(asked.tables)
    names = [name.strip() for name in asked.systems.split(",") if name.strip()]
    found = _leave_out(asked.protocol, data, names)
    lines, told = _by_family(asked.protocol, found)
    if asked.report is not None:
        _write_page(asked, found, names, version)
    by_system = check_tables.by_system(found)
    if asked.as_json:
        shown: dict[str, Any] = {"package_version": version, "systems": names, "families": lines}
        shown["by_system"] = [line.as_dict() for line in by_system]
        shown["by_table"] = [line.as_dict() for line in check_tables.by_table(found)]
        echo(json.dumps(shown))
    else:
        echo("\n".join(told))
        if asked.by == "system":
            echo("\n" + "\n".join(check_tables.report_by_system(by_system)))
    if not all(line.get("holds", True) for line in lines):
        raise Exit(1)


def _leave_out(protocol: str, data: Path, names: Sequence[str]) -> list[LeftOut]:
    """What was left out of every table."""
    from profiles import check_tables, every_second
    from profiles.raw_tables import read_points

    found: list[LeftOut] = []
    systems: set[str] = set()
    for one in read_points(data, names):
        if one.system not in systems:
            systems.add(one.system)
            echo(f"leaving points out of the tables of {one.system} ...", err=True)
        if protocol == "distribution":
            found += check_tables.distributions_left_out(one)
        else:
            found.append(check_tables.every_second_left_out(one, every_second.leave_out(one)))
    return found


def _by_family(protocol: str, found: Sequence[LeftOut]) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines by family, for JSON and for people."""
    from profiles import check_tables, skew_out

    if protocol == "distribution":
        lines = skew_out.summary((one.family, one.predicted_over_measured) for one in found)
        return lines, skew_out.report(lines)
    figures = check_tables.by_family(found)
    return [line.as_dict() for line in figures], check_tables.report_by_family(figures)


def _write_page(asked: Asked, found: list[LeftOut], names: Sequence[str], version: str) -> None:
    from moesim.files import write_text
    from profiles.check_page import Check, tables_page
    from profiles.importers.aiconfigurator_tables import PACKAGE

    assert asked.report is not None
    command = _command(asked.command(), asked.report)
    about = Check(asked.protocol, f"{PACKAGE} {version}", tuple(names), _today(), command)
    write_text(asked.report, tables_page(found, about))
    echo(f"wrote {asked.report}", err=True)


def _command(arguments: Sequence[str], report: Path) -> str:
    return shlex.join(["moesim", "profile", "check", *arguments, "--report", str(report)])


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
