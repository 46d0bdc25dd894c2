"""Slows down the tasks of a graph for as long as computing and communicating overlap, before any executor runs it.

A task that takes `alone` seconds by itself, `slowdown` times as long beside the other kind, and shares `beside` seconds
of its run with it, takes alone + beside x (1 - 1 / slowdown): what it gets done while it is slowed is made up for.
`beside` depends on the times themselves, so it is read from a run of the graph, a few times over; where it has not
settled by then, durations lie between those of the last two passes. Both executors get the same durations.
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

PASSES = 4
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
    lost = (1.0 - 1.0 / factor)[:, None, None]
    found = graph
    for _ in range(PASSES):
        times = maxplus.run(found, timeline=True)
        assert times.start_s is not None and times.end_s is not None
        duration_s = alone_s + lost * _beside(kind, times.start_s, times.end_s)
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
def _beside(kind: NDArray[np.int64], start_s: Floats, end_s: Floats) -> Floats:
    """Seconds of each task during which a task of the other kind runs on its rank: [tasks, steps, ranks]."""
    tasks, steps, ranks = start_s.shape
    found = np.zeros(start_s.shape)
    mine = np.flatnonzero(kind == 0)
    theirs = np.flatnonzero(kind == 1)
    for step in range(steps):
        for rank in range(ranks):
            first = 0  # both lists run in order of time: each is one stream
            for one in mine:
                begin, end = start_s[one, step, rank], end_s[one, step, rank]
                while first < theirs.size and end_s[theirs[first], step, rank] <= begin:
                    first += 1
                place = first
                while place < theirs.size and start_s[theirs[place], step, rank] < end:
                    other = theirs[place]
                    shared = min(end, end_s[other, step, rank]) - max(begin, start_s[other, step, rank])
                    if shared > 0.0:
                        found[one, step, rank] += shared
                        found[other, step, rank] += shared
                    place += 1
    return found
