"""The fast executor: the (max, +) recurrence of a task graph, compiled, over [steps, ranks].

On each rank a task is ready at the later of its dependencies' ends and the end of the task before it on its stream; a
collective starts when the last rank of its group is ready; a task ends `duration_s` after its start. Link sharing is
not modelled: a task takes the time it takes alone. `des` gives the same figures by simulating events, with code of its
own; the two share the graph and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.graph.task import StepTimes, Stream, Task, TaskGraph

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Durations are copied beside each other for the kernel, a block of steps at a time: at most this many in a block
# (2^21 float64 = 16 MiB), so that a large graph does not double its memory.
BLOCK_DURATIONS = 2**21

STREAMS = len(Stream)
COMPUTE = int(Stream.COMPUTE)


class _Structure(NamedTuple):
    """The graph as arrays. Dependencies of task t: dependency[dependency_start[t] : dependency_start[t + 1]]."""

    stream: Ints  # [tasks]
    operation: Ints  # [tasks], number of the operation
    dependency_start: Ints  # [tasks + 1]
    dependency: Ints
    grouping: Ints  # [tasks], which grouping the task meets in, -1 = local
    group_of: Ints  # [groupings, ranks], dense ids
    group_count: Ints  # [groupings]


class _Durations(NamedTuple):
    """Durations of steps [first, last): task t on rank r at the block's step s is at offset + s * step + r * rank."""

    first: int
    last: int
    flat: Floats
    offset: Ints  # [tasks]
    step_stride: Ints  # [tasks], 0 = the same at every step
    rank_stride: Ints  # [tasks], 0 = the same on every rank


class _Found(NamedTuple):
    rank_end_s: Floats  # [steps, ranks]
    busy_s: Floats  # [operations, steps, ranks]
    wait_s: Floats  # [steps, ranks]
    compute_busy_s: Floats  # [steps, ranks]
    start_s: Floats  # [tasks, steps, ranks], or empty
    end_s: Floats


def run(graph: TaskGraph, *, timeline: bool = False) -> StepTimes:
    """Execute every step of `graph` on every rank, without link sharing.

    Time grows with steps x tasks x ranks; durations of shape [1, 1], [steps, 1], [1, ranks] or [steps, ranks] (or
    anything that broadcasts) are read as they are. `timeline` also keeps start_s and end_s [tasks, steps, ranks].
    Raises BadInput for a duration that does not broadcast, or is negative or not finite.
    """
    steps, ranks, tasks = graph.steps, graph.ranks, graph.tasks
    names = list(dict.fromkeys(task.operation for task in tasks))
    kept = (len(tasks), steps, ranks) if timeline else (0, 0, 0)
    found = _Found(
        rank_end_s=np.zeros((steps, ranks)),
        busy_s=np.zeros((len(names), steps, ranks)),
        wait_s=np.zeros((steps, ranks)),
        compute_busy_s=np.zeros((steps, ranks)),
        start_s=np.zeros(kept),
        end_s=np.zeros(kept),
    )
    if tasks and ranks and steps:
        structure = _structure(tasks, ranks, names)
        durations = [_two_dimensional(task, steps, ranks) for task in tasks]
        per_step = sum(array.size // array.shape[0] for array in durations if array.shape[0] > 1)
        block = max(1, min(steps, BLOCK_DURATIONS // max(per_step, 1)))
        for first in range(0, steps, block):
            last = min(first + block, steps)
            _advance(structure, _flatten(tasks, durations, first, last), found)
    return StepTimes(
        step_s=found.rank_end_s.max(axis=1, initial=0.0),
        rank_end_s=found.rank_end_s,
        busy_s={name: found.busy_s[index] for index, name in enumerate(names)},
        wait_s=found.wait_s,
        compute_busy_s=found.compute_busy_s,
        start_s=found.start_s if timeline else None,
        end_s=found.end_s if timeline else None,
    )


def _two_dimensional(task: Task, steps: int, ranks: int) -> Floats:
    """The task's durations as [1 or steps, 1 or ranks], repeats that a view only pretends to hold taken away."""
    array = np.asarray(task.duration_s, dtype=np.float64)
    if array.ndim < 2:
        array = array.reshape((1, -1))
    if array.ndim != 2 or array.shape[0] not in (1, steps) or array.shape[1] not in (1, ranks):
        raise BadInput(
            f"task {task.name} has durations of shape {np.shape(task.duration_s)}",
            mend=f"give a shape that broadcasts to [{steps} steps, {ranks} ranks]",
        )
    if array.strides[0] == 0:
        array = array[:1]
    if array.strides[1] == 0:
        array = array[:, :1]
    return array


def _flatten(tasks: tuple[Task, ...], durations: list[Floats], first: int, last: int) -> _Durations:
    """Durations of steps [first, last) beside each other, each once."""
    parts = [(array[first:last] if array.shape[0] > 1 else array).ravel() for array in durations]
    flat = np.concatenate(parts)
    sizes = np.array([part.size for part in parts], dtype=np.int64)
    offset = np.cumsum(sizes) - sizes
    rank_stride = np.array([int(array.shape[1] > 1) for array in durations], dtype=np.int64)
    step_stride = np.array([array.shape[1] if array.shape[0] > 1 else 0 for array in durations], dtype=np.int64)
    if not (flat.min() >= 0.0 and flat.max() < np.inf):
        wrong = int(np.flatnonzero(~((flat >= 0.0) & (flat < np.inf)))[0])
        task = tasks[int(np.searchsorted(offset, wrong, side="right")) - 1]
        raise BadInput(f"task {task.name} has a duration of {flat[wrong]} s", mend="give a finite time of at least 0")
    return _Durations(first, last, flat, offset, step_stride, rank_stride)


def _structure(tasks: tuple[Task, ...], ranks: int, names: list[str]) -> _Structure:
    number = {name: index for index, name in enumerate(names)}
    dependency_start = np.zeros(len(tasks) + 1, dtype=np.int64)
    dependency_start[1:] = np.cumsum([len(task.depends_on) for task in tasks])
    grouping, group_of = _groupings(tasks, ranks)
    return _Structure(
        stream=np.array([int(task.stream) for task in tasks], dtype=np.int64),
        operation=np.array([number[task.operation] for task in tasks], dtype=np.int64),
        dependency_start=dependency_start,
        dependency=np.array([other for task in tasks for other in task.depends_on], dtype=np.int64),
        grouping=grouping,
        group_of=group_of,
        group_count=group_of.max(axis=1, initial=-1) + 1,
    )


def _groupings(tasks: tuple[Task, ...], ranks: int) -> tuple[Ints, Ints]:
    """Which of the distinct groupings each task meets in (-1: local), and their dense group ids [groupings, ranks]."""
    by_object: dict[int, int] = {}
    by_value: dict[bytes, int] = {}
    dense: list[Ints] = []
    grouping = np.full(len(tasks), -1, dtype=np.int64)
    for index, task in enumerate(tasks):
        if task.groups is None:
            continue
        if id(task.groups) not in by_object:
            ids = np.unique(task.groups, return_inverse=True)[1].astype(np.int64).reshape(ranks)
            by_object[id(task.groups)] = by_value.setdefault(ids.tobytes(), len(dense))
            if len(by_value) > len(dense):
                dense.append(ids)
        grouping[index] = by_object[id(task.groups)]
    return grouping, np.array(dense, dtype=np.int64).reshape((len(dense), ranks))


@njit(cache=True)
def _meet_groups(ready: Floats, latest: Floats, group: Ints, groups: int, waited: Floats) -> None:
    """Move `ready` [ranks] to the latest of its group and add the wait; `latest` is scratch."""
    if groups == 1:  # all ranks together, the common case: a plain maximum
        meet = ready[0]
        for rank in range(1, ready.size):
            meet = max(meet, ready[rank])
        for rank in range(ready.size):
            waited[rank] += meet - ready[rank]
            ready[rank] = meet
        return
    latest[:groups] = 0.0
    for rank in range(ready.size):
        latest[group[rank]] = max(latest[group[rank]], ready[rank])
    for rank in range(ready.size):
        waited[rank] += latest[group[rank]] - ready[rank]
        ready[rank] = latest[group[rank]]


@njit(cache=True)
def _advance(graph: _Structure, durations: _Durations, found: _Found) -> None:
    """Fill `found` for the block of steps that `durations` holds."""
    tasks = graph.stream.size
    ranks = found.rank_end_s.shape[1]
    free = np.zeros((STREAMS, ranks))
    ends = np.zeros((tasks, ranks))
    ready = np.zeros(ranks)
    duration = np.zeros(ranks)
    latest = np.zeros(ranks)
    for step in range(durations.first, durations.last):
        free[:] = 0.0
        for task in range(tasks):
            lane = free[graph.stream[task]]
            for rank in range(ranks):
                ready[rank] = lane[rank]
            for position in range(graph.dependency_start[task], graph.dependency_start[task + 1]):
                before = ends[graph.dependency[position]]
                for rank in range(ranks):
                    ready[rank] = max(ready[rank], before[rank])
            grouping = graph.grouping[task]
            if grouping >= 0:
                _meet_groups(ready, latest, graph.group_of[grouping], graph.group_count[grouping], found.wait_s[step])
            base = durations.offset[task] + (step - durations.first) * durations.step_stride[task]
            if durations.rank_stride[task] == 0:
                duration[:] = durations.flat[base]
            else:
                duration[:] = durations.flat[base : base + ranks]
            end = ends[task]
            busy = found.busy_s[graph.operation[task], step]
            for rank in range(ranks):
                end[rank] = ready[rank] + duration[rank]
                lane[rank] = end[rank]
                busy[rank] += duration[rank]
            if graph.stream[task] == COMPUTE:
                compute = found.compute_busy_s[step]
                for rank in range(ranks):
                    compute[rank] += duration[rank]
            if found.start_s.size > 0:
                found.start_s[task, step] = ready
                found.end_s[task, step] = end
        for rank in range(ranks):
            finish = 0.0
            for lane_number in range(STREAMS):
                finish = max(finish, free[lane_number, rank])
            found.rank_end_s[step, rank] = finish
