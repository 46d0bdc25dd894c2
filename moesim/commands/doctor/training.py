"""What `doctor` says of a scenario that trains: plan, pipeline, memory, and that the step can be priced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moesim.commands.doctor.findings import Finding
from moesim.spec.scenario import Scenario
from moesim.units import human_bytes


def training_findings(path: Path, scenario: Scenario) -> Iterator[Finding]:
    """Check and price the step, as `simulate` would. Raises BadInput, Infeasible and OutsideProfile."""
    from moesim.engine.training import training_model

    model = training_model(scenario, scenario.seed)
    setup, memory = model.setup, model.memory
    yield Finding("scenario", "ok", str(path))
    yield Finding("model", "ok", f"{setup.model.id}, {setup.model.parameters() / 1e9:.1f} billion parameters")
    yield Finding(
        "parallel",
        "ok",
        f"{setup.parallel.label()}, data parallel {setup.data_parallel}, expert data parallel "
        f"{setup.grid.gpus('expert_dp')}",
    )
    pipeline = setup.training.pipeline.schedule
    yield Finding("pipeline", "ok", f"{setup.micro_batches} micro-batches, {pipeline}, {len(model.chunks)} chunks")
    yield Finding(
        "memory",
        "ok",
        f"{human_bytes(memory.peak_bytes)} of {human_bytes(memory.limit_bytes)} in stage {memory.fullest}",
    )
    yield Finding("cost model", "ok", f"{scenario.cost.source} prices every operation of the step")
