"""The price of an uneven all-to-all from measured rows of others: even ones, kept ones, and ones in one direction.

What moves: an even exchange that loads every rank as this one loads its busiest, read from the even curve; between
hosts, likewise, the most that one rank moves off its host. What stays: a copy, read from exchanges in which everything
stays. So no row of an uneven exchange is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.cost.estimate import Tag
from moesim.errors import BadInput, OutsideProfile
from profiles.fit import OUTSIDE, Curve, curve, medians
from profiles.groups import in_hosts
from profiles.protocols import rule_of_collective
from profiles.record import COLLECTIVES, LATENCY
from profiles.shares import KEPT, KEPT_BY_ONE, ONE_WAY
from profiles.traffic import Floats, Ints, endpoint, shared_with, traffic

if TYPE_CHECKING:
    import polars as pl

# Rows in one direction, or kept by one rank, that tell how much two users of one thing disturb each other: the largest,
# where bytes and not latency make the time.
TELLING_ROWS = 3


@dataclass(frozen=True)
class UnevenCost:
    """even: seconds over the size of an even exchange. kept: over what every rank keeps, None if not measured.

    both_ways: how much of a rank's less busy direction adds to its time. together: how much the other ranks' copies add
    to a rank's own. Both 0 to 1, and 0 where no row tells. tag: FORMULA, or ASSUMED where some row is missing (without
    kept rows, what stays counts as in the even exchange).
    """

    ranks: int
    nodes: int
    even: Curve
    kept: Curve | None = None
    both_ways: float = 0.0
    together: float = 0.0
    tag: Tag = Tag.ASSUMED

    def equal_bytes(self, counts: Ints, hosts: Sequence[int]) -> float:
        """The size of the even exchange that loads every rank as `counts` [source, destination] load the busiest."""
        if self.ranks == 1:
            return 0.0
        alike = traffic(counts).busiest(self.both_ways) * self.ranks / (self.ranks - 1)
        if self.nodes > 1:
            off_node = endpoint(counts, hosts)["off_node_bytes"]
            alike = max(alike, off_node / (1.0 - 1.0 / self.nodes))
        return alike

    def seconds(self, counts: Ints, hosts: Sequence[int]) -> float:
        """Seconds of an exchange of `counts` bytes [source, destination]; hosts: of each rank.

        Raises OutsideProfile.
        """
        alike = self.equal_bytes(counts, hosts)
        stays = float(traffic(counts).copies(self.together).max())
        if self.kept is None:
            return self._at(self.even, alike)
        if alike == 0.0:
            return self._at(self.kept, stays)
        moved = self._at(self.even, alike) - self.copy_s(alike / self.ranks)
        return max(moved, float(self.kept.ys[0])) + self.copy_s(stays)

    def copy_s(self, size: float) -> float:
        """Seconds that the copies add to an exchange when every rank keeps `size` bytes. Raises OutsideProfile."""
        if self.kept is None or size <= 0:
            return 0.0
        return self._at(self.kept, size) - float(self.kept.ys[0])

    def _at(self, found: Curve, size: float) -> float:
        seconds, tags = found.price(np.asarray([size]))
        if tags[0] == OUTSIDE:
            raise OutsideProfile(
                f"what an exchange of {self.ranks} ranks on {in_hosts(self.nodes)} moves or keeps, {size:.0f} bytes, "
                f"lies outside what was measured (up to {found.largest:.0f})",
                where="uneven all-to-all",
                mend=f"measure it with `{COLLECTIVES} --kinds all_to_all --to {size:.0f}B --out measured.jsonl`, once "
                f"as it is and once with `--pattern {KEPT} --pattern {KEPT_BY_ONE} --pattern {ONE_WAY}`",
            )
        return float(seconds[0])


def uneven_cost(tables: Mapping[str, pl.DataFrame], *, path: str, ranks: int, nodes: int = 1) -> UnevenCost:
    """The cost of uneven exchanges on these ranks, from the tables `collective` and `uneven_all_to_all`.

    Of the latter only rows count in which nothing moves, or everything moves in one direction. Raises BadInput where no
    even exchange on these ranks was measured.
    """
    import polars as pl

    here = (pl.col("path") == path) & (pl.col("gpus") == ranks) & (pl.col("nodes") == nodes)
    even = tables["collective"].filter(here & (pl.col("kind") == "all_to_all"))
    if even.is_empty():
        raise BadInput(
            f"no even all_to_all over {path} on {ranks} ranks on {in_hosts(nodes)} was measured",
            where="uneven all-to-all",
            mend=f"measure it with `{COLLECTIVES} --kinds all_to_all --out measured.jsonl`",
        )
    rows = tables["uneven_all_to_all"].filter(here)
    still = rows.filter(pl.col("busiest_bytes") == 0)
    every = still.filter(pl.col("kept_bytes") <= pl.col("bytes"))
    alone = still.filter(pl.col("kept_bytes") > pl.col("bytes"))
    one_way = rows.filter(
        (pl.col("busiest_bytes") > 0) & (pl.col("other_way_bytes") == 0) & (pl.col("kept_bytes") == 0)
    )
    kept = None if every.is_empty() else curve(*_columns(every, "kept_bytes"))
    rule = rule_of_collective("all_to_all", path)
    cost = UnevenCost(ranks, nodes, curve(*_columns(even, "bytes"), rule=rule), kept)
    if ranks == 1:
        return dataclasses.replace(cost, tag=Tag.ASSUMED if kept is None else Tag.FORMULA)
    sizes, seconds = medians(*_columns(even, "bytes"))
    inside = sizes <= (np.inf if kept is None else kept.largest * ranks)
    copies = np.asarray([cost.copy_s(float(size) / ranks) for size in sizes[inside]])
    moved = np.maximum.accumulate(seconds[inside] - copies)
    both_ways = _share(one_way, "busiest_bytes", sizes[inside] * (ranks - 1) / ranks, moved, 0.0)
    together = None if kept is None else _share(alone, "kept_bytes", kept.xs, kept.ys - kept.ys[0], float(kept.ys[0]))
    tag = Tag.ASSUMED if both_ways is None or together is None else Tag.FORMULA
    return dataclasses.replace(cost, both_ways=both_ways or 0.0, together=together or 0.0, tag=tag)


def _share(rows: pl.DataFrame, size: str, both_sizes: Floats, both_s: Floats, latency_s: float) -> float | None:
    """How much two users disturb each other, from the largest rows of one alone that the curve of both reaches."""
    sizes, seconds = medians(*_columns(rows, size))
    reached = seconds - latency_s <= both_s[-1]
    sizes, seconds = sizes[reached][-TELLING_ROWS:], seconds[reached][-TELLING_ROWS:] - latency_s
    return shared_with(both_sizes, both_s, sizes.tolist(), seconds.tolist()) if len(sizes) else None


def _columns(rows: pl.DataFrame, size: str) -> tuple[Floats, Floats]:
    return rows[size].cast(float).to_numpy(), rows[LATENCY].to_numpy()
