"""Per-batch balancing one step late: the shares that suited the step before, applied to this step's tokens.

Solving on the step before takes the count exchange and the solve out of the layer's way: both have a whole step's time.
What it costs is balance: the next step's tokens are others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.network.choice import Replicas

Floats = NDArray[np.float64]


def stale_slot_loads(replicas: Replicas, counts: Floats) -> Floats:
    """Tokens of each slot [steps, layers, slots] of steps in order, counts [steps, layers, experts].

    Each step splits an expert's tokens as the choice of `replicas` split them the step before; equally in the first
    step, and where an expert had no token. Parts of tokens are averages, as under fixed shares. Raises BadInput where
    counts are no steps.
    """
    if counts.ndim != 3:
        raise BadInput(f"counts have {counts.ndim} axes", mend="give [steps, layers, experts], steps in order")
    plan = replicas.placement
    table = plan.physical_to_logical
    held = 1.0 / np.take_along_axis(plan.replica_counts(), table, axis=1)
    found = np.empty((*counts.shape[:2], plan.slots))
    tokens = np.take_along_axis(counts.astype(np.float64), np.broadcast_to(table, found.shape), axis=2)
    found[0] = tokens[0] * held
    if len(counts) > 1:
        chosen = replicas.slot_loads(counts[:-1])
        before = tokens[:-1]
        shares = np.where(before > 0, chosen / np.where(before > 0, before, 1.0), held)
        found[1:] = tokens[1:] * shares
    return found


def stale_rank_loads(replicas: Replicas, counts: Floats) -> Floats:
    """Tokens of each rank [steps, layers, ranks]; see `stale_slot_loads`."""
    slots = stale_slot_loads(replicas, counts)
    plan = replicas.placement
    return np.asarray(slots.reshape(*slots.shape[:2], plan.ranks, plan.slots_per_rank).sum(axis=-1))
