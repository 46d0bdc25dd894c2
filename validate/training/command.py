"""The command `validate training`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from validate.shown import show


def training(
    ranks: Annotated[
        list[int] | None, typer.Option(help="Only layouts of so many gloo ranks; repeats. [default: 2 3 4]")
    ] = None,
    layout: Annotated[list[str] | None, typer.Option(help="Only this layout; repeats.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few short sequences, repeats and samples: a look at whether it runs.")
    ] = False,
    sequence_length: Annotated[
        int | None, typer.Option(min=4, help="Tokens of a sequence. [default: 256, quick: 32]")
    ] = None,
    global_batch: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 12,
    bias: Annotated[float, typer.Option(min=0.0, help="How unevenly experts are wanted.")] = 0.5,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Timed steps of each layout. [default: 9, quick: 2]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, tokens and turns.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for scenarios, points, predictions and the record.")] = Path(
        "runs/validate-training"
    ),
    stall_limit: Annotated[float, typer.Option(min=1.0, help="Seconds without progress that end the run.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object.")] = False,
) -> None:
    """Train a small MoE transformer for some steps under many layouts of TP, EP and PP, each predicted beforehand.

    Every layout has a scenario in the folder, priced by operations measured on the spot; `moesim simulate` on it gives
    its prediction again. Gradients and loss are checked against one process before anything is timed.
    """
    from moesim.errors import BadInput
    from validate.hardware.group import need_torch
    from validate.training import run as runner
    from validate.training.job import LAYOUTS, TrainingJob

    need_torch()
    chosen = tuple(one for one in LAYOUTS if (not ranks or one.ranks in ranks) and (not layout or one.name in layout))
    unknown = set(layout or ()) - {one.name for one in LAYOUTS}
    if unknown or not chosen:
        raise BadInput(
            f"no layout {', '.join(sorted(unknown))}" if unknown else "no layout has so many ranks",
            where="--layout" if unknown else "--ranks",
            mend=f"use one of: {'; '.join(f'{one.name} ({one.ranks} ranks)' for one in LAYOUTS)}",
        )
    job = TrainingJob.read(
        {
            "layouts": [one.model_dump() for one in chosen],
            "sequence_length": sequence_length or (32 if quick else 256),
            "global_batch": global_batch,
            "bias": bias,
            "repeats": repeats or (2 if quick else 9),
            **({"samples": 3, "sample_s": 0.001, "warmup": 0} if quick else {}),
            "seed": seed,
            "stall_s": stall_limit,
            "out": str(out.absolute()),
        },
        where=WHERE_OPTIONS,
    )
    record = runner.run(job, lambda line: typer.echo(line, err=True))
    show(record, runner.table, out / runner.RECORD_FILE, as_json=as_json, holds=True)


WHERE_OPTIONS = "the command's options"
