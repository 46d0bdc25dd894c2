"""One pool of lockstep groups, compiled: its state, and what its instances do with a request, a step and its end.

All instances of the pool stand below each other in one set of arrays. What times a step (a table, a prompt length) may
not be known yet: then the loop asks Python for it, as `compiled` does, and goes on where it stopped. Drafts are timed
as `stepmodel` times them. `compiled_roles` runs two of these side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.engine.batch_state import Limits, Plan, Ranks, Requests, new_plan, new_ranks
from moesim.engine.batcher import arrive, finish_step, plan_step
from moesim.engine.compiled import FIRST_STEPS
from moesim.engine.compiled_steps import (
    DONE,
    GAPS_FULL,
    LOG_FULL,
    Grid,
    Prompts,
    StepTables,
    Timed,
    step_s,
)
from moesim.engine.kernel import kernel
from moesim.engine.lookups import DecodeAttention, Drafting, Graphs, interpolated
from moesim.engine.prefix_cache import PrefixCache, new_prefix_cache

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# What an instance does; a waking one plans when nothing else happens at its instant.
IDLE, WAKING, READY, PLANNED, RUNNING = range(5)
# Places in a pool's `counters`; those of what a step asks for stand where `compiled` puts them.
CHOSEN, STEPS, GAPS, PEAK_KV = range(4)


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

    began_s, until_s, last_s [instances]: begin, end and length of the running step. state [instances]. position
    [requests]: where each was sent, as balance.py counts. joined_s [requests]: start of its first decode step in this
    pool. log, gap_s, gap_n, ended: as in `compiled`. scratch: a step of one instance, for what a step is compared with;
    its prompts stay none. before [ranks]: running sequences of an instance before it formed a step.
    """

    requests: Requests
    groups: Ranks
    plans: Plan
    limits: Limits
    began_s: Floats
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
    scratch: Plan
    before: Ints


class TimedRole(Timed, Protocol):
    """What times the steps of a pool: `stepmodel.TimedModel`."""

    def drafting(self) -> Drafting:
        """Costs of drafting, none with 0 drafts."""
        ...


@kernel
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


@kernel
def _plan_of(plans: Plan, first: int, stop: int, instance: int) -> Plan:
    """The planned step of one instance."""
    return Plan(
        plans.decode_seqs[first:stop], plans.decode_kv[first:stop], plans.prefill_seqs[first:stop],
        plans.prefill_tokens[first:stop], plans.prefill_prefix[first:stop], plans.picked[first:stop],
        plans.chunk[first:stop], plans.totals[instance],
    )  # fmt: skip


@kernel
def _timed(pool: PoolState, plan: Plan, timing: Timing) -> tuple[int, float]:
    """As `compiled.step_s`, drafting included."""
    counters, clock, drafting = pool.counters, pool.clock, timing.drafting
    drafts = drafting.drafts
    decode, prefill, attention, graphs, prompts = (
        timing.decode, timing.prefill, timing.attention, timing.graphs, timing.prompts,
    )  # fmt: skip
    if drafts == 0:
        why, whole_s = step_s(plan, decode, prefill, attention, graphs, prompts, counters, clock)
        return int(why), float(whole_s)
    seqs, kv, nothing = pool.scratch.decode_seqs, pool.scratch.decode_kv, pool.scratch.prefill_seqs
    most = 0
    for rank in range(len(seqs)):
        seqs[rank] = plan.decode_seqs[rank] * (1 + drafts)
        kv[rank] = plan.decode_kv[rank] * (1.0 + drafts)
        most = max(most, plan.decode_seqs[rank])
    verified = Plan(
        seqs, kv, plan.prefill_seqs, plan.prefill_tokens, plan.prefill_prefix, plan.picked, plan.chunk, plan.totals
    )
    why, whole_s = step_s(verified, decode, prefill, attention, graphs, prompts, counters, clock)
    if why != DONE:
        return why, 0.0
    found, layers = whole_s, drafting.layers
    if plan.totals[1] > 0:
        found += (whole_s - drafting.overhead_s) / layers
    if plan.totals[0] > 0:
        alone = Plan(
            plan.decode_seqs, plan.decode_kv, nothing, nothing, plan.prefill_prefix, plan.picked, plan.chunk,
            plan.totals,
        )  # fmt: skip
        why, one_s = step_s(alone, decode, prefill, attention, graphs, prompts, counters, clock)
        if why != DONE:
            return why, 0.0
        logits_s = interpolated(drafting.tokens, drafting.logits_s, float(most))
        pass_s = (one_s - drafting.overhead_s - logits_s) / layers + logits_s
        found += drafts * (pass_s + interpolated(drafting.tokens, drafting.projection_s, float(most)))
    return DONE, float(found)


@kernel
def _begin(pool: PoolState, timing: Timing, instance: int, now_s: float) -> int:
    """Form and time the next step of an instance; returns why it could not be timed yet."""
    ranks = len(pool.groups.head) // len(pool.state)
    first = instance * ranks
    plan = _plan_of(pool.plans, first, first + ranks, instance)
    if pool.state[instance] == READY:
        group = _ranks_of(pool.groups, first, first + ranks)
        for rank in range(ranks):
            pool.before[rank] = group.running_seqs[rank]
        if plan_step(pool.requests, group, pool.limits, plan) == 0:
            pool.state[instance] = IDLE
            return DONE
        for rank in range(ranks):
            for place in range(pool.before[rank], group.running_seqs[rank]):
                request = group.running[rank, place]
                if np.isnan(pool.joined_s[request]):
                    pool.joined_s[request] = now_s
        pool.counters[PEAK_KV] = max(pool.counters[PEAK_KV], plan.totals[2])
        pool.state[instance] = PLANNED
    if pool.counters[STEPS] == len(pool.log):
        return LOG_FULL
    why, seconds = _timed(pool, plan, timing)
    if why != DONE:
        return int(why)
    row = pool.log[pool.counters[STEPS]]
    row[0], row[1], row[2], row[3], row[4] = now_s, seconds, plan.totals[0], plan.totals[1], instance
    pool.counters[STEPS] += 1
    pool.began_s[instance], pool.until_s[instance], pool.last_s[instance] = now_s, now_s + seconds, seconds
    pool.state[instance] = RUNNING
    return DONE


@kernel
def begin_all(pool: PoolState, timing: Timing, now_s: float) -> tuple[int, int]:
    """Let every instance that can begin its next step; returns why one could not be timed yet, and which."""
    for instance in range(len(pool.state)):
        if pool.state[instance] == READY or pool.state[instance] == PLANNED:
            why = _begin(pool, timing, instance, now_s)
            if why != DONE:
                return why, instance
    return DONE, -1


@kernel
def put(pool: PoolState, request: int, position: int) -> None:
    """Let a request wait at a rank, and wake its instance."""
    instances = len(pool.state)
    instance, rank = position % instances, position // instances
    pool.position[request] = position
    arrive(pool.requests, pool.groups, instance * (len(pool.groups.head) // instances) + rank, request)
    if pool.state[instance] == IDLE:
        pool.state[instance] = WAKING


@kernel
def turn(pool: PoolState) -> int:
    """The next position in turn."""
    pool.counters[CHOSEN] += 1
    return int((pool.counters[CHOSEN] - 1) % len(pool.groups.head))


@kernel
def end_step(pool: PoolState, instance: int, now_s: float) -> int:
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


@kernel
def earliest(pool: PoolState) -> tuple[int, float]:
    """The instance whose step ends first, of several that which began first, and when; -1 where none runs."""
    found, began_s, until_s = -1, np.inf, np.inf
    for instance in range(len(pool.state)):
        if pool.state[instance] == RUNNING:
            own_s, end_s = pool.began_s[instance], pool.until_s[instance]
            if end_s < until_s or (end_s == until_s and own_s < began_s):
                found, began_s, until_s = instance, own_s, end_s
    return found, until_s


@kernel
def wake(pool: PoolState) -> bool:
    """Let the waking instances form a step; whether there were any."""
    woken = False
    for instance in range(len(pool.state)):
        if pool.state[instance] == WAKING:
            pool.state[instance] = READY
            woken = True
    return woken


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
        began_s=np.zeros(instances),
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
        scratch=new_plan(ranks, 1),
        before=np.zeros(ranks, np.int64),
    )
