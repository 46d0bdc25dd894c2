"""The serving loop: arrivals and lockstep groups as SimPy processes, at step granularity."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.engine.batcher import (
    Limits,
    Plan,
    enqueue,
    finish_step,
    new_plan,
    new_ranks,
    new_requests,
    plan_step,
)
from moesim.engine.outages import FaultClock, drop_rank, empty_queue
from moesim.errors import BadInput, Infeasible

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
StepTime = Callable[[Plan], float]


@dataclass(frozen=True)
class Load:
    """The requests of a run: lengths [requests] in tokens; arrival_s [requests] for an open loop, or concurrency."""

    isl: Ints
    osl: Ints
    arrival_s: Floats | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if (self.arrival_s is None) == (self.concurrency is None):
            raise BadInput("a load has either arrival times or a concurrency", mend="give exactly one")


@dataclass(frozen=True)
class Served:
    """What happened: times in seconds by request [requests]; gaps_s: all inter-token latencies; step_*: by step.

    peak_kv_tokens: most tokens of context that one attention-DP rank had reserved.
    """

    arrival_s: Floats
    first_token_s: Floats
    finish_s: Floats
    isl: Ints
    osl: Ints
    gaps_s: Floats
    duration_s: float
    steps: int
    events: int
    step_start_s: Floats
    step_s: Floats
    step_decode_seqs: Ints
    step_prefill_tokens: Ints
    step_instance: Ints
    peak_kv_tokens: int


class _Log:
    """Grows by doubling; four values a step."""

    def __init__(self) -> None:
        self.rows = np.zeros((1024, 5))
        self.used = 0

    def add(self, *values: float) -> None:
        if self.used == len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
        self.rows[self.used] = values
        self.used += 1


class _Run:
    """State shared by the processes of one run."""

    def __init__(
        self,
        load: Load,
        limits: Limits,
        ranks: int,
        instances: int,
        step_time: StepTime,
        faults: FaultClock | None,
    ) -> None:
        self.load, self.limits, self.step_time, self.faults = load, limits, step_time, faults
        self.environment = simpy.Environment()
        self.requests = new_requests(load.isl, load.osl)
        self.groups = [new_ranks(ranks, limits.max_running) for _ in range(instances)]
        self.plans = [new_plan(ranks, limits.max_running) for _ in range(instances)]
        self.waking = [self.environment.event() for _ in range(instances)]
        self.gaps_s = np.zeros(int(load.osl.sum()))
        self.gaps = 0
        self.arrived = 0
        self.ended = 0
        self.events = 0
        self.peak_kv_tokens = 0
        self.log = _Log()

    def admit(self) -> None:
        """Send the next request to the next instance and rank in turn."""
        request = self.arrived
        self.arrived += 1
        instance = request % len(self.groups)
        rank = (request // len(self.groups)) % len(self.groups[instance].head)
        self.requests.arrival_s[request] = self.environment.now
        self.events += 1
        self.send(request, instance, rank)

    def send(self, request: int, instance: int, rank: int) -> None:
        """Put a request into a rank's queue, or into another's where faults have taken it, and wake its instance."""
        if self.faults is not None:
            instance, rank = self.faults.route(instance, rank, self.environment.now)
        enqueue(self.requests, self.groups[instance], rank, request)
        if not self.waking[instance].triggered:
            self.waking[instance].succeed()

    def arrivals(self, times_s: Floats) -> Generator[Any, Any, None]:
        for time_s in times_s:
            if time_s > self.environment.now:
                yield self.environment.timeout(float(time_s) - self.environment.now)
            self.admit()

    def engine(self, instance: int) -> Generator[Any, Any, None]:
        """One lockstep group: form a step, let its time pass, hand out the tokens, forever."""
        group, plan = self.groups[instance], self.plans[instance]
        ended = np.zeros(group.running.size + len(group.head) * self.limits.max_running, np.int64)
        total = len(self.load.isl)
        while self.ended < total:
            if self.faults is not None:
                self.suffer(instance, self.faults)
                back_s = self.faults.down_until(instance, self.environment.now)
                if back_s > self.environment.now:
                    yield self.environment.timeout(back_s - self.environment.now)
                    continue
            if plan_step(self.requests, group, self.limits, plan) == 0:
                self.waking[instance] = self.environment.event()
                yield self.waking[instance]
                yield self.environment.timeout(0.0)  # requests of the same instant join the step
                continue
            self.peak_kv_tokens = max(self.peak_kv_tokens, int(group.kv_tokens.max()))
            start_s = self.environment.now
            step_s = self.step_time(plan) if self.faults is None else self.faults.step_s(plan, instance, start_s)
            self.log.add(start_s, step_s, plan.decode_seqs.sum(), plan.prefill_tokens.sum(), instance)
            yield self.environment.timeout(step_s)
            self.events += 1
            self.gaps, done = finish_step(
                self.requests, group, plan, self.environment.now, self.gaps_s, self.gaps, ended
            )
            self.end(done)

    def end(self, done: int) -> None:
        """Count requests that ended, or were lost; a closed loop sends as many more."""
        self.ended += done
        if self.load.concurrency is not None:
            for _ in range(min(done, len(self.load.isl) - self.arrived)):
                self.admit()

    def suffer(self, instance: int, faults: FaultClock) -> None:
        """Lose what faults have taken since the last step."""
        for strike in faults.strike(instance, self.environment.now):
            for rank in strike.ranks:
                lost = drop_rank(self.requests, self.groups[instance], rank)
                if strike.queues_move:
                    for request in empty_queue(self.requests, self.groups[instance], rank):
                        self.send(request, instance, rank)
                self.end(len(lost))


def serve(
    load: Load,
    limits: Limits,
    *,
    ranks: int,
    instances: int,
    step_time: StepTime,
    faults: FaultClock | None = None,
) -> Served:
    """Run all requests through `instances` lockstep groups of `ranks` attention-DP ranks.

    step_time: seconds of a planned step. Requests go to instances and ranks in turn. Raises Infeasible when a request
    can never be admitted. faults: which take over the time of steps; a request that they lose has no `finish_s`.
    """
    context = int((load.isl + load.osl).max())
    if context > limits.kv_tokens:
        raise Infeasible(
            f"a request of {context} tokens does not fit the {limits.kv_tokens} tokens of KV cache of a rank",
            mend="use more GPUs, fewer redundant experts or a smaller KV type",
            reason="kv_cache_too_small",
        )
    if not limits.chunked and int(load.isl.max()) > limits.max_tokens:
        raise Infeasible(
            f"a prompt of {int(load.isl.max())} tokens exceeds max_batch_tokens_per_dp_rank {limits.max_tokens}",
            mend="turn chunked_prefill on or raise the limit",
            reason="prompt_too_long",
        )
    if limits.mixes and limits.max_running >= limits.max_tokens:
        raise Infeasible(
            "the running requests alone fill the batch, so that no prompt could be read",
            mend="raise max_batch_tokens_per_dp_rank above max_running_requests_per_dp_rank",
            reason="batch_limits",
        )
    run = _Run(load, limits, ranks, instances, step_time, faults)
    if load.arrival_s is not None:
        run.environment.process(run.arrivals(load.arrival_s))
    else:
        for _ in range(min(int(load.concurrency or 0), len(load.isl))):
            run.admit()
    for instance in range(instances):
        run.environment.process(run.engine(instance))
    run.environment.run()
    log = run.log.rows[: run.log.used]
    return Served(
        arrival_s=run.requests.arrival_s,
        first_token_s=run.requests.first_token_s,
        finish_s=run.requests.finish_s,
        isl=run.requests.isl,
        osl=run.requests.osl,
        gaps_s=run.gaps_s[: run.gaps],
        duration_s=_last(run.requests.finish_s, run.environment.now),
        steps=run.log.used,
        events=run.events,
        step_start_s=log[:, 0],
        step_s=log[:, 1],
        step_decode_seqs=log[:, 2].astype(np.int64),
        step_prefill_tokens=log[:, 3].astype(np.int64),
        step_instance=log[:, 4].astype(np.int64),
        peak_kv_tokens=run.peak_kv_tokens,
    )


def _last(finish_s: Floats, now_s: float) -> float:
    """The last end of a request; the end of the run where faults lost them all."""
    return float(np.nanmax(finish_s)) if np.isfinite(finish_s).any() else now_s
