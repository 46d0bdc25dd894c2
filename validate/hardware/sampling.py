"""Timing the shapes of a profile: all ranks together, the shapes in random turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from validate.hardware.costs import Floats
from validate.hardware.group import CoreShare, Marks
from validate.hardware.layer import Mark
from validate.hardware.rig import Rig, generator

# Samples of each point on each rank: as many as the test cases get, within these bounds.
LEAST_REPEATS = 5
MOST_REPEATS = 20
WARMUP = 2


@dataclass(frozen=True)
class Point:
    """One shape to be profiled: `call` marks the ends of its operations; at some of them all ranks meet."""

    label: str
    call: Callable[[Mark], None]
    collective: tuple[bool, ...]


def sample(rig: Rig, points: Sequence[Point]) -> tuple[list[Floats], float | None]:
    """Seconds in the operations of each point, [ranks, repeats, operations] each, and the share of a core it had.

    The points take turns in random order, as the test cases do later: repeating one shape keeps its memory mapped and
    its data near, and a change in the load of the machine would fall on some points only.
    """
    rng = generator(rig.job, 6)
    moments: list[list[list[float]]] = [[] for _ in points]
    share = CoreShare()
    for turn in range(WARMUP + min(max(rig.job.repeats, LEAST_REPEATS), MOST_REPEATS)):
        for index in rng.permutation(len(points)).tolist():
            rig.group.beat.at(f"profiling {points[index].label}")
            marks = run_point(rig, points[index])
            if turn >= WARMUP:
                moments[index].append(marks.read())
                share.add(marks, points[index].collective)
    spent = [
        intervals(rig.group.gather(np.asarray(rows)), point.collective)[0]
        for point, rows in zip(points, moments, strict=True)
    ]
    return spent, rig.group.core_share(share)


def run_point(rig: Rig, point: Point) -> Marks:
    """Run a point once, from cold near caches and a common start; its marks."""
    rig.flush()
    marks = rig.group.marks()
    rig.group.start_together()
    point.call(marks.mark)
    return marks


def intervals(moments: Floats, collective: Sequence[bool]) -> tuple[Floats, Floats]:
    """Time in each operation and time spent waiting for its start: [ranks, ..., operations] each, in seconds.

    moments: [ranks, ..., operations + 1] on one clock. A collective starts when the last rank comes to it.
    """
    starts = moments[..., :-1].copy()
    meeting = np.asarray(collective)
    starts[..., meeting] = starts[..., meeting].max(axis=0, keepdims=True)
    return moments[..., 1:] - starts, starts - moments[..., :-1]


def probe_sizes(least: float, most: float, points: int, avoid: set[int]) -> list[int]:
    """About `points` sizes spread evenly in the logarithm over [least, most], none of them one of `avoid`."""
    sizes: set[int] = set()
    for value in np.geomspace(max(least, 1.0), max(most, 1.0), points):
        size = max(round(float(value)), 1)
        while size in avoid:
            size += 1
        sizes.add(size)
    return sorted(sizes)
