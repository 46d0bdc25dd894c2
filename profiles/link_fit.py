"""Fit what collectives and exchanges reach of links to imported tables; `profiles.reach_fit` writes it down.

Each kind gets the time of one that carries next to nothing, a share of the rate inside a domain, and, of the normal
kernels of DeepEP, what one multiprocessor moves. Exchanges between domains were measured on one cluster: what NICs
reach is not fitted to it (`moesim.cost.links.NIC_FRACTION`), and the share inside a domain is that of exchanges that
stay in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost import links
from moesim.cost.links import BETWEEN, Transfer, busy_s
from moesim.cost.ops import Collective, MoeExchange
from moesim.cost.reach import REL_SIGMA, LinkReach
from moesim.spec.cluster import ClusterSpec
from profiles.error_law import NINETY
from profiles.reach_rows import (
    architecture,
    cluster_of,
    drawn_by_bin,
    groups_of,
    numbers,
    quantile,
    softened,
    surest,
    weights,
)
from profiles.store import Profile

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]

KEYS = {
    "collective": ("kind", "gpus", "nodes"),
    "exchange": ("step", "mode", "nodes", "ep", "hidden", "top_k", "experts", "dtype", "sms"),
}
PARTS = ("near_s", "far_s", "sm_bytes")
LIBRARY = "nccl"
LEAST_ROWS = 50
"""Of a kind, else it has no figures."""

LOWEST, HIGHEST = (1e-7, 0.02, 1e8), (1e-3, 1.2, 1e12)
START = (1e-5, 0.6, 1e10)


@dataclass(frozen=True)
class Rows:
    """Measured transfers of one kind; moved: as `moesim.cost.links` has them, arrays [rows]; group: system and bin."""

    moved: Transfer
    latency_s: Floats
    seconds: Floats
    group: NDArray[np.int64]
    system: NDArray[np.str_]

    def of(self, chosen: NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        parts = {name: getattr(self.moved, name)[chosen] for name in PARTS}
        moved = replace(self.moved, **parts)
        return Rows(moved, self.latency_s[chosen], self.seconds[chosen], self.group[chosen], self.system[chosen])

    @property
    def by_kernel(self) -> bool:
        """Whether a kernel on few multiprocessors moves it."""
        return bool(self.moved.sm_bytes.any())


@dataclass(frozen=True)
class Figures:
    """What is fitted; as in `LinkReach`."""

    floor_s: float
    near: float
    sm_bytes_per_s: float | None

    def seconds(self, rows: Rows) -> Floats:
        """By the formula."""
        return self.floor_s + rows.latency_s + busy_s(rows.moved, self.near, self.sm_bytes_per_s)


def _collective(cluster: ClusterSpec, key: dict[str, Any], rows: pl.DataFrame) -> Transfer:
    return links.collective(cluster, Collective(bytes=numbers(rows, "bytes"), **key))


def _exchange(cluster: ClusterSpec, key: dict[str, Any], rows: pl.DataFrame) -> Transfer:
    multiprocessors = key.pop("sms")
    op = MoeExchange(tokens=numbers(rows, "tokens"), **key)
    return links.exchange(cluster, op, max(multiprocessors, 1))


MAKERS: dict[str, Callable[[ClusterSpec, dict[str, Any], Any], Transfer]] = {
    "collective": _collective,
    "exchange": _exchange,
}


def read(folder: Path) -> tuple[str, pl.DataFrame]:
    """A profile's system and its transfers: kind, latency_s, near_s, far_s, sm_bytes, seconds; the quickest of each.

    Of collectives those of NCCL. Raises BadInput where there is no profile or no preset of its GPU.
    """
    import polars as pl

    profile = Profile(folder)
    system = str(profile.description.get("system", ""))
    cluster = cluster_of(system)
    columns = ["kind", "latency_s", *PARTS, "seconds"]
    parts = [pl.DataFrame(schema=dict.fromkeys(columns, pl.Float64) | {"kind": pl.String})]
    for family, make in MAKERS.items():
        table = profile.table(family).filter(pl.col("latency_s") > 0)
        if family == "collective":
            table = table.filter(pl.col("path") == LIBRARY)
        for key, rows in table.group_by(KEYS[family], maintain_order=True):
            moved = make(cluster, dict(zip(KEYS[family], key, strict=True)), rows)
            found = {"kind": moved.kind, "latency_s": moved.latency_s, "seconds": rows["latency_s"]}
            parts.append(pl.DataFrame(found | {name: getattr(moved, name) for name in PARTS}).select(columns))
    same = columns[:-1]
    calls = pl.concat(parts).filter((pl.col("near_s") > 0) | (pl.col("far_s") > 0))
    return system, calls.group_by(same).agg(pl.col("seconds").min()).sort(same)


def gather(folders: list[Path], seed: int = 0) -> Iterator[Rows]:
    """Transfers of all profiles by kind, drawn as `drawn_by_bin` does."""
    import polars as pl

    calls = pl.concat([found.with_columns(system=pl.lit(system)) for system, found in map(read, folders)])
    for (kind,), rows in drawn_by_bin(calls, ["kind"], seed).group_by(["kind"], maintain_order=True):
        if len(rows) >= LEAST_ROWS:
            near, far, kernel = (numbers(rows, name) for name in PARTS)
            yield Rows(
                Transfer(str(kind), 0.0, near, far, kernel),
                numbers(rows, "latency_s"),
                numbers(rows, "seconds"),
                groups_of(rows),
                rows["system"].to_numpy().astype(np.str_),
            )


def fitted(rows: Rows, near: float | None = None) -> Figures:
    """By least squares of ln with long tails counted less; every group weighs alike.

    near: the share of the rate inside a domain, where it is not to be fitted.
    """
    from scipy.optimize import least_squares

    weight = np.sqrt(weights(rows))
    asked = np.asarray([True, near is None, rows.by_kernel])

    def figures(logs: Floats) -> Figures:
        values = iter(np.exp(logs).tolist())
        floor_s, share, of_one = (next(values) if one else None for one in asked)
        assert floor_s is not None
        return Figures(floor_s, share or near or 1.0, of_one)

    found = least_squares(
        lambda logs: weight * softened(np.log(figures(logs).seconds(rows) / rows.seconds)),
        np.log(np.asarray(START)[asked]),
        bounds=(np.log(np.asarray(LOWEST)[asked]), np.log(np.asarray(HIGHEST)[asked])),
    )
    return figures(found.x)


def left_out(rows: Rows, near: float | None) -> Floats:
    """ln(measured / predicted) of each row by the fit to other architectures; to other systems where one has all."""
    parts = np.asarray([architecture(name) for name in rows.system])
    parts = parts if len(set(parts)) > 1 else rows.system
    off = np.zeros(len(rows.seconds))
    for part in sorted(set(parts.tolist())):
        own = parts == part
        figures = fitted(rows if own.all() else rows.of(~own), near)
        off[own] = np.log(rows.seconds[own] / figures.seconds(rows.of(own)))
    return off


def least_sigma(rows: Rows) -> float:
    """What no figure is surer than: of few rows, or of one architecture, nothing is known of others."""
    alike = len({architecture(name) for name in rows.system}) < 2
    return max(surest(rows), REL_SIGMA if alike else 0.0)


def fit(folders: list[Path]) -> tuple[LinkReach, ...]:
    """The figures of every kind that has rows enough."""
    found = {rows.moved.kind: rows for rows in gather(folders)}
    shares = {kind: float(f"{fitted(rows).near:.3g}") for kind, rows in found.items() if not kind.endswith(BETWEEN)}
    made = []
    for kind, rows in found.items():
        near = shares.get(kind.removesuffix(BETWEEN)) if kind.endswith(BETWEEN) else None
        if kind.endswith(BETWEEN) and near is None:
            continue
        figures, off = fitted(rows, near), left_out(rows, near)
        per = figures.sm_bytes_per_s
        made.append(
            LinkReach(
                kind=kind,
                floor_s=float(f"{figures.floor_s:.3g}"),
                near=float(f"{figures.near:.3g}"),
                sm_bytes_per_s=None if per is None else float(f"{per:.3g}"),
                rel_sigma=float(f"{max(quantile(off, rows, 0.9) / NINETY, least_sigma(rows)):.2g}"),
                median=float(f"{quantile(off, rows, 0.5):.2g}"),
                points=len(rows.seconds),
                systems=tuple(sorted(set(rows.system.tolist()))),
            )
        )
    return tuple(made)
