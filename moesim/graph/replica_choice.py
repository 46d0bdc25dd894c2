"""What a replica choice that looks at each batch costs in every layer, before anything can be sent.

Every rank learns all ranks' counts (an all-reduce of one number for each expert), solves the same problem, writes the
new map and looks its tokens' slots up in it. Nothing has to be sent after the solve: it has one answer.
"""

from __future__ import annotations

import numpy as np

from moesim.cost.estimate import CostModel, Estimate, Tag, estimate
from moesim.cost.ops import Collective, MemoryBound
from moesim.graph.batch import Floats
from moesim.network.choice import Replicas
from moesim.units import BYTES_PER_ELEMENT

# Counts, slots and parts of the map are numbers of four bytes.
NUMBER_BYTES = BYTES_PER_ELEMENT["fp32"]


def choice_estimates(
    costs: CostModel,
    replicas: Replicas,
    *,
    picks: Floats,
    solve_s: float | None,
    host_rel_sigma: float,
    gpus: tuple[int, int],
) -> tuple[Estimate, ...]:
    """Count exchange, solve, and map update of one layer, each broadcastable to [steps, 1]; nothing where none is due.

    picks: [steps, 1] of the fullest rank. solve_s: a figure of one's own for the solve; none = measured on a CPU core
    (`network.choice`), with the spread of host times. gpus: of the instance, and of a node. Raises OutsideProfile.
    """
    if not replicas.choice.updates_map:
        return ()
    plan = replicas.placement
    whole, node = gpus
    counts = np.full((1, 1), plan.experts * NUMBER_BYTES)
    source = "replica choice on one CPU core" if solve_s is None else "policies.dispatch.replica_solve_s"
    seconds = np.full((1, 1), replicas.solve_s() if solve_s is None else solve_s)
    # The map: for each slot and each sender its part, written and read once; each pick reads its expert, writes a slot.
    moved = (2 * plan.slots * plan.ranks + 2 * picks) * NUMBER_BYTES
    update = costs.estimate(MemoryBound(bytes=moved, name="replica map"))
    if not replicas.choice.exchanges_counts:  # solved while the step before runs
        return (update,)
    return (
        costs.estimate(Collective(kind="all_reduce", bytes=counts, gpus=whole, nodes=-(-whole // node))),
        estimate(seconds, Tag.ASSUMED, "overhead", host_rel_sigma, source),
        update,
    )
