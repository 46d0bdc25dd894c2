"""Slows down the tasks of a graph for as long as computing and communicating overlap, before any executor runs it.

While a task of the other kind runs on its rank, a task progresses at 1 / slowdown of its pace, else at its full pace.
When the other kind runs depends on the durations themselves, so it is read from a run of the graph, a few times over,
each time with the durations found before. Both executors then get the same durations.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.cost.overlap import Slowdown
from moesim.engine import maxplus
from moesim.graph.task import Stream, TaskGraph

Floats = NDArray[np.float64]

# Runs that durations are found by: until no step moves by more than SETTLED of its time, and at most so many.
PASSES = 8
SETTLED = 1e-6
# Time in which a GPU waits for its host is on the compute stream, but no kernel runs.
HOST = "engine_overhead"


def stretched(graph: TaskGraph, slowdown: Slowdown) -> TaskGraph:
    """The graph with durations [steps, ranks] that hold the slowdown; the same graph where there is none.

    No duration becomes shorter, nor longer than its slowdown times what it was.
    """
    if max(slowdown.compute, slowdown.communication) <= 1.0 or not graph.tasks:
        return graph
    factor = np.array([_factor(task.stream, task.operation, slowdown) for task in graph.tasks])
    kind = np.array([_kind(task.stream, task.operation) for task in graph.tasks], dtype=np.int64)
    shape = (graph.steps, graph.ranks)
    alone_s = np.stack([np.broadcast_to(task.duration_s, shape) for task in graph.tasks])
    found, step_s = graph, np.full(graph.steps, np.inf)
    for _ in range(PASSES):
        times = maxplus.run(found, timeline=True)
        assert times.start_s is not None and times.end_s is not None
        if (np.abs(times.step_s - step_s) <= SETTLED * times.step_s).all():
            break
        step_s = times.step_s
        duration_s = _durations(kind, factor, alone_s, times.start_s, times.end_s)
        tasks = [replace(task, duration_s=duration_s[index]) for index, task in enumerate(graph.tasks)]
        found = TaskGraph(graph.steps, graph.ranks, tuple(tasks))
    return found


def _factor(stream: Stream, operation: str, slowdown: Slowdown) -> float:
    if operation == HOST:
        return 1.0
    return {Stream.COMPUTE: slowdown.compute, Stream.COMMUNICATION: slowdown.communication}.get(stream, 1.0)


def _kind(stream: Stream, operation: str) -> int:
    """0: computes, 1: communicates, -1: neither disturbs nor is disturbed."""
    if operation == HOST or stream == Stream.COPY:
        return -1
    return 0 if stream == Stream.COMPUTE else 1


@njit(cache=True)
def _durations(kind: NDArray[np.int64], factor: Floats, alone_s: Floats, start_s: Floats, end_s: Floats) -> Floats:
    """What each task takes if it starts at `start_s` and the other kind runs as it did: [tasks, steps, ranks]."""
    _, steps, ranks = start_s.shape
    found = alone_s.copy()
    for own in range(2):
        mine, theirs = np.flatnonzero(kind == own), np.flatnonzero(kind == 1 - own)
        for step in range(steps):
            for rank in range(ranks):
                first = 0  # both lists run in order of time: each is one stream
                for task in mine:
                    begin = start_s[task, step, rank]
                    while first < theirs.size and end_s[theirs[first], step, rank] <= begin:
                        first += 1
                    now, left, place = begin, alone_s[task, step, rank], first
                    while place < theirs.size and start_s[theirs[place], step, rank] < now + left:
                        meets = max(now, start_s[theirs[place], step, rank])
                        parts = max(meets, end_s[theirs[place], step, rank])
                        left -= meets - now
                        slowed = min(left * factor[task], parts - meets)
                        left = max(left - slowed / factor[task], 0.0)
                        now = meets + slowed
                        place += 1
                    # Differences of late times round: keep within what can be.
                    took = max(now + left - begin, alone_s[task, step, rank])
                    found[task, step, rank] = min(took, alone_s[task, step, rank] * factor[task])
    return found
