"""How seconds run between two measured sizes: nodes that are put between measured points, one rule for each kernel.

All rules stay between the two points around a size, so what was monotone stays so. Rules, in the order of what a
kernel does with one token (or byte) more:

- `chord`: seconds are linear in the size: a latency and a rate (alpha-beta), which a line in log-log is not.
- `tiles`: a product of matrices pays for whole tiles of rows; the tile is the smallest that holds the rows.
- `bend`: a power that changes along the way (attention over a prompt: launches, then rows, then their square): the
  monotone cubic of Fritsch and Butland through ln seconds over ln size.
- `lines`, `steps`: a collective that may change its protocol (`protocols`).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rule = Literal["chord", "tiles", "bend", "lines", "steps"]

# Rows of a tile: the smallest that a tensor core instruction takes, and the largest that every kernel offers (m16n8 of
# mma.sync, m64 of wgmma: NVIDIA's PTX ISA; deepseek-ai/DeepGEMM, get_best_configs, takes block_m of 64 or 128).
SMALLEST_TILE = 16.0
LARGEST_TILE = 64.0
# What of a product's growth in rows comes with padded rows (the multiplication) against rows (activations read and
# written). Chosen on A100, L40S, RTX Pro 6000, B300, GB200 and GB300, of which 1 to 16 are alike within 0.1 %.
PADDED_SHARE = 4.0
# Tiles between two measured sizes up to which each gets its step; beyond, a step is less than a twentieth.
STEPS = 20
# Nodes in a doubling of the size where a curve bends.
NODES_PER_DOUBLING = 3


def padded_rows(rows: Floats) -> Floats:
    """Rows that a product of matrices computes for `rows` real ones."""
    tile = 2.0 ** np.ceil(np.log2(np.clip(rows, SMALLEST_TILE, LARGEST_TILE)))
    padded: Floats = np.ceil(rows / tile) * tile
    return padded


def tile_nodes(xs: Floats, logs: Floats) -> tuple[Floats, Floats]:
    """Nodes at both sides of every tile's edge between measured rows, and those: (rows, ln seconds)."""
    nodes, values = [xs[:1]], [logs[:1]]
    for low, high, start, end in zip(xs[:-1], xs[1:], logs[:-1], logs[1:], strict=True):
        at = _edges(float(low), float(high))
        ends = _tile_work(np.array([low, high]))
        share = (np.log(_tile_work(at)) - np.log(ends[0])) / (np.log(ends[1]) - np.log(ends[0]))
        nodes += [at, np.array([high])]
        values += [start + share * (end - start), np.array([end])]
    return np.concatenate(nodes), np.concatenate(values)


def _tile_work(rows: Floats) -> Floats:
    return rows + PADDED_SHARE * padded_rows(rows)


def _edges(low: float, high: float) -> Floats:
    """The last row of each tile and the first of the next, strictly between two sizes."""
    powers = np.array([SMALLEST_TILE, 2.0 * SMALLEST_TILE])
    first = LARGEST_TILE * np.ceil(low / LARGEST_TILE)
    if (high - first) / LARGEST_TILE > STEPS:
        return np.geomspace(low, high, 2 + int(NODES_PER_DOUBLING * np.log2(high / low)))[1:-1]
    edges = np.concatenate([powers, np.arange(first, high, LARGEST_TILE)])
    both = np.unique(np.concatenate([edges, edges + 1.0]))
    return both[(both > low) & (both < high)]


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
