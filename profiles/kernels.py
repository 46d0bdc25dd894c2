"""Measure kernels on this machine's torch: each point checked against float32, timed, and appended; resumable.

Needs only torch, NumPy and (on a GPU) pynvml, so that the repository can be copied to a bare machine and run there:
`python profiles/kernels.py --device cuda --out h200.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: let `profiles` and `moesim` be found beside this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from moesim.errors import BadInput, CheckFailed, MoesimError
from profiles import local_side, overlap
from profiles.asked import asked
from profiles.beside import NeverTogether
from profiles.capture import Log, identity, statistics_of
from profiles.device import Stopwatch, conditions, device_name, free_bytes, load_torch, readings
from profiles.sweep import CPU, GPU, QUICK, Point, plan, real_loads
from profiles.torch_kernels import TOLERANCE, Builder, Case, bytes_of, dtype_of

MOST_MEMORY = 0.6  # of what is free: the rest is for work space and others
LIMIT_S = 2.0  # a point's repeats; the quick sweep takes less
QUICK_LIMIT_S = 0.1


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure: the sweep of the device, cut to `families` where given, or single `points`.

    budget_s: no point is begun after that long.
    """

    device: str = "cpu"
    quick: bool = False
    repeats: int = 50
    families: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    loads: Path | None = None
    placement: Path | None = None
    ranks: int = 8
    budget_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Done:
    """How a sweep went: points measured now, points that the file held, why others were left out, and for later."""

    measured: int
    kept: int
    left_out: dict[str, int]
    wrong: tuple[str, ...]
    later: int = 0


def points_of(options: Options) -> list[Point]:
    """The points that the options ask for. Raises BadInput for a family or a point that does not exist."""
    if options.points:
        return [point for text in options.points for point in asked(text)]
    reach = QUICK if options.quick else (GPU if options.device.startswith("cuda") else CPU)
    loads = real_loads(options.loads, options.placement, ranks=options.ranks) if options.loads else ()
    found = [*plan(reach, loads=loads), *overlap.points(reach)]
    known = dict.fromkeys(point.family for point in found)
    for family in options.families:
        if family not in known:
            raise BadInput(f"unknown family {family!r}", where="--only", mend=f"use one of: {', '.join(known)}")
    return [point for point in found if not options.families or point.family in options.families]


def measure(options: Options, out: Path, *, say: Callable[[str], None] = lambda line: None) -> Done:
    """Measure the points that `out` does not hold yet; each is appended as it ends, so a kill costs one point at most.

    Raises MissingPart without torch or the device, BadInput when the file cannot be read or written.
    """
    points = points_of(options)
    torch = load_torch(options.device)
    log = Log(out)
    device = device_name(torch, options.device)
    todo = [
        point
        for point in points
        if identity(point.family, dict(point.key), dict(point.size), point.kernel, device) not in log.have
    ]
    limit_s = QUICK_LIMIT_S if options.quick else LIMIT_S
    watch = Stopwatch(torch, options.device, repeats=options.repeats, limit_s=limit_s)
    builder = Builder(torch, options.device)
    left_out: dict[str, int] = {}
    wrong: list[str] = []
    measured = 0
    begun = said = time.monotonic()
    later = 0
    with torch.inference_mode():
        for number, point in enumerate(todo, start=1):
            if options.budget_s is not None and time.monotonic() - begun > options.budget_s:
                later = len(todo) - number + 1
                break
            why, line = _one(torch, options, point, builder, watch, device)
            if line is not None:
                log.append(line)
                measured += 1
            elif why.startswith("wrong"):
                wrong.append(f"{point.family} {point.key} {point.size}: {why}")
                say(wrong[-1])
            else:
                left_out[why] = left_out.get(why, 0) + 1
            if time.monotonic() - said > 5 or number == len(todo):
                say(f"{number} of {len(todo)} points: {point.family} {point.size}")
                said = time.monotonic()
    return Done(measured, len(points) - len(todo), left_out, tuple(wrong), later)


def _one(
    torch: Any, options: Options, point: Point, builder: Builder, watch: Stopwatch, device: str
) -> tuple[str, dict[str, Any] | None]:
    """Check and time one point: why not and None, or "" and its line."""
    cuda = options.device.startswith("cuda")
    builder.forget_unless(point)
    if bytes_of(point, fused_attention=cuda) > MOST_MEMORY * free_bytes(torch, options.device):
        return "larger than the free memory", None
    why = overlap.lacks(point, options.device) if point.family in overlap.FAMILIES else ""
    if why or (not cuda and _only_on_gpu(point)):
        return why or "needs a GPU", None
    before = readings(options.device)
    figures: dict[str, Any] = {"error": None, "extra": point.extra}
    try:
        if point.family in overlap.FAMILIES:
            figures |= overlap.figures(torch, builder, point, options.repeats)
            mode = "beside"
        else:
            case = case_of(torch, builder, point)
            error = None if case.error is None else case.error()
            if error is not None and not error <= TOLERANCE[dtype_of(point)]:
                return f"wrong result: {error:.2g} off the float32 reference", None
            seconds, mode = watch.time(case.run, graph=case.graph)
            figures |= {**statistics_of(seconds), "error": error}
    except NeverTogether as failure:
        return failure.what, None
    except (RuntimeError, NotImplementedError, TypeError, KeyError, AttributeError) as failure:
        # A kernel that this torch or device lacks; the sweep goes on, and the count is told at its end.
        if cuda:
            _alive(torch, point)
        return f"torch refuses {point.family} in {dtype_of(point)}: {str(failure).splitlines()[0][:80]}", None
    finally:
        if cuda:
            torch.cuda.empty_cache()
    after = readings(options.device)
    run = conditions(torch, options.device) | {"timing": mode}
    if cuda:
        run |= {"before": before, "after": after}
    return "", {
        "family": point.family,
        "key": point.key,
        "size": point.size,
        "kernel": point.kernel,
        "device": device,
        "baseline": point.baseline,
        **figures,
        "run": run,
    }


def case_of(torch: Any, builder: Builder, point: Point) -> Case:
    """The work of a point, and its check."""
    if point.family in local_side.FAMILIES:
        return local_side.LocalSide(torch, builder.device, point).case(point.family)
    return builder.case(point)


def _only_on_gpu(point: Point) -> bool:
    """Copies to a device and graphs; and float8, which processors emulate at a thousandth of their speed."""
    name = str(point.key.get("name", ""))
    return "host" in name or name == "launch_graph" or dtype_of(point) == "fp8"


def _alive(torch: Any, point: Point) -> None:
    """Raises CheckFailed when the failure has broken the device for this process, too."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as failure:
        raise CheckFailed(
            f"the device was lost at {point.family} {point.key} {point.size}: {str(failure).splitlines()[0][:80]}",
            where="profile kernels",
            mend="run the command again; leave that family out with --only if it happens twice",
        ) from None


def report(done: Done, out: Path) -> list[str]:
    """What a person reads at the end: counts by family with the middle time, what was left out and why."""
    from profiles.capture import read_lines

    lines = [f"{out}: measured {done.measured} points, kept {done.kept}"]
    by_family: dict[str, list[tuple[float, float]]] = {}
    for line in read_lines([out]) if done.measured or done.kept else ():
        by_family.setdefault(line.family, []).append((line.latency_s, (line.p90_s - line.p10_s) / line.latency_s))
    for family, found in by_family.items():
        times = sorted(one for one, _ in found)
        spread = sorted(one for _, one in found)[len(found) // 2]
        lines.append(
            f"  {family:<18} {len(found):>5} points, {times[0] * 1e6:.1f} to {times[-1] * 1e6:.0f} us,"
            f" spread (p90 - p10) {spread:.0%} of the median"
        )
    lines += [f"  left out {count}: {why}" for why, count in done.left_out.items()]
    if done.later:
        lines.append(f"  {done.later} left for later: the time was up; the same command goes on")
    return lines


def verdict(done: Done) -> None:
    """Raises CheckFailed when a kernel's result was wrong."""
    if done.wrong:
        raise CheckFailed(
            f"{len(done.wrong)} kernels were wrong and not timed; the first: {done.wrong[0]}",
            where="profile kernels",
            mend="leave them out with --only, or try another torch",
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The same as `moesim profile kernels`, without the rest of moesim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--only", action="append", default=[], metavar="FAMILY")
    parser.add_argument("--point", action="append", default=[], metavar="'FAMILY name=value ...'")
    parser.add_argument("--loads", type=Path)
    parser.add_argument("--placement", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    options = Options(
        given.device, given.quick, max(given.repeats, 5), tuple(given.only), tuple(given.point), given.loads,
        given.placement, given.ranks,
    )  # fmt: skip
    try:
        done = measure(options, given.out, say=lambda line: print(line, file=sys.stderr))
        print("\n".join(report(done, given.out)))
        verdict(done)
    except MoesimError as error:
        sys.stderr.write(f"error: {error.line()}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
