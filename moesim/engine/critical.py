"""Why a step took as long as it did: the chain of tasks behind its end, and what each rank waited for.

Both executors start a task at the latest end of what it waits for, and nothing else, so the chain is exact: from the
last end back to 0, each task starts at the very moment at which the one before it ends. A collective starts when the
last rank of its group is ready; there the chain goes on that rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.graph.task import StepTimes, Stream, Task, TaskGraph

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bound = Literal["start", "dependency", "stream"]
_NOT_THIS_GRAPH, _GIVE_THESE = (
    "task {} starts at {} s, when nothing that it waits for ends",
    "give the times of this graph",
)


@dataclass(frozen=True)
class CriticalPath:
    """The chain of one step, first task first; each starts when the one before it ends, the first at 0.

    task, rank: int64 [length]. start_s, end_s: [length], as executed. bound: [length], what held the task back: a
    dependency, the task before it on its stream, or nothing ("start").
    """

    task: Ints
    rank: Ints
    start_s: Floats
    end_s: Floats
    bound: tuple[Bound, ...]

    def by_operation_s(self, graph: TaskGraph) -> dict[str, float]:
        """Operation -> seconds of the chain; they sum to the step's time. Operations off the chain are left out."""
        found: dict[str, float] = {}
        for task, seconds in zip(self.task, self.end_s - self.start_s, strict=True):
            name = graph.tasks[task].operation
            found[name] = found.get(name, 0.0) + float(seconds)
        return found


@dataclass(frozen=True)
class Waits:
    """Time that ranks waited for others before collectives.

    for_operation_s: what the last rank of a group was busy with, or itself waited for, while others stood ready:
    operation -> [steps, ranks], the waits of each rank. They sum to `StepTimes.wait_s`. for_rank_s: [steps, ranks],
    what all other ranks together waited for this one (ranks that come last together share it).
    """

    for_operation_s: dict[str, Floats]
    for_rank_s: Floats


def critical_path(graph: TaskGraph, times: StepTimes, *, step: int = 0) -> CriticalPath:
    """The chain behind the end of one step; of equal ones, dependencies before streams and low ranks before high.

    times: with a timeline, by either executor, of this graph. Raises BadInput where they are not.
    """
    start_s, end_s = _timeline(graph, times)
    start_s, end_s = start_s[:, step], end_s[:, step]
    before = _stream_predecessors(graph.tasks)
    found: list[tuple[int, int, Bound]] = []
    if graph.tasks:
        rank = int(np.argmax(end_s.max(axis=0)))
        task = int(np.argmax(end_s[:, rank]))
        while True:
            start = float(start_s[task, rank])
            if start == 0.0:
                found.append((task, rank, "start"))
                break
            held = _held_back(graph.tasks[task], before[task], end_s, start, rank)
            if held is None:
                raise BadInput(_NOT_THIS_GRAPH.format(graph.tasks[task].name, start), mend=_GIVE_THESE)
            other, other_rank, bound = held
            found.append((task, rank, bound))
            task, rank = other, other_rank
    found.reverse()
    tasks = np.asarray([task for task, _, _ in found], dtype=np.int64)
    ranks = np.asarray([rank for _, rank, _ in found], dtype=np.int64)
    return CriticalPath(tasks, ranks, start_s[tasks, ranks], end_s[tasks, ranks], tuple(bound for _, _, bound in found))


def waits(graph: TaskGraph, times: StepTimes) -> Waits:
    """For what, and for whom, ranks waited before collectives. Raises BadInput for times without a timeline."""
    start_s, end_s = _timeline(graph, times)
    steps, ranks = start_s.shape[1:]
    before = _stream_predecessors(graph.tasks)
    by_operation: dict[str, Floats] = defaultdict(lambda: np.zeros((steps, ranks)))
    for_rank_s = np.zeros((steps, ranks))
    for index, task in enumerate(graph.tasks):
        others = [*task.depends_on, *([before[index]] if before[index] >= 0 else [])]
        if task.groups is None or not others:
            continue
        ready_s = end_s[others].max(axis=0)  # [steps, ranks]
        for group in np.unique(task.groups):
            members = np.flatnonzero(task.groups == group)
            waited_s = start_s[index][:, members] - ready_s[:, members]
            inside_s = ready_s[:, members]
            latest = members[inside_s.argmax(axis=1)]  # [steps]
            last = inside_s == inside_s.max(axis=1, keepdims=True)  # ranks that are last together share it
            for_rank_s[:, members] += last * (waited_s.sum(axis=1) / last.sum(axis=1))[:, None]
            for step in np.flatnonzero(waited_s.any(axis=1)):
                late = (index, int(latest[step]))
                spent = _meanwhile(graph, before, start_s[:, step], end_s[:, step], late, inside_s[step])
                for operation, seconds in spent:
                    by_operation[operation][step, members] += seconds
    return Waits(dict(by_operation), for_rank_s)


def _meanwhile(
    graph: TaskGraph, before: list[int], start_s: Floats, end_s: Floats, last: tuple[int, int], ready: Floats
) -> Iterator[tuple[str, Floats]]:
    """What held back the last rank of a collective since the others were ready: operations, seconds of each [members].

    last: the collective and its last rank; ready: [members], when each of the group was ready.
    """
    task, rank = last
    start = float(start_s[task, rank])
    alone = True  # the collective itself: only this rank's own causes, it is the last
    while start > ready.min():
        held = _held_back(graph.tasks[task], before[task], end_s, start, rank, alone=alone)
        if held is None:
            raise BadInput(_NOT_THIS_GRAPH.format(graph.tasks[task].name, start), mend=_GIVE_THESE)
        task, rank, _ = held
        alone = False
        began, ended = float(start_s[task, rank]), float(end_s[task, rank])
        yield graph.tasks[task].operation, np.maximum(ended - np.maximum(ready, began), 0.0)
        start = began


def _held_back(
    task: Task, before: int, end_s: Floats, start: float, rank: int, *, alone: bool = False
) -> tuple[int, int, Bound] | None:
    """The task and rank whose end is this start, and whether a dependency or the stream; None if there is none.

    alone: look on this rank only, where a collective could have waited for another of its group.
    """
    local = alone or task.groups is None
    ranks = [rank] if local else np.flatnonzero(task.groups == task.groups[rank]).tolist()  # type: ignore[index]
    causes: list[tuple[int, Bound]] = [(other, "dependency") for other in task.depends_on]
    if before >= 0:
        causes.append((before, "stream"))
    for other, bound in causes:
        for member in ranks:
            if end_s[other, member] == start:
                return other, int(member), bound
    return None


def _stream_predecessors(tasks: tuple[Task, ...]) -> list[int]:
    """The task before each on its stream, -1 for the first."""
    last = dict.fromkeys(Stream, -1)
    found = []
    for index, task in enumerate(tasks):
        found.append(last[task.stream])
        last[task.stream] = index
    return found


def _timeline(graph: TaskGraph, times: StepTimes) -> tuple[Floats, Floats]:
    if times.start_s is None or times.end_s is None:
        raise BadInput("these step times hold no timeline", mend="run the executor with timeline=True")
    if times.start_s.shape[0] != len(graph.tasks) or times.start_s.shape[2] != graph.ranks:
        raise BadInput(
            f"times of {times.start_s.shape[0]} tasks on {times.start_s.shape[2]} ranks for a graph of "
            f"{len(graph.tasks)} tasks on {graph.ranks} ranks",
            mend=_GIVE_THESE,
        )
    return times.start_s, times.end_s
