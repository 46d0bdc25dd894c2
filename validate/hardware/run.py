"""`validate hardware`: make the job, start its ranks (or join torchrun's), hand back the record."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import BadInput, CheckFailed, Infeasible, MissingPart
from moesim.files import write_text
from moesim.units import human_bytes
from validate.hardware.job import (
    Backend,
    Job,
    Kernel,
    LayerShape,
    PlacedCase,
    Replica,
    case_of_file,
    copies_held,
    file_profile,
    synthetic_profile,
)
from validate.hardware.placements import BUILT_IN, family
from validate.hardware.ranks import free_bytes

# Defaults: a layer of a few to some tens of milliseconds on two CPU cores, the whole run well under a minute.
HIDDEN = 512
INTERMEDIATE = 1024
EXPERTS = 32
TOP_K = 4
TOKENS = (32, 128, 512)
REPEATS = 20
# Replicas of the planned placement: two for each rank.
REPLICAS_PER_RANK = 2
NOTHING = "no repeat was finished, so nothing is kept"


def make_job(
    *,
    backend: Backend,
    ranks: int,
    hidden: int,
    intermediate: int,
    experts: int | None,
    top_k: int,
    tokens: tuple[int, ...],
    loads: Path | None,
    layer: int | None,
    placements: tuple[Path, ...],
    count: int | None = None,
    slots: int | None,
    replica: Replica,
    kernel: Kernel,
    repeats: int,
    seed: int,
    out: Path,
    stall_limit_s: float,
) -> Job:
    """Put the job together: load profile, placements, shape. Raises BadInput, Infeasible, MissingPart."""
    if ranks < 1:
        raise BadInput(f"{ranks} ranks", where="--ranks", mend="pass at least 1")
    if seed < 0:
        raise BadInput(f"a seed of {seed}", where="--seed", mend="pass 0 or more")
    if loads is not None:
        profile, layer = file_profile(loads, layer)
        source = f"layer {layer} of {loads.name}"
        if experts is not None and experts != len(profile):
            raise BadInput(
                f"{experts} experts, but {loads.name} counts {len(profile)}",
                where="--experts",
                mend="leave --experts out",
            )
    else:
        if experts is not None and experts < 1:
            raise BadInput(f"{experts} experts", where="--experts", mend="pass at least 1")
        profile = synthetic_profile(experts or EXPERTS, np.random.default_rng([seed, 9]))
        source = "synthetic, lognormal"
    known = len(profile)
    shape = LayerShape.read(
        {"hidden": hidden, "intermediate": intermediate, "experts": known, "top_k": top_k}, where="the layer's shape"
    )
    if top_k > known:
        raise BadInput(f"{top_k} of {known} experts", where="--top-k", mend=f"pass at most {known}")
    if hidden < known:
        raise BadInput(
            f"a hidden size of {hidden} cannot carry the routes of {known} experts",
            where="--hidden",
            mend=f"pass at least {known}",
        )
    if known % ranks:
        raise Infeasible(
            f"{known} experts do not divide by {ranks} ranks, so there is no contiguous placement to compare with",
            where="--ranks",
            mend=f"use a divisor of {known}",
            reason="experts_not_divisible",
        )
    total = slots if slots is not None else min(known + REPLICAS_PER_RANK * ranks, known * ranks)
    if count is not None and count < 1:
        raise BadInput(f"{count} placements", where="--placements", mend="pass at least 1")
    cases: tuple[PlacedCase, ...] = family(
        profile,
        ranks=ranks,
        slots=total,
        count=BUILT_IN - bool(placements) if count is None else count,
        seed=seed,
        planned=not placements,
    )
    for path in placements:
        taken = tuple(case.name for case in cases)
        cases += (case_of_file(path, experts=known, ranks=ranks, layer=layer, taken=taken),)
    job = {
        "backend": backend,
        "ranks": ranks,
        "shape": shape,
        "tokens": tuple(dict.fromkeys(tokens)),
        "profile": tuple(profile.tolist()),
        "profile_source": source,
        "placements": cases,
        "replica": replica,
        "kernel": kernel,
        "repeats": repeats,
        "seed": seed,
        "out": str(out.resolve()),
        "stall_limit_s": stall_limit_s,
    }
    return Job.read(job, where="the command line")


def check_parts(backend: Backend, ranks: int, command: str = "validate hardware") -> None:
    """Raise MissingPart unless this machine has what the backend needs, before anything is started."""
    if importlib.util.find_spec("torch") is None:
        raise MissingPart(f"{command} needs torch", mend="pip install '.[hardware]'")
    if backend == "nccl":
        from validate.hardware.rig import missing_gpu

        missing_gpu(ranks)


def run(job: Job) -> dict[str, Any]:
    """Start the ranks of the job on this machine, wait for them, and return the record.

    Writes predictions.json and record.json to the job's folder; what an earlier run left there goes first. Raises
    CheckFailed when a rank fails, dies or hangs, or when the outputs are wrong; then no process and no temporary folder
    is left behind, and unfinished.json holds the repeats that were finished. Raises Infeasible for want of memory.
    """
    from validate.hardware import ranks, unfinished
    from validate.hardware.worker import RECORD_FILE, forget

    check_memory(job)
    out = Path(job.out)
    write_text(out / "job.json", job.model_dump_json(indent=1) + "\n")
    forget(out)
    folder = Path(tempfile.mkdtemp(prefix="moesim-ranks-"))
    try:
        lines = ranks.commands(out / "job.json", folder, job.ranks)
        with _progress() as tell:
            silence_s = ranks.silence_of(job.backend)
            ranks.launch(lines, folder, stall_limit_s=job.stall_limit_s, tell=tell, silence_s=silence_s)
    except CheckFailed as error:
        kept = unfinished.tell(out, job, error.what)
        raise CheckFailed(error.what, where=error.where, mend=f"{error.mend}; {kept or NOTHING}") from None
    except KeyboardInterrupt:
        unfinished.tell(out, job, "interrupted")
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
    return found


def weight_bytes(job: Job, *, shared: bool = False) -> int:
    """Bytes of the weights that all ranks of a CPU run hold: a float32 copy for each replica that a placement needs.

    shared: ranks take turns in one process and share the copies of an expert.
    """
    held = copies_held(job)
    copies = reduce(or_, held).total() if shared else sum(one.total() for one in held)
    return 3 * job.shape.hidden * job.shape.intermediate * 4 * copies


def check_memory(job: Job, *, where: str = "validate hardware", shared: bool = False) -> None:
    """Raise Infeasible where the weights alone need more memory than this machine has left (Linux tells how much)."""
    if job.backend != "gloo":
        return
    left, needed = free_bytes(), weight_bytes(job, shared=shared)
    if left is not None and needed > left:
        raise Infeasible(
            f"the ranks' weights need {human_bytes(needed)}, and {human_bytes(left)} of memory are free",
            where=where,
            mend="use a smaller layer, fewer experts or fewer placements",
            reason="memory",
        )


@contextmanager
def _progress() -> Iterator[Any]:
    """A line on stderr that says what rank 0 does, where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("starting the ranks")
        yield lambda label: progress.update(task, description=label)
