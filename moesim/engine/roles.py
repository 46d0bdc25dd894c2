"""Prefill and decode on pools of their own: prompts are read in one, their KV cache moves to the other over NICs."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.engine.batch_state import Limits, Requests, new_requests
from moesim.engine.in_flight import Flow
from moesim.engine.serving import Load, Pool, PrefillSide, Served, Source, StepTime, check_limits, record, served_of

if TYPE_CHECKING:
    from moesim.engine.compiled_steps import StepTables

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RolePool:
    """One role's instances: limits of a rank, ranks of an instance, instances, and the seconds of a planned step.

    flow: of instances with pipeline stages, see `serving.Pool`. tables: what compiled runs with the same `step_time`
    were timed for so far, to start from and to add to.
    """

    limits: Limits
    ranks: int
    instances: int
    step_time: StepTime
    tables: StepTables | None = None
    flow: Flow | None = None


@dataclass(frozen=True)
class Transfer:
    """How KV cache moves from a prefill rank to a decode rank.

    bytes_per_token: that one GPU sends, all GPUs of a rank side by side; gpus: of a rank, each sending so much (of
    several pipeline stages the fullest counts one for each of its GPUs, the others less). bytes_per_s, latency_s: of a
    GPU's share of its NIC. layers: whose caches one GPU sends. by_layer: a layer's cache leaves when it is computed,
    while the last step of the prompt goes on; otherwise all of it leaves when the prompt is read.
    """

    bytes_per_token: float
    gpus: float
    bytes_per_s: float
    latency_s: float
    layers: int
    by_layer: bool

    def seconds(self, tokens: int) -> float:
        """Time of the NIC for a prompt, without waiting."""
        return self.latency_s + tokens * self.bytes_per_token / self.bytes_per_s


class _Moves:
    """Moves the cache of read prompts: a NIC sends, and receives, for one request at a time."""

    def __init__(self, prefill: Pool, decode: Pool, transfer: Transfer, source: Source) -> None:
        self.prefill, self.decode, self.transfer, self.source = prefill, decode, transfer, source
        self.sending_s = np.zeros(prefill.ranks * prefill.instances)
        self.receiving_s = np.zeros(decode.ranks * decode.instances)
        self.target = np.zeros(len(prefill.requests.isl), np.int64)
        self.taken_s = np.full(len(prefill.requests.isl), np.nan)

    def start(self, ended: NDArray[np.int64]) -> None:
        """Prompts were read: their caches leave, each when both NICs are free."""
        for request in ended.tolist():
            if self.decode.requests.osl[request] == 1:  # nothing is left to decode: the prefill rank answers
                self._answer(request)
                self._end(request)
            else:
                last_step_s = self.prefill.last_step_s[int(self.prefill.position[request]) % self.prefill.instances]
                self.prefill.environment.process(self._move(request, last_step_s))

    def _move(self, request: int, last_step_s: float) -> Generator[Any, Any, None]:
        environment, transfer = self.prefill.environment, self.transfer
        target = self.decode.pick()
        self.decode.chosen += 1
        self.target[request] = target
        sender = int(self.prefill.position[request])
        seconds, now_s = transfer.seconds(int(self.prefill.requests.isl[request])), environment.now
        ready_s = now_s - last_step_s if transfer.by_layer else now_s
        begin_s = max(ready_s, self.sending_s[sender], self.receiving_s[target])
        end_s = begin_s + seconds
        if transfer.by_layer:  # the last layer's share can leave only when the step has ended
            end_s = max(end_s, now_s + transfer.latency_s + (seconds - transfer.latency_s) / transfer.layers)
        self.sending_s[sender] = self.receiving_s[target] = end_s
        yield environment.timeout(end_s - now_s)
        self.taken_s[request] = end_s - now_s
        self._answer(request)
        self.decode.put(request, target)

    def _answer(self, request: int) -> None:
        """The first token reaches the user."""
        requests = self.decode.requests
        requests.arrival_s[request] = self.prefill.requests.arrival_s[request]
        requests.first_token_s[request] = requests.last_token_s[request] = self.prefill.environment.now

    def _end(self, request: int) -> None:
        self.decode.requests.finish_s[request] = self.prefill.environment.now
        if self.source.load.concurrency is not None:
            self.source.follow(1)


def serve_roles(
    load: Load, prefill: RolePool, decode: RolePool, transfer: Transfer, *, balance: str = "round_robin",
    compiled: bool = True,
) -> Served:  # fmt: skip
    """Run all requests through a prefill pool and then a decode pool.

    The first token is the user's when the cache has arrived, as the decode rank answers. A request preempted in the
    decode pool is read again there. compiled: requests sent in turn, whose steps are timed by table, run in
    `compiled_roles`, with the same times. Raises Infeasible when a request can never be admitted in either.
    """
    count = len(load.isl)
    prompts = replace(load, osl=np.ones(count, np.int64))
    check_limits(prompts, prefill.limits)
    check_limits(replace(load, blocks=None), decode.limits)
    timed = all(getattr(pool.step_time, "role_compilable", False) for pool in (prefill, decode))
    if compiled and timed and load.blocks is None and balance == "round_robin":
        return _compiled(load, prefill, decode, transfer)
    environment = simpy.Environment()
    first = Pool(
        environment, new_requests(load.isl, prompts.osl), prefill.limits, prefill.ranks, prefill.instances,
        prefill.step_time, balance, load.blocks, flow=prefill.flow,
    )  # fmt: skip
    waiting = _with_caches(load)
    second = Pool(
        environment, waiting, decode.limits, decode.ranks, decode.instances, decode.step_time, balance,
        flow=decode.flow,
    )  # fmt: skip
    source = Source(load, first)
    moves = _Moves(first, second, transfer, source)
    first.on_end = moves.start
    if load.concurrency is not None:
        second.on_end = lambda ended: source.follow(len(ended))
    source.start()
    environment.run()
    read, done = served_of(first, source.arrived), served_of(second, 0)
    moved = np.isfinite(moves.taken_s)
    sent = float(load.isl[moved].sum()) * transfer.bytes_per_token * transfer.gpus
    return _both(read, done, PrefillSide(read, moves.taken_s, sent, first.position, moves.target))


def _with_caches(load: Load) -> Requests:
    """Requests as they come to the decode pool: prompts read, first tokens made."""
    waiting = new_requests(load.isl, load.osl)
    waiting.read[:] = load.isl
    waiting.generated[:] = 1
    return waiting


def _compiled(load: Load, prefill: RolePool, decode: RolePool, transfer: Transfer) -> Served:
    from moesim.engine.compiled_pool import RolePart, pool_state
    from moesim.engine.compiled_roles import closed_arrivals, open_arrivals, run
    from moesim.engine.compiled_steps import StepTables
    from moesim.engine.compiled_transfers import Links

    count = len(load.isl)
    asked = (new_requests(load.isl, np.ones(count, np.int64)), _with_caches(load))
    first, second = (
        RolePart(
            pool_state(requests, pool.limits, pool.ranks, pool.instances),
            pool.tables or StepTables(_timed(pool)),
            _timed(pool),
        )
        for requests, pool in zip(asked, (prefill, decode), strict=True)
    )
    ints, nan = np.zeros(count, np.int64), np.full(count, np.nan)
    links = Links(
        sending_s=np.zeros(prefill.ranks * prefill.instances),
        receiving_s=np.zeros(decode.ranks * decode.instances),
        end_s=np.zeros(count),
        order=ints.copy(),
        request=ints.copy(),
        target=ints.copy(),
        taken_s=nan,
        moving=np.zeros(2, np.int64),
        bytes_per_token=float(transfer.bytes_per_token),
        bytes_per_s=float(transfer.bytes_per_s),
        latency_s=float(transfer.latency_s),
        layers=transfer.layers,
        by_layer=transfer.by_layer,
    )
    if load.arrival_s is None:
        arrivals = closed_arrivals(count, int(load.concurrency or 0), load.front_end_s)
    else:
        arrivals = open_arrivals(load.arrival_s, load.front_end_s)
    now_s = run(first, second, links, arrivals)
    read, done = (_served(part, count, now_s) for part in (first, second))
    moved = np.isfinite(links.taken_s)
    sent = float(load.isl[moved].sum()) * transfer.bytes_per_token * transfer.gpus
    side = PrefillSide(read, links.taken_s, sent, first.state.position, links.target, second.state.joined_s)
    return _both(read, done, side)


def _timed(pool: RolePool) -> Any:
    return pool.step_time


def _served(part: Any, count: int, now_s: float) -> Served:
    from moesim.engine.compiled_pool import GAPS, PEAK_KV, STEPS

    state = part.state
    gaps = int(state.counters[GAPS])
    log = state.log[: state.counters[STEPS]]
    kept = state.gap_s[:gaps].copy(), state.gap_n[:gaps].copy()
    return record(state.requests, log, kept, len(log) + count, int(state.counters[PEAK_KV]), [state.groups], now_s)


def _both(read: Served, done: Served, side: PrefillSide) -> Served:
    """The run as a whole, told by its decode pool."""
    return replace(
        done,
        events=done.events + read.events,
        preemptions=done.preemptions + read.preemptions,
        recomputed_tokens=done.recomputed_tokens + read.recomputed_tokens,
        prefix_asked_tokens=read.prefix_asked_tokens,
        prefix_found_tokens=read.prefix_found_tokens,
        prefill=side,
    )
