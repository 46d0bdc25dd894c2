"""The command `validate capacity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from validate.shown import show


def capacity(
    ranks: Annotated[int, typer.Option(min=1, help="gloo ranks on this machine.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="One factor and top-2: seconds.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the first rank; each other one has 11 fewer.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Seed of tokens, weights, placements and random drops.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("runs/validate-capacity"),
    stall_limit: Annotated[float, typer.Option(min=1.0, help="Seconds without progress that end the run.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as one JSON object.")] = False,
) -> None:
    """Drop tokens on a real layer under every capacity policy, and hold the simulator to it token for token.

    Exits 1 when a single token, or the rows of a single expert, differ.
    """
    from moesim.errors import BadInput
    from validate.capacity import run as runner
    from validate.hardware.group import need_torch

    need_torch()
    if runner.SHAPE["experts"] % ranks:
        raise BadInput(
            f"{runner.SHAPE['experts']} experts do not divide by {ranks} ranks", where="--ranks", mend="use a divisor"
        )
    job = runner.CapacityJob(
        cases=runner.every_case(ranks, quick=quick, seed=seed),
        tokens=tuple(max(1, tokens - runner.LESS * rank) for rank in range(ranks)),
        seed=seed,
        out=str(out.absolute()),
        stall_s=stall_limit,
    )
    record = runner.run(job, lambda line: typer.echo(line, err=True))
    from validate.capacity.record import holds, table

    show(record, table, out / runner.RECORD_FILE, as_json=as_json, holds=holds(record))
