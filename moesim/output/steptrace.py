"""The timeline of a typical decode step of a simulation."""

from __future__ import annotations

from pathlib import Path

from moesim.engine.simulate import Simulation, typical_decode
from moesim.engine.stepmodel import ExactModel, Fidelity
from moesim.output.timeline import write_timeline


def write_step_timeline(path: Path, simulation: Simulation) -> None:
    """Run one typical decode step and write it as a Chrome trace, whole or not at all."""
    fidelity: Fidelity = "des" if simulation.deployment.ground.cluster.background else "maxplus"
    graph, times = ExactModel(simulation.model, fidelity).run(typical_decode(simulation), "decode", timeline=True)
    write_timeline(path, graph, times)
