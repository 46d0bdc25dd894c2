"""Activities that share the links of their ranks max-min fair, in simulated time; `des` runs its link users here.

An activity asks of each link the share of its rate that it uses when alone. Rates are max-min fair in units of link
rate on the activity's most used link, never above what it uses alone, so that a light activity is not slowed by a heavy
one. They are settled once for each instant at which the set of activities changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.graph.task import Link
from moesim.network.sharing import fill

LINKS = len(Link)

# A link counts as contended when more than this is asked of it, and an activity as unhindered from 1 less this:
# sums of shares that make 1 exactly on paper are off by rounding.
ROUNDING = 1e-12

Finish = Callable[[int, "float | None"], None]


class Activity:
    """A running task: where, how far, how fast.

    alone_s: by rank, seconds that its part takes alone; a rank whose part is over leaves its links. links: (link, share
    of its rate), shares above 0, the same on all ranks. finish is called with each rank when its part is over, and the
    seconds that it took if it was slowed down, else None.
    """

    def __init__(self, alone_s: Mapping[int, float], links: tuple[tuple[Link, float], ...], finish: Finish) -> None:
        self.links = links
        self.finish = finish
        self.demand = max(share for _, share in links)
        leaving: dict[float, list[int]] = {}
        for rank, seconds in alone_s.items():
            leaving.setdefault(seconds, []).append(rank)
        self.parts = sorted(leaving.items(), reverse=True)  # the next one to end last
        self.started_s = 0.0
        self.updated_s = 0.0
        self.progress_s = 0.0  # in seconds alone
        self.rate = 0.0  # progress for each second; 0 until it is first settled
        self.slowed = False
        self.schedule = 0  # number of the timeout that counts; earlier ones are void
        self._crossed: tuple[NDArray[np.int64], NDArray[np.float64]] | None = None

    def advance(self, now_s: float) -> None:
        """Bring the progress up to now."""
        if now_s > self.updated_s:
            self.slowed = self.slowed or self.rate < 1.0
            self.progress_s += self.rate * (now_s - self.updated_s)
        self.updated_s = now_s

    def leave(self) -> tuple[float, list[int]]:
        """Take away the next part to end."""
        self._crossed = None
        return self.parts.pop()

    def crossed(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rank x link numbers it now crosses, and what a unit of its rate takes of each."""
        if self._crossed is None:
            ranks = np.array([rank for _, part in self.parts for rank in part], dtype=np.int64)
            numbers = np.concatenate([ranks * LINKS + int(link) for link, _ in self.links])
            amounts = np.repeat([share / self.demand for _, share in self.links], ranks.size)
            self._crossed = (numbers, amounts)
        return self._crossed


class Fabric:
    """The links of all ranks, and who runs on them."""

    def __init__(self, environment: Any, ranks: int) -> None:
        self._environment = environment
        self._capacity = np.ones(ranks * LINKS)
        self._asked = [0.0] * (ranks * LINKS)
        self._contended: set[int] = set()
        self._active: dict[Activity, None] = {}  # a set that keeps its order
        self._settling = False

    def start(self, activity: Activity) -> None:
        """Begin an activity now."""
        activity.started_s = activity.updated_s = self._environment.now
        self._active[activity] = None
        for _, ranks in activity.parts:
            self._ask(ranks, activity.links, 1.0)
        self._settle_soon()

    def _ask(self, ranks: list[int], links: tuple[tuple[Link, float], ...], sign: float) -> None:
        for link, share in links:
            for rank in ranks:
                number = rank * LINKS + link
                self._asked[number] += sign * share
                if self._asked[number] > 1.0 + ROUNDING:
                    self._contended.add(number)
                else:
                    self._contended.discard(number)

    def _settle_soon(self) -> None:
        if not self._settling:
            self._settling = True
            self._environment.timeout(0.0).callbacks.append(self._settle)

    def _settle(self, _: Any) -> None:
        self._settling = False
        for activity, rate in zip(self._active, self._rates(), strict=True):
            if rate != activity.rate:
                activity.advance(self._environment.now)
                activity.rate = rate
                self._schedule(activity)

    def _rates(self) -> list[float]:
        """Progress rate of each activity, 0 to 1."""
        if not self._contended:
            return [1.0] * len(self._active)
        crossed = [activity.crossed() for activity in self._active]
        demand = np.array([activity.demand for activity in self._active])
        start = np.zeros(demand.size + 1, dtype=np.int64)
        np.cumsum([numbers.size for numbers, _ in crossed], out=start[1:])
        numbers = np.concatenate([numbers for numbers, _ in crossed])
        amounts = np.concatenate([amounts for _, amounts in crossed])
        rates = fill(demand, start, numbers, amounts, self._capacity) / demand
        rates[rates > 1.0 - ROUNDING] = 1.0
        return list(map(float, rates))

    def _schedule(self, activity: Activity) -> None:
        """Plan the end of the activity's next part at its present rate."""
        activity.schedule += 1
        number = activity.schedule
        left_s = max(activity.parts[-1][0] - activity.progress_s, 0.0)

        def arrive(_: Any) -> None:
            if number == activity.schedule:
                self._end_part(activity)

        self._environment.timeout(left_s / activity.rate).callbacks.append(arrive)

    def _end_part(self, activity: Activity) -> None:
        now_s = self._environment.now
        contended = bool(self._contended)
        activity.advance(now_s)
        activity.progress_s, ranks = activity.leave()
        self._ask(ranks, activity.links, -1.0)
        for rank in ranks:
            activity.finish(rank, now_s - activity.started_s if activity.slowed else None)
        if activity.parts:
            self._schedule(activity)
        else:
            del self._active[activity]
        if contended:
            self._settle_soon()
