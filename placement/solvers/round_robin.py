"""Experts dealt to the ranks like cards, in order of their id."""

from __future__ import annotations

import math

import numpy as np

from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.problem import refuse_groups


def solve(request: PlacementRequest) -> ExpertPlacement:
    """Item k, which is a replica of expert k mod experts, goes to rank k mod ranks, one rank further in each round.

    A round is lcm(experts, ranks) items, after which the dealing would meet the same rank with the same expert again;
    the shift by one rank keeps two replicas apart, and as a round is a multiple of the ranks, every rank gets as many
    items. Raises BadInput where groups > 1.
    """
    refuse_groups(request, "round_robin")
    item = np.arange(request.slots, dtype=np.int64)
    rank = (item + item // math.lcm(request.experts, request.ranks)) % request.ranks
    row = (item % request.experts)[np.argsort(rank, kind="stable")]
    return request.placement(np.tile(row, (request.layers, 1)), "round_robin")
