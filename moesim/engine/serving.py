"""The serving loop: arrivals and lockstep groups as SimPy processes, at step granularity."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.engine.balance import CENTRAL_QUEUE, RouterView, balancer
from moesim.engine.batch_state import Limits, Plan, Ranks, Requests, new_plan, new_ranks, new_requests
from moesim.engine.batch_times import Staged
from moesim.engine.batcher import arrive, finish_step, plan_step
from moesim.engine.in_flight import Flow, UnderWay
from moesim.engine.losses import Faults, drop_rank, empty_queue
from moesim.engine.memory_rules import CONTEXT
from moesim.engine.prefix_cache import new_prefix_cache
from moesim.errors import BadInput, Infeasible

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
StepTime = Callable[[Plan], float]


@dataclass(frozen=True)
class PromptBlocks:
    """Hashes of the prompt blocks of requests: request i has hashes[offsets[i]:offsets[i + 1]], `tokens` each."""

    tokens: int
    offsets: Ints
    hashes: Ints


@dataclass(frozen=True)
class Load:
    """The requests of a run: lengths [requests] in tokens; arrival_s [requests] for an open loop, or concurrency.

    blocks: what prompts share, where it is known. front_end_s: of each request, from its arrival to the engine's queue.
    """

    isl: Ints
    osl: Ints
    arrival_s: Floats | None = None
    concurrency: int | None = None
    blocks: PromptBlocks | None = None
    front_end_s: float = 0.0

    def __post_init__(self) -> None:
        if (self.arrival_s is None) == (self.concurrency is None):
            raise BadInput("a load has either arrival times or a concurrency", mend="give exactly one")


@dataclass(frozen=True)
class Served:
    """What happened: times in seconds by request [requests]; step_*: by step.

    gap_s, gap_n: inter-token latencies and how many of each. peak_kv_tokens: most tokens of context that one
    attention-DP rank held for its requests. preemptions and recomputed_tokens: over all ranks. prefix_asked_tokens,
    prefix_found_tokens: prompt tokens admitted, and those of them that a prefix cache held. stage_busy_s [instances,
    stages]: of pipeline stages, whose steps overlap: step_s is then a batch's whole way.
    """

    arrival_s: Floats
    first_token_s: Floats
    finish_s: Floats
    isl: Ints
    osl: Ints
    gap_s: Floats
    gap_n: Ints
    duration_s: float
    steps: int
    events: int
    step_start_s: Floats
    step_s: Floats
    step_decode_seqs: Ints
    step_prefill_tokens: Ints
    step_instance: Ints
    peak_kv_tokens: int
    preemptions: int = 0
    recomputed_tokens: int = 0
    prefix_asked_tokens: int = 0
    prefix_found_tokens: int = 0
    prefill: PrefillSide | None = None
    stage_busy_s: Floats | None = None

    @property
    def gaps_s(self) -> Floats:
        """All inter-token latencies, equal ones side by side; as long as there are generated tokens but the first."""
        return np.repeat(self.gap_s, self.gap_n)


@dataclass(frozen=True)
class PrefillSide:
    """What the prefill pool did where there are roles; `Served` then tells of the decode pool's steps.

    served: of the pool, its requests ending with their first token. transfer_s [requests]: from the first token to the
    whole KV cache being at the decode rank. transfer_bytes: of all requests, by all GPUs. sender, receiver [requests]:
    positions (see balance.py) in the two pools, of use where a cache moved. joined_s [requests]: start of the first
    decode step, NaN where there is none; told by compiled runs only.
    """

    served: Served
    transfer_s: Floats
    transfer_bytes: float
    sender: Ints
    receiver: Ints
    joined_s: Floats | None = None


class StepLog:
    """Grows by doubling; five values a step: start, seconds, decoding sequences, prompt tokens, instance."""

    def __init__(self) -> None:
        self.rows = np.zeros((1024, 5))
        self.used = 0

    def add(self, *values: float) -> None:
        """Append a step."""
        if self.used == len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
        self.rows[self.used] = values
        self.used += 1


@dataclass
class Pool:
    """Lockstep groups of one kind, side by side, and the requests that were sent to them.

    limits: of one attention-DP rank. step_time: seconds of a planned step. balance: see balance.py. on_end: told the
    ids of requests whose last token has come, or that faults have lost. faults: which take over the time of steps; for
    requests sent in turn, memory kept for a whole request and no prefix cache. flow: of instances with several batches
    under way at once, whose `step_time` then tells the time of each stage (`Staged`); no faults with it.
    """

    environment: simpy.Environment
    requests: Requests
    limits: Limits
    ranks: int
    instances: int
    step_time: StepTime
    balance: str = "round_robin"
    blocks: PromptBlocks | None = None
    on_end: Callable[[Ints], None] = lambda ended: None
    faults: Faults | None = None
    flow: Flow | None = None
    gap_s: Floats = field(default_factory=lambda: np.zeros(1024))
    gap_n: Ints = field(default_factory=lambda: np.zeros(1024, np.int64))
    gaps: int = 1
    events: int = 0
    peak_kv_tokens: int = 0

    def __post_init__(self) -> None:
        blocks, count = self.blocks, len(self.requests.isl)
        none = np.zeros(0, np.int64)
        cache = (0, none, none) if blocks is None else (blocks.tokens, blocks.offsets, blocks.hashes)
        self.groups = [
            new_ranks(
                self.ranks,
                self.limits.max_running,
                rule=self.limits.rule,
                cache=new_prefix_cache(count, self.ranks, *cache),
            )
            for _ in range(self.instances)
        ]
        self.waking = [self.environment.event() for _ in range(self.instances)]
        self.choose = balancer(self.balance)
        self.chosen = 0
        self.position = np.zeros(count, np.int64)  # where each request was sent
        self.held: deque[int] = deque()  # at the router, where it keeps a queue of its own
        self.log = StepLog()
        self.last_step_s = [0.0] * self.instances
        flow = self.flow
        self.under_way = [] if flow is None else [UnderWay(group, self.limits, flow) for group in self.groups]
        for instance in range(self.instances):
            run = self._engine(instance) if flow is None else self._pipelined(instance, self.under_way[instance])
            self.environment.process(run)

    def send(self, request: int) -> None:
        """Send a request to a rank, or hold it until one has room where the router keeps the queue."""
        position = self.pick()
        if self.balance == CENTRAL_QUEUE:
            instance, rank = position % self.instances, position // self.instances
            if self.held or self.groups[instance].requests_in[rank] >= self.limits.max_running:
                self.held.append(request)
                return
        self.chosen += 1
        self.put(request, position)

    def pick(self) -> int:
        """The position that the balancing chooses now: rank x instances + instance."""
        if self.balance == "round_robin":
            return self.chosen % (self.instances * self.ranks)
        view = RouterView(
            np.stack([group.requests_in for group in self.groups], axis=1).ravel(),
            np.stack([group.tokens_in for group in self.groups], axis=1).ravel(),
            self.chosen,
        )
        return self.choose(view)

    def put(self, request: int, position: int) -> None:
        """Let a request wait at a rank, or at another where faults have taken it, and wake the instance."""
        instance, rank = position % self.instances, position // self.instances
        if self.faults is not None:
            instance, rank = self.faults.route(instance, rank, self.environment.now)
        self.position[request] = rank * self.instances + instance
        arrive(self.requests, self.groups[instance], rank, request)
        if not self.waking[instance].triggered:
            self.waking[instance].succeed()

    def _pull(self, instance: int) -> None:
        """Take held requests in while a rank of the instance has room."""
        inside = self.groups[instance].requests_in
        while self.held and inside.min() < self.limits.max_running:
            self.chosen += 1
            self.put(self.held.popleft(), int(inside.argmin()) * self.instances + instance)

    def _engine(self, instance: int) -> Generator[Any, Any, None]:
        """One lockstep group: form a step, let its time pass, hand out the tokens, until nothing is left to wake it."""
        group, environment = self.groups[instance], self.environment
        plan = new_plan(self.ranks, self.limits.max_running)
        most = group.running.size + self.ranks * self.limits.max_running
        ended = np.zeros(most, np.int64)
        while True:
            if self.held:
                self._pull(instance)
            if self.faults is not None:
                self._suffer(instance, self.faults)
                back_s = self.faults.down_until(instance, environment.now)
                if back_s > environment.now:
                    yield environment.timeout(back_s - environment.now)
                    continue
            if plan_step(self.requests, group, self.limits, plan) == 0:
                yield from self._idle(instance)
                continue
            decodes, prompts, fullest = plan.totals.tolist()
            self.peak_kv_tokens = max(self.peak_kv_tokens, fullest)
            step_s = self._step_s(plan, instance)
            self.last_step_s[instance] = step_s
            self.log.add(environment.now, step_s, decodes, prompts, instance)
            yield environment.timeout(step_s)
            self.events += 1
            self._make_room(most)
            self.gaps, done = finish_step(
                self.requests, group, self.limits, plan, environment.now, self.gap_s, self.gap_n, self.gaps, ended
            )
            if done:
                self.on_end(ended[:done])

    def _pipelined(self, instance: int, batches: UnderWay) -> Generator[Any, Any, None]:
        """One group with several batches under way: it forms the next ones where it may, then waits for the oldest.

        While it waits it looks at no new requests (vLLM's `step_with_batch_queue` and SGLang's `event_loop_pp` both
        block on the oldest batch once there is nothing more to form).
        """
        environment, timed = self.environment, cast(Staged, self.step_time)
        most = 2 * self.ranks * self.limits.max_running
        ended = np.zeros(most, np.int64)
        while True:
            if self.held:
                self._pull(instance)
            slot = batches.form(self.requests, timed, environment.now)
            if slot is not None:
                decodes, prompts, fullest = slot.plan.totals.tolist()
                self.peak_kv_tokens = max(self.peak_kv_tokens, fullest)
                self.log.add(environment.now, slot.last_s, decodes, prompts, instance)
                if slot.host_s > 0.0:
                    yield environment.timeout(slot.host_s)
                continue
            slot = batches.oldest()
            if slot is None:
                yield from self._idle(instance)
                continue
            if slot.end_s > environment.now:
                yield environment.timeout(slot.end_s - environment.now)
            self.events += 1
            self._make_room(most)
            self.gaps, done = slot.finish(self.requests, environment.now, self.gap_s, self.gap_n, self.gaps, ended)
            self.last_step_s[instance] = slot.last_s
            if done:
                self.on_end(ended[:done])

    def _idle(self, instance: int) -> Generator[Any, Any, None]:
        self.waking[instance] = self.environment.event()
        yield self.waking[instance]
        yield self.environment.timeout(0.0)  # requests of the same instant join the step

    def _make_room(self, most: int) -> None:
        """Room for `most` more inter-token latencies."""
        if self.gaps + most > len(self.gap_s):
            self.gap_s = np.concatenate([self.gap_s, np.zeros(len(self.gap_s) + most)])
            self.gap_n = np.concatenate([self.gap_n, np.zeros(len(self.gap_n) + most, np.int64)])

    def _step_s(self, plan: Plan, instance: int) -> float:
        if self.faults is None:
            return self.step_time(plan)
        return self.faults.step_s(plan, instance, self.environment.now)

    def _suffer(self, instance: int, faults: Faults) -> None:
        """Lose what faults have taken since the last step; what only waited moves on where its rank is gone."""
        group = self.groups[instance]
        for strike in faults.strike(instance, self.environment.now):
            for rank in strike.ranks:
                lost = drop_rank(self.requests, group, rank)
                if strike.queues_move:
                    for request in empty_queue(self.requests, group, rank):
                        self.put(request, rank * self.instances + instance)
                if lost:
                    self.on_end(np.asarray(lost, dtype=np.int64))


def check_limits(load: Load, limits: Limits) -> None:
    """Whether every request can be served at all. Raises Infeasible with its counted reason."""
    context = int((load.isl + load.osl).max()) + limits.draft_tokens
    page = limits.rule.page_tokens
    if -(-context // page) * page > limits.kv_tokens:
        raise Infeasible(
            f"a request of {context} tokens does not fit the {limits.kv_tokens} tokens of KV cache of a rank",
            mend="use more GPUs, fewer redundant experts or a smaller KV type",
            reason="kv_cache_too_small",
        )
    # A preempted request reads its output so far as well.
    longest = int(load.isl.max()) if limits.rule.code == CONTEXT else context
    if not limits.chunked and longest > limits.max_tokens:
        raise Infeasible(
            f"a prompt of {longest} tokens exceeds max_batch_tokens_per_dp_rank {limits.max_tokens}",
            mend="turn chunked_prefill on or raise the limit",
            reason="prompt_too_long",
        )
    if limits.mixes and limits.max_running * (1 + limits.draft_tokens) >= limits.max_tokens:
        raise Infeasible(
            "the running requests alone fill the batch, so that no prompt could be read",
            mend="raise max_batch_tokens_per_dp_rank above max_running_requests_per_dp_rank",
            reason="batch_limits",
        )


class Source:
    """Sends the requests of a load to a pool: at their times, or one for each that ends."""

    def __init__(self, load: Load, pool: Pool) -> None:
        self.load, self.pool, self.arrived = load, pool, 0

    def start(self) -> None:
        """Begin: the arrival process, or the first requests of a closed loop."""
        if self.load.arrival_s is not None:
            self.pool.environment.process(self._arrivals(self.load.arrival_s))
        else:
            self.follow(int(self.load.concurrency or 0))

    def follow(self, count: int) -> None:
        """Send `count` more requests of a closed loop, as far as there are any."""
        for _ in range(min(count, len(self.load.isl) - self.arrived)):
            self._arrive()

    def _arrive(self) -> None:
        request = self.arrived
        self.pool.requests.arrival_s[request] = self.pool.environment.now
        self.arrived += 1
        if self.load.front_end_s > 0:
            self.pool.environment.process(self._queue(request))
        else:
            self.pool.send(request)

    def _queue(self, request: int) -> Generator[Any, Any, None]:
        yield self.pool.environment.timeout(self.load.front_end_s)
        self.pool.send(request)

    def _arrivals(self, times_s: Floats) -> Generator[Any, Any, None]:
        environment = self.pool.environment
        for time_s in times_s:
            if time_s > environment.now:
                yield environment.timeout(float(time_s) - environment.now)
            self._arrive()


def serve(
    load: Load, limits: Limits, *, ranks: int, instances: int, step_time: StepTime, balance: str = "round_robin",
    compiled: bool = True, faults: Faults | None = None, flow: Flow | None = None,
) -> Served:  # fmt: skip
    """Run all requests through `instances` lockstep groups of `ranks` attention-DP ranks.

    step_time: seconds of a planned step. balance: which rank a request goes to, see balance.py. compiled: a load sent
    in turn (open, or closed over one instance), or to the shortest queue (closed, one instance), whose steps are timed
    by table runs in `compiled`, with the same times; with a flow and sent in turn, in `compiled_flow` (a closed loop
    only without a front end). faults, flow: see Pool; a request that faults lose has no `finish_s`. Raises Infeasible
    when a request can never be admitted.
    """
    check_limits(load, limits)
    requests = new_requests(load.isl, load.osl)
    in_turn = balance == "round_robin" and (load.arrival_s is not None or instances == 1)
    shortest = balance == "shortest_queue" and load.arrival_s is None and instances == 1
    known = load.blocks is None and faults is None
    if compiled and known and flow is not None and in_turn and getattr(step_time, "flow_compilable", False):
        if load.front_end_s == 0 or load.concurrency is None:
            return _compiled_flow(load, requests, limits, ranks, instances, step_time, flow)
    elif compiled and known and flow is None and (in_turn or shortest) and getattr(step_time, "compilable", False):
        return _compiled(load, requests, limits, ranks, instances, step_time, shortest)
    environment = simpy.Environment()
    pool = Pool(
        environment, requests, limits, ranks, instances, step_time, balance, load.blocks, faults=faults, flow=flow
    )
    source = Source(load, pool)
    if load.concurrency is not None:
        pool.on_end = lambda ended: source.follow(len(ended))
    source.start()
    environment.run()
    return served_of(pool, source.arrived)


def _compiled(
    load: Load, requests: Requests, limits: Limits, ranks: int, instances: int, timed: Any, shortest: bool
) -> Served:
    from moesim.engine.compiled import Instances

    times_s = np.zeros(len(load.isl)) if load.arrival_s is None else load.arrival_s
    run = Instances(
        requests, times_s, limits, ranks, instances, timed, load.concurrency or 0, shortest, load.front_end_s
    )
    log = run.run()
    gaps = run.gap_s[: run.gaps].copy(), run.gap_n[: run.gaps].copy()
    return record(requests, log, gaps, len(log) + len(load.isl), run.peak_kv_tokens, run.groups, 0.0)


def _compiled_flow(
    load: Load, requests: Requests, limits: Limits, ranks: int, instances: int, timed: Any, flow: Flow
) -> Served:
    from moesim.engine.compiled_flow import StagedInstances

    times_s = np.zeros(len(load.isl)) if load.arrival_s is None else load.arrival_s
    run = StagedInstances(
        requests, times_s, limits, ranks, instances, timed, flow, load.concurrency or 0, load.front_end_s
    )
    log = run.run()
    gaps = run.gap_s[: run.gaps].copy(), run.gap_n[: run.gaps].copy()
    found = record(requests, log, gaps, len(log) + len(load.isl), run.peak_kv_tokens, run.groups, 0.0)
    return replace(found, stage_busy_s=np.stack(run.busy_s))


def served_of(pool: Pool, arrived: int) -> Served:
    """What one pool did with its requests."""
    gaps = pool.gap_s[: pool.gaps].copy(), pool.gap_n[: pool.gaps].copy()
    log = pool.log.rows[: pool.log.used]
    events, now_s = pool.events + arrived, float(pool.environment.now)
    found = record(pool.requests, log, gaps, events, pool.peak_kv_tokens, pool.groups, now_s)
    if not pool.under_way:
        return found
    return replace(found, stage_busy_s=np.stack([batches.lane.busy_s for batches in pool.under_way]))


def record(
    requests: Requests, log: Floats, gaps: tuple[Floats, Ints], events: int, peak_kv_tokens: int, groups: list[Ranks],
    now_s: float,
) -> Served:  # fmt: skip
    """now_s: the end of the run, for one that faults left no request of."""
    return Served(
        arrival_s=requests.arrival_s,
        first_token_s=requests.first_token_s,
        finish_s=requests.finish_s,
        isl=requests.isl,
        osl=requests.osl,
        gap_s=gaps[0],
        gap_n=gaps[1],
        duration_s=_last(requests.finish_s, now_s),
        steps=len(log),
        events=events,
        step_start_s=log[:, 0],
        step_s=log[:, 1],
        step_decode_seqs=log[:, 2].astype(np.int64),
        step_prefill_tokens=log[:, 3].astype(np.int64),
        step_instance=log[:, 4].astype(np.int64),
        peak_kv_tokens=peak_kv_tokens,
        preemptions=sum(int(group.preemptions.sum()) for group in groups),
        recomputed_tokens=sum(int(group.recomputed_tokens.sum()) for group in groups),
        prefix_asked_tokens=sum(int(group.cache.asked_tokens.sum()) for group in groups),
        prefix_found_tokens=sum(int(group.cache.found_tokens.sum()) for group in groups),
    )


def _last(finish_s: Floats, now_s: float) -> float:
    """The last end of a request; the end of the run where faults lost them all."""
    return float(np.nanmax(finish_s)) if np.isfinite(finish_s).any() else now_s
