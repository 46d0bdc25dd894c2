"""Which keys of a scenario let its loads or its placement change from step to step."""

from __future__ import annotations

from moesim.errors import BadInput
from moesim.spec.scenario import Scenario


def asked_changes(scenario: Scenario) -> dict[str, bool]:
    """Key -> whether the scenario asks for it."""
    return {
        "placement.rebalance": scenario.placement.rebalance is not None,
        "routing.drift": scenario.routing.drift is not None,
        "routing.shifts": bool(scenario.routing.shifts),
        "routing.mix": scenario.routing.mix != "step",
    }


def refuse_changes(scenario: Scenario, command: str) -> None:
    """For what has plans that stay as they are, and loads that do. Raises BadInput that names the key."""
    for key, given in asked_changes(scenario).items():
        if given:
            raise BadInput(
                f"{command} does not model {key}", where=key, mend="leave it out, or `moesim simulate` a serving run"
            )


def refuse_drift_with_holdout(scenario: Scenario) -> None:
    """The loads of a drift are all served, so none can be held out. Raises BadInput."""
    if scenario.routing.drift is not None and scenario.routing.holdout.by != "none":
        raise BadInput(
            f"loads held out by {scenario.routing.holdout.by} would be missing from the drift",
            where="routing.holdout.by",
            mend="set it to none: the placement is then fitted to all loads by their weights",
        )
