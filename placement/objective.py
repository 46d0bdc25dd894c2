"""What one plan is worth: simulated once as best known, and again under joint draws for the finalists."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim import plugins
from moesim.engine.deployment import Deployment, Groundwork, place, reads_cost, resolve, resolve_roles, solve
from moesim.engine.draws import joint_draws
from moesim.engine.role_specs import role_scenarios
from moesim.engine.serving import Served
from moesim.engine.simulate import Simulation, simulate
from moesim.engine.stage_layout import of_a_stage
from moesim.errors import BadInput, Infeasible, OutsideProfile
from moesim.output.metrics import flatten, outside_share, serving_metrics
from moesim.routing.trace import stack_profiles
from moesim.spec.plan import ExpertPlacement, max_over_mean
from moesim.spec.scenario import Scenario
from placement.plans import Plan, own_options

# A plan of which more than this share lies outside the profile is never recommended, only shown.
MOST_EXTRAPOLATED = 0.1


@dataclass(frozen=True)
class Outcome:
    """A finished trial. status: "ok", or the reason why the plan could not be priced or run.

    metrics: flat contract metrics plus rank_load_max_over_mean and memory_peak_bytes. violation: how far the worst
    service level is missed, as a share of its limit (at most 0: all are met). aims: what a search maximises and what
    it minimises, where these are not the throughput and the median time per output token of serving.
    """

    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    violation: float = 0.0
    detail: str = ""
    aims: tuple[float, float] | None = None

    def goals(self) -> tuple[float, float]:
        """What a search maximises and what it minimises; of an outcome that is ok."""
        return self.aims or (self.metrics["output_tokens_per_s_per_gpu"], self.metrics["tpot_s.p50"])

    @property
    def recommendable(self) -> bool:
        """Whether the plan ran, met every service level, and leans little on extrapolated costs."""
        outside = self.metrics.get("extrapolated_share", 0.0)
        return self.status == "ok" and self.violation <= 0 and outside <= MOST_EXTRAPOLATED

    def to_json(self) -> dict[str, Any]:
        """The outcome as stored with its trial."""
        found = {"status": self.status, "metrics": self.metrics, "violation": self.violation, "detail": self.detail}
        return found if self.aims is None else {**found, "aims": list(self.aims)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Outcome:
        """The outcome of a stored trial."""
        aims = data.get("aims")
        return Outcome(
            data["status"],
            dict(data["metrics"]),
            float(data["violation"]),
            data.get("detail", ""),
            None if aims is None else (float(aims[0]), float(aims[1])),
        )


class Evaluator:
    """Evaluates plans of one scenario; keeps solved placements, which many plans share."""

    def __init__(self, ground: Groundwork, scenario: Scenario, *, first_look: bool = False) -> None:
        """first_look: `evaluate` sifts plans by a coarse run; `settle` and `run` are full ones either way."""
        self.ground = ground
        self.scenario = scenario
        self.first_look = first_look
        self.solved: dict[tuple[str, int, int, int, str], ExpertPlacement] = {}

    def deployment(self, plan: Plan) -> Deployment:
        """The plan on its cluster. Raises Infeasible and BadInput."""
        if plan.prefill is not None:
            return resolve_roles(self.ground, plan.apply(self.scenario), self.placements(plan))
        return resolve(self.ground, plan.apply(self.scenario), self.placement(plan))

    def placement(self, plan: Plan) -> ExpertPlacement:
        """The plan's placement, solved once. Raises Infeasible and BadInput."""
        variant = plan.apply(self.scenario)
        parallel = of_a_stage(plan.parallel)
        nodes = max(1, parallel.gpus // self.ground.cluster.gpus_per_node)
        # Without groups no solver looks at nodes: instances of several sizes share what was solved for their EP ranks.
        key = (plan.solver, plan.redundant_experts, parallel.ep, nodes if variant.placement.groups > 1 else 1, "")
        if key not in self.solved:
            self.solved[key] = solve(
                self.ground,
                plan.solver,
                slots=self.ground.model.moe.experts + plan.redundant_experts,
                parallel=parallel,
                groups=variant.placement.groups,
                loads=self.ground.fit,
            )
        return self.solved[key]

    def placements(self, plan: Plan) -> dict[str, ExpertPlacement]:
        """The placement of each pool of a plan with roles, solved once. Raises Infeasible and BadInput."""
        found = {}
        for name, (part, cluster) in role_scenarios(plan.apply(self.scenario), self.ground.cluster).items():
            pool, groups = plan.pools[name], part.placement.groups
            nodes = max(1, pool.parallel.gpus // cluster.gpus_per_node)
            # A solver on time looks at what the pool runs; the others share their placements with all plans.
            timed = reads_cost(plugins.load(plugins.SOLVERS, pool.solver, where="placement.solver"))
            asked = f"{name} {pool.layout}" if timed else ""
            key = (pool.solver, pool.redundant_experts, pool.parallel.ep, nodes if groups > 1 else 1, asked)
            if key not in self.solved:
                ground = replace(self.ground, scenario=part, cluster=cluster)
                self.solved[key] = place(ground, part.placement, pool.parallel)
            found[name] = self.solved[key]
        return found

    def run(self, plan: Plan, *, draws: int = 0, first_look: bool = False) -> Simulation:
        """Simulate a plan. Raises Infeasible and OutsideProfile."""
        return simulate(self.deployment(plan), draws=draws, first_look=first_look)

    def evaluate(self, plan: Plan) -> Outcome:
        """Simulate a plan once; what cannot run becomes an outcome with its reason."""
        return self._outcome(plan, first_look=self.first_look)

    def settle(self, plan: Plan) -> Outcome:
        """The outcome of a full run, for plans that a first look liked."""
        return self._outcome(plan, first_look=False)

    def _outcome(self, plan: Plan, *, first_look: bool) -> Outcome:
        try:
            simulation = self.run(plan, first_look=first_look)
        except OutsideProfile as error:
            return Outcome("outside_profile", detail=error.line())
        except Infeasible as error:
            return Outcome(error.reason, detail=error.line())
        except BadInput as error:
            if plan.options == own_options(self.scenario):
                raise  # the scenario's own fault, not that of a value which the search tried
            return Outcome("contradictory", detail=error.line())
        return outcome_of(simulation)


def outcome_of(simulation: Simulation) -> Outcome:
    """Metrics and service levels of a run as best known."""
    deployment = simulation.deployment
    metrics = plan_metrics(simulation)
    limits = deployment.scenario.objective.slo.limits()
    excess = [metrics[f"{name}.{statistic}"] / limit - 1.0 for (name, statistic), limit in limits.items()]
    return Outcome("ok", metrics, max(excess, default=0.0))


def plan_metrics(simulation: Simulation) -> dict[str, float]:
    """Flat metrics of a run, with its balance on the judged loads and its memory."""
    weights = simulation.model.routing.weights
    return _metrics_of(simulation, simulation.served, weights)


def drawn_metrics(simulation: Simulation) -> list[dict[str, float]]:
    """The metrics as best known (entry 0) and under each joint draw."""
    draws = joint_draws(len(simulation.drawn), simulation.model.routing.weights, simulation.seed)
    under = [
        _metrics_of(simulation, served, draw.load_weights) for served, draw in zip(simulation.drawn, draws, strict=True)
    ]
    return [plan_metrics(simulation), *under]


def _metrics_of(simulation: Simulation, served: Served, load_weights: NDArray[np.float64]) -> dict[str, float]:
    deployment = simulation.deployment
    gpus = deployment.ground.cluster.gpus
    metrics = flatten(serving_metrics(served, gpus))
    profiles, _ = stack_profiles(deployment.ground.judge)
    balance = max_over_mean(simulation.model.pricer.replicas.average_rank_loads(profiles)).mean(axis=1)
    metrics["rank_load_max_over_mean"] = float(balance @ load_weights)
    used = [(deployment.memory, served.peak_kv_tokens)]
    if deployment.prefill is not None and served.prefill is not None:
        used.append((deployment.prefill.memory, served.prefill.served.peak_kv_tokens))
    metrics["memory_peak_bytes"] = max(one.fixed_bytes + kv * one.kv_bytes_per_token for one, kv in used)
    metrics["kv_cache_share"] = max(kv / max(one.kv_capacity_tokens, 1) for one, kv in used)
    metrics["extrapolated_share"] = outside_share(simulation)
    metrics["goodput_per_gpu"] = goodput(served, deployment.scenario.objective.slo.limits(), gpus)
    return metrics


def goodput(served: Served, limits: dict[tuple[str, str], float], gpus: int) -> float:
    """Output tokens/s/GPU of the requests that met every latency level on their own."""
    of_request = {
        "ttft_s": served.first_token_s - served.arrival_s,
        "tpot_s": (served.finish_s - served.first_token_s) / np.maximum(served.osl - 1, 1),
        "e2e_s": served.finish_s - served.arrival_s,
    }
    good = np.isfinite(served.finish_s)
    for (name, _), limit in limits.items():
        good &= of_request[name] <= limit
    return float(served.osl[good].sum()) / served.duration_s / gpus
