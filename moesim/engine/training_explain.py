"""Why a training step takes as long as it does: its critical path, what its ranks wait for, and the step otherwise.

The chain behind the end of a step is followed back exactly: parameters, optimizer and gradients of the slowest stage,
then pass by pass through the pipeline of the instance that ends last, and inside a pass along its slowest rank from
meeting to meeting. So its parts sum to the step. Every what-if is the whole step timed again with other durations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.engine import maxplus, training_pipeline, whatif
from moesim.engine.explain import HotLayer
from moesim.engine.training import TrainedStep, TrainingModel, TrainingRun, pass_table
from moesim.engine.training_overlap import OVERLAPPED
from moesim.engine.training_pass import PassParts, pass_parts
from moesim.engine.training_routing import draw_pool
from moesim.errors import BadInput, OutsideProfile
from moesim.graph.pipeline import Pass
from moesim.graph.task import TaskGraph
from moesim.graph.training_passes import chunk_graph, passes_of, price_layers

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TRANSFER, REDUCE, OPTIMIZER, GATHER = "pipeline_transfer", "gradient_reduction", "optimizer", "parameter_gather"
# Where a chain stands in no pass: between stages, and behind the pipeline.
BETWEEN, END = "between_stages", "end_of_step"
EXCHANGES = frozenset({"dispatch", "combine"})


@dataclass(frozen=True, eq=False)
class ExplainedTraining:
    """A training step as best known, explained; seconds.

    critical_path_s: pass -> operation -> seconds, sum `step_s`. critical: the instance, and the stage of its last pass.
    exposed_s: traffic -> seconds of the critical path. whole_s: traffic -> seconds of the mean stage, hidden ones too.
    stage_busy_s, bubble_s: [stages], mean over instances, in passes and in none until the pipeline's end. waited_s:
    [stages, ranks of a stage], before meetings and at the ends of passes; waited_for_operation_s: operation -> the
    same, they sum to it; waited_for_rank_s: [stages, ranks], seconds that the stage's mean rank waited for this one.
    layers: (stage, where it is hottest); ranks count within the stage. what_if_s, free_operation_s: change -> step
    seconds; not_priced: what-if -> what is missing.
    """

    step_s: float
    critical_path_s: dict[str, dict[str, float]]
    critical: tuple[int, int]
    exposed_s: dict[str, float]
    whole_s: dict[str, float]
    stage_busy_s: Floats
    bubble_s: Floats
    waited_s: Floats
    waited_for_operation_s: dict[str, Floats]
    waited_for_rank_s: Floats
    layers: tuple[tuple[int, HotLayer], ...]
    what_if_s: dict[str, float]
    free_operation_s: dict[str, float]
    not_priced: dict[str, str]


@dataclass(frozen=True, eq=False)
class _Steps:
    """What a step is timed from: seconds of passes [chunks, passes, routings], the routings met, and the rest."""

    table: Floats
    assigned: Ints
    transfer_s: float
    reduce_s: Floats
    optimizer_s: Floats
    gather_s: Floats


def explain_training(run: TrainingRun) -> ExplainedTraining:
    """Explain the step of a training run, as best known. Raises BadInput where passes run as pairs."""
    if run.model.setup.policies.schedule == OVERLAPPED:
        raise BadInput(
            "a step whose forward and backward passes run as pairs is not explained",
            where="policies.schedule",
            mend="explain it under `schedule: sequential`",
        )
    model, step = run.model, run.step
    split, stages = model.program.split, model.setup.parallel.pp
    graphs = {
        (index, kind): chunk_graph(model.layers, chunk, kind, split=split)
        for index, chunk in enumerate(model.chunks)
        for kind in passes_of(split)
    }
    parts = {key: pass_parts(graph) for key, graph in graphs.items()}
    path, critical = critical_path_s(model, step, parts)
    met = np.bincount(step.assigned.ravel(), minlength=model.layers.steps) / len(step.assigned)
    waited_for, for_rank = _waits(parts, met, stages)
    what_if, free, not_priced = _what_ifs(run, graphs)
    flat = _by_operation(path)
    whole = _whole(run, parts, met)
    return ExplainedTraining(
        step_s=step.step_s,
        critical_path_s=path,
        critical=critical,
        exposed_s={name: _exposed(flat, name) for name in whole},
        whole_s=whole,
        stage_busy_s=step.pipeline.busy_s.mean(axis=0),
        bubble_s=step.pipeline.bubble_s.mean(axis=0),
        waited_s=np.asarray(sum(waited_for.values(), np.zeros_like(for_rank))),
        waited_for_operation_s=waited_for,
        waited_for_rank_s=for_rank,
        layers=_layers(model, graphs, met),
        what_if_s=what_if,
        free_operation_s=free,
        not_priced=not_priced,
    )


def critical_path_s(
    model: TrainingModel, step: TrainedStep, parts: dict[tuple[int, Pass], PassParts]
) -> tuple[dict[str, dict[str, float]], tuple[int, int]]:
    """Pass -> operation -> seconds of the chain behind the step's end; and the instance and stage where it leaves the
    pipeline. Of equal causes the first instance, stage or pass counts."""
    program, times = model.program, step.pipeline
    found: dict[str, dict[str, float]] = {}

    def add(where: str, operation: str, seconds: float) -> None:
        if seconds > 0:
            inside = found.setdefault(where, {})
            inside[operation] = inside.get(operation, 0.0) + seconds

    last = int(np.argmax(step.optimizer_s + step.gather_s))
    add(END, OPTIMIZER, float(step.optimizer_s[last]))
    add(END, GATHER, float(step.gather_s[last]))
    stage = int(np.argmax(times.end_s.max(axis=0) + step.reduce_s))
    add(END, REDUCE, float(step.reduce_s[stage]))
    instance = int(np.argmax(times.end_s[:, stage]))
    start_s, done_s = times.start_s[instance], times.start_s[instance] + times.duration_s[instance]
    one = int(np.flatnonzero(program.stage == stage)[-1])
    while one >= 0:
        routing = int(step.assigned[instance, program.micro[one]])
        chunk = int(program.chunk[one])
        for (where, operation), seconds in parts[chunk, Pass(int(program.kind[one]))].path_s.items():
            add(where, operation, float(seconds[routing]))
        before, after = int(program.before[one]), int(program.after[one])
        held = before if before >= 0 and done_s[before] == start_s[one] else after
        if held >= 0 and held != before:
            add(BETWEEN, TRANSFER, float(start_s[one] - done_s[held]))
        one = held
    return found, (instance, stage)


def _waits(parts: dict[tuple[int, Pass], PassParts], met: Floats, stages: int) -> tuple[dict[str, Floats], Floats]:
    """For what, and for whom, ranks of each stage waited in all passes of a step, mean over instances."""
    ranks = next(iter(parts.values())).for_rank_s.shape[1]
    found: dict[str, Floats] = {}
    for_rank = np.zeros((stages, ranks))
    for (chunk, _), one in parts.items():
        stage = chunk % stages
        for_rank[stage] += met @ one.for_rank_s / ranks
        for operation, waited in one.waited_s.items():
            found.setdefault(operation, np.zeros((stages, ranks)))[stage] += met @ waited
    return found, for_rank


def _by_operation(path: dict[str, dict[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for inside in path.values():
        for operation, seconds in inside.items():
            found[operation] = found.get(operation, 0.0) + seconds
    return found


def _exposed(flat: dict[str, float], name: str) -> float:
    return sum(flat.get(operation, 0.0) for operation in EXCHANGES) if name == "all_to_all" else flat.get(name, 0.0)


def _whole(run: TrainingRun, parts: dict[tuple[int, Pass], PassParts], met: Floats) -> dict[str, float]:
    """Traffic of a mean stage in a step, hidden or not: exchanges together, other collectives by operation."""
    model, stages = run.model, run.model.setup.parallel.pp
    found: dict[str, float] = {}
    for one in parts.values():
        for operation, seconds in one.collective_s.items():
            name = "all_to_all" if operation in EXCHANGES else operation
            found[name] = found.get(name, 0.0) + float(met @ seconds) / stages
    crossings = int(model.program.crosses.sum()) / stages
    sent = {
        TRANSFER: crossings * float(model.transfer.seconds().max()),
        REDUCE: float(np.mean([sync.reduce.seconds().max() for sync in model.sync])),
        GATHER: float(np.mean([sync.gather.seconds().max() for sync in model.sync])),
    }
    return found | {name: seconds for name, seconds in sent.items() if seconds > 0}


def _layers(
    model: TrainingModel, graphs: dict[tuple[int, Pass], TaskGraph], met: Floats
) -> tuple[tuple[int, HotLayer], ...]:
    """Where each MoE layer is hottest over the routings that were met."""
    placement, stages = model.setup.placement, model.setup.parallel.pp
    share = met / met.sum()
    loads, counts = placement.rank_loads(model.pool.counts), model.pool.counts
    tp = model.setup.parallel.expert_tp
    found = []
    for row, layer in enumerate(placement.layer_ids.tolist()):
        chunk = next(index for index, one in enumerate(model.chunks) if layer in one)
        taken = np.zeros(placement.ranks)
        for (index, _), graph in graphs.items():
            for task in graph.tasks if index == chunk else ():
                if task.layer == layer and task.operation == "experts":
                    seconds = np.broadcast_to(task.duration_s, (graph.steps, graph.ranks))
                    taken += share @ seconds[:, ::tp]
        mean_loads, mean_counts = share @ loads[:, row], share @ counts[:, row]
        rank, expert, slowest = int(mean_loads.argmax()), int(mean_counts.argmax()), int(taken.argmax())
        each = loads[:, row].max(axis=1) / np.maximum(loads[:, row].mean(axis=1), 1e-300)
        hot = HotLayer(
            layer=layer,
            rank=rank * tp,
            rank_over_mean=float(mean_loads[rank] / mean_loads.mean()),
            slowest_rank=slowest * tp,
            slowest_over_mean=float(taken[slowest] / taken.mean()) if taken.any() else 1.0,
            per_step_max_over_mean=float(share @ each),
            expert=expert,
            expert_over_mean=float(mean_counts[expert] / mean_counts.mean()),
            replicas=int(placement.replica_counts()[row, expert]),
        )
        found.append((chunk % stages, hot))
    return tuple(found)


def _what_ifs(
    run: TrainingRun, graphs: dict[tuple[int, Pass], TaskGraph]
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    model, now = run.model, _steps_of(run)
    none = np.zeros_like(now.reduce_s)

    def under(change: Callable[[TaskGraph], TaskGraph]) -> Floats:
        table = np.zeros((len(model.chunks), len(Pass), model.layers.steps))
        for (index, kind), graph in graphs.items():
            table[index, kind] = maxplus.run(change(graph)).step_s
        return table

    silent = replace(now, transfer_s=0.0, reduce_s=none, gather_s=none)
    table = under(whatif.infinite_network)
    what_if = {
        "infinite_network": _timed(model, replace(silent, table=table)),
        "perfect_overlap": _timed(model, replace(silent, table=under(whatif.overlapped)), unhidden=_beyond(run)),
        "no_pipeline_bubble": _timed(model, replace(now, transfer_s=0.0), stalls=False),
    }
    not_priced = {}
    try:
        what_if = {"perfect_balance": _balanced(run, now), **what_if}
    except OutsideProfile as outside:
        not_priced["perfect_balance"] = outside.line()
    names = dict.fromkeys(task.operation for graph in graphs.values() for task in graph.tasks)
    free = {
        name: _timed(model, replace(now, table=under(lambda graph, name=name: whatif.without_operation(graph, name))))  # type: ignore[misc]
        for name in names
    }
    gone = {
        TRANSFER: (replace(now, transfer_s=0.0), now.transfer_s > 0),
        REDUCE: (replace(now, reduce_s=none), bool(now.reduce_s.any())),
        OPTIMIZER: (replace(now, optimizer_s=none), bool(now.optimizer_s.any())),
        GATHER: (replace(now, gather_s=none), bool(now.gather_s.any())),
    }
    free |= {name: _timed(model, changed) for name, (changed, there) in gone.items() if there}
    return what_if, free, not_priced


def _steps_of(run: TrainingRun) -> _Steps:
    model, step = run.model, run.step
    return _Steps(
        table=pass_table(model, None),
        assigned=step.assigned,
        transfer_s=float(model.transfer.seconds().max()),
        reduce_s=step.reduce_s,
        optimizer_s=step.optimizer_s,
        gather_s=step.gather_s,
    )


def _timed(model: TrainingModel, steps: _Steps, *, stalls: bool = True, unhidden: Floats | None = None) -> float:
    """Seconds of a step. stalls: whether stages wait for each other; unhidden: [stages], shortest time of a stage."""
    pass_s = np.transpose(steps.table[:, :, steps.assigned], (2, 1, 3, 0))
    times = training_pipeline.run(model.program, pass_s, steps.transfer_s)
    ends = (times.end_s if stalls else times.busy_s).max(axis=0)
    if unhidden is not None:
        ends = np.maximum(ends, unhidden)
    return float((ends + steps.reduce_s).max() + (steps.optimizer_s + steps.gather_s).max())


def _beyond(run: TrainingRun) -> Floats:
    """Seconds of each stage's gradient and parameter traffic: what even perfect overlap cannot go below."""
    return np.asarray(
        [float(sync.reduce.seconds().max()) + float(sync.gather.seconds().max()) for sync in run.model.sync]
    )


def _balanced(run: TrainingRun, now: _Steps) -> float:
    """The step with every expert taking the same rows. Raises OutsideProfile."""
    model = run.model
    training = model.setup.training.model_copy(update={"router": "balanced"})
    setup = replace(model.setup, training=training)
    pool = draw_pool(setup, model.routing, run.seed)
    layers = price_layers(setup, model.ground.costs, pool.counts)
    table = np.zeros((len(model.chunks), len(Pass), layers.steps))
    for index, chunk in enumerate(model.chunks):
        for kind in passes_of(model.program.split):
            graph = chunk_graph(layers, chunk, kind, split=model.program.split)
            table[index, kind] = maxplus.run(graph).step_s
    return _timed(model, replace(now, table=table, assigned=np.zeros_like(now.assigned)))
