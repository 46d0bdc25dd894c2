"""The nearest rising sequence and grid: measured times scatter, and a larger size must not cost less.

Source: Barlow et al., Statistical Inference under Order Restrictions, 1972 (pool adjacent violators).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@njit(cache=True)
def isotonic(values: Floats) -> Floats:
    """The rising sequence nearest to `values` by least absolute deviations: pool adjacent violators by lower medians.

    Timings scatter upwards (something else ran, too), so a mean would follow the disturbed ones.
    """
    count = len(values)
    start = np.empty(count, dtype=np.int64)
    level = np.empty(count)
    blocks = 0
    for i in range(count):
        start[blocks] = i
        level[blocks] = values[i]
        blocks += 1
        while blocks > 1 and level[blocks - 2] > level[blocks - 1]:
            blocks -= 1
            pooled = np.sort(values[start[blocks - 1] : i + 1])
            level[blocks - 1] = pooled[(len(pooled) - 1) // 2]
    out = np.empty(count)
    for block in range(blocks):
        end = start[block + 1] if block < blocks - 1 else count
        out[start[block] : end] = level[block]
    return out


@njit(cache=True)
def least_squares(values: Floats) -> Floats:
    """The rising sequence nearest to `values` by least squares: pool adjacent violators."""
    means = np.empty(len(values))
    counts = np.empty(len(values), dtype=np.int64)
    blocks = 0
    for value in values:
        means[blocks] = value
        counts[blocks] = 1
        blocks += 1
        while blocks > 1 and means[blocks - 2] > means[blocks - 1]:
            both = counts[blocks - 2] + counts[blocks - 1]
            total = means[blocks - 2] * counts[blocks - 2] + means[blocks - 1] * counts[blocks - 1]
            means[blocks - 2] = total / both
            counts[blocks - 2] = both
            blocks -= 1
    out = np.empty(len(values))
    at = 0
    for block in range(blocks):
        out[at : at + counts[block]] = means[block]
        at += counts[block]
    return out
