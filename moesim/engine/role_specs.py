"""Each role's own scenario and share of the cluster, from `serving.roles`."""

from __future__ import annotations

from typing import Any

from moesim.engine.context_layout import refuse_in_prefill
from moesim.errors import BadInput, Infeasible
from moesim.spec.cluster import ClusterSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import PlacementSpec, PoliciesSpec, PrecisionSpec, Scenario
from moesim.spec.workload import BatchingSpec, RoleSpec, StagesSpec

ROLES = ("prefill", "decode")


def role_scenarios(scenario: Scenario, cluster: ClusterSpec) -> dict[str, tuple[Scenario, ClusterSpec]]:
    """Role -> its scenario without roles, and its GPUs. Raises BadInput and Infeasible."""
    assert scenario.serving is not None
    roles = scenario.serving.roles
    assert roles is not None
    asked = sum(role.gpus * role.replicas for role in (roles.prefill, roles.decode))
    if asked > cluster.gpus:
        raise Infeasible(
            f"the roles ask for {asked} GPUs, the cluster has {cluster.gpus}",
            where="serving.roles",
            mend="use fewer GPUs or replicas",
            reason="roles_exceed_cluster",
        )
    if scenario.serving.balance == "central_queue":
        raise BadInput(
            "a queue at the router is not simulated together with roles",
            where="serving.balance",
            mend="use round_robin, shortest_queue or fewest_tokens",
        )
    return {name: (role_scenario(scenario, name), role_cluster(scenario, name, cluster)) for name in ROLES}


def _role(scenario: Scenario, name: str) -> RoleSpec:
    assert scenario.serving is not None
    assert scenario.serving.roles is not None
    role: RoleSpec = getattr(scenario.serving.roles, name)
    return role


def role_scenario(scenario: Scenario, name: str) -> Scenario:
    """The scenario of one role, without roles: what the role leaves out comes from above. Raises BadInput."""
    assert scenario.serving is not None
    role, where = _role(scenario, name), f"serving.roles.{name}"
    if name == "prefill":
        refuse_in_prefill(role.parallel)
    serving = scenario.serving.model_copy(update={"roles": None})
    if role.batching is not None:
        batching = merged(serving.batching.model_dump(), role.batching)
        serving = serving.model_copy(update={"batching": BatchingSpec.read(batching, where=f"{where}.batching")})
    if role.pipeline is not None:
        pipeline = serving.pipeline.model_dump() | role.pipeline
        serving = serving.model_copy(update={"pipeline": StagesSpec.read(pipeline, where=f"{where}.pipeline")})
    if name == "decode" and serving.batching.prefix_cache:  # prompts are read, and found, in the prefill pool
        batching = serving.batching.model_dump() | {"prefix_cache": False}
        serving = serving.model_copy(update={"batching": BatchingSpec.read(batching, where=where)})
    update: dict[str, Any] = {
        "serving": serving,
        "parallel": role.parallel or ParallelSpec(attention_dp=role.gpus, ep=role.gpus),
    }
    if role.placement is not None:
        base = scenario.placement.model_dump()
        for one, other in (("file", "solver"), ("solver", "file")):
            if role.placement.get(one) is not None:
                base[other] = None
        update["placement"] = PlacementSpec.read(merged(base, role.placement), where=f"{where}.placement")
    if role.policies is not None:
        policies = merged(scenario.policies.model_dump(), role.policies)
        update["policies"] = PoliciesSpec.read(policies, where=f"{where}.policies")
    if role.precision is not None:
        precision = scenario.precision.model_dump() | role.precision
        update["precision"] = PrecisionSpec.read(precision, where=f"{where}.precision")
    return scenario.model_copy(update=update)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with what `over` gives, mappings inside merged alike."""
    found = dict(base)
    for key, value in over.items():
        inner = found.get(key)
        found[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return found


def role_cluster(scenario: Scenario, name: str, cluster: ClusterSpec) -> ClusterSpec:
    """The GPUs of a role: whole nodes, or a part of one. Raises Infeasible."""
    role = _role(scenario, name)
    gpus, node = role.gpus * role.replicas, cluster.gpus_per_node
    if gpus % node == 0:
        return cluster.model_copy(update={"nodes": gpus // node})
    if role.gpus <= node and node % role.gpus == 0:  # several replicas on a node
        return cluster.model_copy(update={"nodes": role.replicas, "gpus_per_node": role.gpus})
    raise Infeasible(
        f"{gpus} GPUs of the role {name} fill neither whole nodes of {node} nor equal parts of them",
        where=f"serving.roles.{name}.gpus",
        mend=f"use a divisor or a multiple of {node}",
        reason="nodes_not_filled",
    )
