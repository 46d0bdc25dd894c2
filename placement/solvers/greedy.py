"""The default solver: greedy replication, longest-processing-time packing, swaps; compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.problem import refuse_uneven_groups
from placement.solvers.branch import MOST_EXPERTS, MOST_RANKS, smallest_rows
from placement.solvers.packing import groups_to_nodes, pack_rows, row_max_over_mean
from placement.solvers.search import search_layers

TOLERANCE = 1e-4
"""Swaps end when the hottest rank is within this share of the mean: far below what a step's own noise adds."""

SEARCH_ABOVE = 1.001
"""Layers that packing leaves hotter than this are searched on: there, other replica counts may be better."""

DOUBLINGS = 5
"""The search lowers the sum of (rank load over mean)**32, close to the maximum, as one load is all there is."""

PASSES = 30
"""Sweeps over all moves of a layer; the search ends by itself earlier."""


SMALL_TOLERANCE = 1e-3
"""Small cases end when nothing better by this is left to find."""

SMALL_NODES = 3_000_000
"""Branches that a small case may try for each question: 0.04 CPU s. Of 800 random ones none ended 0.7 % above what five
times as many find, and three in four are proven optimal."""


def solve(request: PlacementRequest) -> ExpertPlacement:
    """Fit the mix of all loads: no two replicas of an expert on a rank; groups stay on a node where groups > 1.

    Graham's longest-processing-time rule (SIAM J. Appl. Math. 17(2), 1969) on replicas, then pairwise swaps; layers
    that stay uneven get a local search that may also change replica counts, and small cases branch and bound. Raises
    Infeasible where groups, nodes and ranks do not divide.
    """
    refuse_uneven_groups(request)
    return request.placement(pack_mix(request, request.mix()), "greedy")


def pack_mix(request: PlacementRequest, mix: NDArray[np.float64]) -> NDArray[np.int64]:
    """Pack one load [layers, experts] under the request's limits: [layers, slots]."""
    if request.groups == 1:
        return pack(np.ascontiguousarray(mix), request.slots, request.ranks)
    layers, nodes = request.layers, request.nodes
    size, node_experts, node_slots = request.experts // request.groups, request.experts // nodes, request.slots // nodes
    group_load = np.ascontiguousarray(mix.reshape(layers, request.groups, size).sum(axis=-1))
    group_at = groups_to_nodes(group_load, nodes)
    members = (group_at[:, :, None] * size + np.arange(size)).reshape(layers, request.experts)
    node_load = np.take_along_axis(mix, members, axis=-1).reshape(layers * nodes, node_experts)
    local = pack(np.ascontiguousarray(node_load), node_slots, request.ranks // nodes)
    first = (np.arange(nodes) * node_experts)[:, None]
    index = (local.reshape(layers, nodes, node_slots) + first).reshape(layers, request.slots)
    return np.asarray(np.take_along_axis(members, index, axis=-1), dtype=np.int64)


def pack(weight: NDArray[np.float64], slots: int, ranks: int) -> NDArray[np.int64]:
    """Pack each row of [rows, experts]: [rows, slots]. A search's result is kept only where it is better."""
    table = np.asarray(pack_rows(weight, slots, ranks, TOLERANCE))
    packed = row_max_over_mean(table, weight, ranks)
    hot = np.nonzero(packed > SEARCH_ABOVE)[0]
    if weight.shape[1] <= MOST_EXPERTS and ranks <= MOST_RANKS:
        best = table[hot]
        smallest_rows(best, weight[hot], ranks, SMALL_TOLERANCE, SMALL_NODES)
        table[hot] = best
        return table
    total = weight[hot].sum(axis=1, keepdims=True)
    loads = weight[hot] / np.where(total > 0, total, 1.0)
    searched = table[hot]
    search_layers(
        searched, np.ascontiguousarray(loads[:, None, :]), np.ones((len(hot), 1)), ranks, ranks, DOUBLINGS, PASSES
    )
    better = row_max_over_mean(searched, weight[hot], ranks) < packed[hot]
    table[hot[better]] = searched[better]
    return table
