"""Moving from one placement to another: fresh solutions that keep what they can, and what a move takes on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moesim.engine.relayout_moves import match_ranks
from moesim.errors import BadInput
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.solvers.greedy import pack_mix

if TYPE_CHECKING:
    from moesim.engine.deployment import Deployment

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def fresh_rows(old: ExpertPlacement, new: ExpertPlacement, node_ranks: int) -> Ints:
    """The new table [layers, slots] with its ranks' parts dealt out, within nodes, so that most stays where it is."""
    return match_ranks(old, new, [rank // node_ranks for rank in range(new.ranks)]).physical_to_logical


def fitter(request: PlacementRequest, node_ranks: int) -> Callable[[Floats, Ints], Ints]:
    """A function of a load [layers, experts] and the table that stands to a fresh greedy table, matched to that one."""

    def fit(load: Floats, table: Ints) -> Ints:
        new = request.placement(pack_mix(request, np.ascontiguousarray(load)), "greedy")
        return fresh_rows(request.placement(table, "current"), new, node_ranks)

    return fit


@dataclass(frozen=True)
class ExpertTravel:
    """Seconds that one expert's weights take, inside an NVLink domain and from another, and the domain of each rank."""

    near_s: float
    far_s: float
    domain: Ints
    tag: str


def expert_travel(deployment: Deployment) -> ExpertTravel:
    """What one expert of one layer takes over the deployment's links, and from the buffer into its slot.

    The engines' way, as `placement.rebalance` simulates it (moesim.engine.relayout_moves): point-to-point over NVLink
    within a domain, over the NICs between domains. Weights only: a serving deployment has no optimizer states. Raises
    BadInput where the cluster's topology is not known or one rank holds all experts.
    """
    from moesim.engine.relayout_moves import Moves, move_time, rank_domains

    setup = deployment.setup
    if setup.network is None or setup.placement.ranks == 1:
        raise BadInput("one rank holds every expert, so that none can move", where="parallel.ep", mend="use ep above 1")
    domain = np.asarray(rank_domains(setup, setup.network.cluster.domain_gpus), dtype=np.int64)
    hbm = deployment.ground.cluster.gpu.hbm_bytes_per_s
    zero = np.zeros(1, dtype=np.int64)
    copies = np.zeros((setup.placement.layers, setup.placement.ranks), dtype=np.int64)
    found, tag = {}, ""
    for name, others in (
        ("near", np.flatnonzero(domain == domain[0])[1:]),
        ("far", np.flatnonzero(domain != domain[0])),
    ):
        if len(others):
            timed = move_time(Moves(zero, zero, zero, others[:1], copies), setup, setup.network, hbm)
            found[name], tag = float(timed.transfer_s[0] + timed.copy_s[0]), timed.tag.label
    near_s = found.get("near", found.get("far", 0.0))
    return ExpertTravel(near_s, found.get("far", near_s), domain, tag)
