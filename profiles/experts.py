"""The time of a rank's experts as a function of how many tokens each of them gets.

A small physical model M(h) of a grouped SwiGLU orders histograms h; the measured balanced points give its scale. For a
histogram h on L local experts, the balanced load with the same M is found, and its measured time is the answer. So a
balanced histogram at a measured point returns the measurement, more tokens never cost less, and experts without tokens
read no weights.

    M(h)    = overhead + (floor^p + (gemm + stream)^p)^(1/p)
    gemm    = (weights^p + compute^p)^(1/p)
    weights = touched experts x bytes of an expert / HBM rate
    compute = 6 hidden intermediate x padded pairs / FLOP rate
    padded pairs = sum over touched experts of max(h + (tile - 1) / 2, tile): the last tile of an expert is filled up
    stream  = (pairs x activation bytes + rows x bytes of a row) / stream rate: activation, quantisation, permutation

`p` blends what overlaps; `floor` is the time of the launches where they are not hidden. `rows` are the token rows that
the kernels walk over. The parameters are fitted on the balanced rows alone (least squares of ln); the skewed rows judge
the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from moesim.cost.roofline import activation_bytes_per_pair
from moesim.units import BYTES_PER_ELEMENT
from profiles.fit import OUTSIDE, SAME, Curve, curve, medians
from profiles.record import LATENCY

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]
Tags = NDArray[np.int8]

# Rows of a tile of the grouped GEMMs: DeepGEMM's masked and contiguous kernels work on blocks of 64 or 128 rows
# (deepseek-ai/DeepGEMM, get_best_configs); Triton's fused MoE takes 16 to 128 by its tuned config.
TILE = {"deepep_low_latency": 64.0, "deepep_normal": 128.0, "fused": 16.0}


@dataclass(frozen=True)
class Shape:
    """What is fixed about the experts of a rank: widths, element type, tile."""

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
        """Token rows for each pair in the collectors' runs: the tokens of all ranks, whether they come here or not.

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
        return (1.0 - (1.0 - share) ** self.top_k) / (self.top_k * share)

    @property
    def row_bytes(self) -> float:
        """Bytes to permute a token row: read narrow or wide, written as bf16 (2 bytes), one byte of it quantised."""
        return 3.0 * self.hidden

    @property
    def weight_bytes(self) -> float:
        """Bytes of one expert (gate, up, down)."""
        return 3.0 * self.hidden * self.intermediate * BYTES_PER_ELEMENT[self.dtype]

    @property
    def pair_bytes(self) -> float:
        """Bytes of activations that one (token, expert) pair moves."""
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


def measured_seconds(physics: Physics, shape: Shape, slots: Floats, routed: Floats) -> Floats:
    """M of the collectors' balanced rows: `routed` pairs on `slots` local experts, both [rows]."""
    slots = np.broadcast_to(np.asarray(slots, dtype=np.float64), np.shape(routed))
    per_pair = np.array([shape.rows_measured(float(count)) for count in slots])
    out = np.empty(len(routed))
    _model(touched_of(routed, slots), np.asarray(routed, dtype=np.float64), per_pair, _constants(physics, shape), out)
    return out


def _constants(physics: Physics, shape: Shape, rows_per_pair: float = 0.0) -> Floats:
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
            1.0 if shape.grouping == "deepep_normal" else 0.0,
        ]
    )


@njit(cache=True)
def _padded(h: float, touched: float, tile: float) -> float:
    return max(h + touched * 0.5 * (tile - 1.0), touched * tile)


@njit(cache=True)
def _seconds(touched: float, pairs: float, padded: float, rows_per_pair: float, c: Floats) -> float:
    if pairs <= 0.0:
        return 0.0
    p = c[6]
    streamed = pairs + c[9] * (padded - pairs)
    busy = _norm(touched * c[2], padded * c[4], p) + streamed * c[3] + pairs * rows_per_pair * c[7]
    return c[0] + _norm(busy, c[1], p)


@njit(cache=True)
def _norm(a: float, b: float, p: float) -> float:
    most = max(a, b)
    return most * ((a / most) ** p + (b / most) ** p) ** (1.0 / p)


@njit(cache=True)
def _model(touched: Floats, pairs: Floats, rows_per_pair: Floats, c: Floats, out: Floats) -> None:
    for i in range(len(out)):
        padded = _padded(pairs[i], touched[i], c[5])
        out[i] = _seconds(touched[i], pairs[i], padded, rows_per_pair[i], c)


@njit(cache=True)
def _histograms(tokens: Floats, c: Floats, loads: Floats) -> None:
    """M of each row of tokens [rows, slots]; a mean below one token touches its expert that share of the time."""
    for i in range(tokens.shape[0]):
        touched = 0.0
        pairs = 0.0
        padded = 0.0
        for j in range(tokens.shape[1]):
            h = tokens[i, j]
            if h > 0.0:
                share = min(h, 1.0)
                touched += share
                pairs += h
                padded += _padded(h, share, c[5])
        loads[i] = _seconds(touched, pairs, padded, c[8], c)


def touched_of(routed: Floats, slots: Floats) -> Floats:
    """Experts with tokens in the collectors' balanced rows: all of them, or as many as there are pairs."""
    return np.minimum(np.asarray(routed, dtype=np.float64), slots)


def fit_physics(shape: Shape, slots: Floats, routed: Floats, seconds: Floats) -> Physics:
    """Fit M to balanced rows [rows] by least squares of ln(model / measured), robust against single outliers."""
    from scipy.optimize import least_squares

    least = float(seconds.min())
    start = np.log([0.5 * least, 0.25 * least, 3e12, 5e14, 2e12, 2.0])
    low = np.log([1e-8, 1e-8, 2e11, 1e13, 1e11, 1.0])
    high = np.log([least, least, 2e13, 6e15, 2e13, 8.0])

    def miss(parameters: Floats) -> Floats:
        physics = Physics(*(float(value) for value in np.exp(parameters)))
        return np.log(measured_seconds(physics, shape, slots, routed) / seconds)

    found = least_squares(
        miss, np.clip(start, low + 1e-9, high - 1e-9), bounds=(low, high), loss="soft_l1", f_scale=0.1
    )
    return Physics(*(float(value) for value in np.exp(found.x)))


@dataclass(frozen=True)
class ExpertCurve:
    """Seconds of histograms on a fixed number of local experts.

    by_load: measured balanced seconds as a curve over M. limit: the largest M that measured rows reach, which may lie
    beyond the balanced rows where skewed ones were measured. pairs: the most pairs of a balanced row.
    """

    constants: Floats
    by_load: Curve
    limit: float
    pairs: float
    measured: bool

    def price(self, tokens: Floats) -> tuple[Floats, Tags]:
        """Seconds and tags [...] of tokens [..., slots]; tag OUTSIDE beyond the limit."""
        lead = tokens.shape[:-1]
        flat = np.ascontiguousarray(tokens, dtype=np.float64).reshape(-1, tokens.shape[-1])
        loads = np.empty(len(flat))
        _histograms(flat, self.constants, loads)
        seconds, tags = self.by_load.price(loads)
        _beyond(loads, self.by_load.xs, self.by_load.ys, self.limit, seconds, tags)
        return seconds.reshape(lead), tags.reshape(lead)


@njit(cache=True)
def _beyond(loads: Floats, xs: Floats, ys: Floats, limit: float, seconds: Floats, tags: Tags) -> None:
    """Past either end of the balanced points the model carries the last one on, in proportion."""
    last = len(xs) - 1
    for i in range(len(loads)):
        load = loads[i]
        if load <= 0.0:
            continue
        if load < xs[0] * (1.0 - SAME):
            seconds[i] = ys[0] * load / xs[0]
            tags[i] = _FORMULA
        elif load > xs[last] * (1.0 + SAME):
            seconds[i] = ys[last] * load / xs[last]
            tags[i] = _INTERPOLATED if load <= limit * (1.0 + SAME) else OUTSIDE


_FORMULA = int(Tag.FORMULA)
_INTERPOLATED = int(Tag.INTERPOLATED)


@dataclass(frozen=True)
class ExpertTable:
    """Balanced rows of one kernel at one shape: by local experts, the routed pairs and their seconds."""

    shape: Shape
    physics: Physics
    rows: dict[int, tuple[Floats, Floats]]
    limits: dict[int, float]

    def at(self, slots: int) -> ExpertCurve | None:
        """The curve for `slots` local experts: measured, or between the two measured numbers around it."""
        constants = _constants(self.physics, self.shape, self.shape.rows_served(slots))
        if slots in self.rows:
            routed, seconds = self.rows[slots]
            loads = self.load(slots, routed)
            by_load = curve(loads, seconds)
            return ExpertCurve(
                constants, by_load, max(self.limits.get(slots, 0.0), by_load.largest), float(routed.max()), True
            )
        less = [count for count in self.rows if count < slots]
        more = [count for count in self.rows if count > slots]
        if not less or not more:
            return None
        low, high = max(less), min(more)
        share = (np.log(slots) - np.log(low)) / (np.log(high) - np.log(low))
        nodes = self._common(low, high)
        if len(nodes) < 2:
            return None
        ratio = (1.0 - share) * self._log_ratio(low, nodes) + share * self._log_ratio(high, nodes)
        loads = self.load(slots, nodes)
        by_load = curve(loads, loads * np.exp(ratio), exact=False)
        reach = min(self._reach(low), self._reach(high))
        return ExpertCurve(constants, by_load, max(by_load.largest, reach * by_load.largest), float(nodes.max()), False)

    def load(self, slots: int, routed: Floats) -> Floats:
        """M of the collectors' balanced loads."""
        return measured_seconds(self.physics, self.shape, np.asarray(float(slots)), routed)

    def _common(self, low: int, high: int) -> Floats:
        one, other = self.rows[low][0], self.rows[high][0]
        nodes = np.union1d(one, other)
        return nodes[(nodes >= max(one.min(), other.min())) & (nodes <= min(one.max(), other.max()))]

    def _log_ratio(self, slots: int, routed: Floats) -> Floats:
        """ln(measured / M) at the same routed pairs."""
        xs, ys = self.rows[slots]
        seconds, _ = curve(xs, ys).price(routed)
        return np.log(seconds / self.load(slots, routed))

    def _reach(self, slots: int) -> float:
        """How far the limit lies beyond the balanced rows, as a ratio of M."""
        most = float(self.load(slots, self.rows[slots][0]).max())
        return max(self.limits.get(slots, 0.0) / most, 1.0)


def trusted_rows(shape: Shape, table: pl.DataFrame) -> pl.DataFrame:
    """Balanced rows that ran what they claim.

    The balanced prefill rows hand the contiguous kernel unpadded counts, though it takes blocks of 128 rows of one
    expert: below 128 tokens for each expert whole experts are skipped (at EP2 and one token for each of 128 experts the
    row says 0.37 ms, for 5.6 GB of weights). Those rows are left out; the skewed rows are padded as in serving.
    """
    import polars as pl

    rows = table.filter(pl.col("distribution") == "uniform")
    if shape.grouping == "deepep_normal":
        rows = rows.filter(pl.col("routed") >= shape.tile * pl.col("local_experts"))
    return rows


def expert_table(
    shape: Shape, table: pl.DataFrame, fitted: tuple[Physics, dict[int, float]] | None
) -> ExpertTable | None:
    """The lookup of one version's rows; physics is fitted here where the profile does not bring it."""
    rows = trusted_rows(shape, table)
    if not rows.height:
        return None
    columns = (rows["local_experts"].to_numpy().astype(np.float64), rows["routed"].to_numpy(), rows[LATENCY].to_numpy())
    physics, limits = fitted if fitted is not None else (fit_physics(shape, *columns), {})
    by_slots = {}
    for slots in np.unique(columns[0]):
        here = columns[0] == slots
        by_slots[int(slots)] = medians(columns[1][here], columns[2][here])
    return ExpertTable(shape, physics, by_slots, limits)


def physics_name(shape: Shape, source: str) -> str:
    """The name under which a profile keeps fitted physics."""
    words = (shape.grouping, shape.dtype, shape.hidden, shape.intermediate, shape.experts, shape.top_k, source)
    return "|".join(str(word) for word in words)


def balanced_residuals(table: ExpertTable) -> Floats:
    """ln(predicted / measured) at every second inner number of local experts, predicted from the others."""
    found = []
    counts = sorted(table.rows)
    kept = [count for index, count in enumerate(counts) if index % 2 == 0 or index == len(counts) - 1]
    part = ExpertTable(table.shape, table.physics, {count: table.rows[count] for count in kept}, {})
    for slots in counts:
        without = None if slots in kept else part.at(slots)
        if without is None:
            continue
        routed, seconds = table.rows[slots]
        predicted, tags = without.by_load.price(table.load(slots, routed))
        inside = (tags != OUTSIDE) & (predicted > 0)
        found.append(np.log(predicted[inside] / seconds[inside]))
    return np.concatenate(found) if found else np.empty(0)


def power_law_histogram(
    rng: np.random.Generator, *, tokens: int, experts: int, top_k: int, ranks: int, exponent: float, draws: int
) -> Floats:
    """Tokens of each expert [draws, experts / ranks] on the fullest rank, as the collector draws its skewed rows.

    Source: ai-dynamo/aiconfigurator collector/helper.py: truncated power law between 1 and 0.8 x tokens (0.01 and 2 when
    there are fewer pairs than experts), scaled to all pairs, no expert above one copy of each token, the fullest rank.
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
        counts = counts + missing * room / room.sum(axis=1, keepdims=True)
    counts = np.clip(np.round(counts), 0, tokens)
    by_rank = counts.reshape(draws, ranks, experts // ranks)
    fullest = by_rank.sum(axis=2).argmax(axis=1)
    picked: Floats = by_rank[np.arange(draws), fullest]
    return picked
