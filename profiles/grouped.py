"""A physical model of one rank's grouped SwiGLU: seconds of a histogram of tokens over its local experts.

    M(h)    = overhead + (floor^p + (gemm + stream)^p)^(1/p)
    gemm    = (weights^p + compute^p)^(1/p)
    weights = touched experts x bytes of an expert / HBM rate
    compute = 6 hidden intermediate x padded pairs / FLOP rate
    padded pairs = sum over touched experts of max(h + (tile - 1) / 2, tile): the last tile of an expert is filled up
    stream  = (pairs x activation bytes + rows x bytes of a row) / stream rate: activation, quantisation, permutation

`p` blends what overlaps; `floor` is the time of the launches where they are not hidden. `rows` are the token rows that
the kernels walk over. A (token, expert) pair is one token's visit to one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.cost.roofline import activation_bytes_per_pair
from moesim.units import BYTES_PER_ELEMENT

Floats = NDArray[np.float64]

# Rows of a tile of the grouped products: DeepGEMM's masked and contiguous kernels work on blocks of 64 or 128 rows
# (deepseek-ai/DeepGEMM, get_best_configs); Triton's fused MoE takes 16 to 128 by its tuned config.
TILE = {"deepep_low_latency": 64.0, "deepep_normal": 128.0, "fused": 16.0}
# Rows that `histogram_seconds` remembers, one for each remainder by this.
KEPT = 1024


@dataclass(frozen=True)
class Shape:
    """What is fixed about the experts of a rank: widths, element type, the model's experts and top-k, the kernel."""

    hidden: int
    intermediate: int
    dtype: str
    experts: int
    top_k: int
    grouping: str

    @property
    def tile(self) -> float:
        """Rows of a tile of the grouped product."""
        return TILE[self.grouping]

    def rows_measured(self, slots: float) -> float:
        """Token rows for each pair in the collectors' balanced runs: the tokens of all ranks, come here or not.

        The masked kernels have no rows apart from the pairs.
        """
        if self.grouping == "deepep_low_latency":
            return 0.0
        return self.experts / (self.top_k * min(slots, self.experts))

    def rows_served(self, slots: float) -> float:
        """Token rows for each pair when serving.

        DeepEP normal hands over only tokens that chose an expert here: of `top_k` independent picks, each here with the
        share of local experts, at least one; all-gather hands over every token, as in the collectors' runs.
        """
        if self.grouping != "deepep_normal":
            return self.rows_measured(slots)
        share = min(slots, self.experts) / self.experts
        return float((1.0 - (1.0 - share) ** self.top_k) / (self.top_k * share))

    @property
    def row_bytes(self) -> float:
        """Bytes to permute a token row: written as bf16, read as fp8."""
        return 3.0 * self.hidden

    @property
    def weight_bytes(self) -> float:
        """Bytes of one expert (gate, up, down)."""
        return 3.0 * self.hidden * self.intermediate * BYTES_PER_ELEMENT[self.dtype]

    @property
    def pair_bytes(self) -> float:
        """Bytes of activations that one pair moves."""
        return activation_bytes_per_pair(self.hidden, self.intermediate, self.dtype)

    @property
    def pair_flops(self) -> float:
        """FLOP of one pair: three products."""
        return 6.0 * self.hidden * self.intermediate


@dataclass(frozen=True)
class Physics:
    """Fitted parameters of M: seconds, bytes/s, FLOP/s, and the blend exponent."""

    overhead_s: float
    floor_s: float
    hbm_bytes_per_s: float
    flops_per_s: float
    stream_bytes_per_s: float
    blend: float

    def as_dict(self) -> dict[str, float]:
        """For profile.json, six digits."""
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Run:
    """One measured row: the histograms that ran [draws, slots], their token rows [draws], and the mean seconds."""

    histograms: Floats
    rows: Floats
    seconds: float


def constants(physics: Physics, shape: Shape, rows_per_pair: float = 0.0) -> Floats:
    """The numbers that the compiled loops take: [10]."""
    return np.array(
        [
            physics.overhead_s,
            physics.floor_s,
            shape.weight_bytes / physics.hbm_bytes_per_s,
            shape.pair_bytes / physics.stream_bytes_per_s,
            shape.pair_flops / physics.flops_per_s,
            shape.tile,
            physics.blend,
            shape.row_bytes / physics.stream_bytes_per_s,
            rows_per_pair,
            1.0 if shape.grouping == "deepep_normal" else 0.0,  # the contiguous layout streams its padding, too
        ]
    )


@njit(cache=True)
def _padded(h: float, touched: float, tile: float) -> float:
    return float(max(h + touched * 0.5 * (tile - 1.0), touched * tile))


@njit(cache=True)
def _norm(a: float, b: float, p: float) -> float:
    most = max(a, b)
    return float(most * (1.0 + (min(a, b) / most) ** p) ** (1.0 / p))  # the larger one's own share is 1


@njit(cache=True)
def _seconds(touched: float, pairs: float, padded: float, rows: float, c: Floats) -> float:
    if pairs <= 0.0:
        return 0.0
    p = c[6]
    streamed = pairs + c[9] * (padded - pairs)
    busy = _norm(touched * c[2], padded * c[4], p) + streamed * c[3] + rows * c[7]
    return float(c[0] + _norm(busy, c[1], p))


@njit(cache=True)
def histogram_seconds(tokens: Floats, c: Floats, out: Floats) -> None:
    """M of each row of tokens [rows, slots]; a mean below one token touches its expert that share of the time.

    Four rows go side by side: a sum waits for the addition before it, not for those of other rows. Most rows have the
    sums of another one, whose powers are then not raised again.
    """
    rows, slots = tokens.shape
    sums = np.empty((rows, 3))  # touched experts, pairs, padded pairs
    whole = rows - rows % 4
    for i in range(0, whole, 4):
        touched0 = touched1 = touched2 = touched3 = 0.0
        pairs0 = pairs1 = pairs2 = pairs3 = 0.0
        padded0 = padded1 = padded2 = padded3 = 0.0
        for j in range(slots):
            h0, h1, h2, h3 = tokens[i, j], tokens[i + 1, j], tokens[i + 2, j], tokens[i + 3, j]
            share0, share1, share2, share3 = min(h0, 1.0), min(h1, 1.0), min(h2, 1.0), min(h3, 1.0)
            touched0, touched1 = touched0 + share0, touched1 + share1
            touched2, touched3 = touched2 + share2, touched3 + share3
            pairs0, pairs1, pairs2, pairs3 = pairs0 + h0, pairs1 + h1, pairs2 + h2, pairs3 + h3
            padded0, padded1 = padded0 + _padded(h0, share0, c[5]), padded1 + _padded(h1, share1, c[5])
            padded2, padded3 = padded2 + _padded(h2, share2, c[5]), padded3 + _padded(h3, share3, c[5])
        sums[i, 0], sums[i, 1], sums[i, 2] = touched0, pairs0, padded0
        sums[i + 1, 0], sums[i + 1, 1], sums[i + 1, 2] = touched1, pairs1, padded1
        sums[i + 2, 0], sums[i + 2, 1], sums[i + 2, 2] = touched2, pairs2, padded2
        sums[i + 3, 0], sums[i + 3, 1], sums[i + 3, 2] = touched3, pairs3, padded3
    for i in range(whole, rows):
        touched = pairs = padded = 0.0
        for j in range(slots):
            share = min(tokens[i, j], 1.0)
            touched += share
            pairs += tokens[i, j]
            padded += _padded(tokens[i, j], share, c[5])
        sums[i, 0], sums[i, 1], sums[i, 2] = touched, pairs, padded
    last = np.full(KEPT, -1, np.int64)  # the last row of each remainder: of like sums, both have the same
    for i in range(rows):
        touched, pairs, padded = sums[i, 0], sums[i, 1], sums[i, 2]
        place = int(touched * 1009.0 + pairs * 97.0 + padded * 13.0) & (KEPT - 1)
        row = last[place]
        if row >= 0 and sums[row, 0] == touched and sums[row, 1] == pairs and sums[row, 2] == padded:
            out[i] = out[row]
            continue
        out[i] = _seconds(touched, pairs, padded, pairs * c[8], c)
        last[place] = i


@njit(cache=True)
def _summed_seconds(sums: Floats, c: Floats, out: Floats) -> None:
    for i in range(len(out)):
        out[i] = _seconds(sums[i, 0], sums[i, 1], sums[i, 2], sums[i, 3], c)


def sums_of(shape: Shape, histograms: Floats, rows: Floats) -> Floats:
    """What M needs of histograms [draws, slots]: touched experts, pairs, padded pairs, rows: [draws, 4]."""
    share = np.minimum(histograms, 1.0)
    padded = np.maximum(histograms + share * 0.5 * (shape.tile - 1.0), share * shape.tile)
    return np.stack([share.sum(axis=1), histograms.sum(axis=1), padded.sum(axis=1), rows], axis=1)


def balanced_run(shape: Shape, slots: int, routed: float, seconds: float) -> Run:
    """A collector's balanced row: `routed` pairs over all local experts, or one each on as many as there are pairs."""
    touched = min(routed, float(slots))
    histogram = np.zeros((1, slots))
    histogram[0, : int(np.ceil(touched))] = routed / np.ceil(touched)
    return Run(histogram, np.array([routed * shape.rows_measured(slots)]), seconds)


def predicted(physics: Physics, shape: Shape, runs: Sequence[Run]) -> Floats:
    """M of each run, the mean over its draws: [runs]."""
    return _Stacked(shape, runs).seconds(physics)


class _Stacked:
    """Many runs as one array, so that a fit evaluates them in one pass."""

    def __init__(self, shape: Shape, runs: Sequence[Run]) -> None:
        self.shape = shape
        self.sums = np.concatenate([sums_of(shape, run.histograms, run.rows) for run in runs])
        draws = np.array([len(run.histograms) for run in runs])
        self.starts = np.concatenate([[0], np.cumsum(draws)[:-1]])
        self.draws = draws
        self.measured = np.array([run.seconds for run in runs])

    def seconds(self, physics: Physics) -> Floats:
        out = np.empty(len(self.sums))
        _summed_seconds(self.sums, constants(physics, self.shape), out)
        mean: Floats = np.add.reduceat(out, self.starts) / self.draws
        return mean


# Bounds of the fit: from less than one CPU core can do to more than a GPU of today (bytes/s, FLOP/s, bytes/s).
SLOWEST = (1e9, 1e10, 1e9)
FASTEST = (1e13, 6e15, 1e13)


def fit_physics(shape: Shape, runs: Sequence[Run]) -> Physics:
    """Fit M to measured runs by least squares of ln(model / measured), robust against single outliers."""
    from scipy.optimize import least_squares

    stacked = _Stacked(shape, runs)
    least = float(stacked.measured.min())
    start = np.log([0.5 * least, 0.25 * least, 3e12, 5e14, 2e12, 2.0])
    low = np.log([1e-8, 1e-8, *SLOWEST, 1.0])
    high = np.log([least, least, *FASTEST, 8.0])

    def miss(parameters: Floats) -> Floats:
        physics = Physics(*(float(value) for value in np.exp(parameters)))
        return np.asarray(np.log(stacked.seconds(physics) / stacked.measured), dtype=np.float64)

    start = np.clip(start, low + 1e-9, high - 1e-9)
    found = least_squares(miss, start, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    return Physics(*(float(value) for value in np.exp(found.x)))


def power_law_histograms(
    rng: np.random.Generator, *, tokens: int, experts: int, top_k: int, ranks: int, exponent: float, draws: int
) -> Floats:
    """Tokens of each expert [draws, experts / ranks] on the fullest rank, as the collectors draw their skewed rows.

    Source: ai-dynamo/aiconfigurator collector/helper.py: truncated power law between 1 and 0.8 x tokens (0.01 and 2
    when there are fewer pairs than experts), scaled to all pairs, no expert above one copy of each token; the fullest
    rank.
    """
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    power = 1.0 - exponent
    u = rng.random((draws, experts))
    wanted = ((high**power - low**power) * u + low**power) ** (1.0 / power)
    pairs = float(tokens * top_k)
    counts = np.round(wanted * pairs / wanted.sum(axis=1, keepdims=True))
    for _ in range(8):  # what the cap cuts off goes to the experts below it
        counts = np.minimum(counts, tokens)
        missing = pairs - counts.sum(axis=1, keepdims=True)
        room = np.where(counts < tokens, counts + 0.5, 0.0)
        counts = np.maximum(counts + missing * room / room.sum(axis=1, keepdims=True), 0.0)
    counts = np.clip(np.round(counts), 0, tokens)
    by_rank = counts.reshape(draws, ranks, experts // ranks)
    fullest = by_rank.sum(axis=2).argmax(axis=1)
    picked: Floats = by_rank[np.arange(draws), fullest]
    return picked
