"""Lookups in timed tables, compiled: what a step's tokens and its attention take."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.engine.kernel import kernel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class DecodeAttention(NamedTuple):
    """Decode attention of one layer [sequences, context], and what share of a rank's sequences runs at once."""

    seqs: Floats
    kv: Floats
    seconds: Floats
    share: float


class Graphs(NamedTuple):
    """Captured sizes, rising, and what a layer takes more where a step has no graph although others have."""

    sizes: Ints
    eager_layer_s: float


class Drafting(NamedTuple):
    """What drafting costs beside a verifying step: drafts, host seconds of a step, layers; by tokens of a rank [n]:
    seconds of the logits and of the projection before the drafting layer."""

    drafts: int
    overhead_s: float
    layers: int
    tokens: Floats
    logits_s: Floats
    projection_s: Floats


@kernel
def bracket(axis: Floats, value: float) -> tuple[int, float]:
    """Lower index and share of the way to the next point; clamped to the axis."""
    n = len(axis)
    if n == 1 or value <= axis[0]:
        return 0, 0.0
    if value >= axis[n - 1]:
        return n - 2, 1.0
    low = int(np.searchsorted(axis, value)) - 1
    return low, (value - axis[low]) / (axis[low + 1] - axis[low])


@kernel
def trilinear(xs: Floats, ys: Floats, zs: Floats, values: Floats, x: float, y: float, z: float) -> float:
    """A value between the points of a grid; clamped along x and y, carried on along z."""
    i, u = bracket(xs, x)
    j, v = bracket(ys, y)
    k, w = bracket(zs, z)
    if z > zs[-1]:  # longer attention than the grid's: the step grows with it one to one, as at the last interval
        w = (z - zs[k]) / (zs[k + 1] - zs[k])
    total = 0.0
    for a in range(2 if len(xs) > 1 else 1):
        for b in range(2 if len(ys) > 1 else 1):
            for c in range(2 if len(zs) > 1 else 1):
                weight = (u if a else 1.0 - u) * (v if b else 1.0 - v) * (w if c else 1.0 - w)
                if weight != 0.0:
                    total += weight * values[i + a, j + b, k + c]
    return total


@kernel
def interpolated(xs: Floats, values: Floats, x: float) -> float:
    """A value between points; clamped to the ends."""
    i, u = bracket(xs, x)
    return float(values[i] if len(xs) == 1 else values[i] * (1.0 - u) + values[i + 1] * u)


@kernel
def attention_of_rank(seqs: int, kv: float, attention: DecodeAttention) -> float:
    """Decode attention of a rank's sequences: bilinear in the logarithms of sequences and mean context."""
    if seqs == 0:
        return 0.0
    i, u = log_bracket(attention.seqs, max(seqs * attention.share, attention.seqs[0]))
    j, v = log_bracket(attention.kv, kv / seqs)
    high, far = min(i + 1, len(attention.seqs) - 1), min(j + 1, len(attention.kv) - 1)
    table = attention.seconds
    return float(
        table[i, j] * (1 - u) * (1 - v)
        + table[high, j] * u * (1 - v)
        + table[i, far] * (1 - u) * v
        + table[high, far] * u * v
    )


@kernel
def log_bracket(axis: Floats, value: float) -> tuple[int, float]:
    """As `bracket`, in the logarithm."""
    n = len(axis)
    if n == 1 or value <= axis[0]:
        return 0, 0.0
    if value >= axis[n - 1]:
        return n - 2, 1.0
    low = int(np.searchsorted(axis, value)) - 1
    return low, np.log(value / axis[low]) / np.log(axis[low + 1] / axis[low])


@kernel
def sizes_of(decode_seqs: Ints, prefill_tokens: Ints) -> tuple[int, int, int]:
    """Tokens of all ranks, of the fullest rank, and of prompts."""
    total = most = prompts = 0
    for rank in range(len(decode_seqs)):
        tokens = decode_seqs[rank] + prefill_tokens[rank]
        total += tokens
        most = max(most, tokens)
        prompts += prefill_tokens[rank]
    return total, most, prompts


@njit(cache=True)
def attention_of_ranks(seqs: Ints, kv: Floats, attention: DecodeAttention) -> Floats:
    """Decode attention of every rank: [ranks]."""
    found = np.zeros(len(seqs))
    for rank in range(len(seqs)):
        found[rank] = attention_of_rank(seqs[rank], kv[rank], attention)
    return found
