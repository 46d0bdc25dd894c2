"""From the placement that stands to one that is nearly as good as a fresh one, with few experts moved."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.migrate import fresh_rows
from placement.problem import refuse_uneven_groups
from placement.solvers.greedy import TOLERANCE, pack_mix
from placement.solvers.repack import descend, hottest, row_moves

NEARLY = 0.01
"""A layer counts as good when its hottest rank is within this share of the best that is at hand."""


def solve(request: PlacementRequest) -> ExpertPlacement:
    """Change `request.current` as little as it takes, layer by layer; the greedy solver without a current placement.

    A path of single changes (two replicas swapped, a spare replica's slot given to another expert), each of which
    relieves the hottest rank most, is followed until the layer is within 1 % of the better of its end and a fresh
    greedy solution whose parts are dealt to the ranks that hold most of them; of the path and the fresh solution, what
    moves less is taken. Never two replicas of an expert on a rank, and legal after every change. Raises Infeasible
    where groups, nodes and ranks do not divide.
    """
    refuse_uneven_groups(request)
    mix = np.ascontiguousarray(request.mix())
    table = pack_mix(request, mix)
    if request.current is None:
        return request.placement(table, "incremental")
    node_ranks = request.ranks // request.nodes if request.groups > 1 else request.ranks
    old = request.current.physical_to_logical
    fresh = fresh_rows(request.current, request.placement(table, "greedy"), node_ranks)
    rows = [_row(*layer, request, node_ranks) for layer in zip(old, fresh, mix, strict=True)]
    return request.placement(np.stack(rows), "incremental")


def _row(
    old: NDArray[np.int64],
    fresh: NDArray[np.int64],
    load: NDArray[np.float64],
    request: PlacementRequest,
    node_ranks: int,
) -> NDArray[np.int64]:
    if not _legal(old, request):
        return fresh
    rows, loads = descend(old, load, request.ranks, node_ranks, request.slots, TOLERANCE)
    other = hottest(fresh, load, request.ranks)
    near = np.flatnonzero(loads <= min(loads[-1], other) * (1.0 + NEARLY))
    if not len(near):
        return fresh
    row = rows[near[0]]
    domain = np.zeros(request.ranks, dtype=np.int64)
    if other <= min(loads[-1], other) * (1.0 + NEARLY):
        travel = [row_moves(old, new, domain, request.experts, 1.0, 1.0)[0] for new in (row, fresh)]
        if travel[1] < travel[0]:
            return fresh
    return np.asarray(row)


def _legal(row: NDArray[np.int64], request: PlacementRequest) -> bool:
    """Whether no rank holds an expert twice and, where there are groups, each lies on one node."""
    parts = np.sort(row.reshape(request.ranks, -1), axis=1)
    if (np.diff(parts, axis=1) == 0).any():
        return False
    if request.groups == 1:
        return True
    group = row // (request.experts // request.groups)
    node = np.arange(request.slots) // (request.slots // request.nodes)
    return len(set(zip(group.tolist(), node.tolist(), strict=True))) == request.groups
