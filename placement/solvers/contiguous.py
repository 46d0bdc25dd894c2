"""Experts in order of their id: what every engine does when nothing is planned."""

from __future__ import annotations

import numpy as np

from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.problem import refuse_groups


def solve(request: PlacementRequest) -> ExpertPlacement:
    """Slot s of every layer holds expert s mod experts; slots beyond one for each expert start again at expert 0.

    A rank holds consecutive experts, so it never holds one twice (a request has at most experts x ranks slots). This
    is also the layout that SGLang starts with where no map is given (`ExpertLocationMetadata.init_trivial`,
    sgl-project/sglang, python/sglang/srt/eplb/expert_location.py). Raises BadInput where groups > 1.
    """
    refuse_groups(request, "contiguous")
    row = np.arange(request.slots, dtype=np.int64) % request.experts
    return request.placement(np.tile(row, (request.layers, 1)), "contiguous")
