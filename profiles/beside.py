"""Two pieces of work at once: how much a transfer and a product of matrices slow each other.

On a GPU the products run on a stream of their own, on a CPU in a thread of their own; they begin before the transfers
and go on until after them. Of the products only those count that ran wholly beside transfers.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from moesim.errors import CheckFailed

SPAN = 4.0  # transfers in a row last as long as this many products, so that whole products run beside them
MOST_IN_A_ROW = 500  # a transfer so short that more were needed meets less than SPAN products
TRIES = 3  # repeats in vain, for each one wanted, before it is said that the products end too early
GIVE_UP_S = 60.0

Runs = list[tuple[float, float]]  # begin and end of each product, in seconds on the clock of the transfers


class NeverTogether(CheckFailed):
    """The two pieces of work never ran at once for long enough."""


@dataclass(frozen=True)
class Together:
    """Seconds of one transfer and one product, alone and beside each other: one value for each repeat."""

    alone_s: list[float]
    beside_s: list[float]
    product_alone_s: list[float]
    product_beside_s: list[float]

    def slowdowns(self) -> dict[str, float]:
        """The medians beside over the medians alone, as the table of overlaps names them."""
        return {
            "slowdown": median(self.beside_s) / median(self.alone_s),
            "beside_slowdown": median(self.product_beside_s) / median(self.product_alone_s),
        }


@dataclass(frozen=True)
class Pace:
    """How ranks keep step. start: all begin together. most: the largest value of any rank."""

    start: Callable[[], object] = lambda: None
    most: Callable[[float], float] = lambda value: value


def measure(
    torch: Any, device: Any, transfer: Callable[[], object], product: Callable[[], object], *, repeats: int,
    pace: Pace, reset: Callable[[], object] = lambda: None,
) -> Together:  # fmt: skip
    """Time both alone, then beside each other. Raises NeverTogether when no repeat was covered by products.

    All ranks call it alike, and each gets the seconds of the slowest.
    """
    clock = _DeviceClock(torch) if device.type == "cuda" else _HostClock()

    def timed(work: Callable[[], object], count: int) -> float:
        pace.start()
        return pace.most(clock.elapsed(work, count) / count)

    for work in (transfer, product):
        timed(work, 2)  # warm
    reset()
    product_alone = [timed(product, 1) for _ in range(repeats)]
    count = math.ceil(SPAN * median(product_alone) / max(timed(transfer, 2), 1e-9))
    count = min(max(count, 1), MOST_IN_A_ROW)
    alone, beside, product_beside = [], [], []
    margin = 2.0
    for _ in range(TRIES * repeats):
        reset()
        alone.append(timed(transfer, count))
        reset()
        products = math.ceil(margin * max(SPAN, alone[-1] * count / median(product_alone))) + 2
        pace.start()
        seconds, window, runs = clock.beside(transfer, count, product, products)
        inside = [end - begin for begin, end in runs if window[0] <= begin and end <= window[1]]
        if pace.most(0.0 if runs[-1][1] >= window[1] else 1.0):
            margin *= 2  # on some rank the products ended first
            continue
        beside.append(pace.most(seconds / count))
        product_beside.append(pace.most(median(inside) if inside else _around(runs, window)))
        if len(beside) == repeats:
            break
    if not beside:
        raise NeverTogether(
            "the products ended before the transfers, again and again", where="--beside", mend="free the machine"
        )
    return Together(alone, beside, product_alone, product_beside)


def _around(runs: Runs, window: tuple[float, float]) -> float:
    """The product that the transfers fell into, where they were shorter than one."""
    return next((end - begin for begin, end in runs if end >= window[0]), runs[-1][1] - runs[-1][0])


class _HostClock:
    """Work is done when the call returns."""

    def elapsed(self, work: Callable[[], object], count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            work()
        return time.perf_counter() - begun

    def beside(
        self, transfer: Callable[[], object], count: int, product: Callable[[], object], products: int
    ) -> tuple[float, tuple[float, float], Runs]:
        """Seconds of the transfers, begin and end of them, and of every product; `products` is what a device needs."""
        runs: Runs = []
        going, enough = threading.Event(), threading.Event()

        def multiply() -> None:
            until = time.perf_counter() + GIVE_UP_S
            going.set()
            while not enough.is_set() and time.perf_counter() < until:
                begun = time.perf_counter()
                product()
                runs.append((begun, time.perf_counter()))

        thread = threading.Thread(target=multiply, daemon=True)
        thread.start()
        going.wait()
        begun = time.perf_counter()
        for _ in range(count):
            transfer()
        ended = time.perf_counter()
        enough.set()
        thread.join()
        return ended - begun, (begun, ended), runs


class _DeviceClock:
    """Work is done when its stream comes to it: events tell when."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self._aside = torch.cuda.Stream()

    def _event(self) -> Any:
        return self.torch.cuda.Event(enable_timing=True)

    def elapsed(self, work: Callable[[], object], count: int) -> float:
        begin, end = self._event(), self._event()
        begin.record()
        for _ in range(count):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def beside(
        self, transfer: Callable[[], object], count: int, product: Callable[[], object], products: int
    ) -> tuple[float, tuple[float, float], Runs]:
        """Seconds of the transfers, begin and end of them, and of every one of the `products`."""
        torch = self.torch
        marks = [self._event() for _ in range(products + 1)]
        begin, end = self._event(), self._event()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._aside):
            marks[0].record()
            for mark in marks[1:]:
                product()
                mark.record()
        begin.record()
        for _ in range(count):
            transfer()
        end.record()
        torch.cuda.synchronize()
        moments = [float(marks[0].elapsed_time(mark)) * 1e-3 for mark in marks]
        window = (float(marks[0].elapsed_time(begin)) * 1e-3, float(marks[0].elapsed_time(end)) * 1e-3)
        return window[1] - window[0], window, list(itertools.pairwise(moments))
