"""Two slots a rank and one known load: replica counts and places, proven best together.

Given the replicas, sorting them and pairing the heaviest with the lightest is optimal (exchange argument: in any
pairing, swapping partners so that the heaviest meets the lightest raises no pair above the heaviest pair there was).
It stays at or below a limit exactly if for every share s above half of it, the replicas of at least s are no more than
those of at most limit - s (Hall, Journal of the London Mathematical Society 10, 1935: who may be the partner of a
heavier replica may be the partner of a lighter one). With the limit given, both sides are linear in "expert e has n
replicas", so the counts are a feasibility problem for HiGHS, and the limit is bisected.

Replicas of one expert could only meet where the middle of the order is one expert's; that is put right by an exchange
with another rank, and a limit that this breaks counts as not reached.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from placement.solvers.packing import replica_counts

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROUNDING = 1e-12

NODES = 2000
"""Nodes of HiGHS' tree for one limit; an answer mostly comes within some tens."""


def pair(weight: Floats, count: Ints, ranks: int) -> Ints:
    """The best table [2 x ranks] of these counts; an expert's replicas kept apart by the exchange that raises least."""
    expert = np.repeat(np.arange(len(weight)), count)
    share = (weight / count)[expert]
    order = np.argsort(-share, kind="stable")
    table = np.stack([expert[order[:ranks]], expert[order[ranks:][::-1]]], axis=1)
    each = weight / count
    for rank in np.nonzero(table[:, 0] == table[:, 1])[0]:
        twice = table[rank, 0]
        apart = np.nonzero((table != twice).all(axis=1))[0]
        if not len(apart):
            raise ValueError("one expert fills every rank")  # needs more replicas than ranks: counts exclude it
        heaviest = each[twice] + each[table[apart]].max(axis=1)
        other = apart[heaviest.argmin()]
        table[rank, 1], table[other, 1] = table[other, 1], twice
    return table.ravel()


def hottest(table: Ints, weight: Floats, count: Ints) -> float:
    """Load of the hottest rank of a two-slot table."""
    return float((weight / count)[table].reshape(-1, 2).sum(axis=1).max())


def counts_below(weight: Floats, ranks: int, limit: float) -> tuple[Ints | None, bool]:
    """Replica counts [experts] that can be paired at or below `limit`, or None; and whether None is proven."""
    fewest = np.maximum(1, np.ceil(weight / limit - ROUNDING)).astype(np.int64)
    spare = 2 * ranks - int(fewest.sum())
    if spare < 0 or fewest.max() > ranks:
        return None, True
    expert = np.repeat(np.arange(len(weight)), np.minimum(spare, ranks - fewest) + 1)
    first = np.searchsorted(expert, np.arange(len(weight)))
    count = (fewest[expert] + np.arange(len(expert)) - first[expert]).astype(np.float64)
    share = weight[expert] / count
    most = limit * (1.0 + ROUNDING)
    heavy = np.unique(share[share > most / 2])
    at_least = share[None, :] >= heavy[:, None]
    partner = share[None, :] <= most - heavy[:, None]
    hall = sparse.csr_matrix(np.where(at_least, count, 0.0) - np.where(partner, count, 0.0))
    one = sparse.csr_matrix((np.ones(len(expert)), (expert, np.arange(len(expert)))))
    rules = [
        LinearConstraint(one, 1.0, 1.0),
        LinearConstraint(sparse.csr_matrix(count[None, :]), 2.0 * ranks, 2.0 * ranks),
    ]
    if len(heavy):
        rules.append(LinearConstraint(hall, -np.inf, 0.0))
    found = milp(
        np.zeros(len(expert)),
        constraints=rules,
        bounds=Bounds(0.0, 1.0),
        integrality=np.ones(len(expert)),
        options={"node_limit": NODES},
    )
    if found.x is None:
        return None, found.status == 2
    return np.rint(np.bincount(expert, weights=found.x * count)).astype(np.int64), True


def best_pairs(weight: Floats, ranks: int, start: Ints, tolerance: float) -> tuple[Ints, float, float]:
    """A table [2 x ranks] within `tolerance` (relative) of the best, its hottest rank's load, and a proven lower bound.

    weight: [experts]; start: a legal table, kept where nothing is better by more than the tolerance.
    """
    table = start
    found = hottest(start, weight, np.bincount(start, minlength=len(weight)))
    fewest = replica_counts(weight, 2 * ranks, ranks)
    bound = proven = max(float(weight.sum()) / ranks, float((weight / fewest).max()))
    while found > bound * (1.0 + tolerance):
        limit = 0.5 * (found + bound) if found > bound * (1.0 + 2.0 * tolerance) else found / (1.0 + tolerance)
        count, told = counts_below(weight, ranks, limit)
        if count is None:
            bound = limit
            proven = limit if told else proven
            continue
        tried = pair(weight, count, ranks)
        reached = hottest(tried, weight, count)
        if reached < found:
            table, found = tried, reached
        if reached > limit * (1.0 + 2.0 * ROUNDING):
            bound = limit  # replicas of one expert had to part: not reached here, and not disproven
    return table, found, proven
