"""How many times an engine is started, and on how many nodes each time."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.spec.plan import ExpertPlacement
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import Scenario


@dataclass(frozen=True)
class Instances:
    """Engines of a plan: `count` instances side by side, each on `gpus` GPUs of `nodes` nodes."""

    count: int
    gpus: int
    nodes: int

    def note(self) -> str:
        """One line for the operator; empty for a single instance."""
        if self.count == 1:
            return ""
        return f"start this {self.count} times, each on {self.gpus} GPUs; a router sends requests to them by turns"


def instances_of(placement: ExpertPlacement, scenario: Scenario) -> Instances:
    """The instances that a plan's cluster holds."""
    cluster = load_cluster(scenario.cluster)
    gpus = scenario.parallel.gpus if scenario.parallel is not None else placement.ranks
    return Instances(max(1, cluster.gpus // gpus), gpus, -(-gpus // cluster.gpus_per_node))
