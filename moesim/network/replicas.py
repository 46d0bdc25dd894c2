"""Which replica serves a token: the share of an expert's tokens that each of its slots gets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.spec.plan import ExpertPlacement

Floats = NDArray[np.float64]


def replica_shares(placement: ExpertPlacement, *, policy: str, nodes: int) -> Floats:
    """Share of its expert's tokens that each slot serves: float64 [layers, slots]; an expert's shares sum to 1.

    Sources are even over the ranks. policy "equal": every replica the same. "local_first", as SGLang's static dispatch
    does it (python/sglang/srt/eplb/expert_location.py): a rank uses its own replica, else the replicas of its node by
    turns, else all replicas by turns; so a node's tokens stay on the node where it holds a replica. Raises BadInput.
    """
    counts = placement.replica_counts()
    own = np.take_along_axis(counts, placement.physical_to_logical, axis=1)
    if policy == "equal":
        return np.asarray(1.0 / own)
    if policy != "local_first":
        raise BadInput(
            f"unknown replica policy {policy!r}", where="policies.dispatch.replica", mend="use local_first or equal"
        )
    if placement.ranks % nodes:
        raise BadInput(
            f"{placement.ranks} ranks do not divide by {nodes} nodes", where="parallel.ep", mend="fill whole nodes"
        )
    node_of_slot = np.arange(placement.slots) // (placement.slots // nodes)
    by_node = np.zeros((placement.layers, nodes, placement.experts))
    rows = np.arange(placement.layers)[:, None]
    np.add.at(by_node, (rows, node_of_slot[None, :], placement.physical_to_logical), 1.0)
    empty = (by_node == 0).sum(axis=1)
    inside = by_node[rows, node_of_slot[None, :], placement.physical_to_logical]
    from_elsewhere = np.take_along_axis(empty, placement.physical_to_logical, axis=1) / own
    return np.asarray((1.0 / inside + from_elsewhere) / nodes)
