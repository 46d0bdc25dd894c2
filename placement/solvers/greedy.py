"""The default solver: greedy replication, longest-processing-time packing, swaps; compiled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.problem import refuse_uneven_groups
from placement.solvers.packing import groups_to_nodes, pack_rows

TOLERANCE = 1e-4
"""Swaps end when the hottest rank is within this share of the mean: far below what a step's own noise adds."""


def solve(request: PlacementRequest) -> ExpertPlacement:
    """Fit the mix of all loads: no two replicas of an expert on a rank; groups stay on a node where groups > 1.

    Graham's longest-processing-time rule (SIAM J. Appl. Math. 17(2), 1969) on replicas, then pairwise swaps.
    Raises Infeasible where groups, nodes and ranks do not divide.
    """
    refuse_uneven_groups(request)
    return request.placement(pack_mix(request, request.mix()), "greedy")


def pack_mix(request: PlacementRequest, mix: NDArray[np.float64]) -> NDArray[np.int64]:
    """Pack one load [layers, experts] under the request's limits: [layers, slots]."""
    if request.groups == 1:
        return np.asarray(pack_rows(np.ascontiguousarray(mix), request.slots, request.ranks, TOLERANCE))
    layers, nodes = request.layers, request.nodes
    size, node_experts, node_slots = request.experts // request.groups, request.experts // nodes, request.slots // nodes
    group_load = np.ascontiguousarray(mix.reshape(layers, request.groups, size).sum(axis=-1))
    group_at = groups_to_nodes(group_load, nodes)
    members = (group_at[:, :, None] * size + np.arange(size)).reshape(layers, request.experts)
    node_load = np.take_along_axis(mix, members, axis=-1).reshape(layers * nodes, node_experts)
    local = pack_rows(np.ascontiguousarray(node_load), node_slots, request.ranks // nodes, TOLERANCE)
    first = (np.arange(nodes) * node_experts)[:, None]
    index = (local.reshape(layers, nodes, node_slots) + first).reshape(layers, request.slots)
    return np.asarray(np.take_along_axis(members, index, axis=-1), dtype=np.int64)
