"""Max-min fair sharing of links by progressive filling.

Source: D. Bertsekas and R. Gallager, Data Networks, 2nd edition (1992), section 6.5.2: all rates rise together; a flow
stops at its demand or when a link that it crosses is full.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from moesim.errors import BadInput

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Links that fill within this relative distance of the first one count as full at the same level (rounding only).
SAME_LEVEL = 1e-12


def max_min(demand: ArrayLike, usage: ArrayLike, capacity: ArrayLike) -> Floats:
    """Max-min fair rates of flows: [flows].

    demand: [flows], the most that a flow can use, inf = no bound of its own. usage: [flows, links], what one unit of a
    flow's rate takes of a link (0 = does not cross it). capacity: [links]. A flow of infinite demand that crosses no
    link gets inf. Raises BadInput for shapes that do not fit, and for negative or NaN values.
    """
    demand = np.asarray(demand, dtype=np.float64)
    usage = np.asarray(usage, dtype=np.float64)
    capacity = np.asarray(capacity, dtype=np.float64)
    if demand.ndim != 1 or capacity.ndim != 1 or usage.shape != (demand.size, capacity.size):
        raise BadInput(
            f"demand {demand.shape}, usage {usage.shape} and capacity {capacity.shape} do not fit",
            mend="give [flows], [flows, links] and [links]",
        )
    if not all((array >= 0.0).all() for array in (demand, usage, capacity)):
        raise BadInput("a demand, usage or capacity is negative or not a number", mend="give values of at least 0")
    flow, link = np.nonzero(usage)
    start = np.zeros(demand.size + 1, dtype=np.int64)
    np.cumsum(np.bincount(flow, minlength=demand.size), out=start[1:])
    rates: Floats = fill(demand, start, link.astype(np.int64), usage[flow, link], capacity)
    return rates


@njit(cache=True)
def fill(demand: Floats, start: Ints, link: Ints, amount: Floats, capacity: Floats) -> Floats:
    """Progressive filling on sparse usage, unchecked: flow f takes amount[i] of link[i], i in [start[f], start[f + 1]).

    demand: [flows]; start: [flows + 1]; link, amount: [crossings], amounts above 0; capacity: [links]. Returns [flows].
    """
    flows = demand.size
    rate = np.zeros(flows)
    rising = np.ones(flows, dtype=np.bool_)
    left = flows
    used = np.zeros(capacity.size)  # by flows that have stopped
    slope = np.zeros(capacity.size)  # by rising flows, for each unit of the common level
    while left > 0:
        slope[:] = 0.0
        level = np.inf
        for flow in range(flows):
            if rising[flow]:
                level = min(level, demand[flow])
                for crossing in range(start[flow], start[flow + 1]):
                    slope[link[crossing]] += amount[crossing]
        for number in range(capacity.size):
            if slope[number] > 0.0:
                level = min(level, max(capacity[number] - used[number], 0.0) / slope[number])
        stopped = 0
        for flow in range(flows):
            if not rising[flow]:
                continue
            stop = demand[flow] <= level
            for crossing in range(start[flow], start[flow + 1]):
                number = link[crossing]
                full = max(capacity[number] - used[number], 0.0) / slope[number]
                stop = stop or full <= level * (1.0 + SAME_LEVEL)
            if stop:
                rising[flow] = False
                rate[flow] = min(level, demand[flow])
                stopped += 1
        left -= stopped
        # After the pass over all flows, so that `full` above saw one state of the links.
        used[:] = 0.0
        for flow in range(flows):
            if not rising[flow]:
                for crossing in range(start[flow], start[flow + 1]):
                    used[link[crossing]] += amount[crossing] * rate[flow]
    return rate
