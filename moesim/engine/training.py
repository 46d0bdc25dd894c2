"""The training loop: one global batch through the pipeline, then gradients, optimizer and parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.engine import maxplus, training_pipeline
from moesim.engine.deployment import Groundwork, check_placement, lay_groundwork, place
from moesim.engine.draws import Draw, joint_draws
from moesim.engine.routing_draws import RoutingDraws
from moesim.engine.training_checks import check_training, refuse_unsupported_training
from moesim.engine.training_faults import TrainingFaults, check_training_faults, training_faults
from moesim.engine.training_memory import TrainingLedger, training_ledger
from moesim.engine.training_overlap import pair_share
from moesim.engine.training_routing import RoutingPool, draw_pool
from moesim.engine.training_sync import StageSync, stage_sync, stage_transfer
from moesim.errors import BadInput
from moesim.graph.pipeline import Pass, PipelineProgram, layers_of_chunks, program
from moesim.graph.pricing import Part
from moesim.graph.task import StepTimes
from moesim.graph.training_flops import training_flops_per_token
from moesim.graph.training_layer import TrainingSetup
from moesim.graph.training_passes import PricedLayers, chunk_graph, chunk_seconds, passes_of, price_layers
from moesim.spec.faults import FaultSpec
from moesim.spec.maps.frame import MapFrame
from moesim.spec.parallel import ParallelSpec
from moesim.spec.placement_file import read_placement
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario
from moesim.systems.load import apply_system

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


def training_model(scenario: Scenario, seed: int) -> TrainingModel:
    """Check a training scenario and price everything it does. Raises BadInput, Infeasible and OutsideProfile."""
    scenario = apply_system(scenario)
    training = scenario.training
    if training is None:
        raise BadInput("this scenario does not train", where="training", mend="give `training`")
    refuse_unsupported_training(scenario)
    ground = lay_groundwork(scenario)
    model, cluster = ground.model, ground.cluster
    parallel = scenario.parallel or ParallelSpec(attention_dp=cluster.gpus, ep=cluster.gpus)
    grid = check_training(parallel, model, cluster, scenario, training)
    check_training_faults(scenario.faults, grid)
    virtual = training.pipeline.virtual_stages
    chunks = layers_of_chunks(model.layers, parallel.pp * virtual, training.pipeline.layers)
    placement = _placement(ground, scenario, parallel)
    setup = TrainingSetup(
        model=model,
        cluster=cluster,
        parallel=parallel,
        precision=scenario.precision,
        policies=scenario.policies,
        placement=placement,
        training=training,
        grid=grid,
    )
    routing = RoutingDraws(ground.judge, model.moe.top_k)
    pool = draw_pool(setup, routing, seed)
    made = program(training.pipeline.schedule, parallel.pp, setup.micro_batches, virtual)
    rows = setup.placement.rank_loads(pool.counts)
    memory = training_ledger(setup, chunks, made, rows)
    return TrainingModel(
        ground=ground,
        setup=setup,
        routing=routing,
        pool=pool,
        layers=price_layers(setup, ground.costs, pool.counts, pool.kept),
        chunks=chunks,
        program=made,
        sync=tuple(stage_sync(setup, ground.costs, chunks, index) for index in range(parallel.pp)),
        transfer=stage_transfer(setup),
        memory=memory,
    )


def _placement(ground: Groundwork, scenario: Scenario, parallel: ParallelSpec) -> ExpertPlacement:
    """One expert to a slot over the EP ranks of a stage: from a map, or solved. Raises BadInput for replicas."""
    if scenario.placement.file is None:
        return place(ground, scenario.placement, parallel.model_copy(update={"pp": 1}))
    found = read_placement(scenario.placement.file, MapFrame.of(ground.model, parallel.ep))
    check_placement(found, ground.model, parallel)
    if found.redundant:
        raise BadInput(
            f"the map has {found.redundant} replicas, whose gradients would have to be summed",
            where="placement.file",
            mend="train with a map of one slot for each expert",
        )
    return found


def simulate_training(
    scenario: Scenario,
    *,
    draws: int,
    seed: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> TrainingRun:
    """Simulate one training step. `progress` is told the share done. Raises BadInput, Infeasible and OutsideProfile."""
    seed = scenario.seed if seed is None else seed
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    model = training_model(scenario, seed)
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
