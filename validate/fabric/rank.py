"""One rank of a lab: joins the others over its node's NIC, checks what every exchange delivers, then times it.

Ranks start an exchange at one moment of the host's clock, agreed on in shared memory and not over the network.

An exchange is gloo's sends and receives, all receives posted before the start. gloo's own all-to-all posts a send
before the receive, and tells the other end that it may send by a note on the same connection: where the data goes
first, the note waits behind it and the two directions take turns. That is no property of a network: libraries whose
buffers are known to the other end beforehand (NVSHMEM, and so DeepEP) do not do it. Between two nodes it made some runs
1.7 times as long as others.
"""

from __future__ import annotations

import os
import resource
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validate.fabric.plan import RankPlan, Stage, plans_of, tokens_of
from validate.fabric.spec import LabSpec, Pattern

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# Ranks that wait are woken this long before an exchange starts.
LEAD_S = 3e-3
# Runs of every case before the timed ones, so that windows are open and memory is there.
WARM_UPS = 1
# The file over which ranks find each other.
MEETING = "meet"
TIMEOUT_S = 3600.0  # of torch's own; the watch is quicker


@dataclass(frozen=True)
class Case:
    """One exchange, or two at the same time; scheme: flat or two_level."""

    patterns: tuple[Pattern, ...]
    scheme: str
    bytes_per_rank: int

    @property
    def name(self) -> str:
        """In words."""
        return f"{' beside '.join(self.patterns)}, {self.scheme}"


class Shared:
    """What the ranks and their parent share: a meeting point, the start, results, progress."""

    def __init__(self, context: Any, lab: LabSpec, cases: Sequence[Case]) -> None:
        self.cases = cases
        self._lead_s = LEAD_S + lab.delay_s  # every note that a receive is posted has come by then
        self.shape = (len(cases), 2, lab.repeats, lab.ranks)
        self.start = context.RawValue("d", 0.0)
        self.timed = context.RawValue("i", 0)
        self.steps = context.RawArray("l", lab.ranks)
        self._results = context.RawArray("d", int(np.prod(self.shape)))
        self._stages = context.RawArray("d", int(np.prod(self.shape)))
        self._busy = context.RawArray("d", 2 * lab.ranks)
        self.barrier = context.Barrier(lab.ranks, action=self._set_start)

    def _set_start(self) -> None:
        self.start.value = time.perf_counter() + self._lead_s

    def together(self) -> float:
        """Wait for all ranks, then for the common start; returns that moment."""
        self.barrier.wait()
        start = float(self.start.value)
        time.sleep(max(start - time.perf_counter(), 0.0))
        return start

    def store(self, which: tuple[int, int, int, int], seconds: float, first_stage: float) -> None:
        """Seconds of a case, part, repeat and rank."""
        place = int(np.ravel_multi_index(which, self.shape))
        self._results[place], self._stages[place] = seconds, first_stage

    def note_busy(self, rank: int, processor_s: float, passed_s: float) -> None:
        """How much of a processor a rank used while it was timed."""
        self._busy[2 * rank], self._busy[2 * rank + 1] = processor_s, passed_s

    def read(self) -> tuple[Floats, Floats]:
        """Seconds [cases, parts, repeats], the last rank's, of the whole and of its first stage."""
        return tuple(
            np.frombuffer(array, dtype=np.float64).reshape(self.shape).max(axis=-1)
            for array in (self._results, self._stages)
        )  # type: ignore[return-value]

    def by_rank(self) -> Floats:
        """Median seconds of each rank [cases, parts, ranks]."""
        return np.asarray(np.median(np.frombuffer(self._results, dtype=np.float64).reshape(self.shape), axis=2))

    def busy(self) -> float:
        """Processors that all ranks used together while they were timed."""
        used = np.frombuffer(self._busy, dtype=np.float64).reshape(-1, 2)
        return float(used[:, 0].sum() / max(used[:, 1].max(), 1e-9))

    def label(self, step: int) -> str:
        """What a rank does at its nth step."""
        if step == 0:
            return "meeting the others"
        if step <= len(self.cases):
            return f"checking {self.cases[step - 1].name}"
        return "measuring" if self.timed.value else "checking"


Plans = list[list[list[RankPlan]]]  # by case, pattern and rank


def make_plans(lab: LabSpec, cases: Sequence[Case]) -> Plans:
    """What every rank sends in every case. Raises BadInput, Infeasible."""
    found = []
    for case in cases:
        sized = lab.model_copy(update={"bytes_per_rank": case.bytes_per_rank})
        found.append([plans_of(tokens_of(sized, name), case.scheme, lab.nodes) for name in case.patterns])
    return found


def be_rank(
    lab: LabSpec, cases: Sequence[Case], plans: Plans, rank: int, shared: Shared, home: Path,
    enter: Callable[[str], None],
) -> None:  # fmt: skip
    """The whole run of one rank, in its own process; ends it with an exit code."""
    try:
        _session(lab, cases, plans, rank, shared, home, enter)
    except BaseException as error:
        (home / f"{rank}.error").write_text(_line(error), encoding="utf-8")
        if not isinstance(error, _WrongRows):
            traceback.print_exc()
        os._exit(1)
    os._exit(0)


class _WrongRows(Exception):
    """An exchange delivered other rows than its plan says."""


def _line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def _session(
    lab: LabSpec, cases: Sequence[Case], plans: Plans, rank: int, shared: Shared, home: Path,
    enter: Callable[[str], None],
) -> None:  # fmt: skip
    import torch
    from torch import distributed

    from validate.fabric.net import node_space, uid_of

    node, place = divmod(rank, lab.ranks_per_node)
    enter(node_space(node))
    os.seteuid(uid_of(lab.nic(rank)))  # by which the kernel routes what this rank sends over its own NIC
    os.environ["GLOO_SOCKET_IFNAME"] = f"nic{lab.nic(rank)}"
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(home / MEETING), lab.ranks), rank=rank, world_size=lab.ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    groups = _groups(distributed, lab, node, place, two=any(len(case.patterns) > 1 for case in cases))
    works = [
        _work(torch, distributed, lab, case.scheme, [by_rank[rank] for by_rank in planned], rank, groups)
        for case, planned in zip(cases, plans, strict=True)
    ]
    for index, (case, work) in enumerate(zip(cases, works, strict=True)):
        shared.steps[rank] = index + 1
        work.ready()
        shared.together()
        work.run()
        work.check(case.name)
    order = np.random.default_rng([lab.seed, 4])
    used, begun = _processor_s(), time.perf_counter()
    for repeat in range(-WARM_UPS, lab.repeats):
        for index in order.permutation(len(works)).tolist():
            shared.steps[rank] += 1
            works[index].ready()
            start = shared.together()
            if repeat >= 0:
                shared.timed.value = 1
            ends, stage = works[index].run()
            for part, end in enumerate(ends if repeat >= 0 else ()):
                shared.store((index, part, repeat, rank), end - start, stage - start)
    shared.note_busy(rank, _processor_s() - used, time.perf_counter() - begun)
    shared.barrier.wait()
    distributed.destroy_process_group()


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _groups(distributed: Any, lab: LabSpec, node: int, place: int, *, two: bool) -> dict[str, Any]:
    """Process groups of this rank: `rail`, the ranks of its place; `node`; `other`, all ranks once more."""
    each = lab.ranks_per_node
    found: dict[str, Any] = {"all": None}
    for number in range(each):
        made = distributed.new_group([other * each + number for other in range(lab.nodes)])
        found |= {"rail": made} if number == place else {}
    for number in range(lab.nodes):
        made = distributed.new_group(list(range(number * each, (number + 1) * each)))
        found |= {"node": made} if number == node else {}
    return found | ({"other": distributed.new_group(list(range(lab.ranks)))} if two else {})


def _work(
    torch: Any, distributed: Any, lab: LabSpec, scheme: str, plans: Sequence[RankPlan], rank: int,
    groups: dict[str, Any],
) -> Any:  # fmt: skip
    """What `run` and `check` one case on this rank."""
    if len(plans) > 1:
        names = ("all", "other")
        return _Beside(
            [_Flat(torch, distributed, lab, plan, rank, groups[name]) for plan, name in zip(plans, names, strict=True)]
        )
    if scheme == "flat":
        return _Flat(torch, distributed, lab, plans[0], rank, groups["all"])
    return _TwoLevel(torch, distributed, lab, plans[0], rank, groups)


def _rows(torch: Any, names: Ints, lab: LabSpec) -> Any:
    """Rows of a token each: its source and number, then a pattern that names them too: int32 [rows, words]."""
    words = lab.row_bytes // 4
    filled = (names[:, 0] * 65_537 + names[:, 1])[:, None] + np.arange(words)
    filled[:, :2] = names
    return torch.as_tensor(filled.astype(np.int32))


def _check(got: Any, expected: Ints, torch: Any, lab: LabSpec, what: str) -> None:
    """Raises unless the rows are those of the plan, byte for byte."""
    if not torch.equal(got, _rows(torch, expected, lab)):
        raise _WrongRows(f"{what} delivered other rows than its plan says")


class _Messages:
    """One stage of this rank: rows to and from the members of a group, in their order; its own are copied."""

    def __init__(self, distributed: Any, stage: Stage, members: Sequence[int], rank: int, group: Any) -> None:
        self.distributed, self.group, self.rank, self.members = distributed, group, rank, list(members)
        self.to, self.come = _edges(stage.send), _edges(stage.receive)
        own = self.members.index(rank)
        # The next rank first, then the one after it: not everyone sends to rank 0 at once.
        self.turns = [(own + turn) % len(self.members) for turn in range(1, len(self.members))]
        self.own = own
        self.pending: list[Any] = []

    def post(self, got: Any) -> None:
        """Post every receive."""
        for place in self.turns:
            first, last = self.come[place]
            if last > first:
                self.pending.append(self.distributed.irecv(got[first:last], src=self.members[place], group=self.group))

    def send(self, out: Any, got: Any) -> None:
        """Send every message, and copy what stays."""
        for place in self.turns:
            first, last = self.to[place]
            if last > first:
                self.pending.append(self.distributed.isend(out[first:last], dst=self.members[place], group=self.group))
        (first, last), (start, end) = self.to[self.own], self.come[self.own]
        got[start:end].copy_(out[first:last])

    def wait(self) -> None:
        """Until everything is sent and has come."""
        for work in self.pending:
            work.wait()
        self.pending.clear()


def _edges(lengths: Ints) -> list[tuple[int, int]]:
    ends = np.cumsum(lengths)
    return list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))


class _Flat:
    """One all-to-all over all ranks."""

    def __init__(self, torch: Any, distributed: Any, lab: LabSpec, plan: RankPlan, rank: int, group: Any) -> None:
        self.torch, self.lab, self.plan = torch, lab, plan
        stage = plan.stages[0]
        held = _rows(torch, plan.rows, lab)
        self.out = held[torch.as_tensor(stage.take)].contiguous()
        self.got = torch.zeros(int(stage.receive.sum()), held.shape[1], dtype=torch.int32)
        self.messages = _Messages(distributed, stage, range(lab.ranks), rank, group)

    def ready(self) -> None:
        """Post the receives."""
        self.messages.post(self.got)

    def begin(self) -> None:
        """Post the sends."""
        self.messages.send(self.out, self.got)

    def run(self) -> tuple[list[float], float]:
        """Run it; returns the moment at which it is over."""
        self.begin()
        self.messages.wait()
        now = time.perf_counter()
        return [now], now

    def check(self, what: str) -> None:
        """Raises unless every row has come."""
        _check(self.got, self.plan.expected, self.torch, self.lab, what)


class _Beside:
    """Two flat all-to-alls at the same time, each over a process group, and so connections, of its own."""

    def __init__(self, pair: Sequence[_Flat]) -> None:
        self.pair = pair

    def ready(self) -> None:
        """Post the receives of both."""
        for one in self.pair:
            one.ready()

    def run(self) -> tuple[list[float], float]:
        """Run both; returns the moments at which each is over."""
        ends = [0.0] * len(self.pair)

        def wait(index: int) -> None:
            self.pair[index].messages.wait()
            ends[index] = time.perf_counter()

        for one in self.pair:
            one.begin()
        threads = [threading.Thread(target=wait, args=(index,)) for index in range(len(self.pair))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return ends, min(ends)

    def check(self, what: str) -> None:
        """Raises unless every row of both has come."""
        for one in self.pair:
            one.check(what)


class _TwoLevel:
    """Along the rails, then inside the node: what came is passed on by the rank that got it."""

    def __init__(
        self, torch: Any, distributed: Any, lab: LabSpec, plan: RankPlan, rank: int, groups: dict[str, Any]
    ) -> None:
        self.torch, self.lab, self.plan = torch, lab, plan
        first, second = plan.stages
        own, came = len(plan.rows), int(first.receive.sum())
        held = _rows(torch, plan.rows, lab)
        self.holding = torch.zeros(own + came, held.shape[1], dtype=torch.int32)
        self.holding[:own] = held
        self.came = self.holding[own:]
        self.out = held[torch.as_tensor(first.take)].contiguous()
        self.take = torch.as_tensor(second.take)
        self.pass_on = torch.zeros(len(second.take), held.shape[1], dtype=torch.int32)
        self.got = torch.zeros(int(second.receive.sum()), held.shape[1], dtype=torch.int32)
        node, place = divmod(rank, lab.ranks_per_node)
        rail = range(place, lab.ranks, lab.ranks_per_node)
        inside = range(node * lab.ranks_per_node, (node + 1) * lab.ranks_per_node)
        self.along = _Messages(distributed, first, rail, rank, groups["rail"])
        self.inside = _Messages(distributed, second, inside, rank, groups["node"])

    def ready(self) -> None:
        """Post the receives of both stages."""
        self.along.post(self.came)
        self.inside.post(self.got)

    def run(self) -> tuple[list[float], float]:
        """Run both stages; returns the moments at which the whole and the first stage are over."""
        self.along.send(self.out, self.came)
        self.along.wait()
        stage = time.perf_counter()
        self.torch.index_select(self.holding, 0, self.take, out=self.pass_on)
        self.inside.send(self.pass_on, self.got)
        self.inside.wait()
        return [time.perf_counter()], stage

    def check(self, what: str) -> None:
        """Raises unless every row has come."""
        _check(self.got, self.plan.expected, self.torch, self.lab, what)
