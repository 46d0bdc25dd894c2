"""A layer's replicas as the local searches keep them: who holds what, and each rank's load under each load file."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(inline="always")
def layer_loads(
    table: NDArray[np.int64], loads: NDArray[np.float64], ranks: int
) -> tuple[
    NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]
]:  # fmt: skip
    """Replicas of each expert [experts], whether a rank holds one [ranks, experts], the ranks of each expert's replicas
    [experts, ranks], rising; a replica's load [experts, scenarios] and a rank's [ranks, scenarios], over the mean.

    table: [slots]. loads: [scenarios, experts], each summing to 1. Inlined, so that it rounds as its caller does.
    """
    scenarios, experts = loads.shape
    slots = len(table)
    room = slots // ranks
    count = np.zeros(experts, dtype=np.int64)
    holds = np.zeros((ranks, experts), dtype=np.bool_)
    homes = np.empty((experts, ranks), dtype=np.int64)
    for slot in range(slots):
        homes[table[slot], count[table[slot]]] = slot // room
        count[table[slot]] += 1
        holds[slot // room, table[slot]] = True
    share = np.empty((experts, scenarios), dtype=np.float64)
    for expert in range(experts):
        for s in range(scenarios):
            share[expert, s] = loads[s, expert] * ranks / count[expert]
    load = np.zeros((ranks, scenarios), dtype=np.float64)
    for slot in range(slots):
        for s in range(scenarios):
            load[slot // room, s] += share[table[slot], s]
    return count, holds, homes, share, load
