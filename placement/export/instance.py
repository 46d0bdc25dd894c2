"""How many times an engine is started, and on how many nodes each time."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import BadInput
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
        """One line for the operator; empty for a single instance on one node."""
        told = []
        if self.count > 1:
            told.append(f"start this {self.count} times, each on {self.gpus} GPUs; a router sends requests by turns")
        if self.nodes > 1:
            told.append(
                f"run it on each of an instance's {self.nodes} nodes, with NODE_RANK=0 to {self.nodes - 1} and "
                "MASTER_ADDRESS the first of them, by the engine's own multi-node launcher where it has one"
            )
        return "; ".join(told)


@dataclass(frozen=True)
class Told:
    """What was said beside a map, which has no scenario: the model that it is for, and the nodes of its ranks."""

    model: str | None = None
    nodes: int | None = None

    def note(self, ranks: int) -> str:
        """What the launch file lacks, and how to start on several nodes. Raises BadInput for uneven nodes."""
        if self.nodes is not None and (self.nodes < 1 or ranks % self.nodes):
            raise BadInput(
                f"{ranks} ranks are not equal parts on {self.nodes} nodes", where="--nodes", mend="give their number"
            )
        asked = (("the model (--model)", self.model), ("the nodes (--nodes)", self.nodes))
        unknown = [name for name, known in asked if known is None]
        lacks = f"incomplete: a map knows neither {' nor '.join([*unknown, 'batching and memory'])}"
        if not unknown:
            lacks = "incomplete: a map does not know batching and memory"
        started = Instances(1, ranks, self.nodes or 1).note()
        return "; ".join(filter(None, [f"{lacks}; export the plan.yaml of a run for all flags", started]))


def instances_of(placement: ExpertPlacement, scenario: Scenario) -> Instances:
    """The instances that a plan's cluster holds."""
    cluster = load_cluster(scenario.cluster)
    gpus = scenario.parallel.gpus if scenario.parallel is not None else placement.ranks
    return Instances(max(1, cluster.gpus // gpus), gpus, -(-gpus // cluster.gpus_per_node))
