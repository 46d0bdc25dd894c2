"""Measured profiles: import published tables, look into a profile, check it, measure kernels here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer, echo

from profiles.check_command import check
from profiles.import_commands import how_to_price, import_deepep, import_nccl_tests, import_published
from profiles.network_command import fit_network
from profiles.node_command import node
from profiles.topology_command import topology

app = Typer(help=__doc__, no_args_is_help=True, add_completion=False)
importers = Typer(help="Convert published tables into a profile.", no_args_is_help=True)
app.add_typer(importers, name="import")
app.command("check")(check)
app.command("node")(node)
app.command("topology")(topology)
for name, command in (("nccl-tests", import_nccl_tests), ("deepep", import_deepep), ("published", import_published)):
    importers.command(name)(command)
app.command("fit-network")(fit_network)

SYSTEM = Annotated[str, Option("--system", help="System whose shipped profile `default` means.")]
JSON = Annotated[bool, Option("--json", help="Print one JSON object on stdout.")]


@importers.command("aiconfigurator")
def import_aiconfigurator(
    out: Annotated[Path, Option("--out", help="Folder to write the profile to; an older profile there is replaced.")],
    system: Annotated[str, Option("--system", help="System to convert, as the package names it.")] = "h200_sxm",
    engine: Annotated[str, Option("--engine", help="sglang, trtllm, vllm or all.")] = "sglang",
    source: Annotated[
        Path | None, Option("--source", help="Folder of an unpacked aiconfigurator-core; default: the installed one.")
    ] = None,
    priced: Annotated[bool, Option("--priced", help="Write only families that prices are looked up in.")] = False,
    as_json: JSON = False,
) -> None:
    """Convert the measured tables of NVIDIA's aiconfigurator-core for one system and engine."""
    from profiles.importers.aiconfigurator_profile import import_profile

    done = import_profile(
        out, system=system, engine=engine, source=source, priced=priced, say=lambda line: echo(line, err=True)
    )
    summary = {"out": str(out), "rows": done.rows, "source_rows": done.ledger.as_dict(), "errors": done.errors}
    told = [*done.ledger.lines(), f"wrote {out}: {sum(done.rows.values())} rows"]
    echo(json.dumps(summary) if as_json else "\n".join(told))


@importers.command("measured")
def import_measured(
    files: Annotated[list[Path], Argument(help="Of `moesim profile kernels` or `collectives`, or bundles.")],
    system: Annotated[
        str, Option("--system", help="The system that was measured: a preset, h200_sxm, or its cluster file.")
    ],
    out: Annotated[Path, Option("--out", help="Folder to write the profile to; an older profile there is replaced.")],
    as_json: JSON = False,
) -> None:
    """Turn measurements of this machine into a profile that `cost.profiles` can name."""
    from profiles.bundle import read_any
    from profiles.importers.measured import describe, tables_of
    from profiles.store import write_profile
    from profiles.whose import asked_system

    asked = asked_system(system)
    lines, manifests = read_any(files)
    tables = tables_of(lines, asked)
    description = describe(lines, tables, asked, files)
    if manifests:
        description["bundles"] = manifests
    write_profile(out, tables, description)
    summary = {"out": str(out), "rows": description["rows"], "without_table": description["without_table"]}
    if as_json:
        echo(json.dumps(summary))
        return
    echo(f"wrote {out}: " + ", ".join(f"{count} {name}" for name, count in description["rows"].items()))
    if description["without_table"]:
        words = ", ".join(f"{count} {name}" for name, count in description["without_table"].items())
        echo(f"no table yet, left in the file: {words}", err=True)
    echo(how_to_price(out, asked), err=True)


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


@app.command("kernels")
def kernels(
    out: Annotated[Path, Option("--out", help="JSON lines, one for each point; what is there already is kept.")],
    device: Annotated[str, Option("--device", help="cpu, cuda or cuda:N.")] = "cpu",
    quick: Annotated[bool, Option("--quick", help="A small sweep, under a minute on two cores.")] = False,
    repeats: Annotated[int, Option("--repeats", min=5, help="Of each point, as far as its time limit allows.")] = 50,
    only: Annotated[list[str] | None, Option("--only", help="Only this family of the sweep; repeats.")] = None,
    point: Annotated[
        list[str] | None,
        Option("--point", help="Instead of the sweep: `gemm n=4096 k=7168 dtype=bf16 m=1:1024`; repeats."),
    ] = None,
    loads: Annotated[Path | None, Option("--loads", help="SGLang JSON counts: real ranks join the sweep.")] = None,
    placement: Annotated[Path | None, Option("--placement", help="A moesim map for --loads; else contiguous.")] = None,
    ranks: Annotated[int, Option("--ranks", min=1, help="EP ranks for --loads without --placement.")] = 8,
) -> None:
    """Time experts, products, attention and the small kernels on this machine's torch; resumable."""
    from profiles.kernels import Options, measure, report, verdict

    options = Options(device, quick, repeats, tuple(only or ()), tuple(point or ()), loads, placement, ranks)
    done = measure(options, out, say=lambda line: echo(line, err=True))
    echo("\n".join(report(done, out)))
    verdict(done)


@app.command("collectives")
def collectives(
    out: Annotated[Path, Option("--out", help="JSON lines, one for each point; what is there already is kept.")],
    backend: Annotated[str, Option("--backend", help="gloo (CPU) or nccl (GPU).")] = "gloo",
    ranks: Annotated[int, Option("--ranks", min=1, help="Local processes; under torchrun its own count.")] = 2,
    kinds: Annotated[
        str, Option("--kinds", help="Comma-separated.")
    ] = "all_to_all,all_gather,reduce_scatter,all_reduce,send_recv",
    low: Annotated[str, Option("--from", help="Smallest size: 1KB.")] = "1KB",
    high: Annotated[str, Option("--to", help="Largest size: 256MB.")] = "256MB",
    repeats: Annotated[int, Option("--repeats", min=5)] = 20,
    skew: Annotated[
        float | None, Option("--skew", min=0.0, help="Uneven all_to_all: destinations by rank^-SKEW.")
    ] = None,
    loads: Annotated[
        Path | None, Option("--loads", help="Uneven all_to_all as these loads under --placement make it.")
    ] = None,
    placement: Annotated[Path | None, Option("--placement", help="A placement map for --loads.")] = None,
    patterns: Annotated[
        list[str] | None, Option("--pattern", help="Uneven all_to_all: kept, kept_by_one, one_way, zipf_1.2 (say).")
    ] = None,
    beside: Annotated[str | None, Option("--beside", help="gemm: while an expert's product runs.")] = None,
    split: Annotated[
        str, Option("--groups", help="all, inside (a host), rail (one rank a host), N neighbours; comma-separated.")
    ] = "all,inside,rail",
    layer: Annotated[int | None, Option("--layer", help="Layer of --loads; default: the middle one.")] = None,
    stall_limit: Annotated[float, Option("--stall-limit", min=1.0, help="Seconds without progress.")] = 120.0,
) -> None:
    """Time collectives over torch.distributed, under torchrun or with local ranks; resumable."""
    import os

    from profiles import collectives as work
    from profiles.collective_points import asked_for
    from profiles.launch import under_torchrun
    from profiles.shares import destination_shares

    one_of_many = under_torchrun()
    world = int(os.environ["WORLD_SIZE"]) if one_of_many else ranks
    shares, name = destination_shares(world, skew=skew, loads=loads, placement=placement, layer=layer)
    job = asked_for(
        backend=backend,
        kinds=kinds,
        low=low,
        high=high,
        patterns=tuple(patterns or ()),
        beside=beside or "",
        groups=split,
        shares=shares,
        distribution=name,
        repeats=repeats,
        out=str(out.absolute()),
        stall_s=stall_limit,
    )
    if not one_of_many:
        work.run_local(job, ranks, say=lambda line: echo(line, err=True))
    else:
        work.run_under_torchrun(job, say=lambda line: echo(line, err=True))
        if int(os.environ["RANK"]):
            return
    for line in work.report(out):
        echo(line)
