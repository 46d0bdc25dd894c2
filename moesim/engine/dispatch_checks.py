"""What each dispatch backend cannot do, refused by name before anything runs.

DeepEP, the plain all-to-all and the all-reduce have their rules in `deployment.check_parallel`; these are the others',
and those of replica choices and compression.
"""

from __future__ import annotations

from moesim.errors import BadInput, Infeasible
from moesim.network.choice import CHOICES
from moesim.spec.cluster import ClusterSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import DispatchSpec, Scenario

BACKEND, WHERE = "policies.dispatch.backend", "policies.dispatch"
# Backends whose wire format is a plain all-to-all's, so that anything can be packed into it.
PACKS = ("alltoall", "two_level", "tp_dedup")


def takes_formulas(scenario: Scenario) -> bool:
    """Whether a scenario takes prices that no table holds."""
    return scenario.cost.source != "store" or scenario.cost.extrapolate == "allow"


def check_dispatch(parallel: ParallelSpec, cluster: ClusterSpec, dispatch: DispatchSpec) -> None:
    """Whether a dispatch can run under a parallelism. Raises Infeasible (its reason is counted) or BadInput."""
    if dispatch.backend == "two_level":
        _check_two_level(parallel, cluster)
    if dispatch.backend == "tp_dedup":
        _check_tp_dedup(parallel, cluster)
    if dispatch.backend in ("two_level", "tp_dedup") and dispatch.mode != "auto":
        raise BadInput(f"{dispatch.backend} has no modes, only DeepEP has", where=f"{WHERE}.mode", mend="leave it out")
    if dispatch.compression is not None and dispatch.backend not in PACKS:
        raise Infeasible(
            f"{dispatch.backend} sends what its own kernels send",
            where=f"{WHERE}.compression",
            mend=f"set precision.dispatch and precision.combine, or use backend {', '.join(PACKS)}",
            reason="backend_does_not_pack",
        )
    if dispatch.replica_solve_s is not None and not CHOICES[dispatch.replica].exchanges_counts:
        raise BadInput(
            f"replica choice {dispatch.replica} solves nothing", where=f"{WHERE}.replica_solve_s", mend="leave it out"
        )
    if not CHOICES[dispatch.replica].fixed and parallel.ep == 1:
        raise Infeasible(
            f"replica choice {dispatch.replica} has one rank to choose from at ep 1",
            where=f"{WHERE}.replica",
            mend="use ep > 1, or replica equal",
            reason="replica_choice_needs_ep",
        )


def check_background(cluster: ClusterSpec, *, fidelity: str, draws: int) -> None:
    """Whether a run sees the traffic of other jobs that the cluster names. Raises BadInput."""
    if not cluster.background:
        return
    if fidelity != "des":
        raise BadInput(
            "traffic of other jobs slows links, which only the executor `des` has",
            where="cluster.background",
            mend="use `moesim simulate --fidelity des --draws 0`, or leave it out",
        )
    if draws:
        raise BadInput(
            "intervals come from step tables, which no other job slows",
            where="cluster.background",
            mend="use --draws 0",
        )


def _check_two_level(parallel: ParallelSpec, cluster: ClusterSpec) -> None:
    if parallel.ep == 1 or parallel.expert_tp > 1:
        raise Infeasible(
            f"two_level needs whole experts on several ranks, not ep {parallel.ep} with expert_tp {parallel.expert_tp}",
            where=BACKEND,
            mend="use ep > 1 with expert_tp 1, or backend tp_dedup",
            reason="backend_needs_ep",
        )
    if parallel.tp > 1:
        raise Infeasible(
            f"two_level takes each token from one rank, but at tp {parallel.tp} several hold it",
            where=BACKEND,
            mend="use tp 1, or backend tp_dedup",
            reason="backend_needs_tp_1",
        )
    if parallel.gpus <= cluster.domain_gpus:
        raise Infeasible(
            f"two_level needs more than one domain; {parallel.gpus} GPUs lie in one of {cluster.domain_gpus}",
            where=BACKEND,
            mend="use backend alltoall",
            reason="backend_needs_domains",
        )
    if parallel.gpus % cluster.domain_gpus:
        raise Infeasible(
            f"{parallel.gpus} GPUs do not fill domains of {cluster.domain_gpus}",
            where=BACKEND,
            mend="use whole domains, or backend alltoall",
            reason="domains_not_filled",
        )


def _check_tp_dedup(parallel: ParallelSpec, cluster: ClusterSpec) -> None:
    if parallel.tp == 1:
        raise Infeasible(
            "tp_dedup drops what ranks of a TP group send twice, and there are none at tp 1",
            where=BACKEND,
            mend="use tp > 1, or backend alltoall",
            reason="backend_needs_tp",
        )
    if parallel.ep == 1 or parallel.expert_tp not in (1, parallel.tp):
        raise Infeasible(
            f"tp_dedup needs experts on several ranks, whole or split as attention is, not ep {parallel.ep} with "
            f"expert_tp {parallel.expert_tp}",
            where=BACKEND,
            mend=f"use ep > 1 with expert_tp 1 or {parallel.tp}",
            reason="backend_needs_ep",
        )
    if parallel.gpus > cluster.gpus_per_node and cluster.gpus_per_node % parallel.tp:
        raise Infeasible(
            f"tp_dedup needs TP groups inside nodes; tp {parallel.tp} does not divide {cluster.gpus_per_node} GPUs",
            where=BACKEND,
            mend="use a tp that divides a node",
            reason="tp_spans_nodes",
        )
