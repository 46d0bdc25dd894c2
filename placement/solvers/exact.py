"""The best placement of one load, with a proof: small cases by branch and bound, two slots a GPU by pairing."""

from __future__ import annotations

import numpy as np

from moesim.errors import BadInput
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.problem import refuse_groups
from placement.solvers.branch import MOST_EXPERTS, MOST_RANKS, smallest
from placement.solvers.packing import pack_rows
from placement.solvers.two_slots import best_pairs

NODES = 20_000_000
"""Branches for one question of a small case: 0.2 CPU s."""

PAIR_TOLERANCE = 1e-3
"""Two slots a GPU: the search ends when nothing better by this is left."""


def solve(request: PlacementRequest) -> ExpertPlacement:
    """The smallest hottest rank of the mix of all loads, under equal split, no two replicas of an expert on a rank.

    `notes["proven_within"]`: by how much, at most, the placement is above the optimum (worst layer, relative). One slot
    a GPU: the replica counts that make the largest replica smallest are optimal. Two: `two_slots`, some CPU seconds a
    layer of 256 experts. Else up to 12 experts on 8 GPUs by `branch`. Raises BadInput for what is larger, and where
    groups > 1.
    """
    refuse_groups(request, "exact")
    room = request.slots // request.ranks
    if room > 2 and (request.experts > MOST_EXPERTS or request.ranks > MOST_RANKS):
        raise BadInput(
            f"the solver exact does not take {request.experts} experts in {room} slots on each of {request.ranks} GPUs",
            where="--solver",
            mend=f"use greedy, at most {MOST_EXPERTS} experts on {MOST_RANKS} GPUs, or at most two slots a GPU",
        )
    mix = np.ascontiguousarray(request.mix())
    table = np.asarray(pack_rows(mix, request.slots, request.ranks, 0.0))
    within = 0.0
    for layer, weight in enumerate(mix):
        if room == 1:
            continue
        if request.experts <= MOST_EXPERTS and request.ranks <= MOST_RANKS:
            found, bound = smallest(table[layer], weight, request.ranks, 0.0, NODES)
        else:
            table[layer], found, bound = best_pairs(weight, request.ranks, table[layer], PAIR_TOLERANCE)
        if bound > 0.0:
            within = max(within, found / bound - 1.0)
    return request.placement(table, "exact", proven_within=float(within))
