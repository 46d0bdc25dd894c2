"""Measured runs with prefill and decode pools priced by simulation: a prediction for each row."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from moesim import plugins
from moesim.cost.estimate import CostModel
from moesim.engine.deployment import Deployment, Groundwork, groundwork, resolve
from moesim.engine.roles import serve_roles
from moesim.engine.serving import Served
from moesim.engine.simulate import kv_transfer, role_pool
from moesim.engine.stepmodel import StepModel
from moesim.engine.workload import make_load
from moesim.spec.scenario import Scenario
from validate.silicon_disagg_rows import Ran
from validate.silicon_disagg_scenario import disagg_scenario, joined_gpus
from validate.silicon_rows import SiliconRow


@dataclass
class Kept:
    """What rows share: groundworks by model, cluster and costs, and the priced steps of both roles of a deployment."""

    grounds: dict[str, Groundwork] = field(default_factory=dict)
    models: dict[str, tuple[Deployment, StepModel, StepModel]] = field(default_factory=dict)


def simulated(row: SiliconRow, ran: Ran, profiles: Path, rounds: int, kept: Kept) -> Served:
    """The row's closed loop. Raises Infeasible, BadInput and OutsideProfile."""
    scenario = disagg_scenario(row, ran, profiles, rounds)
    decode, reading, decoding = _models(scenario, joined_gpus(row, ran), kept)
    assert scenario.serving is not None
    return serve_roles(
        make_load(scenario.serving.workload, scenario.seed, prefix_cache=False),
        role_pool(reading, reading.under(None)),
        role_pool(decoding, decoding.under(None)),
        kv_transfer(decode),
    )


def _models(scenario: Scenario, node: int, kept: Kept) -> tuple[Deployment, StepModel, StepModel]:
    """The deployment and its priced steps; shared by rows that differ in how many requests are in flight."""
    serving = scenario.serving
    assert serving is not None
    workload = serving.workload.model_copy(update={"requests": 1, "arrivals": None})
    key = scenario.model_copy(update={"serving": serving.model_copy(update={"workload": workload})}).model_dump_json()
    if key not in kept.models:
        decode = resolve(_ground(scenario, node, kept))
        assert decode.prefill is not None
        seed = scenario.seed
        kept.models[key] = (decode, StepModel(decode.prefill, seed=seed), StepModel(decode, seed=seed))
    return kept.models[key]


def _ground(scenario: Scenario, node: int, kept: Kept) -> Groundwork:
    """The groundwork on a cluster whose nodes are `node` GPUs: in a rack NVLink joins more than a tray."""
    parts = (scenario.model, scenario.cluster, scenario.cost, scenario.engine.name)
    key = f"{node}|" + "|".join(part if isinstance(part, str) else part.model_dump_json() for part in parts)  # type: ignore[union-attr]
    if key not in kept.grounds:
        ground = groundwork(scenario)
        if node != ground.cluster.gpus_per_node:
            nodes = -(-ground.cluster.gpus // node)
            cluster = ground.cluster.model_copy(update={"nodes": nodes, "gpus_per_node": node})
            costs: CostModel = plugins.load(plugins.COSTS, scenario.cost.source, where="cost.source")(
                scenario, ground.model, cluster
            )
            ground = replace(ground, cluster=cluster, costs=costs)
        kept.grounds[key] = ground
    return replace(kept.grounds[key], scenario=scenario)
