"""The figures of one typical step: `step` of `simulate --json`. With pipeline stages, of a batch on its way through."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.engine import des, maxplus
from moesim.engine.simulate import Simulation
from moesim.engine.stepmodel import ExactModel, Fidelity
from moesim.graph.batch import StepBatch
from moesim.graph.stages import TRANSFER


def step_figures(simulation: Simulation, batch: StepBatch) -> dict[str, Any]:
    """step_s, by_operation_s (mean over ranks), exposed_communication_s and by_rank_s of a decode batch.

    With pipeline stages: step_s is the way through all of them; by_operation_s sums the stages', each a mean over its
    ranks; exposed_communication_s counts while a rank has the batch; by_rank_s is stage after stage. `stages` tells
    each stage's layers and seconds, and the seconds to the next.
    """
    fidelity: Fidelity = "des" if simulation.deployment.ground.cluster.background else "maxplus"
    exact = ExactModel(simulation.model, fidelity)
    stages = simulation.deployment.setup.stages
    if stages is None:
        _, times = exact.run(batch, "decode")
        return _of_times([times])
    priced = exact.price(batch, "decode")
    run = des.run if fidelity == "des" else maxplus.run
    found = [run(graph) for graph, _ in exact.stage_graphs(priced)]
    sent_s = [float(one.mean()) for one in exact.transfers(priced)]
    told = _of_times(found)
    told["step_s"] += sum(sent_s)
    by_operation = told["by_operation_s"]
    by_operation[TRANSFER] = by_operation.get(TRANSFER, 0.0) + sum(sent_s)
    told["by_operation_s"] = dict(sorted(by_operation.items()))
    told["stages"] = [
        {"layers": [held.start, held.stop - 1], "seconds": float(one.step_s.mean()), "to_the_next_s": seconds}
        for held, one, seconds in zip(stages.layers, found, [*sent_s, None], strict=True)
    ]
    return told


def _of_times(found: list[Any]) -> dict[str, Any]:
    by_operation: dict[str, float] = {}
    for times in found:
        for name, value in times.busy_s.items():
            by_operation[name] = by_operation.get(name, 0.0) + float(value.mean())
    return {
        "step_s": float(sum(times.step_s.mean() for times in found)),
        "by_operation_s": dict(sorted(by_operation.items())),
        "exposed_communication_s": float(sum(times.exposed_communication_s().mean() for times in found)),
        "by_rank_s": [float(value) for times in found for value in np.asarray(times.compute_busy_s.mean(axis=0))],
    }
