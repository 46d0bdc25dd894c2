"""What fits of datasheet shares have in common: GPUs and architectures, and rows that weigh by system and size."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.cost.reach import REL_SIGMA
from moesim.spec.cluster import ClusterSpec
from moesim.spec.presets import load_cluster, near_preset
from moesim.spec.scenario import ClusterChoice

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]

ARCHITECTURES = {"A": "Ampere", "H": "Hopper", "B": "Blackwell", "G": "Blackwell"}
"""By the first letter of the GPU's name without NVIDIA."""

DECADE = 2
"""Bins of a decade of measured time; rows of every bin and system weigh alike, so small and large ones do."""

MOST_ROWS = 300
"""Rows of a bin that are looked at, drawn at random."""

FULL = 100
"""Rows with which a bin weighs in full: what few calls took as long is odd."""

MANY_ROWS = 1000
"""Fewer rows of a kind are of one model's shapes."""

LEAST_ROWS = 100
"""Of a kind at a type, else it has no figures."""

SOFT = 0.2
"""Residuals of ln beyond this count less than their square."""


class Grouped(Protocol):
    """Measured rows [rows]; group: system and bin of each."""

    @property
    def seconds(self) -> Floats:
        """Measured."""
        ...

    @property
    def group(self) -> NDArray[np.int64]:
        """Which rows weigh as one."""
        ...


@functools.cache
def cluster_of(system: str) -> ClusterSpec:
    """The preset of a system, as moesim or aiconfigurator names it. Raises BadInput."""
    return load_cluster(ClusterChoice(system=near_preset(system, likeness=1.0) or system))


def architecture(system: str) -> str:
    """Ampere, Hopper or Blackwell, of a system that has a preset."""
    return ARCHITECTURES[cluster_of(system).gpu.name.removeprefix("NVIDIA ")[0]]


def weights(rows: Grouped) -> Floats:
    """Of each row: groups weigh alike, those of fewer than FULL rows by their number."""
    _, where, sizes = np.unique(rows.group, return_inverse=True, return_counts=True)
    return np.asarray(1.0 / np.maximum(sizes, FULL)[where])


def softened(off: Floats) -> Floats:
    """Whose square grows as the residual does beyond SOFT: soft l1, by hand as scipy's knows no weights beside it."""
    return np.asarray(np.sign(off) * np.sqrt(2.0 * SOFT**2 * (np.sqrt(1.0 + (off / SOFT) ** 2) - 1.0)))


def quantile(off: Floats, rows: Grouped, share: float) -> float:
    """Of |off|, every group weighing alike."""
    order = np.argsort(np.abs(off))
    weight = np.cumsum(weights(rows)[order])
    return float(np.abs(off)[order][np.searchsorted(weight, share * weight[-1])])


def surest(rows: Grouped) -> float:
    """What no figure is surer than: few rows are of few shapes, and say little of others."""
    return REL_SIGMA if len(rows.seconds) < MANY_ROWS else 0.0


def drawn_by_bin(calls: pl.DataFrame, kind: list[str], seed: int) -> pl.DataFrame:
    """Of each kind (columns), system and bin of seconds at most MOST_ROWS rows, at random, with the bin."""
    import polars as pl

    binned = calls.with_columns(
        bin=(DECADE * pl.col("seconds").log10()).floor(),
        drawn=pl.Series(np.random.default_rng(seed).random(len(calls))),
    ).sort("drawn")
    group = [*kind, "system", "bin"]
    return binned.filter(pl.int_range(pl.len()).over(group) < MOST_ROWS).sort(*group, "drawn")


def groups_of(rows: pl.DataFrame) -> NDArray[np.int64]:
    """A number for each system and bin of one kind's rows."""
    import polars as pl

    return rows.select(pl.struct("system", "bin").rank("dense")).to_series().to_numpy().astype(np.int64)


def numbers(rows: pl.DataFrame, name: str) -> Floats:
    """A column as floats."""
    return rows[name].to_numpy().astype(np.float64)
