"""The serving loop of table-timed steps as one compiled loop: the same events as `serving`, many times as fast.

Requests of an open loop go to instances in turn, so each instance can be run by itself from its first request to its
last; those of a closed loop too where there is one instance. What the loop cannot know yet (a table that is first
needed, a prompt length that was not priced) it asks Python for, and goes on where it stopped. A property test holds it
against the SimPy loop: the same times to the last digit.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.engine.batch_state import Limits, Plan, Ranks, Requests, new_plan, new_ranks
from moesim.engine.batcher import arrive, finish_step, plan_step
from moesim.engine.kernel import kernel
from moesim.engine.lookups import DecodeAttention, Graphs, attention_of_rank, interpolated, sizes_of, trilinear
from moesim.engine.prefix_cache import new_prefix_cache
from moesim.engine.steptable import StepTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Why the loop came back to Python.
DONE, NEED_DECODE, NEED_PREFILL, NEED_PROMPT, TOO_SMALL, TOO_LARGE, LOG_FULL, GAPS_FULL = range(8)
# Places in `counters`: the next of the instance's requests, whether a step is planned, ...
NEXT, PLANNED, GAPS, STEPS, ENDED, PEAK_KV, ASKED_SEQS, ASKED_TOKENS, SENT = range(9)
# ... and in `clock`.
NOW, STARTED, ASKED_PREFIX = range(3)
# A step outside the priced grid by less than this (relative) is on its end.
ON_THE_END = 1e-9
FIRST_PROMPTS, FIRST_STEPS = 64, 4096


class Grid(NamedTuple):
    """A StepTable as the loop takes it; `known` is false until it is asked for, `ends` tells which ends refuse."""

    known: bool
    tokens: Floats
    hot: Floats
    attention_s: Floats
    seconds: Floats
    before_s: Floats
    ends_below: bool
    ends_above: bool


class Prompts(NamedTuple):
    """Attention seconds of prompts by (sequences, tokens, prefix of each): open addressing, sequences 0 where free."""

    seqs: Ints
    tokens: Ints
    prefix: Floats
    seconds: Floats


class Timed(Protocol):
    """What times the steps: `stepmodel.TimedModel`."""

    def table(self, kind: str) -> StepTable:
        """The timed table of a kind of step. Raises OutsideProfile."""
        ...

    def prompt_s(self, seqs: int, tokens: int, prefix: float) -> float:
        """Attention of the prompts that a rank reads, of one layer. Raises OutsideProfile."""
        ...

    def attention(self) -> DecodeAttention:
        """Decode attention."""
        ...

    def graphs_taken(self) -> Graphs:
        """Captured graphs."""
        ...


_NOTHING = np.zeros(0)
_UNKNOWN = Grid(False, _NOTHING, _NOTHING, _NOTHING, np.zeros((0, 0, 0)), _NOTHING, False, False)


def _grid(table: StepTable) -> Grid:
    return Grid(
        True, table.tokens, table.hot, table.attention_s, table.seconds, table.before_s, table.lower is not None,
        table.upper is not None,
    )  # fmt: skip


@kernel
def _place(prompts: Prompts, seqs: int, tokens: int, prefix: float) -> int:
    """Where a key stands, or the free place that it would take."""
    size = len(prompts.seqs)
    at = (seqs * 7919 + tokens * 104729 + int(prefix * 16.0) * 1299709) % size
    while prompts.seqs[at] != 0:
        if prompts.seqs[at] == seqs and prompts.tokens[at] == tokens and prompts.prefix[at] == prefix:
            return at
        at = (at + 1) % size
    return at


@kernel
def step_s(
    plan: Plan, decode: Grid, prefill: Grid, attention: DecodeAttention, graphs: Graphs, prompts: Prompts,
    counters: Ints, clock: Floats,
) -> tuple[int, float]:  # fmt: skip
    """Why a planned step cannot be timed yet (DONE where it can), and its seconds."""
    ranks = len(plan.decode_seqs)
    total, most, reading = sizes_of(plan.decode_seqs, plan.prefill_tokens)
    grid = prefill if reading > 0 else decode
    if not grid.known:
        return (NEED_PREFILL if reading > 0 else NEED_DECODE), 0.0
    mean = total / ranks
    longest = 0.0
    for rank in range(ranks):
        seconds = attention_of_rank(plan.decode_seqs[rank], plan.decode_kv[rank], attention)
        seqs = plan.prefill_seqs[rank]
        if plan.prefill_tokens[rank] > 0:
            prefix = plan.prefill_prefix[rank] / seqs
            at = _place(prompts, seqs, plan.prefill_tokens[rank], prefix)
            if prompts.seqs[at] == 0:
                counters[ASKED_SEQS], counters[ASKED_TOKENS] = seqs, plan.prefill_tokens[rank]
                clock[ASKED_PREFIX] = prefix
                return NEED_PROMPT, 0.0
            seconds += prompts.seconds[at]
        longest = max(longest, seconds)
    if mean < grid.tokens[0] * (1 - ON_THE_END) and grid.ends_below:
        return TOO_SMALL, 0.0
    if mean > grid.tokens[-1] * (1 + ON_THE_END) and grid.ends_above:
        return TOO_LARGE, 0.0
    if reading == 0:
        rows = float(most)
        place = int(np.searchsorted(graphs.sizes, most))
        if place < len(graphs.sizes):
            rows = float(graphs.sizes[place])
        padding = interpolated(grid.tokens, grid.before_s, rows) - interpolated(grid.tokens, grid.before_s, mean)
        longest = longest + max(0.0, padding)
        if len(graphs.sizes) > 0 and most > graphs.sizes[-1]:
            longest += graphs.eager_layer_s
    return DONE, trilinear(grid.tokens, grid.hot, grid.attention_s, grid.seconds, mean, most / mean, longest)


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
    ranks = len(group.head)
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
        if concurrency > 0 and counters[NEXT] < counters[SENT]:  # they come while the step runs, which ends after them
            before_s = np.nextafter(clock[NOW], -np.inf)
            _queue(requests, group, mine, counters[SENT], admitted_s, before_s, counters, shortest)
        gaps, done = finish_step(requests, group, limits, plan, clock[NOW], gap_s, gap_n, counters[GAPS], ended)
        counters[GAPS] = gaps
        counters[ENDED] += done
        counters[PLANNED] = 0
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


class StepTables:
    """What one kind of instance has been timed for so far: two grids, and the prompts that were met."""

    def __init__(self, timed: Timed) -> None:
        self.timed = timed
        self.tables: dict[str, StepTable] = {}
        self.decode, self.prefill = _UNKNOWN, _UNKNOWN
        self.prompts, self.priced = _no_prompts(FIRST_PROMPTS), 0

    def answer(self, why: int, counters: Ints, clock: Floats, kind: str) -> None:
        """Bring what a step asked for; `kind` of table it belongs to. Raises OutsideProfile."""
        if why == NEED_PROMPT:
            self._price(int(counters[ASKED_SEQS]), int(counters[ASKED_TOKENS]), float(clock[ASKED_PREFIX]))
        else:
            self._bring(why, kind)

    def _bring(self, why: int, kind: str) -> None:
        """The table that a step asks for; or the reason why it has no price, raised."""
        if why in (TOO_SMALL, TOO_LARGE):
            outside = self.tables[kind].lower if why == TOO_SMALL else self.tables[kind].upper
            assert outside is not None
            raise outside
        kind = "prefill" if why == NEED_PREFILL else "decode"
        self.tables[kind] = self.timed.table(kind)
        if kind == "decode":
            self.decode = _grid(self.tables[kind])
        else:
            self.prefill = _grid(self.tables[kind])

    def _price(self, seqs: int, tokens: int, prefix: float) -> None:
        """Price prompts that were not met before; the places are doubled before half of them are taken."""
        if 2 * (self.priced + 1) > len(self.prompts.seqs):
            old, self.prompts = self.prompts, _no_prompts(2 * len(self.prompts.seqs))
            for place in np.flatnonzero(old.seqs):
                self._keep(int(old.seqs[place]), int(old.tokens[place]), old.prefix[place], old.seconds[place])
        self._keep(seqs, tokens, prefix, self.timed.prompt_s(seqs, tokens, prefix))
        self.priced += 1

    def _keep(self, seqs: int, tokens: int, prefix: float, seconds: float) -> None:
        place = _place(self.prompts, seqs, tokens, prefix)
        self.prompts.seqs[place], self.prompts.tokens[place] = seqs, tokens
        self.prompts.prefix[place], self.prompts.seconds[place] = prefix, seconds


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
        counters, clock = np.zeros(9, np.int64), np.zeros(3)
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


def _no_prompts(size: int) -> Prompts:
    return Prompts(np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size), np.zeros(size))
