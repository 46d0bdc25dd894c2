"""From the options of `validate exchange` to its run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from profiles.collective_points import bytes_from
from profiles.launch import under_torchrun
from profiles.shares import destination_shares
from validate.exchange import run as exchange
from validate.hardware.job import file_profile, synthetic_profile
from validate.hardware.run import EXPERTS

SIZE, REPEATS = "16MB", 200
QUICK_SIZE, QUICK_REPEATS = "1MB", 12


def run(
    *,
    backend: str,
    ranks: int,
    size: str,
    repeats: int | None,
    quick: bool,
    profile: Path | None,
    loads: Path | None,
    placement: Path | None,
    layer: int | None,
    seed: int,
    out: Path,
    stall_limit_s: float,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Put the job together and run it; None on the ranks of torchrun that record nothing. Raises BadInput."""
    world = int(os.environ["WORLD_SIZE"]) if under_torchrun() else ranks
    own: tuple[float, ...] = ()
    if loads is None:
        experts, source = synthetic_profile(EXPERTS, np.random.default_rng([seed, 9])), "synthetic routing"
        destination_shares(world, skew=None, loads=None, placement=placement, layer=layer)  # refuses what needs loads
    else:
        experts, layer = file_profile(loads, layer)
        source = f"layer {layer}"
        if placement is not None:
            own, _ = destination_shares(world, skew=None, loads=loads, placement=placement, layer=layer)
    bytes_of_rank = bytes_from(size or (QUICK_SIZE if quick else SIZE), "--size")
    job = exchange.ExchangeJob(
        backend=backend,
        cases=exchange.ten_cases(experts, world, source=source, own=own),
        size=bytes_of_rank,
        repeats=repeats or (QUICK_REPEATS if quick else REPEATS),
        seed=seed,
        out=str(out.absolute()),
        profile=str(profile.absolute()) if profile else "",
        stall_s=stall_limit_s,
    )
    return exchange.run_under_torchrun(job, say) if under_torchrun() else exchange.run(job, ranks, say)
