"""`moesim profile import nccl-tests | deepep | published`: logs and figures that others left become a profile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import Argument, Option, echo

if TYPE_CHECKING:
    from profiles.whose import System

SYSTEM = Annotated[
    str, Option("--system", help="The system that was measured: a preset, h200_sxm, or its cluster file.")
]
OUT = Annotated[Path, Option("--out", help="Folder to write the profile to; an older profile there is replaced.")]
JSON = Annotated[bool, Option("--json", help="Print one JSON object on stdout.")]
DEVICE = Annotated[str | None, Option("--device", help="The GPU that ran, where the log does not tell it.")]
VERSION = Annotated[str | None, Option("--version", help="Of the library, where the log does not tell it.")]
Numbers = list[int] | None


def import_nccl_tests(
    logs: Annotated[list[Path], Argument(help="Output of nccl-tests or rccl-tests; a file may hold several runs.")],
    system: SYSTEM,
    out: OUT,
    kind: Annotated[
        str | None,
        Option("--kind", help="all_reduce, all_gather, reduce_scatter, all_to_all or send_recv, where no log says it."),
    ] = None,
    gpus: Annotated[int | None, Option("--gpus", min=2, help="All ranks, where no log lists them.")] = None,
    nodes: Annotated[int | None, Option("--nodes", min=1, help="Of all ranks, where no log lists them.")] = None,
    as_json: JSON = False,
) -> None:
    """Turn logs of nccl-tests or rccl-tests into collectives of a profile, over one node or several."""
    from profiles.importers.nccl_rows import Given, read_collectives
    from profiles.whose import asked_system

    asked = asked_system(system)
    read = read_collectives(logs, asked, Given(kind, gpus, nodes))
    told = {"left_out": read.left_out, "measured": list(read.measured)}
    _write(read.rows, asked, read.engine, logs, out, as_json, told)


def import_deepep(
    logs: Annotated[list[Path], Argument(help="Output of DeepEP's test_intranode, test_internode, test_low_latency.")],
    system: SYSTEM,
    out: OUT,
    tokens: Annotated[
        Numbers, Option("--tokens", min=1, help="Of a rank. Each of these: once, or for each log.")
    ] = None,
    hidden: Annotated[Numbers, Option("--hidden", min=1)] = None,
    top_k: Annotated[Numbers, Option("--top-k", min=1)] = None,
    experts: Annotated[Numbers, Option("--experts", min=1, help="Of the layer; no log tells it.")] = None,
    ep: Annotated[Numbers, Option("--ep", min=2, help="All ranks; no log tells it.")] = None,
    nodes: Annotated[Numbers, Option("--nodes", min=1)] = None,
    topk_groups: Annotated[Numbers, Option("--topk-groups", min=1, help="Nodes that a token may choose from.")] = None,
    device: DEVICE = None,
    version: VERSION = None,
    as_json: JSON = False,
) -> None:
    """Turn logs of DeepEP's own tests into exchanges of a profile; options say what a log does not."""
    from profiles.importers.deepep import Setup
    from profiles.importers.deepep_rows import read_exchanges
    from profiles.importers.gathered import UNKNOWN
    from profiles.record import DEEPEP
    from profiles.whose import asked_system

    asked = asked_system(system)
    if device is not None:
        asked.refuse_other(device, "--device")

    count = len(logs)
    columns = [
        _each(numbers, name, count)
        for name, numbers in (
            ("--tokens", tokens), ("--hidden", hidden), ("--top-k", top_k), ("--experts", experts), ("--ep", ep),
            ("--nodes", nodes), ("--topk-groups", topk_groups),
        )
    ]  # fmt: skip
    setups = [Setup(*values) for values in zip(*columns, strict=True)]
    read = read_exchanges(logs, setups, system=asked.name, device=device or UNKNOWN, version=version or UNKNOWN)
    for one in read.measured:
        if "spread" in one:
            told = f"{one['step']} is the median of {one['ranks']} ranks, which spread by {one['spread']:.1%}"
            echo(f"{one['file']}: {told}", err=True)
    _write(read.rows, asked, DEEPEP, logs, out, as_json, {"left_out": read.left_out, "measured": list(read.measured)})


def import_published(
    files: Annotated[list[Path], Argument(help="CSVs of published figures, known by their header.")],
    system: SYSTEM,
    out: OUT,
    experts: Annotated[
        int | None, Option("--experts", min=1, help="Of the layer, for exchanges whose source does not state it.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, Option("--gpus-per-node", min=1, help="Of a system that is no preset.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Turn published figures of one system's GPU into a profile; every row is imported or left out for a reason."""
    from moesim.errors import BadInput
    from profiles.importers.published import context_of, read_published, reasons
    from profiles.record import PUBLISHED
    from profiles.whose import asked_system

    asked = asked_system(system)
    context = context_of(asked.name, experts, gpus_per_node)
    read = [read_published(path, context) for path in files]
    rows = [row for one in read for row in one.rows]
    told = reasons(read)
    for name, counts in told.items():
        echo(f"{name}: {counts['imported']} of {counts['rows']} rows", err=True)
        for reason, number in counts["left_out"].items():
            echo(f"  left out {number}: {reason}", err=True)
    if not rows:
        raise BadInput(
            f"no row is of {context.chip}", where=", ".join(map(str, files)), mend="name the system whose GPU ran"
        )
    _write(rows, asked, PUBLISHED, files, out, as_json, {"source_rows": told})


T = TypeVar("T")


def _each(values: list[T] | None, name: str, count: int) -> list[T | None]:
    """An option for each log: none, the one for all, or as many as there are logs. Raises BadInput."""
    from moesim.errors import BadInput

    given = values or []
    if len(given) not in (0, 1, count):
        raise BadInput(
            f"{len(given)} values for {count} logs", where=name, mend="give one for all, or one for each log"
        )
    return [None] * count if not given else list(given) if len(given) == count else [given[0]] * count


def _write(
    rows: Sequence[tuple[str, dict[str, Any]]], system: System, engine: str, files: Sequence[Path], out: Path,
    as_json: bool, told: dict[str, Any],
) -> None:  # fmt: skip
    """Write the profile whole or not at all, and say what it holds."""
    from profiles.importers.gathered import description, tables_of_rows
    from profiles.store import write_profile

    tables = tables_of_rows(rows)
    content = description(tables, system, engine, files, **told)
    write_profile(out, tables, content)
    summary = {"out": str(out), "rows": content["rows"], **{name: told[name] for name in told if name != "measured"}}
    if as_json:
        echo(json.dumps(summary))
        return
    echo(f"wrote {out}: " + ", ".join(f"{count} {name}" for name, count in content["rows"].items()))
    for reason, number in told.get("left_out", {}).items():
        echo(f"left out {number}: {reason}", err=True)
    echo(how_to_price(out, system), err=True)


def how_to_price(out: Path, system: System) -> str:
    """What to write into a scenario of the system, after an import."""
    from profiles.whose import shipped_for

    if shipped_for(system.gpu):
        return f"price with it: cost: {{profiles: [{out}, default]}}"
    rest = f"none ships for {system.name}; name an imported one for what this lacks, or set cost.extrapolate: allow"
    return f"price with it: cost: {{profiles: [{out}]}} ({rest})"
