"""The product's own simulation of benchmark runs, under given host times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.cost.host import HostTime
from moesim.engine.deployment import Deployment, groundwork, resolve
from moesim.engine.host_times import with_host_times
from moesim.engine.overheads import PARTS
from moesim.engine.serving import serve
from moesim.engine.stepmodel import StepModel
from moesim.errors import BadInput
from moesim.spec.scenario import Scenario
from moesim.spec.workload import ArrivalsSpec, WorkloadSpec
from validate.calibrate.bench_run import BenchRun

Floats = NDArray[np.float64]

# Of a run whose times the file does not tell, so many are drawn; what differs between them is chance.
ARRIVAL_DRAWS = 6


@dataclass(frozen=True)
class Seen:
    """What clients see of a run, in seconds: ttft_s, tpot_s [draws, requests]; one draw where requests are paired."""

    ttft_s: Floats
    tpot_s: Floats


class Simulated:
    """Simulates runs of one deployment; its steps are priced once, whatever the host times."""

    def __init__(self, deployment: Deployment, seed: int) -> None:
        self.model = StepModel(deployment, seed=seed)
        self.seed = seed
        self.count = 0

    @property
    def now(self) -> dict[str, float]:
        """The host times of the scenario as it is, by name."""
        rules = self.model.deployment.rules
        return {name: getattr(rules, part).seconds for name, part in PARTS.items()}

    def see(self, runs: Sequence[BenchRun], values: Mapping[str, float]) -> list[Seen]:
        """What clients would see of each run. Raises Infeasible and OutsideProfile."""
        rules = self.model.deployment.rules
        rules = replace(rules, **{PARTS[name]: HostTime(value) for name, value in values.items()})  # type: ignore[arg-type]
        model = with_host_times(self.model, rules)
        return [self._one(run, model, index) for index, run in enumerate(runs)]

    def _one(self, run: BenchRun, model: StepModel, index: int) -> Seen:
        deployment, rows = model.deployment, []
        for draw in range(1 if run.paired else ARRIVAL_DRAWS):
            load = run.load(np.random.default_rng([self.seed, 31, index, draw]))
            served = serve(
                replace(load, front_end_s=deployment.rules.request.seconds),
                model.limits,
                ranks=deployment.setup.parallel.attention_dp,
                instances=deployment.instances,
                step_time=model.under(None),
                balance=deployment.serving.balance,
            )
            self.count += 1
            decode_s = served.finish_s - served.first_token_s
            tpot_s = np.where(served.osl > 1, decode_s / np.maximum(served.osl - 1, 1), np.nan)
            rows.append((served.first_token_s - served.arrival_s, tpot_s))
        return Seen(np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows]))


def deployment_for(scenario: Scenario, runs: Sequence[BenchRun]) -> Deployment:
    """The scenario's deployment, made for the longest requests of the runs. Raises BadInput and Infeasible."""
    _refuse(scenario)
    assert scenario.serving is not None
    longest = WorkloadSpec(
        isl=max(int(run.isl.max()) for run in runs),
        osl=max(int(run.osl.max()) for run in runs),
        requests=max(run.requests for run in runs),
        arrivals=ArrivalsSpec(concurrency=1),
    )
    serving = scenario.serving.model_copy(update={"workload": longest})
    return resolve(groundwork(scenario.model_copy(update={"serving": serving})))


def _refuse(scenario: Scenario) -> None:
    """What no plain run of one pool has. Raises BadInput."""
    serving = scenario.serving
    if serving is None:
        raise BadInput("serving is calibrated, not training", where="training", mend="give a scenario that serves")
    found = {
        "serving.roles": serving.roles is not None,
        "serving.batching.prefix_cache": serving.batching.prefix_cache,
        "faults": bool(scenario.faults),
        "placement.rebalance": scenario.placement.rebalance is not None,
        "routing.shifts": bool(scenario.routing.shifts),
        "routing.drift": scenario.routing.drift is not None,
    }
    for key, there in found.items():
        if there:
            raise BadInput("overheads are calibrated on one plain pool", where=key, mend="leave it out to calibrate")
