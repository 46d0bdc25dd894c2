"""The training loop: one global batch through the pipeline, then gradients, optimizer and parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.engine import maxplus, training_pipeline
from moesim.engine.deployment import Groundwork
from moesim.engine.draws import Draw, joint_draws
from moesim.engine.routing_draws import RoutingDraws
from moesim.engine.training_faults import TrainingFaults, training_faults
from moesim.engine.training_memory import TrainingLedger, require_room
from moesim.engine.training_overlap import pair_share
from moesim.engine.training_plan import SharedTraining, checked_training
from moesim.engine.training_routing import RoutingPool
from moesim.engine.training_sync import StageSync, stage_sync, stage_transfer
from moesim.graph.pipeline import Pass, PipelineProgram
from moesim.graph.priced_step import Part
from moesim.graph.task import StepTimes
from moesim.graph.training_flops import training_flops_per_token
from moesim.graph.training_layer import TrainingSetup
from moesim.graph.training_passes import PricedLayers, chunk_graph, chunk_seconds, passes_of, price_layers
from moesim.spec.faults import FaultSpec
from moesim.spec.scenario import Scenario

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TrainingModel:
    """Everything of a training scenario that no draw changes, priced. chunks: the layers of each model chunk."""

    ground: Groundwork
    setup: TrainingSetup
    routing: RoutingDraws
    pool: RoutingPool
    layers: PricedLayers
    chunks: tuple[range, ...]
    program: PipelineProgram
    sync: tuple[StageSync, ...]
    transfer: Part
    memory: TrainingLedger


@dataclass(frozen=True, eq=False)
class TrainedStep:
    """One step under one draw (or as best known).

    pipeline: when every pass of every instance ran. reduce_s, optimizer_s, gather_s: [stages], what is exposed.
    assigned: [instances, micro-batches], the drawn routing that each met.
    """

    step_s: float
    pipeline: training_pipeline.PipelineTimes
    reduce_s: Floats
    optimizer_s: Floats
    gather_s: Floats
    assigned: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A step as best known and under each joint draw; passes: [chunk][pass], of all ranks over the drawn
    routings, by `maxplus`. faulted: the step as best known with the scenario's faults, which `drawn` has as well; the
    rest is without them.
    """

    model: TrainingModel
    step: TrainedStep
    drawn: tuple[TrainedStep, ...]
    passes: tuple[tuple[StepTimes, ...], ...]
    seed: int
    wall_s: float
    cpu_s: float
    faults: tuple[FaultSpec, ...] = ()
    faulted: TrainedStep | None = None

    def rates(self, step_s: float) -> dict[str, float]:
        """The contract's metrics for a step time; MFU is against the peak of the dense weights' type."""
        setup = self.model.setup
        gpus = setup.cluster.gpus
        tokens = setup.training.global_batch * setup.training.sequence_length
        flops = training_flops_per_token(setup.model, setup.training.sequence_length) * tokens / step_s / gpus
        return {
            "step_s": step_s,
            "tokens_per_s": tokens / step_s,
            "tokens_per_s_per_gpu": tokens / step_s / gpus,
            "tflops_per_s_per_gpu": flops / 1e12,
            "mfu": flops / setup.cluster.gpu.peak(setup.precision.dense),
        }


def training_model(scenario: Scenario, seed: int, shared: SharedTraining | None = None) -> TrainingModel:
    """Check a training scenario and price everything it does. Raises BadInput, Infeasible and OutsideProfile.

    shared: what the plans of a search have in common.
    """
    plan = checked_training(scenario, seed, shared or SharedTraining())
    ground, setup = plan.ground, plan.setup
    require_room(setup, plan.memory)
    return TrainingModel(
        ground=ground,
        setup=setup,
        routing=plan.routing,
        pool=plan.pool,
        layers=price_layers(setup, ground.costs, plan.pool.counts, plan.pool.kept),
        chunks=plan.chunks,
        program=plan.program,
        sync=tuple(stage_sync(setup, ground.costs, plan.chunks, index) for index in range(setup.parallel.pp)),
        transfer=stage_transfer(setup),
        memory=plan.memory,
    )


def simulate_training(
    scenario: Scenario,
    *,
    draws: int,
    seed: int | None = None,
    progress: Callable[[float], None] | None = None,
    shared: SharedTraining | None = None,
) -> TrainingRun:
    """Simulate one training step. `progress` is told the share done. Raises BadInput, Infeasible and OutsideProfile."""
    seed = scenario.seed if seed is None else seed
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    model = training_model(scenario, seed, shared)
    split = model.program.split
    passes = tuple(
        tuple(maxplus.run(chunk_graph(model.layers, chunk, kind, split=split)) for kind in passes_of(split))
        for chunk in model.chunks
    )
    wrong = training_faults(scenario.faults, model.setup, model.layers, model.chunks, model.program, seed)
    table = pass_table(model, None)
    step = _step(model, table, None, seed)
    faulted = None if wrong is None else _step(model, table, None, seed, wrong)
    found = []
    for index, draw in enumerate(joint_draws(draws, model.routing.weights, seed)):
        if progress is not None:
            progress((index + 1) / (draws + 1))
        found.append(_step(model, pass_table(model, draw), draw, seed, wrong))
    return TrainingRun(
        model=model,
        step=step,
        drawn=tuple(found),
        passes=passes,
        seed=seed,
        wall_s=time.perf_counter() - wall_s,
        cpu_s=time.process_time() - cpu_s,
        faults=scenario.faults,
        faulted=faulted,
    )


def pass_table(model: TrainingModel, draw: Draw | None) -> Floats:
    """Seconds of every pass under a draw: [chunks, 3 passes, drawn routings]; a pass that is not split off takes 0."""
    normal, split = None if draw is None else draw.normal, model.program.split
    table = np.zeros((len(model.chunks), len(Pass), model.layers.steps))
    for index, chunk in enumerate(model.chunks):
        for kind in passes_of(split):
            table[index, kind] = chunk_seconds(model.layers, chunk, kind, split=split, normal=normal)
    return table * pair_share(model.layers, model.chunks, normal)[:, None, :]


def _step(
    model: TrainingModel, table: Floats, draw: Draw | None, seed: int, wrong: TrainingFaults | None = None
) -> TrainedStep:
    """Time a step from the seconds of its passes [chunks, passes, drawn routings]."""
    setup = model.setup
    normal = None if draw is None else draw.normal
    weights = model.pool.weights if draw is None or len(model.pool.weights) == 1 else draw.load_weights
    assigned = model.pool.assign((setup.grid.instances, setup.micro_batches), seed, weights)
    pass_s = np.transpose(table[:, :, assigned], (2, 1, 3, 0))  # [instances, passes, micro-batches, chunks]
    transfer_s: float | Floats = float(model.transfer.seconds(normal).max())
    ends = model.sync
    if wrong is not None:
        pass_s = wrong.pass_s(pass_s, assigned, normal)
        transfer_s, ends = wrong.transfer_s(float(transfer_s), len(pass_s)), wrong.sync(ends)
    times = training_pipeline.run(model.program, pass_s, transfer_s)
    mean = pass_s.mean(axis=(0, 2))  # [passes, chunks]
    optimizer = setup.training.optimizer
    stages = range(setup.parallel.pp)
    of_stage = [mean[:, stage :: setup.parallel.pp].sum(axis=1) for stage in stages]
    reduce_s = np.asarray(
        [
            sync.exposed_reduce_s(
                normal,
                float(of_stage[stage][Pass.BACKWARD] + of_stage[stage][Pass.WEIGHT]),
                overlap=optimizer.overlap_gradients,
            )
            for stage, sync in enumerate(ends)
        ]
    )
    gather_s = np.asarray(
        [
            sync.exposed_gather_s(normal, float(of_stage[stage][Pass.FORWARD]), overlap=optimizer.overlap_parameters)
            for stage, sync in enumerate(ends)
        ]
    )
    adam_s = np.asarray([float(sync.optimizer.seconds(normal).max()) for sync in ends])
    # All instances meet to reduce; all ranks meet in the gradients' norm, before any of them steps.
    reduced = (times.end_s.max(axis=0) + reduce_s).max()
    step_s = float(reduced + (adam_s + gather_s).max())
    return TrainedStep(
        step_s=step_s if wrong is None else wrong.ended_s(step_s),
        pipeline=times,
        reduce_s=reduce_s,
        optimizer_s=adam_s,
        gather_s=gather_s,
        assigned=assigned,
    )
