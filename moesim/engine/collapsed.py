"""Seconds of steps on one rank that stands for the slowest at each stage: what step tables are made of, many at a time.

Tables of many plans have the same tasks and differ in durations alone. So the tasks of a schedule are built once, as a
skeleton, and timed by the rules of `maxplus` on one rank: the same numbers, to the last digit, without the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.graph.layer import build_lists, schedule_lists
from moesim.graph.priced_step import LayerSetup, Part, PricedStep

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STREAMS = 3
BESIDE = 64  # steps: half a megabyte for a thousand tasks
# Schedules whose every task takes one priced part's time, so that a skeleton says all of it.
SCHEDULES = ("sequential", "two_batch")


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The tasks of a step: stream [tasks], what each waits for (dependency[start[i]:start[i + 1]]), and its duration.

    sources: (micro-batch, part, MoE layer) of each distinct duration; source [tasks]: which of them a task takes.
    """

    stream: Ints
    start: Ints
    dependency: Ints
    source: Ints
    sources: tuple[tuple[int, str, int], ...]


_skeletons: dict[tuple[object, ...], Skeleton] = {}


def collapsed_seconds(
    setup: LayerSetup, priced: Sequence[PricedStep], normal: Mapping[str, float] | None, stage: int | None = None
) -> Floats | None:
    """Seconds [steps] of priced micro-batches on one rank; None where the schedule's tasks are more than priced parts.

    normal: a joint draw, see `Part.seconds`.
    """
    if setup.policies.schedule not in SCHEDULES or setup.storage is not None or setup.overlap is not None:
        return None
    builders = build_lists(setup, priced, normal, 1)
    moe = setup.model.moe.layer_ids
    stages = None if setup.stages is None else (stage, setup.stages.layers)
    key = (
        setup.policies.schedule, setup.model.layers, moe, stages, *(_present(builder.priced) for builder in builders),
    )  # fmt: skip
    found = _skeletons.get(key)
    if found is None:
        found = _skeletons[key] = _skeleton(setup, priced, normal, stage)
    steps = priced[0].batch.steps
    durations = np.empty((len(found.sources), steps))
    for place, (micro, part, row) in enumerate(found.sources):
        durations[place] = builders[micro].seconds(part, row)[:, 0]
    if not (durations.min() >= 0.0 and durations.max() < np.inf):
        return None  # the executor says which task it is
    seconds = np.empty(steps)
    _advance(found.stream, found.start, found.dependency, found.source, durations, seconds)
    return seconds


def _present(priced: PricedStep) -> tuple[bool, ...]:
    return tuple(
        bool(getattr(priced, one.name).estimates)
        for one in fields(priced)
        if isinstance(getattr(priced, one.name), Part)
    )


def _skeleton(
    setup: LayerSetup, priced: Sequence[PricedStep], normal: Mapping[str, float] | None, stage: int | None
) -> Skeleton:
    builders = build_lists(setup, priced, normal, 1, tasks=True, stage=stage)
    graph = schedule_lists(setup, [builder.tasks for builder in builders], priced[0].batch.steps, 1)
    # A task of the graph is one of a list's, whose duration it holds: the very object tells which.
    of_duration = {
        id(task.duration_s): (micro, *source)
        for micro, builder in enumerate(builders)
        for task, source in zip(builder.tasks, builder.sources, strict=True)
    }
    wanted = [of_duration[id(task.duration_s)] for task in graph.tasks]
    sources = tuple(dict.fromkeys(wanted))
    number = {source: index for index, source in enumerate(sources)}
    counts = [len(task.depends_on) for task in graph.tasks]
    return Skeleton(
        stream=np.asarray([int(task.stream) for task in graph.tasks], dtype=np.int64),
        start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        dependency=np.asarray([other for task in graph.tasks for other in task.depends_on], dtype=np.int64),
        source=np.asarray([number[source] for source in wanted], dtype=np.int64),
        sources=sources,
    )


@njit(cache=True)
def _advance(stream: Ints, start: Ints, dependency: Ints, source: Ints, durations: Floats, seconds: Floats) -> None:
    """Fill `seconds` [steps] from durations [sources, steps]: tasks start when their stream and what they await end.

    BESIDE steps go side by side, which a processor does at once, and few enough for what they hold to stay near.
    """
    ends = np.empty((stream.size, BESIDE))
    free = np.empty((STREAMS, BESIDE))
    ready = np.empty(BESIDE)
    for first in range(0, seconds.size, BESIDE):
        wide = min(BESIDE, seconds.size - first)
        free[:] = 0.0
        for task in range(stream.size):
            lane, end = free[stream[task]], ends[task]
            lasts = durations[source[task], first : first + wide]
            for step in range(wide):
                ready[step] = lane[step]
            for position in range(start[task], start[task + 1]):
                before = ends[dependency[position]]
                for step in range(wide):
                    ready[step] = max(ready[step], before[step])
            for step in range(wide):
                end[step] = ready[step] + lasts[step]
            for step in range(wide):
                lane[step] = end[step]
        for step in range(wide):
            finish = free[0, step]
            for other in range(1, STREAMS):
                finish = max(finish, free[other, step])
            seconds[first + step] = finish
