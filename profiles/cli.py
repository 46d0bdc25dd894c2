"""Measured profiles: import published tables, look into a profile, check it, measure kernels here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option, Typer, echo

app = Typer(help=__doc__, no_args_is_help=True, add_completion=False)
importers = Typer(help="Convert published tables into a profile.", no_args_is_help=True)
app.add_typer(importers, name="import")

SYSTEM = Annotated[str, Option("--system", help="System whose shipped profile `default` means.")]
JSON = Annotated[bool, Option("--json", help="Print one JSON object on stdout.")]


@importers.command("aiconfigurator")
def import_aiconfigurator(
    out: Annotated[Path, Option("--out", help="Folder to write the profile to; an older profile there is replaced.")],
    system: Annotated[str, Option("--system", help="System to convert, as the package names it.")] = "h200_sxm",
    engine: Annotated[str, Option("--engine", help="sglang, trtllm or vllm.")] = "sglang",
    source: Annotated[
        Path | None, Option("--source", help="Folder of an unpacked aiconfigurator-core; default: the installed one.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Convert the measured tables of NVIDIA's aiconfigurator-core for one system and engine."""
    from profiles.importers.aiconfigurator import find_package, import_tables
    from profiles.importers.aiconfigurator_tables import PACKAGE
    from profiles.leave_out import errors_of, fit_experts
    from profiles.store import write_profile

    left_out: list[str] = []

    def say(line: str) -> None:
        left_out.append(line)
        echo(line, err=True)

    data, package_version = find_package(source)
    tables = import_tables(data, system=system, engine=engine, package_version=package_version, say=say)
    echo("fitting the experts' physics and leaving points out ...", err=True)
    fitted = fit_experts(tables["experts"])
    errors = errors_of(tables, fitted)
    rows = {name: table.height for name, table in tables.items() if table.height}
    description = {
        "system": system,
        "engine": engine,
        "source": {"package": PACKAGE, "version": package_version, "licence": "Apache-2.0, NVIDIA"},
        "left_out": left_out,
        "rows": rows,
        "errors": errors,
        "physics": fitted["parameters"],
    }
    write_profile(out, tables, description)
    summary = {"out": str(out), "rows": rows, "errors": errors}
    echo(json.dumps(summary) if as_json else f"wrote {out}: {sum(rows.values())} rows")


@app.command("list")
def list_profiles(as_json: JSON = False) -> None:
    """List the profiles that ship with moesim."""
    from profiles.store import DATA, Profile, shipped_systems

    found: list[dict[str, Any]] = []
    for system in shipped_systems():
        description = Profile(DATA / system).description
        found.append({"system": system, **{key: description.get(key) for key in ("engine", "source", "rows")}})
    if as_json:
        echo(json.dumps({"profiles": found}))
        return
    for one in found:
        echo(f"default for {one['system']}: engine {one['engine']}, {sum(one['rows'].values())} rows")


@app.command("show")
def show(
    profile: Annotated[str, Argument(help="`default` or a profile folder.")] = "default",
    system: SYSTEM = "h200_sxm",
    family: Annotated[str | None, Option("--family", help="Show the rows of one family as CSV.")] = None,
    as_json: JSON = False,
) -> None:
    """Show what a profile holds: families, kernels, versions and measured ranges."""
    from moesim.errors import BadInput
    from profiles.record import FAMILIES
    from profiles.store import open_profile

    opened = open_profile(profile, system)
    if family is not None:
        if family not in FAMILIES:
            raise BadInput(f"unknown family {family!r}", where="--family", mend=f"use one of: {', '.join(FAMILIES)}")
        sys.stdout.write(opened.table(family).write_csv())
        return
    found = [_overview(opened.table(name), name) for name in opened.families()]
    if as_json:
        echo(json.dumps({"profile": str(opened.folder), "families": found}))
        return
    for one in found:
        ranges = ", ".join(f"{size} {low:g} to {high:g}" for size, (low, high) in one["ranges"].items())
        echo(f"{one['family']}: {one['rows']} rows; {ranges}; {', '.join(one['versions'])}")


def _overview(table: Any, name: str) -> dict[str, Any]:
    from profiles.record import FAMILIES

    return {
        "family": name,
        "rows": table.height,
        "versions": sorted({f"{engine} {version}" for engine, version in table.select("engine", "version").rows()}),
        "kernels": sorted(table["kernel"].unique().to_list()),
        "ranges": {size: [table[size].min(), table[size].max()] for size in FAMILIES[name].point},
    }


@app.command("check")
def check(
    profile: Annotated[str, Argument(help="`default` or a profile folder.")] = "default",
    system: SYSTEM = "h200_sxm",
    stored: Annotated[
        bool, Option("--stored", help="Show the errors kept in the profile instead of new ones.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Leave measured points out, predict them from the others, and print the error by family."""
    from profiles.leave_out import errors_of, fit_experts
    from profiles.record import FAMILIES
    from profiles.store import open_profile

    opened = open_profile(profile, system)
    tables = {name: opened.table(name) for name in FAMILIES}
    errors: dict[str, dict[str, float]] = (
        opened.description.get("errors", {}) if stored else errors_of(tables, fit_experts(tables["experts"]))
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


@app.command("kernels")
def kernels(
    out: Annotated[Path, Option("--out", help="JSON lines, one for each point; what is there already is kept.")],
    device: Annotated[str, Option("--device", help="cpu, cuda or cuda:N.")] = "cpu",
    hidden: Annotated[int, Option("--hidden", min=1)] = 256,
    intermediate: Annotated[int, Option("--intermediate", min=1)] = 128,
    slots: Annotated[int, Option("--slots", min=1, help="Local experts.")] = 4,
    tokens: Annotated[list[int] | None, Option("--tokens", min=1, help="Tokens of each expert; repeats.")] = None,
    repeats: Annotated[int, Option("--repeats", min=3)] = 20,
    quick: Annotated[bool, Option("--quick", help="Three sizes and few repeats: a check that it works.")] = False,
) -> None:
    """Time grouped SwiGLU experts on this machine's torch: median, p10 and p90, resumable."""
    from profiles.kernels import Sweep, measure

    sizes = tuple(tokens) if tokens else ((1, 8, 64) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256))
    sweep = Sweep(device, hidden, intermediate, slots, sizes, 5 if quick else repeats)
    done, kept = measure(sweep, out, say=lambda line: echo(line, err=True))
    echo(f"{out}: measured {done} points, kept {kept}")
