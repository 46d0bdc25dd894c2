"""A prefill and a decode pool as one compiled loop: the events of `roles`, many times as fast.

The loop takes the earliest of arrivals, ends of steps and ends of transfers, hands out its tokens, and forms the steps
that can begin (see `compiled_pool`). Requests come at their times, or one for each that ends. A property test holds
the loop against the SimPy processes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.engine.compiled import admission
from moesim.engine.compiled_pool import PoolState, RolePart, Timing, begin_all, earliest, end_step, put, turn, wake
from moesim.engine.compiled_steps import DONE, GAPS_FULL
from moesim.engine.compiled_transfers import UNDER_WAY, Links, pop, push
from moesim.engine.kernel import kernel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Places in `shared`: the next request to queue, those that ended, who asks, and the requests that have come.
NEXT, ENDED, ASKING_POOL, ASKING_INSTANCE, COME = range(5)


class Arrivals(NamedTuple):
    """How requests come: concurrency of a closed loop, 0 = an open one; front_end_s of each, from there to the queue.

    arrived_s, queued_s, scheduled_s [requests]: when each comes, when it is queued, and when that was scheduled; a
    closed loop fills them as it goes.
    """

    concurrency: int
    front_end_s: float
    arrived_s: Floats
    queued_s: Floats
    scheduled_s: Floats


def open_arrivals(arrival_s: Floats, front_end_s: float) -> Arrivals:
    """The requests of an open loop."""
    arrived_s, scheduled_s = np.empty(len(arrival_s)), np.empty(len(arrival_s))
    admission(arrival_s, arrived_s, scheduled_s)
    if front_end_s == 0.0:
        return Arrivals(0, 0.0, arrived_s, arrived_s, scheduled_s)
    # A process of its own brings each request to the queue.
    return Arrivals(0, front_end_s, arrived_s, arrived_s + front_end_s, arrived_s)


def closed_arrivals(count: int, concurrency: int, front_end_s: float) -> Arrivals:
    """The `count` requests of a closed loop."""
    return Arrivals(concurrency, front_end_s, np.zeros(count), np.zeros(count), np.zeros(count))


@kernel
def _queue(pool: PoolState, arrivals: Arrivals, shared: Ints) -> None:
    """Bring the next request to its rank."""
    request = shared[NEXT]
    shared[NEXT] += 1
    pool.requests.arrival_s[request] = arrivals.arrived_s[request]
    put(pool, request, turn(pool))


@kernel
def _follow(pool: PoolState, arrivals: Arrivals, shared: Ints, count: int, now_s: float) -> None:
    """Send more requests of the closed loop, as far as there are any."""
    if arrivals.concurrency == 0:
        return
    for _ in range(min(count, len(pool.requests.isl) - shared[COME])):
        request = shared[COME]
        shared[COME] += 1
        arrivals.arrived_s[request] = arrivals.scheduled_s[request] = now_s
        arrivals.queued_s[request] = now_s + arrivals.front_end_s
        if arrivals.front_end_s == 0.0:
            _queue(pool, arrivals, shared)


@kernel
def _move(first: PoolState, second: PoolState, links: Links, request: int, now_s: float) -> None:
    """A prompt was read: its cache leaves when both NICs are free."""
    target, sender = turn(second), first.position[request]
    seconds = links.latency_s + first.requests.isl[request] * links.bytes_per_token / links.bytes_per_s
    ready_s = now_s - first.last_s[sender % len(first.state)] if links.by_layer else now_s
    end_s = max(ready_s, links.sending_s[sender], links.receiving_s[target]) + seconds
    if links.by_layer:
        end_s = max(end_s, now_s + links.latency_s + (seconds - links.latency_s) / links.layers)
    links.sending_s[sender] = links.receiving_s[target] = end_s
    links.target[request] = target
    links.taken_s[request] = end_s - now_s
    push(links, now_s + (end_s - now_s), request)


@kernel
def _answer(first: PoolState, second: PoolState, request: int, now_s: float) -> None:
    """The first token reaches the user."""
    second.requests.arrival_s[request] = first.requests.arrival_s[request]
    second.requests.first_token_s[request] = second.requests.last_token_s[request] = now_s


@kernel
def _comes_first(pool: PoolState, arrivals: Arrivals, request: int, reader: int, read_s: float) -> bool:
    """Whether a request is queued before the prompt step that ends first: of one instant, what was scheduled first."""
    queued_s = arrivals.queued_s[request]
    return bool(queued_s < read_s or arrivals.scheduled_s[request] <= pool.began_s[reader])


@kernel
def _advance(
    first: PoolState, second: PoolState, reading: Timing, decoding: Timing, links: Links, arrivals: Arrivals,
    shared: Ints, clock: Floats,
) -> int:  # fmt: skip
    """Run both pools until all requests ended or something is asked for; returns why it stopped."""
    count = len(first.requests.isl)
    if shared[COME] == 0:
        if arrivals.concurrency == 0:
            shared[COME] = count
        _follow(first, arrivals, shared, arrivals.concurrency, 0.0)
    while shared[ENDED] < count:
        now_s = clock[0]
        shared[ASKING_POOL] = 0
        why, shared[ASKING_INSTANCE] = begin_all(first, reading, now_s)
        if why == DONE:
            shared[ASKING_POOL] = 1
            why, shared[ASKING_INSTANCE] = begin_all(second, decoding, now_s)
        if why != DONE:
            return int(why)
        reader, read_s = earliest(first)
        decoder, decoded_s = earliest(second)
        moved_s = links.end_s[0] if links.moving[UNDER_WAY] > 0 else np.inf
        queued_s = arrivals.queued_s[shared[NEXT]] if shared[NEXT] < shared[COME] else np.inf
        next_s = min(read_s, decoded_s, moved_s, queued_s)
        if next_s > now_s:
            woken = wake(first)
            if wake(second) or woken:
                continue
        if next_s == np.inf:
            return DONE
        if moved_s == next_s:
            request = pop(links)
            _answer(first, second, request, next_s)
            put(second, request, links.target[request])
        elif queued_s == next_s and _comes_first(first, arrivals, shared[NEXT], reader, read_s):
            _queue(first, arrivals, shared)
        elif read_s == next_s:
            done = end_step(first, reader, next_s)
            if done < 0:
                shared[ASKING_POOL] = 0
                return GAPS_FULL
            for place in range(done):
                request = first.ended[place]
                if second.requests.osl[request] == 1:  # nothing is left to decode: the prefill rank answers
                    _answer(first, second, request, next_s)
                    second.requests.finish_s[request] = next_s
                    shared[ENDED] += 1
                    _follow(first, arrivals, shared, 1, next_s)
                else:
                    _move(first, second, links, request, next_s)
        else:
            done = end_step(second, decoder, next_s)
            if done < 0:
                shared[ASKING_POOL] = 1
                return GAPS_FULL
            shared[ENDED] += done
            _follow(first, arrivals, shared, done, next_s)
        clock[0] = next_s
    return DONE


def run(first: RolePart, second: RolePart, links: Links, arrivals: Arrivals) -> float:
    """Run both pools until the last request ended; returns the time of the last event. Raises OutsideProfile."""
    shared, clock = np.zeros(5, np.int64), np.zeros(1)
    reading, decoding = first.timing(), second.timing()
    while True:
        why = _advance(first.state, second.state, reading, decoding, links, arrivals, shared, clock)
        if why == DONE:
            return float(clock[0])
        part = second if shared[ASKING_POOL] else first
        part.mend(why, int(shared[ASKING_INSTANCE]))
        reading, decoding = first.timing(), second.timing()
