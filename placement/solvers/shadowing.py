"""The hottest experts on every GPU, the others in order of their id."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.problem import refuse_groups


def solve(request: PlacementRequest) -> ExpertPlacement:
    """Every GPU holds the hottest experts of each layer, as many as it has slots beyond one for each expert.

    The idea of FasterMoE's dynamic shadowing (He et al., PPoPP 2022, section 4.2), which copies experts with many
    tokens to all workers for an iteration; here the copies stay, as engines need a map with equal slots. Places that
    the other experts leave are filled with the next hottest. Raises BadInput where groups > 1.
    """
    refuse_groups(request, "shadowing")
    mix = request.mix()
    room, fewest = request.slots // request.ranks, -(-request.experts // request.ranks)
    hottest_first = np.argsort(-mix, axis=-1, kind="stable")
    table = np.stack([_row(order, request.ranks, room, room - fewest) for order in hottest_first])
    return request.placement(table, "shadowing", shadowed=room - fewest)


def _row(hottest_first: NDArray[np.int64], ranks: int, room: int, shadowed: int) -> NDArray[np.int64]:
    """One layer's slots [ranks x room]: `shadowed` experts everywhere, the others once, then the next hottest."""
    everywhere, others = hottest_first[:shadowed].tolist(), np.sort(hottest_first[shadowed:])
    held = [everywhere + part.tolist() for part in np.array_split(others, ranks)]
    at = shadowed
    for rank in held:
        tried = 0
        while len(rank) < room:
            expert = int(hottest_first[shadowed + (at - shadowed) % (len(hottest_first) - shadowed)])
            at += 1
            tried += 1
            if expert not in rank or tried > len(hottest_first):
                rank.append(expert)
    return np.asarray(held, dtype=np.int64).ravel()
