"""What an exchange takes at an EP size that was not measured: few physical parameters, and the measured neighbours.

seconds = base + network x crossing + message x peers + the slower of bytes over the NIC and bytes over NVLink, with the
copies of uniform routing (moesim/network/uniform.py). Crossing counts what waits for the network: the share of a
token's copies that leave the domain, doublings of the domains where they agree on sizes first (DeepEP's normal mode),
and 1 for a plain all-to-all over several domains.

Five parameters are fitted to all rows of one kernel and shape at once, each held near what such hardware does unless
the rows say otherwise. What the measured rows still deviate by is carried over from the two measured EP sizes around,
fading with the distance in ln EP; beyond the edges, from the nearest one.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.network.uniform import Copies, CopyScheme, Routed, uniform_copies
from profiles.monotone import isotonic

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ExchangeKind:
    """One kernel on one shape: how it copies, bytes of a copy, GPUs of a domain, and its hardware's nominal rates."""

    scheme: CopyScheme
    routed: Routed
    copy_bytes: float
    domain: int
    nic_bytes_per_s: float
    nvlink_bytes_per_s: float

    def copies(self, ranks: int) -> Copies:
        """Of a token, at an EP size."""
        return uniform_copies(self.scheme, self.routed, ranks=ranks, domain=self.domain)


@dataclass(frozen=True)
class ExchangePhysics:
    """The fitted parameters: seconds, and bytes/s of one GPU in one direction."""

    base_s: float
    network_s: float
    message_s: float
    nic_bytes_per_s: float
    nvlink_bytes_per_s: float

    def seconds(self, kind: ExchangeKind, ranks: ArrayLike, tokens: ArrayLike) -> Floats:
        """Of exchanges of `tokens` a rank over `ranks` ranks; the two broadcast."""
        per_token, fixed = _features(kind, np.asarray(ranks))
        return _seconds(np.asarray(astuple(self)), per_token, fixed, np.asarray(tokens, dtype=np.float64))


# Where the fit starts and is held: medians over DeepEP on H200 as aiconfigurator-core 0.12.0 measured it (smallest
# sizes: 13 to 16 us low-latency, 27 to 47 us normal inside a node, about as much again between nodes), 0.1 us for a
# message that a GPU posts to a NIC itself; rates: what such kernels reach of a datasheet's NIC and NVLink (DeepEP
# README on H800: 43 of 50 GB/s, 153 to 158 of 200 GB/s).
TYPICAL_BASE_S = {"node": 40e-6}
OTHER_BASE_S = 15e-6
TYPICAL_MESSAGE_S = 1e-7
NIC_FRACTION = 0.86
NVLINK_FRACTION = 0.77
# How far rows may pull them, one standard deviation of the logarithm: latencies by a factor of e, what a message costs
# by more (a CPU that posts for the GPU takes microseconds), rates by a half.
LOOSE = np.asarray([1.0, 1.0, 1.5, 0.4, 0.4])
# How far a measured row lies from any such model, one standard deviation of ln(measured / model).
NOISE = 0.05
# How far in ln EP such a deviation is felt: to one e-th over a doubling. Between 0.5 and 1.5 nothing changes by more
# than a percent in the tables of DeepEP and of TensorRT-LLM's all-to-all.
CORRELATED = math.log(2.0)
# Distance in ln EP at which two EP sizes are one.
SAME = 1e-9


def fit(kind: ExchangeKind, ranks: ArrayLike, tokens: ArrayLike, seconds: ArrayLike) -> ExchangePhysics:
    """The parameters that measured rows [n] make likeliest, given what is typical."""
    from scipy.optimize import least_squares

    per_token, fixed = _features(kind, np.asarray(ranks))
    sizes, measured = np.asarray(tokens, dtype=np.float64), np.log(np.asarray(seconds, dtype=np.float64))
    base = TYPICAL_BASE_S.get(kind.scheme, OTHER_BASE_S)
    rates = NIC_FRACTION * kind.nic_bytes_per_s, NVLINK_FRACTION * kind.nvlink_bytes_per_s
    start = np.log([base, base, TYPICAL_MESSAGE_S, *rates])

    def residuals(logs: Floats) -> Floats:
        misses = np.log(_seconds(np.exp(logs), per_token, fixed, sizes)) - measured
        return np.concatenate([misses / NOISE, (logs - start) / LOOSE])

    found = least_squares(residuals, start)
    return ExchangePhysics(*(float(value) for value in np.exp(found.x)))


def carried(
    physics: ExchangePhysics, kind: ExchangeKind, measured: dict[int, tuple[Floats, Floats]], ranks: int, tokens: Floats
) -> Floats:
    """Seconds [n] at tokens [n] and an EP size: the model times what the measured EP sizes around deviate from it.

    measured: EP size -> (tokens [n], seconds [n]) at the same tokens; at least one. More ranks at as many tokens each
    never take less, so the measured seconds are first moved to the nearest that rise with the ranks.
    """
    sizes = sorted(measured)
    rising = np.apply_along_axis(isotonic, 0, np.log([measured[size][1] for size in sizes]))
    weights = _weights(np.log(sizes), math.log(ranks))
    moved = np.zeros(np.shape(tokens))
    for size, logs, weight in zip(sizes, rising, weights.tolist(), strict=True):
        if weight:
            moved = moved + weight * (logs - np.log(physics.seconds(kind, size, measured[size][0])))
    return np.asarray(physics.seconds(kind, ranks, tokens) * np.exp(moved))


def _weights(nodes: Floats, at: float) -> Floats:
    """How much of each node's deviation is expected at `at`: kriging of an Ornstein-Uhlenbeck process, exact at nodes.

    Source: C. E. Rasmussen, C. K. I. Williams, Gaussian Processes for Machine Learning (2006), sections 2.2 and 4.2.1;
    such a process is Markov, so that only the two nodes around count.
    """
    weights = np.zeros(len(nodes))
    high = int(np.searchsorted(nodes, at))
    if high < len(nodes) and abs(nodes[high] - at) < SAME:
        weights[high] = 1.0
    elif high in (0, len(nodes)):
        edge = min(high, len(nodes) - 1)
        weights[edge] = math.exp(-abs(nodes[edge] - at) / CORRELATED)
    else:
        before, after = at - nodes[high - 1], nodes[high] - at
        gap = math.sinh((before + after) / CORRELATED)
        weights[high - 1], weights[high] = math.sinh(after / CORRELATED) / gap, math.sinh(before / CORRELATED) / gap
    return weights


def _features(kind: ExchangeKind, ranks: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Bytes of a token over NIC and NVLink [..., 2], and what counts latencies [..., 3], at each EP size."""
    sizes = np.unique(ranks)
    rows = []
    for size in sizes.tolist():
        copies = kind.copies(size)
        rows.append(
            [copies.nic * kind.copy_bytes, copies.nvlink * kind.copy_bytes, 1.0, _crossing(kind, copies), copies.peers]
        )
    found = np.asarray(rows, dtype=np.float64)[np.searchsorted(sizes, ranks)]
    return found[..., :2], found[..., 2:]


def _crossing(kind: ExchangeKind, copies: Copies) -> float:
    """How often the network's latency counts."""
    if kind.scheme == "node":
        return math.log2(copies.domains)
    if kind.scheme == "peer":
        return float(copies.domains > 1)
    return 1.0 - 1.0 / copies.domains


def _seconds(parameters: Floats, per_token: Floats, fixed: Floats, tokens: Floats) -> Floats:
    moved = tokens[..., None] * per_token / parameters[3:]
    return np.asarray(fixed @ parameters[:3] + moved.max(axis=-1))
