"""What engines must be told of a plan's pipeline stages beside their number."""

from __future__ import annotations

from moesim.engine.stage_layout import split_of
from moesim.graph.stages import split_layers
from moesim.spec.hf import load_model
from moesim.spec.scenario import Scenario


def partition(scenario: Scenario | None, engine: str) -> list[int] | None:
    """Layers of each stage, where the engine would split them otherwise by itself. Raises BadInput."""
    if scenario is None or scenario.parallel is None or scenario.parallel.pp == 1:
        return None
    model = load_model(scenario.model)
    wanted = split_of(scenario, scenario.parallel, model)
    own = split_layers(model.layers, scenario.parallel.pp, engine)
    return None if wanted == own else [len(held) for held in wanted]


def running_in_a_batch(scenario: Scenario) -> int:
    """Most requests of one batch of an attention-DP rank where each batch has its share of those that run."""
    assert scenario.serving is not None
    most, asked = scenario.serving.batching.max_running_requests_per_dp_rank, scenario.serving.pipeline
    if scenario.parallel is None or scenario.parallel.pp == 1:
        return most
    return asked.running_requests_per_dp_rank or max(1, most // (asked.batches or scenario.parallel.pp))
