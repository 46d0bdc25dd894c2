"""Measure a whole machine, or several under torchrun, and write one bundle: ceilings, kernels, collectives.

Resumable: what is finished stays in a folder beside the bundle, and the same command goes on there. Needs only torch,
NumPy and (on GPUs) pynvml: `python profiles/node.py --device cuda --out node.zip` runs on a copy of the repository.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: let `profiles` and `moesim` be found beside this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from moesim.errors import BadInput, MissingPart, MoesimError
from profiles import collectives, kernels, machine
from profiles.bundle import write_bundle
from profiles.collective_points import GEMM, GIVEN, KINDS, Job, Part, sizes_between
from profiles.device import load_torch
from profiles.groups import DEFAULT
from profiles.launch import under_torchrun
from profiles.shares import KEPT, KEPT_BY_ONE, ONE_WAY, destination_shares

KERNELS_FILE, COLLECTIVES_FILE = "kernels.jsonl", "collectives.jsonl"
SKEWS = ("zipf_0.6", "zipf_1.2")  # as the histograms of the kernels
COLLECTIVES_SHARE = 0.5  # of the time budget; what they do not need is the kernels'
REPEATS, QUICK_REPEATS = 20, 5  # of each collective
KIB, MIB = 2**10, 2**20


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure, and where to: ranks None means every GPU of this machine, or two CPU processes."""

    out: Path
    device: str = "cpu"
    ranks: int | None = None
    quick: bool = False
    budget_s: float | None = None
    loads: Path | None = None
    placement: Path | None = None
    stall_s: float = 300.0


def measure(options: Options, say: Callable[[str], None]) -> list[str]:
    """Measure what is not there yet and write the bundle; returns what a person reads (nothing on later ranks).

    Raises CheckFailed, once the bundle is written, where a kernel was wrong; BadInput, MissingPart.
    """
    if options.device not in ("cpu", "cuda"):
        raise BadInput(f"unknown device {options.device!r}", where="--device", mend="use cpu or cuda")
    torch = load_torch(options.device)
    folder = options.out.with_name(options.out.name + ".parts")
    one_of_many = under_torchrun()
    begun = time.monotonic()
    job, ranks, here = _job(options, torch, folder, one_of_many)
    if not one_of_many:
        left = collectives.run_local(job, ranks, say)
    else:
        left = collectives.run_under_torchrun(job, say)
        if int(os.environ["RANK"]) != 0:
            return []
    rest = None if options.budget_s is None else max(options.budget_s - (time.monotonic() - begun), 0.0)
    done = kernels.measure(
        kernels.Options(
            options.device, options.quick, loads=options.loads, placement=options.placement, ranks=ranks, budget_s=rest
        ),
        folder / KERNELS_FILE,
        say=say,
    )
    later = left + done.later
    lines = {
        name: (folder / name).read_bytes()
        for name in (COLLECTIVES_FILE, KERNELS_FILE)
        if (folder / name).exists()  # a budget may end before the first kernel
    }
    if not lines:
        return ["nothing was measured, the time was up; the same command with a larger --budget goes on"]
    manifest = {
        **machine.describe(torch, options.device),
        "command": _command(options, one_of_many), "backend": job.backend, "ranks": ranks,
        "ranks_here": here, "complete": later == 0, "points_left": later, "left_out": done.left_out,
        "wrong": list(done.wrong),
    }  # fmt: skip
    write_bundle(options.out, lines, manifest, topology=machine.topology())
    kernels.verdict(done)
    return [
        *(collectives.report(folder / COLLECTIVES_FILE) if COLLECTIVES_FILE in lines else ()),
        *kernels.report(done, folder / KERNELS_FILE),
        f"wrote {options.out}"
        + (f": {later} points left for later, the time was up; the same command goes on" if later else ", complete"),
    ]


def _job(options: Options, torch: Any, folder: Path, one_of_many: bool) -> tuple[Job, int, int]:
    """Every collective of the machine, over how many ranks, and how many of them are here."""
    cuda = options.device == "cuda"
    here = options.ranks or (torch.cuda.device_count() if cuda else 2)
    if one_of_many:
        ranks, here = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    else:
        ranks = here
    if cuda and here > torch.cuda.device_count():
        raise MissingPart(
            f"{here} ranks need as many GPUs; {torch.cuda.device_count()} are here", where="--ranks",
            mend="leave --ranks out",
        )  # fmt: skip
    shares, distribution = destination_shares(
        ranks, skew=None, loads=options.loads, placement=options.placement, layer=None
    )
    smaller = tuple(str(2**power) for power in range(1, here.bit_length()) if 2**power < here and here % 2**power == 0)
    budget_s = None if options.budget_s is None else COLLECTIVES_SHARE * options.budget_s
    return (
        Job(
            backend="nccl" if cuda else "gloo",
            parts=_parts(options.quick, bool(shares)),
            repeats=QUICK_REPEATS if options.quick else REPEATS,
            out=str((folder / COLLECTIVES_FILE).absolute()),
            groups=(*DEFAULT, *smaller),
            shares=shares,
            distribution=distribution,
            stall_s=options.stall_s,
            budget_s=budget_s,
        ),
        ranks,
        here,
    )


def _parts(quick: bool, given: bool) -> tuple[Part, ...]:
    """Even kinds first, then what prices uneven exchanges, then those with work beside."""
    even = sizes_between(KIB, 64 * KIB, 8) if quick else sizes_between(KIB, 256 * MIB)
    other = (64 * KIB, 256 * KIB) if quick else sizes_between(64 * KIB, 64 * MIB, 4)
    patterns = (KEPT, KEPT_BY_ONE, ONE_WAY, *SKEWS, *((GIVEN,) if given else ()))
    besides = KINDS[:1] if quick else KINDS
    return (
        *(Part(kind, even) for kind in KINDS),
        *(Part("all_to_all", other, pattern=name) for name in patterns),
        *(Part(kind, other, beside=GEMM) for kind in besides),
    )


def _command(options: Options, one_of_many: bool) -> str:
    """The command that wrote the bundle, without paths."""
    words = ["moesim profile node", "--device", options.device]
    words += ["--quick"] if options.quick else []
    words += ["--budget", f"{options.budget_s:g}"] if options.budget_s is not None else []
    words += ["--loads", options.loads.name] if options.loads else []
    words += ["--placement", options.placement.name] if options.placement else []
    return " ".join(words) + (" (under torchrun)" if one_of_many else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The same as `moesim profile node`, without the rest of moesim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", type=float, metavar="SECONDS")
    parser.add_argument("--loads", type=Path)
    parser.add_argument("--placement", type=Path)
    given = parser.parse_args(arguments)
    options = Options(
        given.out, given.device, given.ranks, given.quick, given.budget, given.loads, given.placement
    )  # fmt: skip
    try:
        print("\n".join(measure(options, say=lambda line: print(line, file=sys.stderr))))
    except MoesimError as error:
        sys.stderr.write(f"error: {error.line()}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
