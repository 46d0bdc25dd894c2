"""The storage of a plan's expert weights, made ready: sizes, link rates, and the hit rates of a cache."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.engine.expert_cache import hit_rates
from moesim.engine.memory import WEIGHT_BYTES_PER_ELEMENT
from moesim.engine.routing_draws import RoutingDraws
from moesim.graph.storage import ExpertStorage
from moesim.routing.trace import RoutingCounts
from moesim.spec.cluster import ClusterSpec
from moesim.spec.model import ModelSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario


def expert_storage(
    scenario: Scenario,
    model: ModelSpec,
    cluster: ClusterSpec,
    parallel: ParallelSpec,
    placement: ExpertPlacement,
    *,
    fit: Sequence[RoutingCounts],
    judge: Sequence[RoutingCounts],
) -> ExpertStorage | None:
    """The storage of a plan; None where all weights are on the GPU.

    fit, judge: loads that a cache may know beforehand, and those that it meets. A NIC that sends at its best takes its
    rate of the PCIe link that it shares with the host's copies: GPU and NIC hang on one switch.
    """
    policies = scenario.policies
    if policies.storage == "resident":
        return None
    hits = None
    if policies.expert_cache is not None:
        batch = scenario.serving.batching.max_batch_tokens_per_dp_rank if scenario.serving is not None else 1
        hits = hit_rates(
            policies.expert_cache,
            placement,
            RoutingDraws(judge, model.moe.top_k),
            fit,
            most_tokens=float(batch * parallel.attention_dp),
            seed=scenario.seed,
        )
    weights = model.expert_parameters() / parallel.expert_tp * WEIGHT_BYTES_PER_ELEMENT[scenario.precision.experts]
    return ExpertStorage(
        kind=policies.storage,
        expert_bytes=weights,
        pcie_bytes_per_s=cluster.pcie_bytes_per_s,
        shared_with_nic=min(1.0, cluster.shared_nic_bytes_per_s / cluster.pcie_bytes_per_s),
        hits=hits,
    )
