"""What a step would cost if something were otherwise: the same graph with other durations, to be run again.

Shares of a step never add up to what a change saves, because what was hidden comes to light; so every figure here is
from running a changed graph. A critical path bounds them: making an operation free saves at most its part of the path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moesim.graph.task import Stream, Task, TaskGraph

# Operations that the host, not the GPU, takes.
HOST_OPERATIONS = frozenset({"engine_overhead"})


def without(graph: TaskGraph, free: Callable[[Task], bool]) -> TaskGraph:
    """The graph with the tasks that `free` names taking no time; ranks still meet where they met."""
    nothing = np.zeros((1, 1))
    return _changed(graph, lambda task: replace(task, duration_s=nothing) if free(task) else task)


def without_operation(graph: TaskGraph, operation: str) -> TaskGraph:
    """The graph with one operation free."""
    return without(graph, lambda task: task.operation == operation)


def infinite_network(graph: TaskGraph) -> TaskGraph:
    """The graph with exchanges and collectives free: what is left is computing, copying and waiting for others."""
    return without(graph, lambda task: task.collective or task.stream == Stream.COMMUNICATION)


def no_host_overhead(graph: TaskGraph) -> TaskGraph:
    """The graph without the host's time between steps and for launches."""
    return without(graph, lambda task: task.operation in HOST_OPERATIONS)


def balanced(graph: TaskGraph) -> TaskGraph:
    """The graph with every task taking each rank what it takes the mean rank; total work stays."""

    def mean(task: Task) -> Task:
        seconds = np.asarray(task.duration_s, dtype=np.float64)
        return task if seconds.ndim == 0 else replace(task, duration_s=seconds.mean(axis=-1, keepdims=True))

    return _changed(graph, mean)


def at_most(graph: TaskGraph, other: TaskGraph, operations: frozenset[str]) -> TaskGraph:
    """The graph with tasks of these operations no longer than in `other`, a graph of the same tasks."""
    shorter = iter(other.tasks)

    def least(task: Task) -> Task:
        twin = next(shorter)
        if twin.name != task.name:
            raise AssertionError(f"{twin.name} stands where {task.name} does")
        if task.operation not in operations:
            return task
        return replace(task, duration_s=np.minimum(task.duration_s, twin.duration_s))

    return _changed(graph, least)


def overlapped(graph: TaskGraph) -> TaskGraph:
    """The graph without dependencies between streams: each rank's longest stream, and no schedule can do better."""
    streams = [task.stream for task in graph.tasks]

    def alone(task: Task) -> Task:
        return replace(task, depends_on=tuple(other for other in task.depends_on if streams[other] == task.stream))

    return _changed(graph, alone)


def _changed(graph: TaskGraph, change: Callable[[Task], Task]) -> TaskGraph:
    return replace(graph, tasks=tuple(change(task) for task in graph.tasks))
