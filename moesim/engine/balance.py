"""Which attention-DP rank of which instance a request goes to.

A policy is a pure function of what the router knows; it returns a position. Positions run over instances first, then
ranks: position = rank x instances + instance. Ties go to the first position from the turn on, so that equal ranks take
turns. The router knows the present state exactly; SGLang's and vLLM's routers know it as of each rank's last step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RouterView:
    """What a router knows: requests_in and tokens_in by position [n] (waiting and running), and how often it chose."""

    requests_in: Ints
    tokens_in: Ints
    turn: int


def round_robin(view: RouterView) -> int:
    """In turn (SGLang `--load-balance-method round_robin`)."""
    return view.turn % len(view.requests_in)


def shortest_queue(view: RouterView) -> int:
    """Fewest requests, waiting or running (SGLang `total_requests`; vLLM's internal balancer counts alike)."""
    return _least(view.requests_in, view.turn)


def fewest_tokens(view: RouterView) -> int:
    """Fewest tokens of prompts and outputs so far (SGLang `total_tokens`)."""
    return _least(view.tokens_in, view.turn)


def _least(load: Ints, turn: int) -> int:
    start = turn % len(load)
    return int((start + np.roll(load, -start).argmin()) % len(load))


BALANCERS: dict[str, Callable[[RouterView], int]] = {
    "round_robin": round_robin,
    "shortest_queue": shortest_queue,
    "fewest_tokens": fewest_tokens,
}
# Requests wait in one queue at the router until a rank runs fewer than its most; then as shortest_queue.
CENTRAL_QUEUE = "central_queue"


def balancer(name: str, *, where: str = "serving.balance") -> Callable[[RouterView], int]:
    """The policy of a name. Raises BadInput for one that is not known."""
    if name == CENTRAL_QUEUE:
        return shortest_queue
    if name not in BALANCERS:
        raise BadInput(f"unknown balancing {name!r}", where=where, mend=f"use {', '.join((*BALANCERS, CENTRAL_QUEUE))}")
    return BALANCERS[name]
