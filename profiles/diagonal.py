"""What a neighbour of equal work tells about a size that was not measured.

A kernel that splits one loop over its sequences and their length takes nearly as long for twice the batch at half the
length (the same bytes and tiles). Where that neighbour was measured and the point was not, its deviation from its own
interpolation is the bend that the point's row hides between its measured sizes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from profiles.refine import Rule, between

Floats = NDArray[np.float64]

# Relative difference at which two sizes are one.
SAME = 1e-6


def equal_work(log_batches: Floats, log_sizes: Floats, grid: Floats, rule: Rule) -> tuple[Floats, Floats]:
    """The grid with the columns that neighbours of equal work were measured at: (ln sizes, ln seconds [batch, size]).

    grid: ln seconds [batch, size], NaN where not measured. A new cell is the mean of its row's interpolation and of the
    neighbours' (twice the batch at half the size, half at twice), each shifted by how its row differs from this one at
    the two measured sizes around; it stays between those.
    """
    step = np.log(2.0)
    columns = _distinct(np.concatenate([log_sizes, log_sizes - step, log_sizes + step]))
    columns = columns[(columns >= log_sizes[0] - SAME) & (columns <= log_sizes[-1] + SAME)]
    wide = np.full((len(grid), len(columns)), np.nan)
    wide[:, _place(columns, log_sizes)] = grid
    rows = [np.flatnonzero(~np.isnan(line)) for line in wide]
    out = wide.copy()
    for i, known in enumerate(rows):
        if len(known) < 2:
            continue
        inside = np.arange(known[0], known[-1] + 1)
        lacking = inside[np.isnan(wide[i, inside])]
        if not len(lacking):
            continue
        own = between(rule, columns[known], wide[i, known], columns[lacking])
        after = known[np.searchsorted(known, lacking)]
        before = known[np.searchsorted(known, lacking) - 1]
        total, count = np.zeros(len(lacking)), np.zeros(len(lacking))
        for sign in (1.0, -1.0):
            near = np.flatnonzero(np.abs(log_batches - log_batches[i] - sign * step) < SAME)
            if not len(near) or len(rows[near[0]]) < 2:
                continue
            told = _told(columns, wide[near[0]], rows[near[0]], sign * step, wide[i], lacking, before, after, rule)
            heard = ~np.isnan(told)
            total[heard] += told[heard]
            count[heard] += 1.0
        use = count > 0
        mean = (own[use] + total[use]) / (1.0 + count[use])
        low, high = wide[i, before[use]], wide[i, after[use]]
        out[i, lacking[use]] = np.clip(mean, np.minimum(low, high), np.maximum(low, high))
    return columns, out


def _told(
    columns: Floats, other: Floats, known: NDArray[np.int64], shift: float, mine: Floats,
    at: NDArray[np.int64], before: NDArray[np.int64], after: NDArray[np.int64], rule: Rule,
) -> Floats:  # fmt: skip
    """What the neighbour's row says at the same work: NaN where it was not measured there itself."""
    here = columns[at] - shift
    place = np.clip(np.searchsorted(columns, here - SAME), 0, len(columns) - 1)
    told = np.where(np.abs(columns[place] - here) < SAME, other[place], np.nan)
    low, high = columns[before] - shift, columns[after] - shift
    first, last = columns[known[0]] - SAME, columns[known[-1]] + SAME
    reach = (low >= first) & (high <= last)
    told[~reach] = np.nan
    use = ~np.isnan(told)
    if use.any():
        x, y = columns[known], other[known]
        left = between(rule, x, y, np.clip(low[use], x[0], x[-1])) - mine[before[use]]
        right = between(rule, x, y, np.clip(high[use], x[0], x[-1])) - mine[after[use]]
        told[use] -= 0.5 * (left + right)
    return told


def _distinct(values: Floats) -> Floats:
    ordered = np.sort(values)
    kept: Floats = ordered[np.concatenate([[True], np.diff(ordered) > SAME])]
    return kept


def _place(columns: Floats, sizes: Floats) -> NDArray[np.int64]:
    return np.searchsorted(columns, sizes - SAME).astype(np.int64)
