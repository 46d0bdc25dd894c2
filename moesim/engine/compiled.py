"""The serving loop of table-timed steps as one compiled loop: the same events as `serving`, many times as fast.

Requests of an open loop go to instances in turn, so each instance can be run by itself from its first request to its
last; those of a closed loop too where there is one instance. What the loop cannot know yet (a table that is first
needed, a prompt length that was not priced) it asks Python for, and goes on where it stopped. A property test holds it
against the SimPy loop: the same times to the last digit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.engine.batch_state import Limits, Plan, Ranks, Requests, new_plan, new_ranks
from moesim.engine.batcher import arrive, count_gap, finish_step, plan_step
from moesim.engine.compiled_steps import (
    ASKED_PREFIX,
    ASKED_SEQS,
    ASKED_TOKENS,
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
from moesim.engine.lookups import DecodeAttention, Graphs
from moesim.engine.memory_rules import CONTEXT
from moesim.engine.prefix_cache import new_prefix_cache

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Places in `counters`: the next of the instance's requests, whether a step is planned, ...
NEXT, PLANNED, GAPS, STEPS, ENDED, PEAK_KV = range(6)
SENT = 8
COUNTERS = max(SENT, ASKED_SEQS, ASKED_TOKENS) + 1
# ... and in `clock`.
NOW, STARTED = 0, 1
CLOCKS = max(NOW, STARTED, ASKED_PREFIX) + 1
FIRST_STEPS = 4096

__all__ = ["FIRST_STEPS", "Instances", "StepTables", "admission"]


@kernel
def _queue(
    requests: Requests, group: Ranks, mine: Ints, sent: int, admitted_s: Floats, until_s: float, counters: Ints,
    shortest: bool,
) -> None:  # fmt: skip
    """Bring the requests of a closed loop whose time has come to their ranks."""
    ranks = len(group.head)
    while counters[NEXT] < sent and admitted_s[mine[counters[NEXT]]] <= until_s:
        request = mine[counters[NEXT]]
        to = request % ranks
        if shortest:
            for other in range(1, ranks):
                rank = (request + other) % ranks
                if group.requests_in[rank] < group.requests_in[to]:
                    to = rank
        arrive(requests, group, to, request)
        counters[NEXT] += 1


@kernel
def _repeats(limits: Limits) -> bool:
    """Whether a step that only decodes, and that nobody leaves, is followed by its like until somebody comes.

    So it is where whoever could not be let in cannot be until somebody leaves: memory is kept for whole requests, and
    no rule counts steps.
    """
    counts = limits.poll_steps > 1 or limits.hold_steps > 0 or limits.wait_steps > 0
    return bool(limits.rule.code == CONTEXT and limits.draft_tokens == 0 and not counts)


@kernel
def _repeat(
    requests: Requests, group: Ranks, plan: Plan, mine: Ints, admitted_s: Floats, scheduled_s: Floats, decode: Grid,
    prefill: Grid, attention: DecodeAttention, graphs: Graphs, prompts: Prompts, counters: Ints, clock: Floats,
    gap_s: Floats, gap_n: Ints, log: Floats, room: int, known: int,
) -> None:  # fmt: skip
    """Repeat the decode step that has just ended, until somebody comes or may end: the batcher's part done at once.

    room: places that the gaps of one step may need. known: of `mine`, those whose time to come is known.
    """
    next_s = scheduled = np.inf
    if counters[NEXT] < known:
        next_s, scheduled = admitted_s[mine[counters[NEXT]]], scheduled_s[mine[counters[NEXT]]]
    if next_s < 2 * clock[NOW] - clock[STARTED]:
        return  # too soon to be worth it
    ranks, left = len(group.head), np.iinfo(np.int64).max
    for rank in range(ranks):
        for place in range(group.running_seqs[rank]):
            request = group.running[rank, place]
            left = min(left, requests.osl[request] - requests.generated[request])
    steps, used = 0, counters[GAPS]
    while steps + 1 < left and counters[STEPS] < len(log) and used + room <= len(gap_s):
        if next_s < clock[NOW] or (next_s == clock[NOW] and scheduled <= clock[STARTED]):
            break
        for rank in range(ranks):
            plan.decode_kv[rank] += plan.decode_seqs[rank]
        why, seconds = step_s(plan, decode, prefill, attention, graphs, prompts, counters, clock)
        if why != DONE:
            break
        row = log[counters[STEPS]]
        row[0], row[1], row[2], row[3] = clock[NOW], seconds, plan.totals[0], plan.totals[1]
        counters[STEPS] += 1
        clock[STARTED] = clock[NOW]
        clock[NOW] += seconds
        used = count_gap(gap_s, gap_n, used, clock[NOW] - clock[STARTED], plan.totals[0])
        steps += 1
    counters[GAPS] = used
    if steps == 0:
        return
    for rank in range(ranks):
        made = steps * plan.decode_seqs[rank]
        group.context[rank] += made
        group.tokens_in[rank] += made
        group.unpolled[rank] += steps
        for place in range(group.running_seqs[rank]):
            request = group.running[rank, place]
            requests.generated[request] += steps
            requests.last_token_s[request] = clock[NOW]


@kernel
def _advance(
    requests: Requests, group: Ranks, limits: Limits, plan: Plan, mine: Ints, instances: int, admitted_s: Floats,
    scheduled_s: Floats, decode: Grid, prefill: Grid, attention: DecodeAttention, graphs: Graphs, prompts: Prompts,
    counters: Ints, clock: Floats, gap_s: Floats, gap_n: Ints, log: Floats, ended: Ints, concurrency: int,
    shortest: bool, front_end_s: float,
) -> int:  # fmt: skip
    """Run one instance until it is done or needs something; returns why it stopped.

    concurrency: requests of a closed loop, 0 = an open one, whose requests come at `admitted_s`. shortest: those of a
    closed loop go to the rank with the fewest, see `balance.shortest_queue`; else in turn. front_end_s: of each request
    of a closed loop, from its arrival to the queue; in an open one `admitted_s` holds it already.
    """
    ranks, repeats = len(group.head), _repeats(limits)
    while counters[ENDED] < len(mine):
        if counters[PLANNED] == 0 and concurrency > 0:
            sent = min(concurrency + counters[ENDED], len(mine))
            for place in range(counters[SENT], sent):
                requests.arrival_s[mine[place]] = clock[NOW]
                admitted_s[mine[place]] = clock[NOW] + front_end_s
            counters[SENT] = sent
            if counters[NEXT] < sent:
                _queue(requests, group, mine, sent, admitted_s, clock[NOW], counters, shortest)
            if plan_step(requests, group, limits, plan) == 0:
                if counters[NEXT] == sent:
                    return DONE
                clock[NOW] = admitted_s[mine[counters[NEXT]]]
                continue
            counters[PEAK_KV] = max(counters[PEAK_KV], plan.totals[2])
            counters[PLANNED] = 1
        elif counters[PLANNED] == 0:
            while counters[NEXT] < len(mine):
                request = mine[counters[NEXT]]
                late = admitted_s[request] - clock[NOW]
                # Of two events at one instant, that which was scheduled first comes first.
                if late > 0.0 or (late == 0.0 and scheduled_s[request] > clock[STARTED]):
                    break
                requests.arrival_s[request] = admitted_s[request]
                arrive(requests, group, (request // instances) % ranks, request)
                counters[NEXT] += 1
            if plan_step(requests, group, limits, plan) == 0:
                if counters[NEXT] == len(mine):
                    return DONE
                clock[NOW] = admitted_s[mine[counters[NEXT]]]
                clock[STARTED] = np.inf  # idle: all requests of that instant are taken
                continue
            counters[PEAK_KV] = max(counters[PEAK_KV], plan.totals[2])
            counters[PLANNED] = 1
        if counters[STEPS] == len(log):
            return LOG_FULL
        if counters[GAPS] + len(ended) > len(gap_s):
            return GAPS_FULL
        why, seconds = step_s(plan, decode, prefill, attention, graphs, prompts, counters, clock)
        if why != DONE:
            return int(why)
        row = log[counters[STEPS]]
        row[0], row[1], row[2], row[3] = clock[NOW], seconds, plan.totals[0], plan.totals[1]
        counters[STEPS] += 1
        clock[STARTED] = clock[NOW]
        clock[NOW] += seconds
        waiting = counters[NEXT]
        if concurrency > 0 and counters[NEXT] < counters[SENT]:  # they come while the step runs, which ends after them
            before_s = np.nextafter(clock[NOW], -np.inf)
            _queue(requests, group, mine, counters[SENT], admitted_s, before_s, counters, shortest)
        gaps, done = finish_step(requests, group, limits, plan, clock[NOW], gap_s, gap_n, counters[GAPS], ended)
        counters[GAPS] = gaps
        counters[ENDED] += done
        counters[PLANNED] = 0
        known = len(mine) if concurrency == 0 else counters[SENT]
        if repeats and done == 0 and plan.totals[1] == 0 and counters[NEXT] == waiting:
            _repeat(
                requests, group, plan, mine, admitted_s, scheduled_s, decode, prefill, attention, graphs, prompts,
                counters, clock, gap_s, gap_n, log, len(ended), known,
            )  # fmt: skip
    return DONE


@kernel
def admission(arrival_s: Floats, admitted_s: Floats, scheduled_s: Floats) -> None:
    """When each request is let in, by a process that waits from one to the next, and when that was scheduled."""
    now = since = 0.0
    for request in range(len(arrival_s)):
        if arrival_s[request] > now:
            since = now
            now += arrival_s[request] - now
        admitted_s[request] = now
        scheduled_s[request] = since


class Instances(StepTables):
    """Runs every instance of a deployment in turn over one set of requests; see `run`."""

    def __init__(
        self, requests: Requests, arrival_s: Floats, limits: Limits, ranks: int, instances: int, timed: Timed,
        concurrency: int = 0, shortest: bool = False, front_end_s: float = 0.0,
    ) -> None:  # fmt: skip
        """arrival_s: of an open loop. concurrency: of a closed one, of a single instance; arrivals are ignored then.

        shortest: requests of a closed loop go to the rank with the fewest. front_end_s: from arrival to the queue.
        """
        super().__init__(timed)
        self.requests, self.limits, self.ranks, self.instances = requests, limits, ranks, instances
        self.concurrency, self.shortest = concurrency, shortest
        self.admitted_s, self.scheduled_s = np.empty(len(arrival_s)), np.empty(len(arrival_s))
        admission(arrival_s, self.admitted_s, self.scheduled_s)
        self.front_end_s = front_end_s
        if front_end_s > 0.0 and not concurrency:  # a process of its own brings each request to the queue
            self.scheduled_s = self.admitted_s
            self.admitted_s = self.admitted_s + front_end_s
        self.gap_s, self.gap_n = np.zeros(FIRST_STEPS), np.zeros(FIRST_STEPS, np.int64)
        self.gaps = 1  # place 0 counts tokens of the same step
        self.groups: list[Ranks] = []
        self.peak_kv_tokens = 0

    def run(self) -> Floats:
        """Run all; returns the steps [steps, 5]: start, seconds, decoding sequences, prompt tokens, instance, by start.

        Raises OutsideProfile.
        """
        logs = [self._one(instance) for instance in range(self.instances)]
        if self.front_end_s > 0.0 and not self.concurrency:
            self.requests.arrival_s[:] = self.scheduled_s
        steps = np.concatenate(logs)
        found: Floats = steps[np.lexsort((steps[:, 4], steps[:, 0]))]
        return found

    def _one(self, instance: int) -> Floats:
        mine = np.arange(instance, len(self.admitted_s), self.instances)
        none = np.zeros(0, np.int64)
        cache = new_prefix_cache(len(self.admitted_s), self.ranks, 0, none, none)
        group = new_ranks(self.ranks, self.limits.max_running, rule=self.limits.rule, cache=cache)
        self.groups.append(group)
        plan = new_plan(self.ranks, self.limits.max_running)
        ended = np.zeros(group.running.size + self.ranks * self.limits.max_running, np.int64)
        counters, clock = np.zeros(COUNTERS, np.int64), np.zeros(CLOCKS)
        counters[GAPS] = self.gaps
        log = np.zeros((FIRST_STEPS, 5))
        attention, graphs = self.timed.attention(), self.timed.graphs_taken()
        while True:
            why = _advance(
                self.requests, group, self.limits, plan, mine, self.instances, self.admitted_s, self.scheduled_s,
                self.decode, self.prefill, attention, graphs, self.prompts, counters, clock, self.gap_s, self.gap_n,
                log, ended, self.concurrency, self.shortest, self.front_end_s,
            )  # fmt: skip
            if why == DONE:
                break
            if why == LOG_FULL:
                log = np.concatenate([log, np.zeros_like(log)])
            elif why == GAPS_FULL:
                self.gap_s = np.concatenate([self.gap_s, np.zeros(len(self.gap_s) + len(ended))])
                self.gap_n = np.concatenate([self.gap_n, np.zeros(len(self.gap_n) + len(ended), np.int64)])
            else:
                self.answer(why, counters, clock, "prefill" if plan.prefill_tokens.any() else "decode")
        self.gaps = int(counters[GAPS])
        self.peak_kv_tokens = max(self.peak_kv_tokens, int(counters[PEAK_KV]))
        steps = log[: counters[STEPS]]
        steps[:, 4] = instance
        return steps
