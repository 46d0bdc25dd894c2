"""The command `validate training`, and the job that it is asked to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from validate.shown import BackendName, show

if TYPE_CHECKING:
    from validate.training.job import TrainingJob

OUT = Path("runs/validate-training")
WHERE_OPTIONS = "the command's options"


def training(
    backend: Annotated[BackendName, typer.Option(help="gloo: CPU processes; nccl: GPUs.")] = BackendName.gloo,
    ranks: Annotated[
        list[int] | None,
        typer.Option(
            help="Only layouts of so many ranks; repeats. [default: gloo: 2 3 4, nccl: the GPUs of this machine, "
            "under torchrun its own count]"
        ),
    ] = None,
    layout: Annotated[list[str] | None, typer.Option(help="Only this layout; repeats.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few short sequences, repeats and samples: a look at whether it runs.")
    ] = False,
    sequence_length: Annotated[
        int | None, typer.Option(min=4, help="Tokens of a sequence. [default: gloo 256, nccl 2048, quick: 32]")
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a step. [default: gloo 12, nccl 32, or two a rank]")
    ] = None,
    bias: Annotated[float, typer.Option(min=0.0, help="How unevenly experts are wanted.")] = 0.5,
    repeats: Annotated[
        int | None, typer.Option(min=2, help="Timed steps of each layout. [default: 9, quick: 2]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of weights, tokens and turns.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for scenarios, points, predictions and the record.")] = OUT,
    stall_limit: Annotated[float, typer.Option(min=1.0, help="Seconds without progress that end the run.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object.")] = False,
) -> None:
    """Train a small MoE transformer for some steps under many layouts of TP, EP and PP, each predicted beforehand.

    Every layout has a scenario in the folder, priced by operations measured on the spot; `moesim simulate` on it gives
    its prediction again. Gradients and loss are checked against one process before anything is timed.
    """
    from validate.hardware.record import RECORD_FILE
    from validate.training import run as runner

    def say(line: str) -> None:
        typer.echo(line, err=True)

    def make(world: int | None) -> TrainingJob:
        return make_job(
            backend.value, world, say, ranks=ranks or (), names=layout or (), quick=quick, out=out,
            stall_s=stall_limit, sequence_length=sequence_length, global_batch=global_batch, bias=bias,
            repeats=repeats, seed=seed,
        )  # fmt: skip

    record = start(backend.value, make, say)
    if record is not None:
        show(record, runner.table, out / RECORD_FILE, as_json=as_json, holds=True)


def start(
    backend: str, make: Callable[[int | None], TrainingJob], say: Callable[[str], None], *, keep: bool = False
) -> dict[str, Any] | None:
    """Run on the ranks that torchrun started, if it did, else on ranks of its own; None where nothing is recorded.

    make: the job for so many ranks that are there, or None for as many as it asks for. keep: a record of the same job
    that is there already will do. Raises MissingPart.
    """
    from profiles.launch import under_torchrun
    from validate.hardware.group import need_torch
    from validate.hardware.rig import missing_gpu
    from validate.training import run as runner
    from validate.training.company import Started
    from validate.training.job import WHERE

    need_torch(WHERE)
    if backend == "nccl":
        missing_gpu(1)
    if under_torchrun():
        return runner.run_under_torchrun(make, say, keep=keep)
    job = make(None)
    if backend == "nccl":
        missing_gpu(max(one.ranks for one in job.layouts))
    return runner.run(job, Started(job, say), keep=keep)


def make_job(
    backend: str,
    world: int | None,
    say: Callable[[str], None],
    *,
    ranks: Sequence[int],
    names: Sequence[str],
    quick: bool,
    out: Path,
    stall_s: float,
    sequence_length: int | None = None,
    global_batch: int | None = None,
    bias: float = 0.5,
    repeats: int | None = None,
    seed: int = 0,
) -> TrainingJob:
    """Put the job together; layouts that nobody named and that do not fit are left out, and `say` is told.

    world: ranks that are there; None for as many as needed. Raises BadInput.
    """
    from moesim.errors import BadInput
    from validate.hardware.group import need_torch
    from validate.training.job import LAYOUTS, SEQUENCE_LENGTH, SHAPES, TrainingJob, batch_of, fitting, layouts_of

    kind: Any = backend
    some = sorted({one.ranks for one in LAYOUTS})
    if backend == "nccl" and world is None:
        some = [need_torch().cuda.device_count()]
    counts = sorted(set(ranks)) or (some if world is None else [world])
    known = [one for count in counts for one in layouts_of(count)]
    chosen = tuple(one for one in known if not names or one.name in names)
    unknown = [f"no layout {one!r}" for one in names if one not in {each.name for each in known}]
    unknown += [f"no layout of {one} ranks" for one in counts if not layouts_of(one)]
    if world is not None:
        unknown += [f"{one} ranks of {world}" for one in counts if one > world]
    if unknown or not chosen:
        raise BadInput(
            unknown[0] if unknown else "no layout of that name has so many ranks",
            where="--layout, --ranks",
            mend=f"use some of: {'; '.join(f'{one.name} ({one.ranks} ranks)' for one in known or LAYOUTS)}",
        )
    job = TrainingJob.read(
        {
            "shape": SHAPES[kind].model_dump(),
            "layouts": [one.model_dump() for one in chosen],
            "sequence_length": sequence_length or (32 if quick else SEQUENCE_LENGTH[kind]),
            "global_batch": global_batch or batch_of(kind, max(counts)),
            "bias": bias,
            "repeats": repeats or (2 if quick else 9),
            **({"samples": 3, "sample_s": 0.001, "warmup": 0} if quick else {}),
            "seed": seed,
            "backend": backend,
            "stall_s": stall_s,
            "out": str(out.absolute()),
        },
        where=WHERE_OPTIONS,
    )
    job, wrong = fitting(job)
    if wrong and (names or len(wrong) == len(chosen)):
        name, why = next(iter(wrong.items()))
        raise BadInput(why, where=f"layout {name}", mend="use another layout, batch or sequence length")
    for name, why in wrong.items():
        say(f"left out {name}: {why}")
    return job
