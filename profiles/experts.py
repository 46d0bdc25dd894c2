"""The time of a rank's experts as a function of how many tokens each of them gets, anchored on measured rows.

The physical model of `grouped` orders histograms; the measured balanced points give its scale. For a histogram on L
local experts, the balanced load with the same model time is found, and its measured time is the answer. Where balanced
rows cannot be trusted, skewed rows give the scale, each in the place of the balanced run that takes as long. So a
balanced histogram at a measured point returns the measurement, more tokens never cost less, and experts without tokens
read no weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from moesim.cost.ops import ExpertGemm
from profiles.fit import OUTSIDE, SAME, Curve, curve, medians
from profiles.grouped import (
    Physics,
    Run,
    Shape,
    balanced_run,
    constants,
    fit_physics,
    histogram_seconds,
    power_law_histograms,
    predicted,
)
from profiles.record import LATENCY

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]
Tags = NDArray[np.int8]

UNIFORM = "uniform"
POWER_LAW = "power_law_"
# Not the rows that a balancer laid out ("power_law_1.01_eplb"): which ranks they fill is not published.
SKEWED = r"^power_law_[0-9.]+$"
# The collectors time each skewed point over this many draws (collect_wideep_deepep_moe.py); their seeds are unknown.
SKEWED_DRAWS = 5
_FORMULA = int(Tag.FORMULA)
_INTERPOLATED = int(Tag.INTERPOLATED)


@dataclass(frozen=True)
class ExpertCurve:
    """Seconds of histograms on a fixed number of local experts.

    by_load: measured balanced seconds as a curve over model seconds. limit: the largest model seconds that measured
    rows reach, beyond the balanced rows where skewed ones were measured. pairs: the most pairs of a balanced row.
    """

    constants: Floats
    by_load: Curve
    limit: float
    pairs: float
    measured: bool

    def price(self, tokens: Floats) -> tuple[Floats, Tags]:
        """Seconds and tags [...] of tokens [..., slots].

        Tag OUTSIDE where the load lies beyond the limit and the pairs beyond the most of a balanced row: as many pairs
        laid unevenly fill a few tiles more than the balanced row, which only the model adds.
        """
        lead = tokens.shape[:-1]
        flat = np.ascontiguousarray(tokens, dtype=np.float64).reshape(-1, tokens.shape[-1])
        loads = np.empty(len(flat))
        histogram_seconds(flat, self.constants, loads)
        seconds, tags = self.by_load.price(loads)
        inside = (loads <= self.limit * (1.0 + SAME)) | (flat.sum(axis=-1) <= self.pairs * (1.0 + SAME))
        _beyond(loads, self.by_load.xs, self.by_load.ys, inside, seconds, tags)
        return seconds.reshape(lead), tags.reshape(lead)

    def under(self, op: ExpertGemm) -> NDArray[np.bool_]:
        """Where the load lies below the smallest measured one: [...]."""
        tokens = op.tokens
        flat = np.ascontiguousarray(tokens, dtype=np.float64).reshape(-1, tokens.shape[-1])
        loads = np.empty(len(flat))
        histogram_seconds(flat, self.constants, loads)
        small = (loads > 0.0) & (loads < self.by_load.xs[0] * (1.0 - SAME))
        return np.asarray(small.reshape(tokens.shape[:-1]))


@njit(cache=True)
def _beyond(loads: Floats, xs: Floats, ys: Floats, inside: NDArray[np.bool_], seconds: Floats, tags: Tags) -> None:
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
            tags[i] = _INTERPOLATED if inside[i] else OUTSIDE


@dataclass(frozen=True)
class ExpertTable:
    """Balanced rows of one kernel at one shape: by local experts, the routed pairs and their seconds.

    limits: by local experts, the largest model seconds of any measured row.
    """

    shape: Shape
    physics: Physics
    rows: dict[int, tuple[Floats, Floats]]
    limits: dict[int, float]

    def at(self, slots: int) -> ExpertCurve | None:
        """The curve for `slots` local experts: measured, or between the two measured numbers around it."""
        numbers = constants(self.physics, self.shape, self.shape.rows_served(slots))
        if slots in self.rows:
            routed, seconds = self.rows[slots]
            by_load = curve(self.load(slots, routed), seconds)
            limit = max(self.limits.get(slots, 0.0), by_load.largest)
            return ExpertCurve(numbers, by_load, limit, float(routed.max()), True)
        less = [count for count in self.rows if count < slots]
        more = [count for count in self.rows if count > slots]
        if not less or not more:
            return None
        low, high = max(less), min(more)
        nodes = self._common(low, high)
        if len(nodes) < 2:
            return None
        share = (np.log(slots) - np.log(low)) / (np.log(high) - np.log(low))
        ratio = (1.0 - share) * self._log_ratio(low, nodes) + share * self._log_ratio(high, nodes)
        loads = self.load(slots, nodes)
        by_load = curve(loads, loads * np.exp(ratio), exact=False)
        reach = min(self._reach(low), self._reach(high))
        return ExpertCurve(numbers, by_load, reach * by_load.largest, float(nodes.max()), False)

    def load(self, slots: int, routed: Floats) -> Floats:
        """Model seconds of the collectors' balanced rows."""
        runs = [balanced_run(self.shape, slots, float(pairs), 1.0) for pairs in routed]
        return predicted(self.physics, self.shape, runs)

    def _common(self, low: int, high: int) -> Floats:
        one, other = self.rows[low][0], self.rows[high][0]
        nodes = np.union1d(one, other)
        inside: Floats = nodes[(nodes >= max(one.min(), other.min())) & (nodes <= min(one.max(), other.max()))]
        return inside

    def _log_ratio(self, slots: int, routed: Floats) -> Floats:
        """ln(measured / model) at the same routed pairs."""
        seconds, _ = curve(*self.rows[slots]).price(routed)
        ratio: Floats = np.log(seconds / self.load(slots, routed))
        return ratio

    def _reach(self, slots: int) -> float:
        """How far the limit lies beyond the balanced rows, as a ratio of model seconds."""
        most = float(self.load(slots, self.rows[slots][0]).max())
        return max(self.limits.get(slots, 0.0) / most, 1.0)


def trusted_rows(shape: Shape, table: pl.DataFrame) -> pl.DataFrame:
    """Balanced rows that ran what they claim.

    The balanced prefill rows hand the contiguous kernel unpadded counts, though it takes blocks of 128 rows of one
    expert: below 128 tokens for each expert whole experts are skipped (at EP2 and one token for each of 128 experts the
    row says 0.37 ms, for 5.6 GB of weights). Those rows are left out; the skewed rows are padded as in serving.
    """
    import polars as pl

    rows = table.filter(pl.col("distribution") == UNIFORM)
    if shape.grouping == "deepep_normal":
        rows = rows.filter(pl.col("routed") >= shape.tile * pl.col("local_experts"))
    return rows


def balanced_runs(shape: Shape, table: pl.DataFrame) -> list[Run]:
    """The trusted balanced rows as runs."""
    rows = trusted_rows(shape, table).select("local_experts", "routed", LATENCY)
    return [balanced_run(shape, slots, routed, seconds) for slots, routed, seconds in rows.iter_rows()]


def skewed_alone(shape: Shape, table: pl.DataFrame) -> pl.DataFrame:
    """Skewed rows of fused kernels beyond the last trusted balanced row of their number of local experts."""
    import polars as pl

    if shape.grouping != "fused":
        return table.clear()
    last = trusted_rows(shape, table).group_by("local_experts").agg(pl.col("routed").max().alias("last"))
    skewed = table.filter(pl.col("distribution").str.contains(SKEWED)).join(last, on="local_experts", how="left")
    return skewed.filter(pl.col("routed") > pl.col("last").fill_null(0.0)).drop("last")


def as_balanced(shape: Shape, physics: Physics, slots: int, runs: Sequence[Run]) -> tuple[Floats, Floats]:
    """Skewed runs as points of the balanced axis: the routed pairs of as long a balanced run, and the seconds.

    In the order of the runs; those outside the range of balanced runs of 1 to 2^24 pairs are left out.
    """
    routed = np.exp2(np.arange(0.0, 24.01, 0.125))
    loads = predicted(physics, shape, [balanced_run(shape, slots, float(pairs), 1.0) for pairs in routed])
    loads = np.maximum.accumulate(loads)
    asked = predicted(physics, shape, runs)
    inside = (asked >= loads[0]) & (asked <= loads[-1])
    found = np.exp(np.interp(np.log(asked[inside]), np.log(loads), np.log(routed)))
    return found, np.array([run.seconds for run in runs])[inside]


def skewed_runs(shape: Shape, table: pl.DataFrame) -> Iterator[tuple[int, float, Run]]:
    """The skewed rows as (local experts, exponent, run), their histograms drawn again as the collectors draw them."""
    import polars as pl

    rows = table.filter(pl.col("distribution").str.contains(SKEWED))
    for slots, distribution, routed, seconds in rows.select(
        "local_experts", "distribution", "routed", LATENCY
    ).iter_rows():
        ranks = shape.experts // slots
        tokens = round(routed * ranks / shape.top_k)
        exponent = float(distribution.removeprefix(POWER_LAW))
        seed = zlib.crc32(f"{slots} {tokens} {exponent}".encode())  # the same draws in every process
        histograms = power_law_histograms(
            np.random.default_rng(seed),
            tokens=tokens,
            experts=shape.experts,
            top_k=shape.top_k,
            ranks=ranks,
            exponent=exponent,
            draws=SKEWED_DRAWS,
        )
        if not histograms.any():  # the collector's own draw was another
            continue
        walked = 0.0 if shape.grouping == "deepep_low_latency" else float(tokens)
        yield slots, exponent, Run(histograms, np.full(SKEWED_DRAWS, walked), seconds)


def expert_table(
    shape: Shape, table: pl.DataFrame, fitted: tuple[Physics, dict[int, float]] | None
) -> ExpertTable | None:
    """The lookup of one version's rows; physics is fitted here where the profile does not bring it."""
    import polars as pl

    rows, alone = trusted_rows(shape, table), skewed_alone(shape, table)
    skewed: dict[int, list[Run]] = {}
    for slots, _, run in skewed_runs(shape, alone):
        skewed.setdefault(slots, []).append(run)
    if not rows.height and not skewed:
        return None
    if fitted is not None:
        physics, limits = fitted
    else:
        runs = [*balanced_runs(shape, table), *(run for part in skewed.values() for run in part)]
        physics, limits = fit_physics(shape, runs), {}
    points = {count: as_balanced(shape, physics, count, found) for count, found in skewed.items()}
    for (slots,), part in rows.partition_by(["local_experts"], as_dict=True).items():
        more = points.get(int(slots), (np.empty(0), np.empty(0)))
        own = part["routed"].cast(pl.Float64).to_numpy(), part[LATENCY].to_numpy()
        points[int(slots)] = np.concatenate([own[0], more[0]]), np.concatenate([own[1], more[1]])
    by_slots = {count: medians(*found) for count, found in points.items()}
    balanced = set(rows["local_experts"].to_list())  # one skewed row alone is no curve; one balanced row is a price
    by_slots = {count: found for count, found in by_slots.items() if len(found[0]) > 1 or count in balanced}
    return ExpertTable(shape, physics, by_slots, limits) if by_slots else None


def physics_name(shape: Shape, engine: str, version: str) -> str:
    """The name under which a profile keeps fitted physics."""
    words = (
        shape.grouping, shape.dtype, shape.hidden, shape.intermediate, shape.experts, shape.top_k, engine, version,
    )  # fmt: skip
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
        guessed, tags = without.by_load.price(table.load(slots, routed))
        inside = (tags != OUTSIDE) & (guessed > 0)
        found.append(np.log(guessed[inside] / seconds[inside]))
    return np.concatenate(found) if found else np.empty(0)


def skewed_residuals(table: ExpertTable, runs: list[tuple[int, float, Run]]) -> Floats:
    """ln(predicted / measured) of skewed runs, priced as histograms are (their own token rows, as measured)."""
    found = []
    curves = {slots: table.at(slots) for slots in {slots for slots, _, _ in runs}}
    for slots, _, run in runs:
        by_slots = curves[slots]
        if by_slots is None:
            continue
        walked = np.asarray(run.rows).mean() / max(float(run.histograms.sum(axis=1).mean()), 1.0)
        numbers = constants(table.physics, table.shape, walked)
        seconds, _ = ExpertCurve(numbers, by_slots.by_load, np.inf, by_slots.pairs, True).price(run.histograms)
        if seconds.mean() > 0.0:  # all draws may leave this rank empty; the collector's own draw did not
            found.append(np.log(seconds.mean() / run.seconds))
    return np.array(found)


def limits_of(shape: Shape, physics: Physics, runs: list[tuple[int, float, Run]]) -> dict[int, float]:
    """By local experts, the largest model seconds of the skewed runs."""
    limits: dict[int, float] = {}
    seconds = predicted(physics, shape, [run for _, _, run in runs]) if runs else ()
    for (slots, _, _), reached in zip(runs, seconds, strict=True):
        limits[slots] = max(limits.get(slots, 0.0), float(reached))
    return limits
