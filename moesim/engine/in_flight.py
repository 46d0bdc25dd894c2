"""Batches of one lockstep group that are under way at once, as with pipeline stages.

The group has as many slots as batches may be under way. A request that decodes belongs to one slot, so it is in one
batch at a time; the queue, the memory and the prefix cache are the group's. Prompts longer than a batch are read in
consecutive batches, each beginning before the one before it has ended, as vLLM (which counts tokens as computed when
they are scheduled), SGLang (whose chunked request is the scheduler's, not a micro-batch's) and TensorRT-LLM do.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from moesim.engine.batch_state import NONE, Ints, Limits, Plan, Ranks, Requests, new_plan
from moesim.engine.batch_times import BatchTimes, Staged
from moesim.engine.batcher import finish_step, plan_step
from moesim.engine.kernel import kernel

__all__ = ["Flow", "Lane", "Slot", "UnderWay", "come_back", "depart"]


@dataclass(frozen=True)
class Flow:
    """How a group runs batches side by side.

    stages: pipeline stages. batches: most under way at once. running: most requests of one batch on an attention-DP
    rank; None: as many as the rank may run in all.
    """

    stages: int
    batches: int
    running: int | None = None

    def of_batch(self, limits: Limits) -> Limits:
        """A rank's limits with that of a batch."""
        return limits if self.running is None else limits._replace(of_batch=self.running)


class Slot:
    """One batch of a group: its requests that decode, and the step that it was last planned for.

    joining [ranks]: prompts whose last chunk is under way. last [ranks, max_running]: which chunks are. end_s: when its
    batch ends; last_s: how long it takes; host_s: the engine's time before it leaves.
    """

    def __init__(self, group: Ranks, limits: Limits) -> None:
        ranks, zero = len(group.head), np.zeros(len(group.head), np.int64)
        self.group = group._replace(
            running=np.full((ranks, limits.max_running), NONE, np.int64),
            running_seqs=zero.copy(),
            context=np.full(ranks, NONE, np.int64),
            full=np.zeros(ranks, np.bool_),
            unpolled=zero.copy(),
            elsewhere=zero.copy(),
        )
        self.limits = limits
        self.plan = new_plan(ranks, limits.max_running)
        self.joining = zero.copy()
        self.last = np.zeros((ranks, limits.max_running), np.bool_)
        self.end_s = self.last_s = self.host_s = 0.0

    def form(self, requests: Requests, others: list[Slot]) -> int:
        """Plan the slot's next batch, 0 tokens where there is nothing; its prompts count as read from now on."""
        self.group.elsewhere[:] = np.sum([one.group.running_seqs + one.joining for one in others], axis=0)
        tokens = int(plan_step(requests, self.group, self.limits, self.plan))
        if tokens:
            depart(requests, self.plan, self.last, self.joining)
        return tokens

    def finish(
        self, requests: Requests, now_s: float, gap_s: np.ndarray, gap_n: np.ndarray, gaps: int, ended: Ints
    ) -> tuple[int, int]:
        """Hand out the tokens of the batch, see `finish_step`."""
        reads = self.plan.prefill_seqs > 0
        come_back(requests, self.plan, self.last, self.joining)
        found: tuple[int, int] = finish_step(
            requests, self.group, self.limits, self.plan, now_s, gap_s, gap_n, gaps, ended
        )
        self.group.unpolled[reads] = self.limits.poll_steps
        return found


class Lane:
    """When the stages and the links between them are free."""

    def __init__(self, stages: int) -> None:
        self.stage_s = np.zeros(stages)
        self.link_s = np.zeros(max(stages - 1, 0))
        self.busy_s = np.zeros(stages)

    def send(self, ready_s: float, times: BatchTimes) -> float:
        """Let a batch follow those before it through all stages; its end.

        ready_s: when the engine has it ready for the first stage. A stage goes on with the next batch while it sends.
        """
        at_s = ready_s
        for stage, seconds in enumerate(times.stages_s):
            self.stage_s[stage] = at_s = max(at_s, float(self.stage_s[stage])) + seconds
            self.busy_s[stage] += seconds
            if stage < len(times.transfers_s):
                self.link_s[stage] = at_s = max(at_s, float(self.link_s[stage])) + times.transfers_s[stage]
        return at_s


class UnderWay:
    """The batches of one group: those that are under way, oldest first, and the slots that are free."""

    def __init__(self, group: Ranks, limits: Limits, flow: Flow) -> None:
        self.slots = [Slot(group, flow.of_batch(limits)) for _ in range(flow.batches)]
        self.free, self.order, self.lane = deque(self.slots), deque[Slot](), Lane(flow.stages)

    def form(self, requests: Requests, timed: Staged, now_s: float) -> Slot | None:
        """Form a batch in the first free slot that has anything to do; None where none has."""
        for slot in list(self.free):
            if slot.form(requests, [other for other in self.slots if other is not slot]) == 0:
                continue
            times = timed.stages(slot.plan)
            slot.host_s = times.host_s
            slot.end_s = self.lane.send(now_s + times.host_s, times)
            slot.last_s = slot.end_s - now_s
            self.free.remove(slot)
            self.order.append(slot)
            return slot
        return None

    def oldest(self) -> Slot | None:
        """The batch that ends next; its slot is the first to be tried then."""
        if not self.order:
            return None
        self.free.appendleft(self.order.popleft())
        return self.free[0]


@kernel
def depart(requests: Requests, plan: Plan, last: np.ndarray, joining: Ints) -> None:
    """Count the batch's prompts as read, so that the next batch goes on after them."""
    for rank in range(len(joining)):
        joining[rank] = 0
        for place in range(plan.prefill_seqs[rank]):
            request = plan.picked[rank, place]
            requests.read[request] += plan.chunk[rank, place]
            last[rank, place] = requests.read[request] >= requests.target[request]
            joining[rank] += last[rank, place]


@kernel
def come_back(requests: Requests, plan: Plan, last: np.ndarray, joining: Ints) -> None:
    """Keep of the batch's prompts those that are read to their end, for `finish_step` to count."""
    for rank in range(len(joining)):
        kept = 0
        for place in range(plan.prefill_seqs[rank]):
            if not last[rank, place]:
                continue
            request = plan.picked[rank, place]
            requests.read[request] -= plan.chunk[rank, place]
            plan.picked[rank, kept] = request
            plan.chunk[rank, kept] = plan.chunk[rank, place]
            kept += 1
        plan.prefill_seqs[rank] = kept
        joining[rank] = 0
