"""The best in hindsight over given tables: a lower bound for every policy that had these, and no others, to choose."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from placement.dynamics.series import Floats, Ints, Prices
from placement.solvers.repack import row_moves


@njit(cache=True)
def _layer_best(step_s: NDArray[np.float64], move_s: NDArray[np.float64]) -> float:
    """Least sum of steps and moves: step_s [candidates, steps], move_s [candidates, candidates]; starts in row 0."""
    candidates, steps = step_s.shape
    value = np.full(candidates, np.inf)
    value[0] = 0.0
    after = np.empty(candidates)
    for step in range(steps):
        for new in range(candidates):
            best = np.inf
            for old in range(candidates):
                best = min(best, value[old] + move_s[old, new])
            after[new] = best + step_s[new, step]
        value[:] = after
    return float(value.min())


@njit(cache=True)
def _move_table(
    rows: NDArray[np.int64], domain: NDArray[np.int64], experts: int, near_s: float, far_s: float
) -> NDArray[np.float64]:
    found = np.zeros((len(rows), len(rows)))
    for one in range(len(rows)):
        for two in range(len(rows)):
            if one != two:
                found[one, two] = row_moves(rows[one], rows[two], domain, experts, near_s, far_s)[1]
    return found


def best_in_hindsight(counts: Floats, tables: list[Ints], prices: Prices) -> float:
    """Seconds of the best way through the series when each layer may hold, at each step, any of the tables' rows.

    counts: [steps, layers, experts]. The first of the tables [layers, slots] is the start. All steps are known to it,
    and it pays for moves but not for solving: a dynamic programme over steps and rows, layer by layer.
    """
    steps, layers, experts = counts.shape
    total: float = prices.other_s * steps
    for layer in range(layers):
        unique: dict[bytes, Ints] = {}
        for table in tables:
            unique.setdefault(table[layer].tobytes(), table[layer])
        rows = np.stack(list(unique.values()))
        step_s = np.stack([prices.steps_s(row[None], counts[:, layer : layer + 1])[:, 0] for row in rows])
        moves = _move_table(rows, prices.domain, experts, prices.near_s, prices.far_s)
        total += float(_layer_best(step_s, moves))
    return total
