"""Measured runs with prefill and decode pools priced by simulation: mean TTFT and TPOT of a row.

What rows share is kept: the groundwork of a model on a cluster, the priced steps of a role's worker, and whole runs,
since many rows repeat a run. A run of many requests is cut short, see `rounds_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim import plugins
from moesim.cost.estimate import CostModel
from moesim.engine.compiled import StepTables
from moesim.engine.deployment import Deployment, Groundwork, groundwork, resolve
from moesim.engine.roles import RolePool, serve_roles
from moesim.engine.serving import Load, Served
from moesim.engine.simulate import kv_transfer
from moesim.engine.speculative import draft_tokens
from moesim.engine.stepmodel import StepModel, TimedModel, batch_limits
from moesim.engine.workload import make_load
from moesim.errors import MoesimError
from moesim.spec.scenario import Scenario
from validate.silicon.disagg_rows import ran
from validate.silicon.disagg_scenario import decode_tokens, disagg_scenario, front_end_s, joined_gpus
from validate.silicon.rows import SiliconRow
from validate.silicon.settings import ROUNDS

Floats = NDArray[np.float64]
# Output tokens that a run is cut to, where the fewest rounds of requests make no more; and the most rounds simulated.
MOST_TOKENS, FEWEST_ROUNDS, MOST_ROUNDS = 400_000, 2, 4
# Running requests of a decode rank that steps are priced up to: workers with fewer share the prices.
WIDTHS = (128, 512, 1024)
# Prompt lengths are drawn in steps of so many tokens: batches of prompts that are alike are priced once.
GRAIN = 16


@dataclass(frozen=True)
class Priced:
    """The timed steps of a role's worker, and the tables that runs with it filled."""

    model: StepModel
    timed: TimedModel
    tables: StepTables

    def pool(self, deployment: Deployment) -> RolePool:
        """The role's instances in a deployment of this worker, under the deployment's own limits."""
        ranks = deployment.setup.parallel.attention_dp
        return RolePool(batch_limits(deployment), ranks, deployment.instances, self.timed, self.tables)


@dataclass
class Kept:
    """What rows priced with the same costs share, by what it is made of.

    change: of a groundwork, once. system: that all but the runs is of, as prices take memory. runs: seconds of TTFT and
    TPOT, or why there are none.
    """

    change: Callable[[Groundwork], Groundwork] | None = None
    system: str = ""
    grounds: dict[str, Groundwork] = field(default_factory=dict)
    deployments: dict[str, Deployment] = field(default_factory=dict)
    priced: dict[str, Priced] = field(default_factory=dict)
    runs: dict[str, tuple[float, float] | MoesimError] = field(default_factory=dict)

    def turn_to(self, system: str) -> None:
        """Drop the prices of another system."""
        if system != self.system:
            for kept in (self.grounds, self.deployments, self.priced):
                kept.clear()
        self.system = system


def disagg_times(row: SiliconRow, profiles: Path, kept: Kept) -> tuple[float, float]:
    """Mean TTFT and TPOT of a disaggregated row in seconds. Raises MoesimError with the reason why there are none."""
    kept.turn_to(row.system)
    known = ran(row)
    scenario = disagg_scenario(row, known, profiles, rounds_of(row))
    node, late_s = joined_gpus(row, known), front_end_s(row)
    key = f"{node}|{late_s}|{scenario.model_dump_json()}"
    if key not in kept.runs:
        try:
            kept.runs[key] = means(simulated(scenario, node, kept), row.concurrency or 1, late_s)
        except MoesimError as error:
            kept.runs[key] = error
    found = kept.runs[key]
    if isinstance(found, MoesimError):
        raise found
    return found


def rounds_of(row: SiliconRow) -> int:
    """Requests that are simulated for each place of the closed loop: fewer than the client's ROUNDS, see `means`."""
    tokens = max(1, (row.concurrency or 1) * row.osl)
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, MOST_TOKENS // tokens))


def means(served: Served, concurrency: int, front_end_s: float) -> tuple[float, float]:
    """Mean TTFT and TPOT in seconds over ROUNDS requests for each place of the loop.

    The first round, sent at once, counts once and later ones, of which fewer may be simulated, for all the rest. A
    request's first token is sent when it joins a decode batch, which is when SGLang's decode worker
    (`process_prebuilt`) and TensorRT-LLM's (`_handle_first_token_response`) do so: a request that waits for a place in
    the batch waits for its first token. Prefill workers run without overlap scheduling, so no step is lagged.
    """
    side = served.prefill
    assert side is not None
    assert side.joined_s is not None
    first_s = np.where(np.isnan(side.joined_s), served.first_token_s, side.joined_s)
    ttft_s = first_s - served.arrival_s + front_end_s
    tpot_s = (served.finish_s - first_s) / np.maximum(served.osl - 1, 1)
    return _weighed(ttft_s, concurrency), _weighed(tpot_s, concurrency)


def _weighed(values: Floats, concurrency: int) -> float:
    first, later = values[:concurrency], values[concurrency:]
    if len(later) == 0:
        return float(first.mean())
    return float(first.mean() + later.mean() * (ROUNDS - 1)) / ROUNDS


def simulated(scenario: Scenario, node: int, kept: Kept) -> Served:
    """The closed loop of a scenario with roles, on nodes of `node` GPUs. Raises MoesimError."""
    decode = _deployment(scenario, node, kept)
    assert decode.prefill is not None
    assert scenario.serving is not None
    drawn = make_load(scenario.serving.workload, scenario.seed, prefix_cache=False)
    isl = np.maximum(GRAIN, (drawn.isl + GRAIN // 2) // GRAIN * GRAIN)
    return serve_roles(
        Load(isl, drawn.osl, concurrency=drawn.concurrency),
        _priced(scenario, "prefill", node, kept).pool(decode.prefill),
        _priced(scenario, "decode", node, kept).pool(decode),
        kv_transfer(decode),
    )


def _deployment(scenario: Scenario, node: int, kept: Kept) -> Deployment:
    key = f"{node}|{_told(scenario)}"
    if key not in kept.deployments:
        kept.deployments[key] = resolve(_ground(scenario, node, kept))
    return kept.deployments[key]


def _priced(scenario: Scenario, role: str, node: int, kept: Kept) -> Priced:
    """The steps of a role's worker, shared by deployments that have any number of it, under any smaller limits."""
    key = f"{node}|{_told(scenario, role)}"
    if key not in kept.priced:
        decode = _deployment(_widest(scenario, role), node, kept)
        deployment = decode.prefill if role == "prefill" else decode
        assert deployment is not None
        model = StepModel(deployment, seed=scenario.seed)
        timed = model.under(None)
        kept.priced[key] = Priced(model, timed, StepTables(timed))
    return kept.priced[key]


def _told(scenario: Scenario, role: str | None = None) -> str:
    """What prices hang on: how many requests there are left out; of one role, what is of the other, and replicas."""
    if role is not None:
        scenario = _widest(scenario, role)
    serving = scenario.serving
    assert serving is not None
    assert serving.roles is not None
    changes: dict[str, Any] = {
        "workload": serving.workload.model_copy(update={"requests": 1, "arrivals": None}),
    }
    text = ""
    if role is not None:
        one = getattr(serving.roles, role).model_copy(update={"replicas": 1})
        text = f"{role}|{one.model_dump_json()}|"
        changes["roles"] = None
    return text + scenario.model_copy(update={"serving": serving.model_copy(update=changes)}).model_dump_json()


def _widest(scenario: Scenario, role: str) -> Scenario:
    """The scenario with the limits of a decode rank raised to the next of WIDTHS, which its steps are priced up to."""
    serving = scenario.serving
    assert serving is not None
    assert serving.roles is not None
    asked = getattr(serving.roles, role)
    running = asked.batching["max_running_requests_per_dp_rank"]
    wide = next((width for width in WIDTHS if width >= running), running)
    if role != "decode" or wide == running:
        return scenario
    tokens = max(asked.batching["max_batch_tokens_per_dp_rank"], decode_tokens(wide, draft_tokens(serving)))
    limits = {"max_running_requests_per_dp_rank": wide, "max_batch_tokens_per_dp_rank": tokens}
    roles = serving.roles.model_copy(update={role: asked.model_copy(update={"batching": {**asked.batching, **limits}})})
    return scenario.model_copy(update={"serving": serving.model_copy(update={"roles": roles})})


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
        kept.grounds[key] = ground if kept.change is None else kept.change(ground)
    return replace(kept.grounds[key], scenario=scenario)
