"""Run the real thing and compare it with what was predicted before."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moesim.errors import BadInput
from validate.calibrate.command import calibrate
from validate.capacity.command import capacity
from validate.replay.command import replay
from validate.shown import BackendName, show
from validate.training.command import training

app = typer.Typer(
    help="Run the real thing and compare it with what was predicted before.",
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class ReplicaName(StrEnum):
    """Which replica serves a token."""

    local_first = "local_first"
    equal = "equal"


class KernelName(StrEnum):
    """How a rank runs its experts."""

    auto = "auto"
    loop = "loop"
    grouped = "grouped"


@app.callback()
def validate() -> None:
    """Run the real thing and compare it with what was predicted before."""


@app.command()
def hardware(
    backend: Annotated[BackendName, typer.Option(help="gloo: CPU processes; nccl: GPUs.")] = BackendName.gloo,
    ranks: Annotated[int, typer.Option(help="Expert-parallel ranks; under torchrun its own count.")] = 2,
    placement: Annotated[
        list[Path] | None, typer.Option(help="A placement in moesim's format; repeats; instead of the planned one.")
    ] = None,
    loads: Annotated[Path | None, typer.Option(help="Real expert counts; without, a skewed synthetic profile.")] = None,
    layer: Annotated[int | None, typer.Option(help="Absolute layer of the loads; without, the most skewed.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a rank; repeats. [default: 32 128 512]")] = None,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 512,
    intermediate: Annotated[int, typer.Option(help="Intermediate size of an expert.")] = 1024,
    experts: Annotated[int | None, typer.Option(help="Experts. [default: 32, or as in the loads]")] = None,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 4,
    placements: Annotated[
        int | None, typer.Option(help="How many placements to make and compare, from planned to bad. [default: 3]")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Slots of the planned placement over all ranks. [default: experts + 2 x ranks]")
    ] = None,
    replica: Annotated[ReplicaName, typer.Option(help="Which replica serves a token.")] = ReplicaName.local_first,
    kernel: Annotated[
        KernelName, typer.Option(help="auto: a grouped kernel on GPUs, a loop on the CPU.")
    ] = KernelName.auto,
    repeats: Annotated[int, typer.Option(help="Timed repeats of each case.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of routing, tokens and weights.")] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 1 unless error, span, order and regret are within their limits.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for predictions.json and record.json. [default: runs/validate-hardware]")
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Then also `validate training` on these ranks and the node's profile; all of it goes here, a zip "
            "that imports anywhere."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="With --bundle: short steps of training and a small profile.")
    ] = False,
    budget: Annotated[
        float | None, typer.Option(min=1.0, help="With --bundle: seconds after which no point of the profile is begun.")
    ] = None,
    stall_limit: Annotated[float, typer.Option(help="Seconds without progress after which the run is ended.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object.")] = False,
) -> None:
    """Run a real expert-parallel MoE layer, predicted beforehand from a profile taken on the spot.

    The predictions are written before the first test run; outputs are checked against a float32 reference before they
    are timed; the error is reported as it is and changes the exit code only with --check.
    """
    from profiles.launch import under_torchrun
    from validate.hardware import bundled
    from validate.hardware import run as runner
    from validate.hardware.job import Job
    from validate.hardware.record import finished

    if bundle is None and (quick or budget is not None):
        raise BadInput("there is no profile", where="--quick, --budget", mend="give them with --bundle")
    runner.check_parts(backend.value, 1 if under_torchrun() else ranks)
    folder = out or (Path("runs/validate-hardware") if bundle is None else bundled.folder_of(bundle))
    if bundle is not None and out is not None:
        raise BadInput("a bundle keeps its parts beside it", where="--out", mend="leave it out with --bundle")

    def say(line: str) -> None:
        typer.echo(line, err=True)

    def make(count: int) -> Job:
        return runner.make_job(
            backend=backend.value,
            ranks=count,
            hidden=hidden,
            intermediate=intermediate,
            experts=experts,
            top_k=top_k,
            tokens=tuple(tokens) if tokens else runner.TOKENS,
            loads=loads,
            layer=layer,
            placements=tuple(placement or ()),
            count=placements,
            slots=slots,
            replica=replica.value,
            kernel=kernel.value,
            repeats=repeats,
            seed=seed,
            out=folder,
            stall_limit_s=stall_limit,
        )

    told: list[str] = []
    if under_torchrun():
        from validate.hardware.worker import join_torchrun

        record = join_torchrun(make)
    else:
        job = make(ranks)
        record = (finished(job, job.out) if bundle is not None else None) or runner.run(job)
    if bundle is not None:
        wrong = bundled.trained(
            bundle, backend=backend.value, ranks=ranks, quick=quick, seed=seed, stall_s=stall_limit, say=say
        )  # fmt: skip
        told = bundled.profile_and_bundle(
            record, bundle=bundle, backend=backend.value, ranks=None if under_torchrun() else ranks, quick=quick,
            budget_s=budget, loads=loads, stall_s=max(stall_limit, bundled.LEAST_STALL_S), say=say,
        )  # fmt: skip
        if wrong is not None:
            raise wrong
    if record is None:
        return
    from validate.hardware import tables

    if as_json:
        typer.echo(json.dumps(record, allow_nan=False))
    else:
        typer.echo(tables.table(record))
        if check:
            typer.echo(f"\n{tables.verdict(record)}")
        typer.echo("\n".join(["", f"record: {folder / 'record.json'}", *told]))
    if check and not tables.holds(record):
        raise typer.Exit(1)


@app.command()
def exchange(
    backend: Annotated[BackendName, typer.Option(help="gloo: CPU processes; nccl: GPUs.")] = BackendName.gloo,
    ranks: Annotated[int, typer.Option(help="Ranks; under torchrun its own count.")] = 2,
    size: Annotated[str, typer.Option(help="Send buffer of a rank, the mean over ranks. [default: 16MB]")] = "",
    repeats: Annotated[int | None, typer.Option(min=4, help="Of each case. [default: 200]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="1MB and 12 repeats: seconds.")] = False,
    profile: Annotated[
        Path | None, typer.Option(help="Lines of `moesim profile collectives`; without, measured first.")
    ] = None,
    loads: Annotated[Path | None, typer.Option(help="Real expert counts; without, a skewed synthetic profile.")] = None,
    placement: Annotated[Path | None, typer.Option(help="A placement of these loads on the ranks.")] = None,
    layer: Annotated[int | None, typer.Option(help="Absolute layer of the loads; without, the most skewed.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of runs.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for profile, predictions and record.")] = Path(
        "runs/validate-exchange"
    ),
    stall_limit: Annotated[float, typer.Option(min=1.0, help="Seconds without progress that end the run.")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object.")] = False,
) -> None:
    """Run ten uneven all-to-alls, predicted beforehand from even ones, and compare time and order.

    Exits 1 when a pair of cases that differs by more than twice the spread was foretold the wrong way round.
    """
    from validate.exchange import command as runner
    from validate.exchange.record import holds, table

    record = runner.run(
        backend=backend.value, ranks=ranks, size=size, repeats=repeats, quick=quick, profile=profile, loads=loads,
        placement=placement, layer=layer, seed=seed, out=out, stall_limit_s=stall_limit,
        say=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    if record is not None:
        show(record, table, out / "record.json", as_json=as_json, holds=holds(record))


@app.command()
def fabric(
    labs: Annotated[
        list[str] | None, typer.Argument(help="LAB.yaml, or the name of a lab that ships; without, all that ship.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few bytes and repeats: seconds for each lab.")] = False,
    repeats: Annotated[int | None, typer.Option(min=2, help="Of each case, instead of the lab's own.")] = None,
    loads: Annotated[Path | None, typer.Option(help="Real expert counts for the routed patterns.")] = None,
    layer: Annotated[int | None, typer.Option(help="Absolute layer of the loads; without, the most skewed.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="calibration.json of an earlier run; without, measured first.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for calibration, predictions and record.")] = Path(
        "runs/validate-fabric"
    ),
    stall_limit: Annotated[float, typer.Option(min=1.0, help="Seconds without progress that end the run.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object.")] = False,
) -> None:
    """Build real networks out of namespaces, predict all-to-alls on them, and only then run them.

    Needs root, iproute2 and util-linux. Exits 1 when flat or two-level, or a placement, was foretold the winner and
    lost by more than 10 %, when a link or a rank is lost, and when an exchange delivers wrong rows.
    """
    from validate.fabric import lab as runner
    from validate.fabric.record import holds, table

    asked = runner.labs_of(labs or (), quick=quick, repeats=repeats, loads=loads, layer=layer)
    record = runner.run(
        asked, out=out, calibration=calibration, stall_s=stall_limit, say=lambda line: typer.echo(line, err=True)
    )
    show(record, table, out / "record.json", as_json=as_json, holds=holds(record))


@app.command()
def silicon(
    rows: Annotated[
        Path | None, typer.Option(help="Measured runs as silicon_sample.csv has them; without, the installed one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write id,status,ttft_ms,tpot_ms,reason here.")] = None,
    profiles: Annotated[
        Path | None, typer.Option(help="Folder with a profile for each system; without, imported once into the cache.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that price.")] = 1,
    scale: Annotated[
        list[str] | None, typer.Option(help="PART=FACTOR: costs made wrong on purpose, to try a check; repeats.")
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="Price all rows; write the committed record and the table in --docs.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Price some rows again; hold them and --docs to the committed record.")
    ] = False,
    docs: Annotated[
        Path | None, typer.Option(help="Page of the generated table. [default: docs/accuracy.md where it is]")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Folder of the record. [default: the committed one]")] = None,
    recorded: Annotated[
        bool, typer.Option("--recorded", help="Price nothing: take the predictions on record, in seconds.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write one HTML page of errors, causes and intervals here.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Rows that --check prices again.")] = 160,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Price measured serving runs, and say how far predictions are from what was measured.

    --check exits 1 when predictions are no longer those on record, and names the costs that moved.
    """
    from moesim.output.console import progress_bar
    from validate.silicon import command

    def say(line: str) -> None:
        typer.echo(line, err=True)

    scaled = command.scales(scale or ())
    if recorded and (update or check):
        raise BadInput("--update and --check price rows", where="--recorded", mend="leave one of them out")
    if recorded:
        from validate.silicon.keep import recorded as on_record

        result = on_record(rows=rows, record=record, out=out, report=report, scale=scaled)
    elif update or check:
        from validate.silicon.keep import kept

        with progress_bar("pricing measured runs") as progress:
            result = kept(
                update_first=update, check_then=check, rows=rows, profiles=profiles, workers=workers, docs=docs,
                record=record, scale=scaled, most=sample, report=report, say=say, progress=progress,
            )  # fmt: skip
    else:
        with progress_bar("pricing measured runs") as progress:
            result = command.run(
                rows=rows, out=out, profiles=profiles, say=say, progress=progress, workers=workers, scale=scaled,
                record=record, report=report,
            )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result, allow_nan=False, default=str))
    else:
        typer.echo(command.told(result))
    if not result.get("holds", True):
        raise typer.Exit(1)


@app.command()
def published(
    manifest: Annotated[
        Path | None, typer.Option(help="Rows with their scenarios beside it; without, those that ship.")
    ] = None,
    row: Annotated[list[str] | None, typer.Option(help="Only this row; repeats.")] = None,
    draws: Annotated[int, typer.Option(min=0, help="Joint draws behind the intervals.")] = 20,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as docs/accuracy.md has them.")
    ] = False,
    update: Annotated[bool, typer.Option("--update", help="Write the tables into --docs, too.")] = False,
    docs: Annotated[Path, typer.Option(help="Page of the generated tables.")] = Path("docs/accuracy.md"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Price published whole-system figures and ratios of pairs of them, and say how far off they are.

    Exits 1 when a ratio has the wrong sign and the manifest does not say why.
    """
    from moesim.output.console import progress_bar
    from validate.published import manifest as published_manifest
    from validate.published import predict as published_predict
    from validate.published import table as published_table

    if update and row:
        raise BadInput("the page holds all rows", where="--row", mend="leave it out with --update")
    path = manifest if manifest is not None else published_manifest.bundled_manifest()
    asked = published_manifest.chosen(published_manifest.read_manifest(path), tuple(row or ()))
    with progress_bar("pricing published rows") as progress:
        found = published_predict.predict_rows(asked.rows, draws=draws, progress=progress)
    ratios = published_predict.set_beside(asked, found)
    total = published_predict.summary(found, ratios)
    if update:
        published_table.PART.put(docs, published_table.markdown(found, ratios, total))
    if as_json:
        typer.echo(json.dumps(published_table.as_json(found, ratios, total), allow_nan=False))
    else:
        show = published_table.markdown if markdown else published_table.text
        typer.echo(show(found, ratios, total))
    if total["unexplained"]:
        raise typer.Exit(1)


@app.command()
def records(
    add: Annotated[
        list[Path] | None,
        typer.Option(help="record.json of a `validate` command that predicts, or a bundle; repeats."),
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(help="With --add: the cluster of several nodes, as scenarios name it."),
    ] = "",
    update: Annotated[bool, typer.Option("--update", help="Write the table into --docs.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 unless --docs holds the table.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Folder of the records. [default: the committed ones]")] = None,
    docs: Annotated[Path, typer.Option(help="Page of the generated table.")] = Path("docs/accuracy.md"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as one JSON object.")] = False,
) -> None:
    """Keep validations on record, one dated file for each, and show how far predictions were off."""
    from validate.records import store
    from validate.records.table import PART, markdown

    where = folder or store.FOLDER
    for one in store.add(add or (), where, cluster=cluster):
        typer.echo(f"added {one.path}", err=True)
    found = store.read_all(where)
    table = markdown(found)
    if update:
        PART.put(docs, table)
    if check:
        PART.check(docs, table)
    if as_json:
        typer.echo(json.dumps({"records": [one.model_dump(mode="json") for one in found]}, allow_nan=False))
    else:
        typer.echo(table)


app.command()(calibrate)
app.command()(capacity)
app.command()(training)
app.command()(replay)
