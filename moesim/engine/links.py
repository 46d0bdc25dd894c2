"""Operations that share the links of a cluster max-min fair, as a fluid; `des` runs link users here under a network.

A collective is one flow on each link that carries some of its bytes, and asks there for what it uses when alone: bytes
over its time. A stream (a KV transfer) is one flow over its whole path. Flows on a link share it max-min fair
(`network.sharing`); a flow that gets less than it asks for makes that much less progress, and a collective is over when
its last flow is. Between two starts nothing else changes, so the fluid runs from one completed part to the next in
compiled code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.network.sharing import fill

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Finish = Callable[[int, "float | None"], None]

# A part that took longer than alone by no more than this part of the clock was not slowed, and work below this part of
# a flow's whole is done: rounding.
ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Streams:
    """Flows that never end: asked [streams] bytes/s; link[start[s] : start[s + 1]], the links that stream s crosses."""

    asked: Floats
    start: Ints
    link: Ints


NO_STREAMS = Streams(np.zeros(0), np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Flows:
    """Flows of a running operation, one on each link: link and asked [flows], bytes/s when alone; part [flows]."""

    link: Ints
    asked: Floats
    part: Ints


class Operation:
    """A running operation in parts that end one after the other: ranks that leave at the same time alone.

    alone_s: [parts], rising; ranks: of each part. finish is called with each rank when its part is over, and the
    seconds that it took if it was slowed down, else None.
    """

    def __init__(self, alone_s: list[float], ranks: list[list[int]], flows: Flows, finish: Finish) -> None:
        self.alone_s = alone_s
        self.ranks = ranks
        self.flows = flows
        self.finish = finish
        self.started_s = 0.0
        self.ended = 0  # parts that are over


class SharedLinks:
    """The links of a cluster in simulated time. capacity: [links] bytes/s."""

    def __init__(self, environment: Any, capacity: Floats, streams: Streams) -> None:
        self._environment = environment
        self._capacity = capacity
        self._streams = streams
        self._active: list[Operation] = []
        self._at_s = 0.0
        self._fluid: _Fluid | None = None
        self._version = 0  # of the planned completion that counts; earlier ones are void
        self._settling = False

    def start(self, operation: Operation) -> None:
        """Begin an operation now."""
        self._catch_up()
        operation.started_s = self._environment.now
        self._active.append(operation)
        fluid = _Fluid.of(operation)
        self._fluid = fluid if self._fluid is None else self._fluid.with_more(fluid, len(self._active) - 1)
        if not self._settling:  # once for each instant
            self._settling = True
            self._environment.timeout(0.0).callbacks.append(self._settle)

    def _catch_up(self) -> None:
        """Bring the fluid up to now. Parts that end at this very instant are told of when it is settled."""
        left_s = self._environment.now - self._at_s
        while self._fluid is not None and left_s > 0.0 and self._fluid.open.any():
            left_s -= self._run(self._fluid, left_s)
        self._at_s = self._environment.now
        self._version += 1

    def _run(self, fluid: _Fluid, limit_s: float) -> float:
        taken: float = _flow(
            fluid.left, fluid.whole, fluid.asked, fluid.link, fluid.key, fluid.open,
            self._streams.asked, self._streams.start, self._streams.link, self._capacity, limit_s,
        )  # fmt: skip
        return taken

    def _settle(self, _: Any) -> None:
        """Tell of parts that are over and plan the next: run ahead on a copy, the state when its time comes."""
        self._settling = False
        self._tell()
        if self._fluid is None:
            return
        self._version += 1
        version, ahead = self._version, self._fluid.copy()
        seconds = self._run(ahead, np.inf)

        def arrive(_: Any) -> None:
            if version == self._version:
                self._fluid, self._at_s = ahead, self._environment.now
                self._settle(None)

        self._environment.timeout(seconds).callbacks.append(arrive)

    def _tell(self) -> None:
        """Finish the ranks of every part that is over, and go on with what is left."""
        if self._fluid is None:
            return
        now_s = self._environment.now
        over = []
        for place, operation in enumerate(self._active):
            first, parts = self._fluid.first[place], len(operation.alone_s)
            while operation.ended < parts and self._fluid.open[first + operation.ended] == 0:
                alone_s, ranks = operation.alone_s[operation.ended], operation.ranks[operation.ended]
                took_s = now_s - operation.started_s
                slowed = took_s - alone_s > ROUNDING * now_s
                for rank in ranks:
                    operation.finish(rank, took_s if slowed else None)
                operation.ended += 1
            if operation.ended == parts:
                over.append(place)
        self._fluid = self._fluid.without(over)
        self._active = [operation for place, operation in enumerate(self._active) if place not in over]


class _Fluid:
    """All flows of the running operations, beside each other; each part has a clock beside its flows on links.

    left, whole: seconds alone, what is left and what there was; asked: bytes/s; link: -1 for a clock; key: number of
    the part, over all operations; open: [parts], flows not over; first: first part of each operation.
    """

    def __init__(
        self, left: Floats, whole: Floats, asked: Floats, link: Ints, key: Ints, open_: Ints, first: list[int]
    ) -> None:
        self.left, self.whole, self.asked, self.link, self.key = left, whole, asked, link, key
        self.open, self.first = open_, first

    @staticmethod
    def of(operation: Operation) -> _Fluid:
        flows, parts = operation.flows, len(operation.alone_s)
        key = np.concatenate([flows.part, np.arange(parts)])
        whole = np.asarray(operation.alone_s)[key]
        asked = np.concatenate([flows.asked, np.ones(parts)])
        link = np.concatenate([flows.link, np.full(parts, -1)])
        return _Fluid(whole.copy(), whole, asked, link, key, np.bincount(key, minlength=parts), [0])

    def copy(self) -> _Fluid:
        return _Fluid(self.left.copy(), self.whole, self.asked, self.link, self.key, self.open.copy(), self.first)

    def with_more(self, other: _Fluid, place: int) -> _Fluid:
        """With one operation more, the last."""
        parts = len(self.open)
        return _Fluid(
            np.concatenate([self.left, other.left]),
            np.concatenate([self.whole, other.whole]),
            np.concatenate([self.asked, other.asked]),
            np.concatenate([self.link, other.link]),
            np.concatenate([self.key, other.key + parts]),
            np.concatenate([self.open, other.open]),
            [*self.first[:place], parts],
        )

    def without(self, over: list[int]) -> _Fluid | None:
        """Without the operations that are over; None when nothing is left."""
        if len(over) == len(self.first):
            return None
        if not over:
            return self
        ends = [*self.first[1:], len(self.open)]
        kept = np.ones(len(self.open), dtype=bool)
        for place in over:
            kept[self.first[place] : ends[place]] = False
        number = np.cumsum(kept) - 1
        flows = kept[self.key]
        first = [int(number[start]) for place, start in enumerate(self.first) if place not in over]
        return _Fluid(
            self.left[flows], self.whole[flows], self.asked[flows], self.link[flows], number[self.key[flows]],
            self.open[kept], first,
        )  # fmt: skip


@njit(cache=True)
def _flow(
    left: Floats,
    whole: Floats,
    asked: Floats,
    link: Ints,
    key: Ints,
    open_: Ints,
    stream_asked: Floats,
    stream_start: Ints,
    stream_link: Ints,
    capacity: Floats,
    limit_s: float,
) -> float:
    """Run on until a part is completed or `limit_s` has passed; changes `left` and `open_`, returns the seconds.

    A flow that is over has `left` below 0.
    """
    flows, streams = len(left), len(stream_asked)
    taken = 0.0
    while True:
        # Flows that still run on links, then the streams.
        running = 0
        for flow in range(flows):
            if left[flow] >= 0.0 and link[flow] >= 0:
                running += 1
        demand = np.empty(running + streams)
        start = np.empty(running + streams + 1, dtype=np.int64)
        crossed = np.empty(running + len(stream_link), dtype=np.int64)
        number = 0
        for flow in range(flows):
            if left[flow] >= 0.0 and link[flow] >= 0:
                demand[number], start[number], crossed[number] = asked[flow], number, link[flow]
                number += 1
        for stream in range(streams):
            demand[running + stream] = stream_asked[stream]
            start[running + stream] = running + stream_start[stream]
        start[running + streams] = running + len(stream_link)
        crossed[running:] = stream_link
        rates = fill(demand, start, crossed, np.ones(len(crossed)), capacity)
        step = np.inf
        number = 0
        speed = np.ones(flows)
        for flow in range(flows):
            if left[flow] < 0.0:
                continue
            if link[flow] >= 0:
                speed[flow] = min(rates[number] / demand[number], 1.0)
                if speed[flow] > 1.0 - ROUNDING:
                    speed[flow] = 1.0
                number += 1
            step = min(step, left[flow] / speed[flow])
        if step == np.inf:
            return taken
        if taken + step > limit_s:
            for flow in range(flows):
                if left[flow] >= 0.0:
                    left[flow] = max(left[flow] - (limit_s - taken) * speed[flow], 0.0)
            return limit_s
        completed = False
        for flow in range(flows):
            if left[flow] < 0.0:
                continue
            left[flow] -= step * speed[flow]
            if left[flow] <= ROUNDING * whole[flow]:
                left[flow] = -1.0
                open_[key[flow]] -= 1
                completed = completed or open_[key[flow]] == 0
            else:
                left[flow] = max(left[flow], 0.0)
        taken += step
        if completed:
            return taken
