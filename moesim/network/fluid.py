"""Exchanges at once as a fluid: every pair's bytes a flow over its whole path, links shared max-min fair.

Rates are those of `network.sharing`, from one flow's end to the next. Where `des` slows a whole exchange by the link on
which it gets the least, here only the flows on that link are slowed, and the others go on: what TCP and flow-fair
fabrics do. `moesim validate fabric` holds both to real packets (docs/explanation/validation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.network.sharing import fill
from moesim.network.topology import Topology

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# Bytes below this part of a flow's whole are gone: rounding.
GONE = 1e-12


def finish_s(topology: Topology, loads: Sequence[Floats]) -> Floats:
    """Seconds until each of some exchanges that start at once is over, latencies left out: [exchanges].

    loads: bytes [gpus, gpus] of each, from row to column; the diagonal stays and costs nothing. Raises BadInput for
    another shape, and for values that are negative or not finite.
    """
    gpus = topology.cluster.gpus
    number = {edge: index for index, edge in enumerate(topology.graph.edges)}
    left: list[float] = []
    owner: list[int] = []
    start, link = [0], list[int]()
    for index, load in enumerate(loads):
        if load.shape != (gpus, gpus) or not (np.isfinite(load) & (load >= 0.0)).all():
            raise BadInput(
                f"bytes of shape {load.shape} between {gpus} GPUs", mend="give [gpus, gpus], finite, of at least 0"
            )
        for source, target in zip(*(axis.tolist() for axis in np.nonzero(load)), strict=True):
            if source != target:
                left.append(float(load[source, target]))
                owner.append(index)
                link += [number[edge] for edge in pairwise(topology.path(source, target))]
                start.append(len(link))
    found = np.zeros(len(loads))
    if left:
        ends = _drain(
            np.asarray(left), np.asarray(start, dtype=np.int64), np.asarray(link, dtype=np.int64), topology.rates()
        )
        np.maximum.at(found, np.asarray(owner), ends)
    return found


@njit(cache=True)
def _drain(left: Floats, start: Ints, link: Ints, capacity: Floats) -> Floats:
    """When each flow ends: [flows]. left: bytes [flows]; flow f crosses link[start[f] : start[f + 1]]."""
    whole = left.copy()
    ends = np.zeros(left.size)
    now = 0.0
    while True:
        running = np.flatnonzero(left > 0.0)
        if running.size == 0:
            return ends
        first = np.zeros(running.size + 1, dtype=np.int64)
        for place in range(running.size):
            first[place + 1] = first[place] + start[running[place] + 1] - start[running[place]]
        crossed = np.empty(first[-1], dtype=np.int64)
        for place in range(running.size):
            crossed[first[place] : first[place + 1]] = link[start[running[place]] : start[running[place] + 1]]
        rate = fill(np.full(running.size, np.inf), first, crossed, np.ones(crossed.size), capacity)
        step = np.inf
        for place in range(running.size):
            step = min(step, left[running[place]] / rate[place])
        now += step
        for place in range(running.size):
            flow = running[place]
            left[flow] -= step * rate[place]
            if left[flow] <= GONE * whole[flow]:
                left[flow] = 0.0
                ends[flow] = now
