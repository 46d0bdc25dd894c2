"""Experts that tokens pick together on one node, at no worse balance: fewer copies of a token cross between nodes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.problem import refuse_groups
from placement.solvers.greedy import SEARCH_ABOVE, pack_mix
from placement.solvers.regroup import regroup

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SWAPS = 100_000
"""Proposed swaps of a run, or 400 for each slot if that is more."""

RUNS = 1_536
"""Runs that keep the bounds, of which the best counts, times the slots of a layer; six at least.

Small layers get more, as their few swaps trap a run sooner: 64 slots take 0.1 s a layer, 288 slots 0.2 s."""

TRIES = 6
"""Runs at most, for each that is to keep the bounds: with few experts on a rank most do not."""


def solve(request: PlacementRequest) -> ExpertPlacement:
    """Regroup the greedy placement by co-activation, then name the nodes of each layer after the layer before.

    A layer stays as even as greedy has it: no rank hotter than its hottest or 1.001 x the mean, no more load above
    1.001, and, where steps are known, no more variance of the ranks' loads from step to step. A layer that cannot stays
    as greedy has it. On one node, or where ranks do not fill the nodes evenly, ranks take the place of
    nodes. Tokens of one pick are grouped by transitions alone, which helps only where tokens stay at their experts.
    Without co-activation it is greedy, and `notes["affinity"]` says so. Raises BadInput where groups > 1.

    The ideas: experts that go together on one device, Occult (Luo et al., arXiv:2505.13345) and MoETuner (Go and
    Mahajan, arXiv:2502.06643); transitions, ExFlow (Yao et al., arXiv:2401.08383).
    """
    refuse_groups(request, "affinity")
    table = pack_mix(request, request.mix())
    parts = request.nodes if request.nodes > 1 and request.ranks % request.nodes == 0 else request.ranks
    together, onward = request.coactivation, request.transitions
    if together is None:
        return request.placement(table, "affinity", affinity="no co-activation in the loads: placed by greedy")
    rng = np.random.default_rng(request.seed)
    if together.any():
        nothing = np.zeros((parts, request.experts))
        left = sum(_regroup(request, table, layer, together[layer], nothing, parts, rng) for layer in layers(request))
        by = "co-activation"
    else:
        left = 0 if onward is None else _chain(request, table, onward, parts, rng)
        by = "transitions"
    if onward is not None:
        align(table, onward, parts)
    where = "rank" if parts == request.ranks else "node"
    return request.placement(table, "affinity", affinity=f"{by} by {where}", layers_left_as_greedy=left)


def layers(request: PlacementRequest) -> range:
    """Rows of the request's tables."""
    return range(request.layers)


def _chain(request: PlacementRequest, table: Ints, onward: Floats, parts: int, rng: np.random.Generator) -> int:
    """Draw each layer's experts to the parts of the layer before, then to both neighbours; layers that could not."""
    left = 0
    for both in (False, True):
        left = 0
        for layer in layers(request):
            pull = np.zeros((parts, request.experts))
            if layer > 0:
                pull += presence(table[layer - 1], request.experts, parts) @ onward[layer - 1]
            if both and layer + 1 < request.layers:
                pull += presence(table[layer + 1], request.experts, parts) @ onward[layer].T
            left += _regroup(request, table, layer, np.zeros((request.experts,) * 2), pull, parts, rng)
    return left


def _regroup(
    request: PlacementRequest,
    table: Ints,
    layer: int,
    together: Floats,
    attract: Floats,
    parts: int,
    rng: np.random.Generator,
) -> bool:
    """Regroup one layer of table [layers, slots] in place; whether it could not, and stays as it was.

    together, attract: as `regroup` takes them.
    """
    if parts == 1:
        return False
    weight = np.ascontiguousarray(request.mix()[layer])
    row, ranks = table[layer], request.ranks
    none = np.zeros((request.experts, request.experts))
    swing = none if request.dispersion is None else np.ascontiguousarray(request.dispersion[layer])
    rounds, wanted = max(400, SWAPS // request.slots), max(6, RUNS // request.slots)
    effort = (rounds, wanted, TRIES * wanted)
    return not regroup(row, weight, together, attract, swing, ranks, SEARCH_ABOVE, *effort, rng)


def presence(row: Ints, experts: int, parts: int) -> Floats:
    """Share of each expert's replicas in each part: [parts, experts], for one layer's row [slots]."""
    out = np.zeros((parts, experts))
    np.add.at(out, (np.arange(len(row)) // (len(row) // parts), row), 1.0)
    return np.asarray(out / out.sum(axis=0))


def align(table: Ints, transitions: Floats, parts: int) -> None:
    """Permute the parts of each layer, in place, so that most tokens find their next experts in the part they are in.

    Neither balance nor the copies within a layer change. An assignment problem for each layer, given the one before.
    """
    experts = transitions.shape[1]
    for layer in range(1, len(table)):
        before, after = presence(table[layer - 1], experts, parts), presence(table[layer], experts, parts)
        _, source = linear_sum_assignment(before @ transitions[layer - 1] @ after.T, maximize=True)
        table[layer] = table[layer].reshape(parts, -1)[source].ravel()
