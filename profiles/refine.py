"""How seconds run between two measured sizes: nodes that are put between measured points, one rule for each kernel.

All rules stay between the two points around a size, so what was monotone stays so. Rules, in the order of what a
kernel does with one token (or byte) more:

- `chord`: seconds are linear in the size: a latency and a rate (alpha-beta), which a line in log-log is not.
- `bend`: a power that changes along the way (attention over a prompt: launches, then rows, then their square): the
  monotone cubic of Fritsch and Butland through ln seconds over ln size.
- `lines`, `steps`: a collective that may change its protocol (`protocols`).

A product of matrices, which pays for whole tiles of rows, has a rule that is found for each kernel (`products`).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rule = Literal["chord", "bend", "lines", "steps"]

# Nodes in a doubling of the size where a curve bends.
NODES_PER_DOUBLING = 3


@njit(cache=True)
def _slope(before: float, after: float, h0: float, h1: float) -> float:
    """The slope of a monotone cubic at a point: Fritsch and Butland 1984, a weighted harmonic mean of its secants."""
    if before * after <= 0.0:
        return 0.0
    w0, w1 = 2.0 * h1 + h0, h1 + 2.0 * h0
    return float((w0 + w1) / (w0 / before + w1 / after))


@njit(cache=True)
def bend(x: Floats, y: Floats, at: Floats, out: Floats) -> None:
    """The monotone cubic through rising points (x, y), written to `out` for every `at` within them."""
    last = len(x) - 1
    for i in range(len(at)):
        j = min(max(int(np.searchsorted(x, at[i])) - 1, 0), last - 1)
        h = x[j + 1] - x[j]
        secant = (y[j + 1] - y[j]) / h
        start = end = secant
        if j > 0:
            start = _slope((y[j] - y[j - 1]) / (x[j] - x[j - 1]), secant, x[j] - x[j - 1], h)
        if j < last - 1:
            end = _slope(secant, (y[j + 2] - y[j + 1]) / (x[j + 2] - x[j + 1]), h, x[j + 2] - x[j + 1])
        t = (at[i] - x[j]) / h
        t2, t3 = t * t, t * t * t
        out[i] = (
            (2.0 * t3 - 3.0 * t2 + 1.0) * y[j] + (t3 - 2.0 * t2 + t) * h * start
            + (3.0 * t2 - 2.0 * t3) * y[j + 1] + (t3 - t2) * h * end
        )  # fmt: skip


@njit(cache=True)
def chord(x: Floats, y: Floats, at: Floats, out: Floats) -> None:
    """ln of the seconds that are linear in the size, from points (x = ln size, y = ln seconds)."""
    last = len(x) - 1
    for i in range(len(at)):
        j = min(max(int(np.searchsorted(x, at[i])) - 1, 0), last - 1)
        low, high = np.exp(x[j]), np.exp(x[j + 1])
        share = (np.exp(at[i]) - low) / (high - low)
        out[i] = np.log((1.0 - share) * np.exp(y[j]) + share * np.exp(y[j + 1]))


def between(rule: Rule, x: Floats, y: Floats, at: Floats) -> Floats:
    """ln seconds at ln sizes `at` by the rule (`chord` or `bend`) through points (x = ln size, y = ln seconds)."""
    out = np.empty(len(at))
    (bend if rule == "bend" else chord)(x, y, at, out)
    return out
