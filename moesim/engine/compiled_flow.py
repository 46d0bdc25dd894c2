"""The serving loop of instances with pipeline stages as one compiled loop: the same events as `serving`, faster.

As in `compiled`, each instance is run by itself from its first request to its last, and asks Python for what it cannot
know yet. A property test holds it against the SimPy loop: the same times to the last digit.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.engine.batch_state import NONE, Limits, Plan, Ranks, Requests, new_ranks
from moesim.engine.batcher import arrive, finish_step, plan_step
from moesim.engine.compiled import FIRST_STEPS, admission
from moesim.engine.compiled_steps import (
    DONE,
    GAPS_FULL,
    LOG_FULL,
    NEED_DECODE,
    NEED_PREFILL,
    NEED_PROMPT,
    TOO_LARGE,
    TOO_SMALL,
    Grid,
    Prompts,
    StepTables,
    Timed,
    step_s,
)
from moesim.engine.in_flight import Flow, come_back, depart
from moesim.engine.kernel import kernel
from moesim.engine.lookups import DecodeAttention, Graphs
from moesim.engine.prefix_cache import new_prefix_cache
from moesim.engine.steptable import StepTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Places in `counters`; those of `compiled` that a step asks through keep their numbers.
NEXT, PLANNED, GAPS, STEPS, ENDED, PEAK_KV, ASKED_SEQS, ASKED_TOKENS, FREE, UNDER_WAY, SENT = range(11)
NOW, STARTED = range(2)


class Slots(NamedTuple):
    """What each batch of a group has for itself, see `in_flight.Slot`: [slots, ...] as there.

    free, under_way: slots in the order in which they are tried, and in which they end. end_s [slots].
    """

    running: Ints
    running_seqs: Ints
    context: Ints
    full: NDArray[np.bool_]
    unpolled: Ints
    elsewhere: Ints
    joining: Ints
    last: NDArray[np.bool_]
    decode_seqs: Ints
    decode_kv: Floats
    prefill_seqs: Ints
    prefill_tokens: Ints
    prefill_prefix: Floats
    picked: Ints
    chunk: Ints
    totals: Ints
    free: Ints
    under_way: Ints
    end_s: Floats


class Way(NamedTuple):
    """An instance's stages: seconds of the host, of each hop without rows and for each row, and when all are free."""

    host_s: float
    fixed_s: Floats
    each_s: Floats
    stage_free_s: Floats
    link_free_s: Floats
    busy_s: Floats


class StagedTimed(Timed, Protocol):
    """What times batches by stage: `stepmodel.TimedModel`."""

    def stage_tables(self, kind: str) -> list[StepTable]:
        """The timed table of each stage. Raises OutsideProfile."""
        ...

    def hops(self) -> tuple[float, Floats, Floats]:
        """Host seconds of a batch; seconds of each hop without tokens, and for each row."""
        ...


@kernel
def _ranks(group: Ranks, slots: Slots, slot: int) -> Ranks:
    return Ranks(
        group.head, group.tail, group.reading, slots.running[slot], slots.running_seqs[slot], slots.context[slot],
        group.kv_tokens, slots.elsewhere[slot], group.requests_in, group.tokens_in, group.output_share,
        slots.full[slot], slots.unpolled[slot], group.held, group.preemptions, group.recomputed_tokens, group.cache,
    )  # fmt: skip


@kernel
def _plan(slots: Slots, slot: int) -> Plan:
    return Plan(
        slots.decode_seqs[slot], slots.decode_kv[slot], slots.prefill_seqs[slot], slots.prefill_tokens[slot],
        slots.prefill_prefix[slot], slots.picked[slot], slots.chunk[slot], slots.totals[slot],
    )  # fmt: skip


@kernel
def _form(requests: Requests, group: Ranks, slots: Slots, limits: Limits, counters: Ints) -> int:
    """Form a batch in the first free slot that has anything to do; the slot, NONE where there is nothing."""
    for place in range(counters[FREE]):
        slot = slots.free[place]
        for rank in range(len(group.head)):
            slots.elsewhere[slot, rank] = 0
            for other in range(len(slots.end_s)):
                if other != slot:
                    slots.elsewhere[slot, rank] += slots.running_seqs[other, rank] + slots.joining[other, rank]
        plan = _plan(slots, slot)
        if plan_step(requests, _ranks(group, slots, slot), limits, plan) == 0:
            continue
        depart(requests, plan, slots.last[slot], slots.joining[slot])
        for later in range(place, counters[FREE] - 1):
            slots.free[later] = slots.free[later + 1]
        counters[FREE] -= 1
        return int(slot)
    return NONE


@kernel
def _stage(grid: Grid, seconds: Floats, stage: int) -> Grid:
    return Grid(
        grid.known, grid.tokens, grid.hot, grid.attention_s, seconds[stage], grid.before_s, grid.ends_below,
        grid.ends_above,
    )  # fmt: skip


@kernel
def _time(
    plan: Plan, decode: Grid, decode_s: Floats, prefill: Grid, prefill_s: Floats, attention: DecodeAttention,
    graphs: Graphs, prompts: Prompts, counters: Ints, clock: Floats, way: Way, stage_s: Floats,
) -> int:  # fmt: skip
    """Fill `stage_s` with the seconds of a planned batch on each stage; why it cannot be, DONE where it can."""
    asked = decode if plan.totals[1] == 0 else prefill
    if not asked.known:
        return NEED_DECODE if plan.totals[1] == 0 else NEED_PREFILL
    for stage in range(len(stage_s)):
        why, stage_s[stage] = step_s(
            plan, _stage(decode, decode_s, stage if decode.known else 0),
            _stage(prefill, prefill_s, stage if prefill.known else 0), attention, graphs, prompts, counters, clock,
        )  # fmt: skip
        if why != DONE:
            return int(why)
    stage_s[0] -= way.host_s
    return DONE


@kernel
def _send(plan: Plan, graphs: Graphs, ready_s: float, stage_s: Floats, way: Way) -> float:
    """Let a batch follow those before it through all stages, see `in_flight.Lane.send`; its end."""
    most = 0
    for rank in range(len(plan.decode_seqs)):
        most = max(most, plan.decode_seqs[rank] + plan.prefill_tokens[rank])
    rows = float(most)
    if plan.totals[1] == 0:
        place = int(np.searchsorted(graphs.sizes, most))
        if place < len(graphs.sizes):
            rows = float(graphs.sizes[place])
    at_s = ready_s
    for stage in range(len(stage_s)):
        at_s = max(at_s, way.stage_free_s[stage]) + stage_s[stage]
        way.stage_free_s[stage] = at_s
        way.busy_s[stage] += stage_s[stage]
        if stage < len(way.fixed_s):
            at_s = max(at_s, way.link_free_s[stage]) + (way.fixed_s[stage] + rows * way.each_s[stage])
            way.link_free_s[stage] = at_s
    return at_s


@kernel
def _advance(
    requests: Requests, group: Ranks, slots: Slots, limits: Limits, mine: Ints, instances: int,
    admitted_s: Floats, scheduled_s: Floats, decode: Grid, decode_s: Floats, prefill: Grid, prefill_s: Floats,
    attention: DecodeAttention, graphs: Graphs, prompts: Prompts, way: Way, stage_s: Floats, counters: Ints,
    clock: Floats, gap_s: Floats, gap_n: Ints, log: Floats, ended: Ints, concurrency: int,
) -> int:  # fmt: skip
    """Run one instance until it is done or needs something; returns why it stopped. concurrency: 0 = an open loop."""
    ranks = len(group.head)
    while counters[ENDED] < len(mine):
        if counters[PLANNED] == 0:
            if concurrency > 0:
                sent = min(concurrency + counters[ENDED], len(mine))
                for place in range(counters[SENT], sent):
                    requests.arrival_s[mine[place]] = clock[NOW]
                    arrive(requests, group, mine[place] % ranks, mine[place])
                counters[SENT] = counters[NEXT] = sent
            else:
                while counters[NEXT] < len(mine):
                    request = mine[counters[NEXT]]
                    late = admitted_s[request] - clock[NOW]
                    # Of two events at one instant, that which was scheduled first comes first.
                    if late > 0.0 or (late == 0.0 and scheduled_s[request] > clock[STARTED]):
                        break
                    requests.arrival_s[request] = admitted_s[request]
                    arrive(requests, group, (request // instances) % ranks, request)
                    counters[NEXT] += 1
            slot = _form(requests, group, slots, limits, counters)
            if slot != NONE:
                counters[PEAK_KV] = max(counters[PEAK_KV], slots.totals[slot, 2])
                counters[PLANNED] = slot + 1
            elif counters[UNDER_WAY] == 0:
                if counters[NEXT] == len(mine) or concurrency > 0:
                    return DONE
                clock[NOW] = admitted_s[mine[counters[NEXT]]]
                clock[STARTED] = np.inf  # idle: all requests of that instant are taken
                continue
            else:
                if counters[GAPS] + len(ended) > len(gap_s):
                    return GAPS_FULL
                slot = slots.under_way[0]
                counters[UNDER_WAY] -= 1
                for place in range(counters[UNDER_WAY]):
                    slots.under_way[place] = slots.under_way[place + 1]
                if slots.end_s[slot] > clock[NOW]:
                    clock[STARTED] = clock[NOW]
                    clock[NOW] += slots.end_s[slot] - clock[NOW]
                _finish(requests, group, slots, slot, limits, counters, clock, gap_s, gap_n, ended)
                continue
        if counters[STEPS] == len(log):
            return LOG_FULL
        slot = counters[PLANNED] - 1
        plan = _plan(slots, slot)
        why = _time(
            plan, decode, decode_s, prefill, prefill_s, attention, graphs, prompts, counters, clock, way, stage_s
        )
        if why != DONE:
            return int(why)
        slots.end_s[slot] = _send(plan, graphs, clock[NOW] + way.host_s, stage_s, way)
        row = log[counters[STEPS]]
        row[0], row[1] = clock[NOW], slots.end_s[slot] - clock[NOW]
        row[2], row[3] = plan.totals[0], plan.totals[1]
        counters[STEPS] += 1
        slots.under_way[counters[UNDER_WAY]] = slot
        counters[UNDER_WAY] += 1
        counters[PLANNED] = 0
        if way.host_s > 0.0:
            clock[STARTED] = clock[NOW]
            clock[NOW] += way.host_s
    return DONE


@kernel
def _finish(
    requests: Requests, group: Ranks, slots: Slots, slot: int, limits: Limits, counters: Ints, clock: Floats,
    gap_s: Floats, gap_n: Ints, ended: Ints,
) -> None:  # fmt: skip
    """Hand out the tokens of a batch and free its slot, which is the next to be tried."""
    plan, ranks = _plan(slots, slot), _ranks(group, slots, slot)
    come_back(requests, plan, slots.last[slot], slots.joining[slot])
    gaps, done = finish_step(requests, ranks, limits, plan, clock[NOW], gap_s, gap_n, counters[GAPS], ended)
    for rank in range(len(ranks.head)):
        if plan.prefill_tokens[rank] > 0:
            ranks.unpolled[rank] = limits.poll_steps
    counters[GAPS] = gaps
    counters[ENDED] += done
    for place in range(counters[FREE], 0, -1):
        slots.free[place] = slots.free[place - 1]
    slots.free[0] = slot
    counters[FREE] += 1


class StagedInstances(StepTables):
    """Runs every instance of a deployment with pipeline stages in turn over one set of requests; see `run`."""

    def __init__(
        self, requests: Requests, arrival_s: Floats, limits: Limits, ranks: int, instances: int, timed: StagedTimed,
        flow: Flow, concurrency: int = 0, front_end_s: float = 0.0,
    ) -> None:  # fmt: skip
        """arrival_s: of an open loop. concurrency: of a closed one, of a single instance; no front end with it."""
        super().__init__(timed)
        self.staged, self.flow = timed, flow
        self.requests, self.ranks, self.instances, self.concurrency = requests, ranks, instances, concurrency
        self.limits = flow.of_batch(limits)
        self.admitted_s, self.scheduled_s = np.empty(len(arrival_s)), np.empty(len(arrival_s))
        admission(arrival_s, self.admitted_s, self.scheduled_s)
        self.front_end_s = front_end_s
        if front_end_s > 0.0:  # a process of its own brings each request to the queue
            self.scheduled_s = self.admitted_s
            self.admitted_s = self.admitted_s + front_end_s
        self.seconds = {"decode": np.zeros((1, 0, 0, 0)), "prefill": np.zeros((1, 0, 0, 0))}
        self.gap_s, self.gap_n = np.zeros(FIRST_STEPS), np.zeros(FIRST_STEPS, np.int64)
        self.gaps = 1  # place 0 counts tokens of the same step
        self.groups: list[Ranks] = []
        self.busy_s: list[Floats] = []
        self.peak_kv_tokens = 0

    def run(self) -> Floats:
        """Run all; returns the batches [batches, 5]: start, seconds, decoding sequences, prompt tokens, instance.

        Raises OutsideProfile.
        """
        logs = [self._one(instance) for instance in range(self.instances)]
        if self.front_end_s > 0.0:
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
        slots = _new_slots(self.flow.batches, self.ranks, self.limits.max_running)
        host_s, fixed_s, each_s = self.staged.hops()
        stages = self.flow.stages
        way = Way(host_s, fixed_s, each_s, np.zeros(stages), np.zeros(stages - 1), np.zeros(stages))
        self.busy_s.append(way.busy_s)
        ended = np.zeros(2 * self.ranks * self.limits.max_running, np.int64)
        counters, clock, stage_s = np.zeros(11, np.int64), np.zeros(3), np.zeros(stages)
        counters[GAPS], counters[FREE] = self.gaps, self.flow.batches
        log = np.zeros((FIRST_STEPS, 5))
        attention, graphs = self.timed.attention(), self.timed.graphs_taken()
        while True:
            why = _advance(
                self.requests, group, slots, self.limits, mine, self.instances,
                self.admitted_s, self.scheduled_s, self.decode, self.seconds["decode"], self.prefill,
                self.seconds["prefill"], attention, graphs, self.prompts, way, stage_s, counters, clock, self.gap_s,
                self.gap_n, log, ended, self.concurrency,
            )  # fmt: skip
            if why == DONE:
                break
            if why == LOG_FULL:
                log = np.concatenate([log, np.zeros_like(log)])
            elif why == GAPS_FULL:
                self.gap_s = np.concatenate([self.gap_s, np.zeros(len(self.gap_s) + len(ended))])
                self.gap_n = np.concatenate([self.gap_n, np.zeros(len(self.gap_n) + len(ended), np.int64)])
            else:
                slot = int(counters[PLANNED]) - 1
                kind = "prefill" if slots.prefill_tokens[slot].any() else "decode"
                if why in (NEED_DECODE, NEED_PREFILL):
                    tables = self.staged.stage_tables(kind)
                    self.seconds[kind] = np.ascontiguousarray(np.stack([table.seconds for table in tables]))
                assert why in (NEED_DECODE, NEED_PREFILL, NEED_PROMPT, TOO_SMALL, TOO_LARGE)
                self.answer(why, counters, clock, kind)
        self.gaps = int(counters[GAPS])
        self.peak_kv_tokens = max(self.peak_kv_tokens, int(counters[PEAK_KV]))
        steps = log[: counters[STEPS]]
        steps[:, 4] = instance
        return steps


def _new_slots(count: int, ranks: int, running: int) -> Slots:
    def zeros() -> Ints:
        return np.zeros((count, ranks), np.int64)

    return Slots(
        running=np.full((count, ranks, running), NONE, np.int64),
        running_seqs=zeros(),
        context=np.full((count, ranks), NONE, np.int64),
        full=np.zeros((count, ranks), np.bool_),
        unpolled=zeros(),
        elsewhere=zeros(),
        joining=zeros(),
        last=np.zeros((count, ranks, running), np.bool_),
        decode_seqs=zeros(),
        decode_kv=np.zeros((count, ranks)),
        prefill_seqs=zeros(),
        prefill_tokens=zeros(),
        prefill_prefix=np.zeros((count, ranks)),
        picked=np.full((count, ranks, running), NONE, np.int64),
        chunk=np.zeros((count, ranks, running), np.int64),
        totals=np.zeros((count, 3), np.int64),
        free=np.arange(count, dtype=np.int64),
        under_way=np.zeros(count, np.int64),
        end_s=np.zeros(count),
    )
