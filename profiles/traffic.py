"""Who sends how much to whom in an uneven exchange, and what of that makes its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Traffic:
    """What each rank sends to others, gets from others, and keeps: [ranks] each, in rows or bytes."""

    sent: Ints
    received: Ints
    kept: Ints

    def loads(self, both_ways: float) -> Floats:
        """What an even exchange moves each way that loads a rank as this one does: [ranks].

        A rank's load is its busier direction plus `both_ways` of the other one; in an even exchange, both are equal.
        """
        more, less = np.maximum(self.sent, self.received), np.minimum(self.sent, self.received)
        return np.asarray((more + both_ways * less) / (1.0 + both_ways), dtype=np.float64)

    def copies(self, together: float) -> Floats:
        """What every rank keeps in an exchange whose copies take as long as this one's: [ranks].

        together: how much the others' copies, on average, add to a rank's own.
        """
        others = (self.kept.sum() - self.kept) / max(len(self.kept) - 1, 1)
        return np.asarray((self.kept + together * others) / (1.0 + together), dtype=np.float64)

    def busiest(self, both_ways: float) -> float:
        """Rows of an even exchange that loads every rank as this one loads its busiest."""
        return float(self.loads(both_ways).max())


def traffic(counts: Ints) -> Traffic:
    """By direction, of an exchange with `counts` [source ranks, slots]; its way back is the same, turned round."""
    ranks = counts.shape[0]
    table = counts.reshape(ranks, ranks, -1).sum(axis=-1)
    kept = np.diagonal(table).copy()
    return Traffic(table.sum(axis=1) - kept, table.sum(axis=0) - kept, kept)


def shared_with(even_sizes: Floats, even_seconds: Floats, sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """How much one user of a thing that two share is slowed by the other, from runs of one alone: 0 to 1.

    The users are the two directions of a rank, or the copies of two ranks. One alone with b bytes takes as long as both
    with e bytes each (read backwards from the curve of both): b = (1 + share) e. 0: they do not disturb each other; 1:
    they take turns, as in a transport that one thread serves. The median over the sizes.
    """
    found = []
    for size, value in zip(sizes, seconds, strict=True):
        alike = float(np.interp(value, even_seconds, even_sizes))
        found.append(min(max(size / alike - 1.0, 0.0), 1.0) if alike > 0 else 1.0)
    return float(np.median(found)) if found else 0.0


def endpoint(counts: Ints, hosts: Sequence[int]) -> dict[str, int]:
    """What makes the time of an exchange of `counts` bytes [source ranks, destination ranks], as a table keys it.

    The busier direction of the busiest rank and its other one, the most that a rank moves to or from other hosts, and
    the most that stays on a rank. hosts: of each rank.
    """
    flows = traffic(counts)
    more, less = np.maximum(flows.sent, flows.received), np.minimum(flows.sent, flows.received)
    rank = int(np.lexsort((less, more))[-1])
    far = np.asarray(hosts)[:, None] != np.asarray(hosts)[None, :]
    away = np.where(far, counts, 0)
    return {
        "busiest_bytes": int(more[rank]),
        "other_way_bytes": int(less[rank]),
        "off_node_bytes": int(max(away.sum(axis=1).max(), away.sum(axis=0).max())),
        "kept_bytes": int(flows.kept.max()),
    }
