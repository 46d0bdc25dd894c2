"""Runs whose loads or placement change from step to step: what they ask for, and what refuses them by name."""

from __future__ import annotations

from moesim import plugins
from moesim.engine.deployment import Deployment
from moesim.engine.moving import asked_changes
from moesim.errors import BadInput, Infeasible

# What makes a step's time depend on when it is; `routing.mix` does not.
OVER_TIME = ("placement.rebalance", "routing.drift", "routing.shifts")


def check_relayouts(deployment: Deployment, fidelity: str) -> None:
    """Whether the serving loop can follow what the scenario lets change. Raises BadInput, Infeasible."""
    scenario, pools = deployment.scenario, (deployment, deployment.prefill)
    given_to = [deployment.ground.scenario, *(pool.scenario for pool in pools if pool is not None)]
    asked = [key for key in OVER_TIME if any(asked_changes(one)[key] for one in given_to)]
    if not asked:
        return
    odd = {
        "serving.roles": deployment.prefill is not None,
        "faults": bool(scenario.faults),
        "cluster.background": bool(deployment.ground.cluster.background),
        "--fidelity des": fidelity == "des",
    }
    for key, given in odd.items():
        if given:
            mend = "use table or maxplus" if key.startswith("--") else f"leave out one of {key} and {asked[0]}"
            raise BadInput(f"{asked[0]} is not modelled together with {key}", where=asked[0], mend=mend)
    if scenario.placement.rebalance is not None:
        _check_rebalance(deployment)


def _check_rebalance(deployment: Deployment) -> None:
    setup, where = deployment.setup, "placement.rebalance"
    spec = deployment.scenario.placement.rebalance
    assert spec is not None
    plugins.load(plugins.SOLVERS, spec.solver, where=f"{where}.solver")
    if setup.parallel.ep == 1:
        raise Infeasible(
            "one EP rank holds every expert, so that none can move",
            where=where,
            mend="leave it out, or use ep above 1",
            reason="nothing_to_move",
        )
    assert setup.network is not None
    setup.network.exchange("flat")  # no topology, no price: said before anything runs
    if setup.policies.storage != "resident":
        raise Infeasible(
            f"how experts move whose weights wait on the host (storage {setup.policies.storage}) is not modelled",
            where=where,
            mend="use storage resident, or leave it out",
            reason="relayout_with_storage",
        )
