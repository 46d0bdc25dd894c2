"""KV transfers of the compiled loop over roles: the NICs, and a heap of what is under way, the first to end on top."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.engine.kernel import kernel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Places in `moving`: transfers under way, and begun so far.
UNDER_WAY, BEGUN = range(2)


class Links(NamedTuple):
    """Transfers: until when NICs are busy, seconds by position [ranks x instances]; a heap of (end, order, request).

    target, taken_s [requests]: the position that each goes to, and its seconds. moving: counts, see above. The rest as
    in `roles.Transfer`.
    """

    sending_s: Floats
    receiving_s: Floats
    end_s: Floats
    order: Ints
    request: Ints
    target: Ints
    taken_s: Floats
    moving: Ints
    bytes_per_token: float
    bytes_per_s: float
    latency_s: float
    layers: int
    by_layer: bool


@kernel
def _before(links: Links, one: int, other: int) -> bool:
    if links.end_s[one] != links.end_s[other]:
        return bool(links.end_s[one] < links.end_s[other])
    return bool(links.order[one] < links.order[other])


@kernel
def _swap(links: Links, one: int, other: int) -> None:
    links.end_s[one], links.end_s[other] = links.end_s[other], links.end_s[one]
    links.order[one], links.order[other] = links.order[other], links.order[one]
    links.request[one], links.request[other] = links.request[other], links.request[one]


@kernel
def push(links: Links, end_s: float, request: int) -> None:
    """Add a transfer that ends at `end_s`."""
    at = links.moving[UNDER_WAY]
    links.end_s[at], links.order[at], links.request[at] = end_s, links.moving[BEGUN], request
    links.moving[UNDER_WAY] += 1
    links.moving[BEGUN] += 1
    while at > 0 and _before(links, at, (at - 1) // 2):
        _swap(links, at, (at - 1) // 2)
        at = (at - 1) // 2


@kernel
def pop(links: Links) -> int:
    """Take the transfer that ends first; returns its request."""
    request = int(links.request[0])
    links.moving[UNDER_WAY] -= 1
    last = links.moving[UNDER_WAY]
    _swap(links, 0, last)
    at = 0
    while True:
        least = at
        for below in (2 * at + 1, 2 * at + 2):
            if below < last and _before(links, below, least):
                least = below
        if least == at:
            return request
        _swap(links, at, least)
        at = least
