"""From one placement to another: which experts travel, from where, and how long the links take.

An expert that a rank holds already is copied inside its memory. One that it lacks comes from a holder in its NVLink
domain if there is one, else from another domain; of several the one that has sent least. Layers are moved one after the
other, all ranks meeting in between, as engines do it (vLLM `distributed/eplb/rebalance_execute.py`, SGLang
`srt/eplb/expert_location_updater.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.spec.cluster import ClusterSpec
from moesim.spec.plan import ExpertPlacement

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Moves:
    """Experts moved, int64 [layers, ranks] each: received and sent inside a domain (near) and between (far), copied."""

    received_near: Ints
    received_far: Ints
    sent_near: Ints
    sent_far: Ints
    copied: Ints

    @property
    def moved(self) -> int:
        """Experts that came over a link."""
        return int(self.received_near.sum() + self.received_far.sum())


def plan_moves(old: ExpertPlacement, new: ExpertPlacement, ranks_per_domain: int) -> Moves:
    """The moves that turn one placement into another of the same layers, experts and ranks. Raises BadInput."""
    if (old.layers, old.experts, old.ranks, old.slots) != (new.layers, new.experts, new.ranks, new.slots):
        raise BadInput("the two placements differ in shape", mend="use the same model, ranks and slots")
    parts = np.zeros((5, old.layers, old.ranks), np.int64)
    _move_layers(old.physical_to_logical, new.physical_to_logical, old.experts, old.ranks, ranks_per_domain, parts)
    return Moves(*parts)


@njit(cache=True)
def _move_layers(old: Ints, new: Ints, experts: int, ranks: int, domain: int, parts: Ints) -> None:
    layers, slots = old.shape
    room = slots // ranks
    for layer in range(layers):
        holds = np.zeros((ranks, experts), np.bool_)
        for slot in range(slots):
            holds[slot // room, old[layer, slot]] = True
        sent = np.zeros(ranks, np.int64)
        for slot in range(slots):
            rank, expert = slot // room, new[layer, slot]
            if old[layer, slot] == expert:
                continue
            first = True  # a second slot of an expert on one rank is a copy of the first
            for other in range(rank * room, slot):
                first = first and new[layer, other] != expert
            if holds[rank, expert] or not first:
                parts[4, layer, rank] += 1
                continue
            best, near = -1, False
            for holder in range(ranks):
                if not holds[holder, expert]:
                    continue
                close = holder // domain == rank // domain
                if best < 0 or (close and not near) or (close == near and sent[holder] < sent[best]):
                    best, near = holder, close
            sent[best] += 1
            parts[0 if near else 1, layer, rank] += 1
            parts[2 if near else 3, layer, best] += 1


def move_seconds(moves: Moves, expert_bytes: float, cluster: ClusterSpec) -> Floats:
    """Seconds of each layer's moves [layers]: the busiest link of any GPU, beside copies at the HBM's rate.

    expert_bytes: of one expert on one GPU. `formula`, and `assumed` to reach the cluster's rates; a link works both
    ways at once, NVLink and NIC side by side.
    """
    near_rate = cluster.nvlink_bytes_per_s or cluster.pcie_bytes_per_s
    near = np.maximum(moves.received_near, moves.sent_near).max(axis=1) * expert_bytes / near_rate
    far = np.maximum(moves.received_far, moves.sent_far).max(axis=1) * expert_bytes / cluster.shared_nic_bytes_per_s
    near += np.where(moves.received_near.sum(axis=1) > 0, cluster.nvlink_latency_s, 0.0)
    far += np.where(moves.received_far.sum(axis=1) > 0, cluster.nic_latency_s, 0.0)
    copied = moves.copied.max(axis=1) * expert_bytes * 2 / cluster.gpu.hbm_bytes_per_s  # read and written
    return np.asarray(np.maximum(np.maximum(near, far), copied))
