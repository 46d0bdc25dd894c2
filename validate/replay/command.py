"""The command line of `validate replay`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from validate.shown import show


class DeviceName(StrEnum):
    """Where the ranks are played."""

    cpu = "cpu"
    cuda = "cuda"


def replay(
    device: Annotated[DeviceName, typer.Option(help="What plays the ranks.")] = DeviceName.cpu,
    ranks: Annotated[int, typer.Option(help="Expert-parallel ranks of the plan.")] = 8,
    placement: Annotated[
        list[Path] | None, typer.Option(help="A placement in moesim's format; repeats; instead of the planned one.")
    ] = None,
    placements: Annotated[int, typer.Option(help="How many placements to make and compare.")] = 10,
    loads: Annotated[Path | None, typer.Option(help="Real expert counts; without, a skewed synthetic profile.")] = None,
    layer: Annotated[int | None, typer.Option(help="Absolute layer of the loads; without, the most skewed.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a rank; repeats. [default: 8 32 128]")] = None,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 512,
    intermediate: Annotated[int, typer.Option(help="Intermediate size of an expert.")] = 1024,
    experts: Annotated[int | None, typer.Option(help="Experts. [default: 64, or as in the loads]")] = None,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 4,
    repeats: Annotated[int, typer.Option(help="Timed repeats of each rank of each case.")] = 15,
    seed: Annotated[int, typer.Option(help="Seed of routing, tokens and weights.")] = 0,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 unless error, order and regret hold.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for predictions.json and record.json.")] = Path(
        "runs/validate-replay"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object.")] = False,
) -> None:
    """Play every rank of a layer in turn on one device, each with the rows its plan gives it, predicted beforehand.

    What ranks compute is validated; what they exchange is not run. Predictions are written before the first test run,
    and outputs are checked against a float32 reference before they are timed.
    """
    from validate.hardware.job import Backend
    from validate.hardware.run import check_memory, check_parts, make_job
    from validate.replay import run as runner

    backend: Backend = "gloo" if device is DeviceName.cpu else "nccl"
    check_parts(backend, 1, "validate replay")
    job = make_job(
        backend=backend,
        ranks=ranks,
        hidden=hidden,
        intermediate=intermediate,
        experts=runner.EXPERTS if experts is None and loads is None else experts,
        top_k=top_k,
        tokens=tuple(tokens) if tokens else runner.TOKENS,
        loads=loads,
        layer=layer,
        placements=tuple(placement or ()),
        count=placements,
        slots=None,
        replica="local_first",
        kernel="auto",
        repeats=repeats,
        seed=seed,
        out=out,
        stall_limit_s=60.0,
    )
    check_memory(job, where="validate replay", shared=True)
    record = runner.run(job, lambda line: typer.echo(line, err=True))
    holds = not check or all(goal["holds"] for goal in record["comparison"]["goals"])
    show(record, runner.table, out / runner.RECORD_FILE, as_json=as_json, holds=holds)
