"""The careful executor: a task graph as SimPy processes, one for each rank and stream, sharing links max-min fair.

A process takes the tasks of its stream in the graph's order; it waits for dependencies on other streams, meets the
other ranks of a collective's group, and then for the time that the task takes. Tasks that occupy a link (`Task.links`)
progress slower while others occupy the same link of the same rank; a collective is one activity over the links of all
its ranks. Without such contention the figures equal those of `maxplus`, with which this module shares no timing code.

There is no deadlock, because all ranks take their tasks from one list, in its order. Suppose that some tasks never end,
and take the first of them in the list. Its dependencies and the tasks before it on its stream stand earlier in the
list, so they end, on every rank; every rank of its group therefore reaches it, and it starts. Durations are finite and
rates above 0, so it ends, which contradicts the choice. (Ranks with lists of their own could disagree on the order of
two collectives and wait for each other for ever; the graph cannot express that.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.engine.fabric import Activity, Fabric
from moesim.engine.links import SharedLinks
from moesim.engine.linkuse import LinkUse, RankFlows, contended_flows, operation
from moesim.errors import BadInput
from moesim.graph.task import Link, StepTimes, Stream, TaskGraph

Floats = NDArray[np.float64]
NOT_YET = -1.0


def run(
    graph: TaskGraph,
    *,
    step: int | None = None,
    sharing: bool = True,
    timeline: bool = False,
    network: LinkUse | None = None,
) -> StepTimes:
    """Simulate the steps of `graph` one by one, or only `step` (the arrays then hold that one step: [1, ranks]).

    sharing: whether tasks slow each other down on links that they share; busy_s holds the times so stretched. network:
    the cluster's links, shared by the tasks of this step and by other jobs; without it, tasks share the links of their
    own rank alone. Raises BadInput for a step that the graph does not have, and for a duration that does not broadcast,
    or is negative or not finite.
    """
    if step is not None and not 0 <= step < graph.steps:
        raise BadInput(f"step {step} of a graph of {graph.steps} steps", mend="count steps from 0")
    chosen = range(graph.steps) if step is None else range(step, step + 1)
    plan = _plan(graph, sharing and network is None)
    durations = [_durations(graph, index) for index in chosen]
    shape = (len(graph.tasks), len(chosen), graph.ranks)
    start_s, end_s, busy_s, wait_s = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for index, alone_s in enumerate(durations):
        found = _Step(graph, plan, alone_s, network if sharing else None).run()
        start_s[:, index], end_s[:, index], busy_s[:, index], wait_s[:, index] = found
    rank_end_s = end_s.max(axis=0, initial=0.0)
    operations: dict[str, list[int]] = defaultdict(list)
    for index, task in enumerate(graph.tasks):
        operations[task.operation].append(index)
    compute = [index for index, task in enumerate(graph.tasks) if task.stream == Stream.COMPUTE]
    return StepTimes(
        step_s=rank_end_s.max(axis=1, initial=0.0),
        rank_end_s=rank_end_s,
        busy_s={name: busy_s[indices].sum(axis=0) for name, indices in operations.items()},
        wait_s=wait_s.sum(axis=0),
        compute_busy_s=busy_s[compute].sum(axis=0),
        start_s=start_s if timeline else None,
        end_s=end_s if timeline else None,
    )


@dataclass(frozen=True)
class _Plan:
    """What does not change from step to step, by task."""

    lanes: tuple[tuple[int, ...], ...]  # tasks of each stream, in order
    elsewhere: list[tuple[int, ...]]  # dependencies on other streams; those on its own are over when it is reached
    watched: list[bool]  # whether a task of another stream depends on it
    group: list[list[int] | None]  # group of each rank, counted from 0; None = local
    members: list[list[list[int]]]  # ranks of each group
    links: list[tuple[tuple[Link, float], ...]]  # links on which it can meet others


def _plan(graph: TaskGraph, sharing: bool) -> _Plan:
    tasks = graph.tasks
    lanes = tuple(tuple(i for i, task in enumerate(tasks) if task.stream == stream) for stream in Stream)
    elsewhere = [tuple(j for j in task.depends_on if tasks[j].stream != task.stream) for task in tasks]
    watched = [False] * len(tasks)
    for others in elsewhere:
        for other in others:
            watched[other] = True
    group: list[list[int] | None] = []
    members: list[list[list[int]]] = []
    for task in tasks:
        if task.groups is None:
            group.append(None)
            members.append([])
            continue
        number = {name: index for index, name in enumerate(dict.fromkeys(task.groups.tolist()))}
        of = [number[name] for name in task.groups.tolist()]
        group.append(of)
        members.append([[rank for rank in range(graph.ranks) if of[rank] == index] for index in range(len(number))])
    contended = _can_be_contended(graph) if sharing else frozenset()
    links = [tuple((link, share) for link, share in task.links if link in contended and share > 0) for task in tasks]
    return _Plan(lanes, elsewhere, watched, group, members, links)


def _can_be_contended(graph: TaskGraph) -> frozenset[Link]:
    """Links of which more than their rate can be asked; a stream runs one task at a time."""
    largest: dict[Link, dict[Stream, float]] = defaultdict(dict)
    for task in graph.tasks:
        for link, share in task.links:
            if not 0.0 <= share <= 1.0:
                raise BadInput(f"task {task.name} uses {share} of {link.name}", mend="give a share from 0 to 1")
            largest[link][task.stream] = max(share, largest[link].get(task.stream, 0.0))
    return frozenset(link for link, shares in largest.items() if sum(shares.values()) > 1.0)


def _durations(graph: TaskGraph, step: int) -> Floats:
    """Times alone of one step: [tasks, ranks]."""
    alone_s = np.zeros((len(graph.tasks), graph.ranks))
    for index, task in enumerate(graph.tasks):
        try:
            alone_s[index] = np.broadcast_to(task.duration_s, (graph.steps, graph.ranks))[step]
        except ValueError:
            raise BadInput(
                f"task {task.name} has durations of shape {np.shape(task.duration_s)}",
                mend=f"give a shape that broadcasts to [{graph.steps} steps, {graph.ranks} ranks]",
            ) from None
        if not (np.isfinite(alone_s[index]) & (alone_s[index] >= 0.0)).all():
            raise BadInput(
                f"task {task.name} has a duration that is negative or not finite",
                mend="give a finite time of at least 0",
            )
    return alone_s


class _Meeting:
    """Where the ranks of one group wait for each other before one collective."""

    def __init__(self, everyone: Any) -> None:
        self.arrived = 0
        self.everyone = everyone
        self.done: dict[int, Any] = {}


class _Step:
    """One step in an environment of its own; times by slot = task x ranks + rank."""

    def __init__(self, graph: TaskGraph, plan: _Plan, alone_s: Floats, network: LinkUse | None) -> None:
        self.plan = plan
        self.ranks = graph.ranks
        self.alone_s = alone_s
        self.alone: list[float] = alone_s.ravel().tolist()
        self.same: list[bool] = (alone_s == alone_s[:, :1]).all(axis=1).tolist()
        self.environment: Any = simpy.Environment()
        self.fabric = Fabric(self.environment, graph.ranks)
        self.flows: dict[int, list[RankFlows]] = {}
        if network is not None:
            self.flows = contended_flows(graph, alone_s, network)
            self.links = SharedLinks(self.environment, network.capacity, network.streams)
        slots = len(graph.tasks) * graph.ranks
        self.ready = [NOT_YET] * slots
        self.start = [NOT_YET] * slots
        self.end = [NOT_YET] * slots
        self.stretched: dict[int, float] = {}
        self.waiters: dict[int, Any] = {}
        self.meetings: dict[tuple[int, int], _Meeting] = {}

    def run(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Start, end, time executed and time waited: [tasks, ranks] each."""
        for lane in self.plan.lanes:
            for rank in range(self.ranks if lane else 0):
                self.environment.process(self._lane(rank, lane))
        self.environment.run()
        ready, start, end = (
            np.array(times).reshape(self.alone_s.shape) for times in (self.ready, self.start, self.end)
        )
        if (end < 0.0).any():
            raise AssertionError("a task never ran")  # the module's docstring says why this cannot be
        busy = self.alone_s.copy()
        for slot, seconds in self.stretched.items():
            busy.flat[slot] = seconds
        return start, end, busy, start - ready

    def _lane(self, rank: int, lane: tuple[int, ...]) -> Iterator[Any]:
        """The process of one stream of one rank."""
        environment, plan, ranks = self.environment, self.plan, self.ranks
        timeout = environment.timeout
        alone, ready, start, end = self.alone, self.ready, self.start, self.end
        for task in lane:
            slot = task * ranks + rank
            for other in plan.elsewhere[task]:
                if end[other * ranks + rank] < 0.0:
                    yield self._end_of(other * ranks + rank)
            ready[slot] = environment.now
            if plan.group[task] is not None:
                yield from self._collective(rank, task)
            elif plan.links[task] or task in self.flows:
                start[slot] = environment.now
                done = environment.event()
                self._occupy(task, {rank: done})
                yield done
            else:
                start[slot] = environment.now
                yield timeout(alone[slot])
            end[slot] = environment.now
            if plan.watched[task]:
                waiting = self.waiters.pop(slot, None)
                if waiting is not None:
                    waiting.succeed()

    def _end_of(self, slot: int) -> Any:
        """The event of a slot's end, made only when somebody waits for it."""
        if slot not in self.waiters:
            self.waiters[slot] = self.environment.event()
        return self.waiters[slot]

    def _collective(self, rank: int, task: int) -> Iterator[Any]:
        group: int = self.plan.group[task][rank]  # type: ignore[index]
        members = self.plan.members[task][group]
        meeting = self.meetings.get((task, group))
        if meeting is None:
            meeting = self.meetings[task, group] = _Meeting(self.environment.event())
        meeting.arrived += 1
        last = meeting.arrived == len(members)
        if last:
            del self.meetings[task, group]
            for member in members:
                self.start[task * self.ranks + member] = self.environment.now
        alone_s = self.alone[task * self.ranks + rank]
        if self.plan.links[task] or task in self.flows:
            meeting.done[rank] = self.environment.event()
            if last:
                self._occupy(task, meeting.done)
            yield meeting.done[rank]
        elif self.same[task]:  # all end together: one timeout for the group
            if last:
                yield self.environment.timeout(alone_s)
                meeting.everyone.succeed()
            else:
                yield meeting.everyone
        else:
            if last:
                meeting.everyone.succeed()
            else:
                yield meeting.everyone
            yield self.environment.timeout(alone_s)

    def _occupy(self, task: int, done: dict[int, Any]) -> None:
        """Start a task on its links; each rank's event comes when the task is over there."""
        alone_s = {rank: self.alone[task * self.ranks + rank] for rank in done}

        def finish(rank: int, slowed_s: float | None) -> None:
            if slowed_s is not None:
                self.stretched[task * self.ranks + rank] = slowed_s
            done[rank].succeed()

        if task not in self.flows:
            self.fabric.start(Activity(alone_s, self.plan.links[task], finish))
            return
        self.links.start(operation(self.flows[task], alone_s, finish))
