"""A closed loop over a prefill and a decode pool as one compiled loop: the events of `roles`, many times as fast.

All instances of a pool stand below each other in one set of arrays. The loop takes the earliest of the ends of steps
and of transfers, hands out its tokens, and forms the steps that can begin; what it cannot know yet (a table, a prompt
length) it asks Python for, as `compiled` does, and goes on where it stopped. Drafts are timed as `stepmodel` times
them. A property test holds the loop against the SimPy processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.engine.batch_state import Limits, Plan, Ranks, Requests, new_plan, new_ranks
from moesim.engine.batcher import arrive, finish_step, plan_step
from moesim.engine.compiled import (
    DONE,
    FIRST_STEPS,
    GAPS_FULL,
    LOG_FULL,
    Grid,
    Prompts,
    StepTables,
    Timed,
    step_s,
)
from moesim.engine.compiled_transfers import UNDER_WAY, Links, pop, push
from moesim.engine.lookups import DecodeAttention, Drafting, Graphs, interpolated
from moesim.engine.prefix_cache import PrefixCache, new_prefix_cache

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# What an instance does; a waking one plans when nothing else happens at its instant.
IDLE, WAKING, READY, PLANNED, RUNNING = range(5)
# Places in a pool's `counters`; those of what a step asks for stand where `compiled` puts them.
CHOSEN, STEPS, GAPS, PEAK_KV = range(4)
# Places in `shared`: the next request, those that ended, and who asks.
NEXT, ENDED, ASKING_POOL, ASKING_INSTANCE = range(4)


class Timing(NamedTuple):
    """How long the steps of a pool take; see `compiled.step_s`."""

    decode: Grid
    prefill: Grid
    attention: DecodeAttention
    graphs: Graphs
    prompts: Prompts
    drafting: Drafting


class PoolState(NamedTuple):
    """One pool: rank r of instance i is row i x ranks + r of `groups` and `plans`; totals [instances, 3], held [2 x
    instances].

    until_s, last_s [instances]: end and length of the running step. state [instances]. position [requests]: where each
    was sent, as balance.py counts. joined_s [requests]: start of its first decode step in this pool. log, gap_s, gap_n,
    ended: as in `compiled`.
    """

    requests: Requests
    groups: Ranks
    plans: Plan
    limits: Limits
    until_s: Floats
    last_s: Floats
    state: Ints
    counters: Ints
    clock: Floats
    position: Ints
    joined_s: Floats
    log: Floats
    gap_s: Floats
    gap_n: Ints
    ended: Ints


class TimedRole(Timed, Protocol):
    """What times the steps of a pool: `stepmodel.TimedModel`."""

    def drafting(self) -> Drafting:
        """Costs of drafting, none with 0 drafts."""
        ...


@njit(cache=True)
def _ranks_of(groups: Ranks, first: int, stop: int) -> Ranks:
    """The ranks of one instance."""
    cache, instance = groups.cache, first // (stop - first)
    return Ranks(
        groups.head[first:stop], groups.tail[first:stop], groups.reading[first:stop], groups.running[first:stop],
        groups.running_seqs[first:stop], groups.context[first:stop], groups.kv_tokens[first:stop],
        groups.elsewhere[first:stop], groups.requests_in[first:stop], groups.tokens_in[first:stop],
        groups.output_share[first:stop], groups.full[first:stop], groups.unpolled[first:stop],
        groups.held[2 * instance : 2 * instance + 2], groups.preemptions[first:stop],
        groups.recomputed_tokens[first:stop],
        PrefixCache(
            cache.tokens, cache.offsets, cache.names, cache.uses[first:stop], cache.older[first:stop],
            cache.newer[first:stop], cache.idle_tokens[first:stop], cache.shared, cache.asked_tokens[first:stop],
            cache.found_tokens[first:stop],
        ),
    )  # fmt: skip


@njit(cache=True)
def _plan_of(plans: Plan, first: int, stop: int, instance: int) -> Plan:
    """The planned step of one instance."""
    return Plan(
        plans.decode_seqs[first:stop], plans.decode_kv[first:stop], plans.prefill_seqs[first:stop],
        plans.prefill_tokens[first:stop], plans.prefill_prefix[first:stop], plans.picked[first:stop],
        plans.chunk[first:stop], plans.totals[instance],
    )  # fmt: skip


@njit(cache=True)
def _timed(plan: Plan, timing: Timing, counters: Ints, clock: Floats) -> tuple[int, float]:
    """As `compiled.step_s`, drafting included."""
    drafts = timing.drafting.drafts
    if drafts == 0:
        why, whole_s = step_s(
            plan, timing.decode, timing.prefill, timing.attention, timing.graphs, timing.prompts, counters, clock
        )
        return int(why), float(whole_s)
    verified = Plan(
        plan.decode_seqs * (1 + drafts), plan.decode_kv * (1.0 + drafts), plan.prefill_seqs, plan.prefill_tokens,
        plan.prefill_prefix, plan.picked, plan.chunk, plan.totals,
    )  # fmt: skip
    why, whole_s = step_s(
        verified, timing.decode, timing.prefill, timing.attention, timing.graphs, timing.prompts, counters, clock
    )
    if why != DONE:
        return why, 0.0
    found, layers = whole_s, timing.drafting.layers
    if plan.totals[1] > 0:
        found += (whole_s - timing.drafting.overhead_s) / layers
    if plan.totals[0] > 0:
        nothing = np.zeros_like(plan.prefill_seqs)
        alone = Plan(
            plan.decode_seqs, plan.decode_kv, nothing, nothing, plan.prefill_prefix, plan.picked, plan.chunk,
            plan.totals,
        )  # fmt: skip
        why, one_s = step_s(
            alone, timing.decode, timing.prefill, timing.attention, timing.graphs, timing.prompts, counters, clock
        )
        if why != DONE:
            return why, 0.0
        drafting = timing.drafting
        rows = float(plan.decode_seqs.max())
        logits_s = interpolated(drafting.tokens, drafting.logits_s, rows)
        pass_s = (one_s - drafting.overhead_s - logits_s) / layers + logits_s
        found += drafts * (pass_s + interpolated(drafting.tokens, drafting.projection_s, rows))
    return DONE, float(found)


@njit(cache=True)
def _begin(pool: PoolState, timing: Timing, instance: int, now_s: float) -> int:
    """Form and time the next step of an instance; returns why it could not be timed yet."""
    ranks = len(pool.groups.head) // len(pool.state)
    first = instance * ranks
    plan = _plan_of(pool.plans, first, first + ranks, instance)
    if pool.state[instance] == READY:
        group = _ranks_of(pool.groups, first, first + ranks)
        before = group.running_seqs.copy()
        if plan_step(pool.requests, group, pool.limits, plan) == 0:
            pool.state[instance] = IDLE
            return DONE
        for rank in range(ranks):
            for place in range(before[rank], group.running_seqs[rank]):
                request = group.running[rank, place]
                if np.isnan(pool.joined_s[request]):
                    pool.joined_s[request] = now_s
        pool.counters[PEAK_KV] = max(pool.counters[PEAK_KV], plan.totals[2])
        pool.state[instance] = PLANNED
    if pool.counters[STEPS] == len(pool.log):
        return LOG_FULL
    why, seconds = _timed(plan, timing, pool.counters, pool.clock)
    if why != DONE:
        return int(why)
    row = pool.log[pool.counters[STEPS]]
    row[0], row[1], row[2], row[3], row[4] = now_s, seconds, plan.totals[0], plan.totals[1], instance
    pool.counters[STEPS] += 1
    pool.until_s[instance], pool.last_s[instance] = now_s + seconds, seconds
    pool.state[instance] = RUNNING
    return DONE


@njit(cache=True)
def _begin_all(pool: PoolState, timing: Timing, now_s: float, shared: Ints) -> int:
    for instance in range(len(pool.state)):
        if pool.state[instance] == READY or pool.state[instance] == PLANNED:
            why = _begin(pool, timing, instance, now_s)
            if why != DONE:
                shared[ASKING_INSTANCE] = instance
                return int(why)
    return DONE


@njit(cache=True)
def _put(pool: PoolState, request: int, position: int) -> None:
    """Let a request wait at a rank, and wake its instance."""
    instances = len(pool.state)
    instance, rank = position % instances, position // instances
    pool.position[request] = position
    arrive(pool.requests, pool.groups, instance * (len(pool.groups.head) // instances) + rank, request)
    if pool.state[instance] == IDLE:
        pool.state[instance] = WAKING


@njit(cache=True)
def _turn(pool: PoolState) -> int:
    """The next position in turn."""
    pool.counters[CHOSEN] += 1
    return int((pool.counters[CHOSEN] - 1) % len(pool.groups.head))


@njit(cache=True)
def _follow(pool: PoolState, shared: Ints, count: int, now_s: float) -> None:
    """Send more requests of the closed loop, as far as there are any."""
    for _ in range(min(count, len(pool.requests.isl) - shared[NEXT])):
        request = shared[NEXT]
        shared[NEXT] += 1
        pool.requests.arrival_s[request] = now_s
        _put(pool, request, _turn(pool))


@njit(cache=True)
def _move(first: PoolState, second: PoolState, links: Links, request: int, now_s: float) -> None:
    """A prompt was read: its cache leaves when both NICs are free."""
    target, sender = _turn(second), first.position[request]
    seconds = links.latency_s + first.requests.isl[request] * links.bytes_per_token / links.bytes_per_s
    ready_s = now_s - first.last_s[sender % len(first.state)] if links.by_layer else now_s
    end_s = max(ready_s, links.sending_s[sender], links.receiving_s[target]) + seconds
    if links.by_layer:
        end_s = max(end_s, now_s + links.latency_s + (seconds - links.latency_s) / links.layers)
    links.sending_s[sender] = links.receiving_s[target] = end_s
    links.target[request] = target
    links.taken_s[request] = end_s - now_s
    push(links, now_s + (end_s - now_s), request)


@njit(cache=True)
def _answer(first: PoolState, second: PoolState, request: int, now_s: float) -> None:
    """The first token reaches the user."""
    second.requests.arrival_s[request] = first.requests.arrival_s[request]
    second.requests.first_token_s[request] = second.requests.last_token_s[request] = now_s


@njit(cache=True)
def _end_step(pool: PoolState, instance: int, now_s: float) -> int:
    """Hand out the tokens of a step; returns how many requests ended, or -1 where their gaps find no place."""
    if pool.counters[GAPS] + len(pool.ended) > len(pool.gap_s):
        return -1
    ranks = len(pool.groups.head) // len(pool.state)
    first = instance * ranks
    group = _ranks_of(pool.groups, first, first + ranks)
    plan = _plan_of(pool.plans, first, first + ranks, instance)
    gaps, done = finish_step(
        pool.requests, group, pool.limits, plan, now_s, pool.gap_s, pool.gap_n, pool.counters[GAPS], pool.ended
    )
    pool.counters[GAPS] = gaps
    pool.state[instance] = READY
    return int(done)


@njit(cache=True)
def _earliest(pool: PoolState) -> tuple[int, float]:
    """The instance whose step ends first, and when; -1 where none runs."""
    found, until_s = -1, np.inf
    for instance in range(len(pool.state)):
        if pool.state[instance] == RUNNING and pool.until_s[instance] < until_s:
            found, until_s = instance, pool.until_s[instance]
    return found, until_s


@njit(cache=True)
def _wake(pool: PoolState) -> bool:
    woken = False
    for instance in range(len(pool.state)):
        if pool.state[instance] == WAKING:
            pool.state[instance] = READY
            woken = True
    return woken


@njit(cache=True)
def _advance(
    first: PoolState, second: PoolState, reading: Timing, decoding: Timing, links: Links, shared: Ints, clock: Floats,
    concurrency: int,
) -> int:  # fmt: skip
    """Run both pools until all requests ended or something is asked for; returns why it stopped."""
    if shared[NEXT] == 0:
        _follow(first, shared, concurrency, 0.0)
    while shared[ENDED] < len(first.requests.isl):
        now_s = clock[0]
        shared[ASKING_POOL] = 0
        why = _begin_all(first, reading, now_s, shared)
        if why == DONE:
            shared[ASKING_POOL] = 1
            why = _begin_all(second, decoding, now_s, shared)
        if why != DONE:
            return int(why)
        reader, read_s = _earliest(first)
        decoder, decoded_s = _earliest(second)
        moved_s = links.end_s[0] if links.moving[UNDER_WAY] > 0 else np.inf
        next_s = min(read_s, decoded_s, moved_s)
        if next_s > now_s:
            woken = _wake(first)
            if _wake(second) or woken:
                continue
        if next_s == np.inf:
            return DONE
        if moved_s == next_s:
            request = pop(links)
            _answer(first, second, request, next_s)
            _put(second, request, links.target[request])
        elif read_s == next_s:
            done = _end_step(first, reader, next_s)
            if done < 0:
                shared[ASKING_POOL] = 0
                return GAPS_FULL
            for place in range(done):
                request = first.ended[place]
                if second.requests.osl[request] == 1:  # nothing is left to decode: the prefill rank answers
                    _answer(first, second, request, next_s)
                    second.requests.finish_s[request] = next_s
                    shared[ENDED] += 1
                    _follow(first, shared, 1, next_s)
                else:
                    _move(first, second, links, request, next_s)
        else:
            done = _end_step(second, decoder, next_s)
            if done < 0:
                shared[ASKING_POOL] = 1
                return GAPS_FULL
            shared[ENDED] += done
            _follow(first, shared, done, next_s)
        clock[0] = next_s
    return DONE


@dataclass
class RolePart:
    """What Python keeps of a pool while the loop runs: its state and its tables."""

    state: PoolState
    tables: StepTables
    timed: Any

    def timing(self) -> Timing:
        """The pool's tables as far as they are known."""
        known = self.tables
        return Timing(
            known.decode, known.prefill, self.timed.attention(), self.timed.graphs_taken(), known.prompts,
            self.timed.drafting(),
        )  # fmt: skip

    def mend(self, why: int, instance: int) -> None:
        """Bring what the loop asked for. Raises OutsideProfile."""
        state = self.state
        if why == LOG_FULL:
            self.state = state._replace(log=np.concatenate([state.log, np.zeros_like(state.log)]))
        elif why == GAPS_FULL:
            more = len(state.gap_s) + len(state.ended)
            self.state = state._replace(
                gap_s=np.concatenate([state.gap_s, np.zeros(more)]),
                gap_n=np.concatenate([state.gap_n, np.zeros(more, np.int64)]),
            )
        else:
            reads = bool(state.plans.totals[instance, 1] > 0)
            self.tables.answer(why, state.counters, state.clock, "prefill" if reads else "decode")


def pool_state(requests: Requests, limits: Limits, ranks: int, instances: int) -> PoolState:
    """A pool of `instances` of `ranks` attention-DP ranks, with nothing in it yet."""
    rows, count, none = ranks * instances, len(requests.isl), np.zeros(0, np.int64)
    cache = new_prefix_cache(count, rows, 0, none, none)
    groups = new_ranks(rows, limits.max_running, rule=limits.rule, cache=cache)
    groups = groups._replace(held=np.zeros(2 * instances, np.int64))
    plans = new_plan(rows, limits.max_running)._replace(totals=np.zeros((instances, 3), np.int64))
    counters = np.zeros(8, np.int64)
    counters[GAPS] = 1  # place 0 counts tokens of the same step
    return PoolState(
        requests=requests,
        groups=groups,
        plans=plans,
        limits=limits,
        until_s=np.zeros(instances),
        last_s=np.zeros(instances),
        state=np.full(instances, READY, np.int64),
        counters=counters,
        clock=np.zeros(3),
        position=np.zeros(count, np.int64),
        joined_s=np.full(count, np.nan),
        log=np.zeros((FIRST_STEPS, 5)),
        gap_s=np.zeros(FIRST_STEPS),
        gap_n=np.zeros(FIRST_STEPS, np.int64),
        ended=np.zeros(2 * ranks * limits.max_running, np.int64),
    )


def run_closed(first: RolePart, second: RolePart, links: Links, concurrency: int) -> float:
    """Run a closed loop over both pools; returns the time of the last event. Raises OutsideProfile."""
    shared, clock = np.zeros(4, np.int64), np.zeros(1)
    reading, decoding = first.timing(), second.timing()
    while True:
        why = _advance(first.state, second.state, reading, decoding, links, shared, clock, concurrency)
        if why == DONE:
            return float(clock[0])
        part = second if shared[ASKING_POOL] else first
        part.mend(why, int(shared[ASKING_INSTANCE]))
        reading, decoding = first.timing(), second.timing()
