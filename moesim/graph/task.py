"""One step as tasks: what runs on which stream of which rank, after what. Both executors read this and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput


class Stream(IntEnum):
    """Streams of a rank; tasks of one stream run in the order in which the graph lists them."""

    COMPUTE = 0
    COMMUNICATION = 1
    COPY = 2


class Link(IntEnum):
    """A rank's share of the fabric that a task occupies; concurrent tasks on one link share it max-min fair."""

    NVLINK = 0
    NIC = 1
    PCIE = 2


@dataclass(frozen=True)
class Task:
    """A piece of work that every rank of the graph does once.

    duration_s: float64, broadcastable to [steps, ranks], time when alone. depends_on: indices of earlier tasks, on
    the same rank. groups: int64 [ranks], the collective's group of each rank (None = local): it starts when the last
    rank of the group is ready. links: (link, share of its rate used when alone, 0 to 1]; only `des` reads them, and
    only where operations are concurrent. operation: the key that its time is reported under. layer: absolute; -1: none.
    """

    name: str
    operation: str
    stream: Stream
    duration_s: NDArray[np.float64]
    depends_on: tuple[int, ...] = ()
    groups: NDArray[np.int64] | None = None
    links: tuple[tuple[Link, float], ...] = ()
    layer: int = -1

    @property
    def collective(self) -> bool:
        """Whether ranks must meet before it starts."""
        return self.groups is not None


@dataclass(frozen=True)
class TaskGraph:
    """Tasks, each after what it depends on, for `steps` independent steps of `ranks` ranks."""

    steps: int
    ranks: int
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        for index, task in enumerate(self.tasks):
            if any(not 0 <= other < index for other in task.depends_on):
                raise BadInput(
                    f"task {task.name} depends on a task that does not come before it", mend="order the tasks"
                )
            if task.groups is not None and task.groups.shape != (self.ranks,):
                raise BadInput(
                    f"task {task.name} groups {task.groups.shape}, not {self.ranks} ranks",
                    mend="give [ranks]",
                )


@dataclass(frozen=True)
class StepTimes:
    """What an executor found.

    step_s: [steps], the last end over tasks and ranks. rank_end_s: [steps, ranks]. busy_s: operation -> [steps, ranks],
    summed durations as executed. wait_s: [steps, ranks], time between being ready for a collective (dependencies and
    stream free on this rank) and its start. compute_busy_s: [steps, ranks], time with the compute stream busy.
    start_s, end_s: [tasks, steps, ranks], only when a timeline was asked for.
    """

    step_s: NDArray[np.float64]
    rank_end_s: NDArray[np.float64]
    busy_s: dict[str, NDArray[np.float64]]
    wait_s: NDArray[np.float64]
    compute_busy_s: NDArray[np.float64]
    start_s: NDArray[np.float64] | None = None
    end_s: NDArray[np.float64] | None = None

    def exposed_communication_s(self) -> NDArray[np.float64]:
        """Step time of a rank that no computation of its own covers, waits included: [steps, ranks]."""
        return np.asarray(self.step_s[:, None] - self.compute_busy_s)
