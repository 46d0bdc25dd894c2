"""An annealer that also knows how far each expert's load may stray: to ask what such knowledge would be worth.

Plain on purpose: it reckons whole ranks anew at every move. Nothing in the product leans on it.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.solvers.anneal import HAND_OVER
from placement.solvers.greedy import pack_mix
from placement.solvers.robust import FIRST, LAST, RobustOptions, _scenarios


@njit(cache=True)
def eighth_moment(mean: float, variance: float) -> float:
    """E[x**8] of a normal x (coefficients 28, 210, 420, 105: binomial(8, 2k) times the 2k-th normal moment)."""
    q = mean * mean
    return q**4 + variance * (28.0 * q**3 + variance * (210.0 * q * q + variance * (420.0 * q + 105.0 * variance)))


@njit(cache=True)
def rank_cost(
    table: NDArray[np.int64],
    rank: int,
    ranks: int,
    count: NDArray[np.int64],
    loads: NDArray[np.float64],
    weights: NDArray[np.float64],
    variance: NDArray[np.float64],
) -> float:
    """The expected eighth power of a rank's load over the mean: loads [scenarios, experts], variance [experts]."""
    room = len(table) // ranks
    spread = 0.0
    for slot in range(rank * room, (rank + 1) * room):
        spread += variance[table[slot]] * (ranks / count[table[slot]]) ** 2
    cost = 0.0
    for s in range(len(loads)):
        load = 0.0
        for slot in range(rank * room, (rank + 1) * room):
            load += loads[s, table[slot]] * ranks / count[table[slot]]
        cost += weights[s] * eighth_moment(load, spread)
    return cost


@njit(cache=True)
def anneal(
    table: NDArray[np.int64],
    ranks: int,
    loads: NDArray[np.float64],
    weights: NDArray[np.float64],
    variance: NDArray[np.float64],
    moves: int,
    first: float,
    last: float,
    rng: np.random.Generator,
) -> None:
    """Threshold accepting, in place: swaps of two replicas, and spare slots handed to another expert."""
    slots, experts = len(table), loads.shape[1]
    room = slots // ranks
    count = np.zeros(experts, dtype=np.int64)
    for expert in table:
        count[expert] += 1
    cost = np.array([rank_cost(table, r, ranks, count, loads, weights, variance) for r in range(ranks)])
    touched, new = np.zeros(ranks, dtype=np.bool_), np.empty(ranks)
    threshold, falls = first, (last / first) ** (1.0 / max(moves, 1))
    for _ in range(moves):
        threshold *= falls
        a = int(rng.random() * slots)
        one = table[a]
        touched[:] = False
        if rng.random() >= HAND_OVER:
            b = int(rng.random() * slots)
            two = table[b]
            if a // room == b // room or one == two:
                continue
            table[a], table[b] = two, one
            touched[a // room] = touched[b // room] = True
        else:
            b, two = a, int(rng.random() * experts)
            if count[one] < 2 or one == two:
                continue
            table[a] = two
            count[one] -= 1
            count[two] += 1
            touched[a // room] = True
            for slot in range(slots):
                if table[slot] == one or table[slot] == two:
                    touched[slot // room] = True
        change = 0.0
        legal = _once(table, a // room, room, two) and (b == a or _once(table, b // room, room, one))
        for rank in range(ranks):
            if legal and touched[rank]:
                new[rank] = rank_cost(table, rank, ranks, count, loads, weights, variance)
                change += new[rank] - cost[rank]
        if legal and change < threshold:
            cost = np.where(touched, new, cost)
            continue
        table[b] = two
        table[a] = one
        if b == a:
            count[one] += 1
            count[two] -= 1


@njit(cache=True)
def _once(table: NDArray[np.int64], rank: int, room: int, expert: int) -> bool:
    found = 0
    for slot in range(rank * room, (rank + 1) * room):
        found += table[slot] == expert
    return found == 1


def place_knowing(
    request: PlacementRequest, variance: NDArray[np.float64], more: NDArray[np.float64] | None, moves: int
) -> ExpertPlacement:
    """`robust` that knows the variance of each expert's load, [layers, experts], and may be told one load more.

    more: [layers, experts], given half of the weight.
    """
    table = pack_mix(request, request.mix())
    rng = np.random.default_rng([request.seed, 0x0B57])
    loads, weights = _scenarios(request, RobustOptions(), rng)
    if more is not None:
        loads, weights = np.concatenate([loads, more[None]]), np.concatenate([0.5 * weights, [0.5]])
    by_layer = np.ascontiguousarray(loads.transpose(1, 0, 2))
    for layer, own in enumerate(rng.spawn(len(table))):
        anneal(table[layer], request.ranks, by_layer[layer], weights, variance[layer], moves, FIRST, LAST, own)
    return request.placement(table, "hindsight")
