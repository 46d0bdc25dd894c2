"""The command `moesim profile node`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option, echo


def node(
    out: Annotated[Path, Option("--out", help="The bundle, a zip; finished points wait in a folder beside it.")],
    device: Annotated[str, Option("--device", help="cpu or cuda.")] = "cpu",
    ranks: Annotated[
        int | None, Option("--ranks", min=1, help="Local processes; default: every GPU, or two on a CPU.")
    ] = None,
    quick: Annotated[bool, Option("--quick", help="A small version of everything.")] = False,
    budget: Annotated[
        float | None, Option("--budget", min=1.0, help="Seconds after which no point is begun; run again to go on.")
    ] = None,
    loads: Annotated[Path | None, Option("--loads", help="SGLang JSON counts: real ranks and exchanges join.")] = None,
    placement: Annotated[Path | None, Option("--placement", help="A moesim map for --loads; else contiguous.")] = None,
    stall_limit: Annotated[float, Option("--stall-limit", min=1.0, help="Seconds without progress.")] = 300.0,
) -> None:
    """Measure ceilings, kernels and collectives of this machine (of several under torchrun) into one bundle."""
    from profiles.node import Options, measure

    options = Options(out, device, ranks, quick, budget, loads, placement, stall_limit)
    told = measure(options, say=lambda line: echo(line, err=True))
    if told:
        echo("\n".join(told))
