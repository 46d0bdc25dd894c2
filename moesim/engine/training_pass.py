"""One pass of a model chunk, taken apart: its slowest ranks from meeting to meeting, and who waited for what.

Tasks of a pass run one after another and all ranks meet at every collective, so the chain behind a pass's end goes
along the rank that comes last to each meeting. This is what `critical` finds on the graph, for all routings at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.graph.task import Task, TaskGraph

Floats = NDArray[np.float64]

# What a task of `training_passes` is named after -> the pass it is told under.
PASSES = {"forward": "forward", "recomputed": "recompute", "backward": "backward", "weights": "weight_gradient"}


@dataclass(frozen=True, eq=False)
class PassParts:
    """path_s: (pass, operation) -> seconds on the critical path [routings], sum: the pass. waited_s: operation of the
    rank that came last -> [routings, ranks]. for_rank_s: [routings, ranks], what all others together waited for this
    one (ranks that come last together share it). collective_s: operation -> [routings], of the slowest rank.
    """

    path_s: dict[tuple[str, str], Floats]
    waited_s: dict[str, Floats]
    for_rank_s: Floats
    collective_s: dict[str, Floats]


def pass_parts(graph: TaskGraph) -> PassParts:
    """Take a pass's graph apart; see `moesim.graph.training_passes.chunk_graph`."""
    shape = (graph.steps, graph.ranks)
    found = PassParts({}, {}, np.zeros(shape), {})
    stretch: list[tuple[Task, Floats]] = []
    for task in graph.tasks:
        seconds = np.broadcast_to(np.asarray(task.duration_s, dtype=np.float64), shape)
        if task.groups is None:
            stretch.append((task, seconds))
            continue
        _meet(found, stretch, shape)
        stretch = []
        took = np.asarray(seconds.max(axis=1))
        _add(found.path_s, (_pass(task), task.operation), took)
        _add(found.collective_s, task.operation, took)
        _wait(found, task.operation, took[:, None] - seconds, seconds)
    _meet(found, stretch, shape)
    return found


def _meet(found: PassParts, stretch: list[tuple[Task, Floats]], shape: tuple[int, int]) -> None:
    """All ranks come together after a stretch of their own tasks."""
    if not stretch:
        return
    ready = np.sum([seconds for _, seconds in stretch], axis=0)  # [routings, ranks]
    last = ready.argmax(axis=1)[:, None]
    done = np.zeros((shape[0], 1))
    for task, seconds in stretch:
        spent = np.take_along_axis(seconds, last, axis=1)
        _add(found.path_s, (_pass(task), task.operation), spent[:, 0])
        _add(found.waited_s, task.operation, np.maximum(done + spent - np.maximum(ready, done), 0.0))
        done = done + spent
    waited = ready.max(axis=1, keepdims=True) - ready
    latest = waited == 0.0
    found.for_rank_s[:] += latest * (waited.sum(axis=1) / latest.sum(axis=1))[:, None]


def _wait(found: PassParts, operation: str, waited: Floats, seconds: Floats) -> None:
    """Ranks whose own share of a collective is shorter wait for the longest."""
    if not waited.any():
        return
    latest = seconds == seconds.max(axis=1, keepdims=True)
    _add(found.waited_s, operation, waited)
    found.for_rank_s[:] += latest * (waited.sum(axis=1) / latest.sum(axis=1))[:, None]


def _pass(task: Task) -> str:
    return PASSES[task.name.rpartition(", ")[2]]


def _add(found: dict, key: object, value: Floats) -> None:  # type: ignore[type-arg]
    found[key] = found.get(key, 0.0) + value
