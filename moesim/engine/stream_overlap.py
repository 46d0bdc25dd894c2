"""The slowdown of overlapping streams that a plan runs with: none, assumed, by multiprocessors, or measured."""

from __future__ import annotations

from moesim.cost.estimate import CostModel, Tag
from moesim.cost.overlap import (
    DEEPEP_NORMAL_MULTIPROCESSORS,
    MeasuresOverlap,
    Slowdown,
    StreamOverlap,
    by_multiprocessors,
)
from moesim.errors import Infeasible
from moesim.spec.cluster import ClusterSpec
from moesim.spec.overlap import SlowdownSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import PoliciesSpec

MODES = ("normal", "low_latency")
# The collective whose measured slowdown stands for each backend's exchange.
MEASURED_AS = {
    "deepep": "all_to_all",
    "alltoall": "all_to_all",
    "allgather_reducescatter": "all_gather",
    "allreduce": "all_reduce",
}


def stream_overlap(
    policies: PoliciesSpec, cluster: ClusterSpec, parallel: ParallelSpec, costs: CostModel
) -> StreamOverlap | None:
    """What overlapping streams cost each other under a plan; None where nothing is asked for.

    Raises Infeasible where it is to be measured and no profile holds it.
    """
    asked = policies.overlap.slowdown
    if asked == "none":
        return None
    if isinstance(asked, SlowdownSpec):
        given = Slowdown(asked.compute, asked.communication, 0, Tag.ASSUMED, "policies.overlap.slowdown")
        return StreamOverlap(dict.fromkeys(MODES, given))
    if asked == "multiprocessors":
        taken = by_multiprocessors(DEEPEP_NORMAL_MULTIPROCESSORS, cluster.gpu.multiprocessors)
        return StreamOverlap({"normal": taken})
    work = MEASURED_AS.get(policies.dispatch.backend, policies.dispatch.backend)
    nodes = -(-parallel.gpus // cluster.gpus_per_node)
    found = costs.overlap(work, parallel.gpus, nodes) if isinstance(costs, MeasuresOverlap) else None
    if found is None:
        raise Infeasible(
            f"no profile holds what {work} of {parallel.gpus} GPUs on {nodes} nodes and a product beside it cost each "
            "other",
            where="policies.overlap.slowdown",
            mend="run `moesim profile collectives --beside gemm` there and name its profile, or give the figures",
            reason="overlap_not_measured",
        )
    return StreamOverlap(dict.fromkeys(MODES, found))
