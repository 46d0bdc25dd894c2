"""Faults of a training step: slow GPUs and links, jitter, and a rank whose death stops the job until it is restarted.

A GPU counts within its instance stage by stage, in a stage as its expert groups lie (expert-TP fastest, then EP): the
order of `step.by_rank_s`. All ranks of a stage meet at every collective, so a slow GPU stretches the passes of its
stage by its own work between two meetings, where that makes it the last. A collective over a slow link takes the whole
factor on all ranks, as in serving: an upper bound (`assumed`). Jitter is drawn for each pass and rank. Where several
GPUs of a stage differ, `maxplus` on the slowed graph gives the same seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.engine.faults import REROUTED_FACTOR, jitter_factors
from moesim.engine.training_sync import StageSync
from moesim.errors import BadInput
from moesim.graph.pipeline import PipelineProgram
from moesim.graph.priced_step import Part
from moesim.graph.task import TaskGraph
from moesim.graph.training_layer import TrainingSetup
from moesim.graph.training_passes import PricedLayers, chunk_graph, passes_of
from moesim.network.rank_groups import Group, RankGrid
from moesim.spec.faults import FaultSpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# The group of ranks that a collective of this operation is among; all others exchange tokens.
GROUPS: dict[str, Group] = {"tp_collective": "tp", "cp_collective": "cp", "expert_tp_collective": "expert_tp"}
_REDUCING: tuple[Group, ...] = ("dp_cp", "expert_dp")


def check_training_faults(faults: Sequence[FaultSpec], grid: RankGrid) -> None:
    """Whether a training step can have these faults. Raises BadInput that names the entry."""
    for index, fault in enumerate(faults):
        where = f"faults.{index}"
        if fault.instance >= grid.instances:
            raise BadInput(
                f"instance {fault.instance} of {grid.instances}", where=f"{where}.instance", mend="count from 0"
            )
        if fault.gpu is not None and fault.gpu >= grid.parallel.gpus:
            raise BadInput(
                f"GPU {fault.gpu} of an instance of {grid.parallel.gpus}", where=f"{where}.gpu", mend="count from 0"
            )
        if fault.recovery_s is not None:
            continue
        if fault.kind == "dead_rank":
            raise BadInput(
                "a training job stops when a rank dies: no other holds its stage's pipeline",
                where=where,
                mend="give recovery_s: the restart and the steps since the last checkpoint, in seconds",
            )
        if fault.from_s > 0 or fault.to_s is not None:
            raise BadInput(
                "one step is simulated, and this fault lasts all of it",
                where=f"{where}.{'from_s' if fault.from_s > 0 else 'to_s'}",
                mend="leave it out",
            )
        if fault.link is not None and not _used(grid, fault.link):
            raise BadInput(
                f"no group of this plan meets over a GPU's {fault.link}", where=f"{where}.link", mend="name the other"
            )


def _link(grid: RankGrid, group: Group) -> str | None:
    """The link that a group's collectives are priced over; None where a rank is alone."""
    if grid.gpus(group) == 1:
        return None
    return "nic" if grid.domains(group) > 1 else "nvlink"


def _used(grid: RankGrid, link: str) -> bool:
    groups: tuple[Group, ...] = ("tp", "cp", "pp", "ep", "expert_tp", *_REDUCING)
    return link in {_link(grid, group) for group in groups}


@dataclass(frozen=True, eq=False)
class TrainingFaults:
    """The faults of one step: what its passes, sends and end of step take instead.

    gpus: [instances, stages, ranks of a stage], factors of computing. links: link -> the same, of that link. sigma:
    [instances], of jitter.
    """

    setup: TrainingSetup
    layers: PricedLayers
    chunks: tuple[range, ...]
    program: PipelineProgram
    faults: tuple[FaultSpec, ...]
    gpus: Floats
    links: dict[str, Floats]
    sigma: Floats
    seed: int

    def pass_s(self, pass_s: Floats, assigned: Ints, normal: Mapping[str, float] | None) -> Floats:
        """Seconds of passes [instances, passes, micro-batches, chunks] under the faults."""
        found, stages = pass_s.copy(), self.setup.parallel.pp
        for index, chunk in enumerate(self.chunks):
            hit = [one for one in range(len(found)) if self._hit(one, index % stages)]
            for kind in passes_of(self.program.split) if hit else ():
                graph = chunk_graph(self.layers, chunk, kind, split=self.program.split, normal=normal)
                for one in hit:
                    compute = self.gpus[one, index % stages][None, :]
                    if self.sigma[one] > 0:
                        rng = np.random.default_rng([self.seed, 11, one, index, int(kind)])
                        shape = (assigned.shape[1], compute.shape[1])
                        compute = compute * jitter_factors(float(self.sigma[one]), shape, rng)
                    network = {name: self._collective(one, index % stages, name) for name in _operations(graph)}
                    found[one, kind, :, index] = slowed_pass_s(graph, assigned[one], compute, network)
        return found

    def transfer_s(self, seconds: float, instances: int) -> Floats:
        """Seconds of the send before each pass: [instances, passes]; a send goes by the slower of its two stages."""
        link, program = _link(self.setup.grid, "pp"), self.program
        found = np.full((instances, len(program.stage)), seconds)
        if link in self.links:
            by_stage = self.links[link].max(axis=2)  # [instances, stages]
            source = program.stage[np.maximum(program.after, 0)]
            found = found * np.maximum(by_stage[:, program.stage], by_stage[:, source])
        return found

    def sync(self, sync: Sequence[StageSync]) -> tuple[StageSync, ...]:
        """The end of step of each stage: gradients and parameters by the slowest link, Adam by the slowest GPU."""
        slow = {link for group in _REDUCING if (link := _link(self.setup.grid, group)) is not None}
        found = []
        for stage, one in enumerate(sync):
            factor = max((float(self.links[link][:, stage].max()) for link in slow if link in self.links), default=1.0)
            found.append(
                replace(
                    one,
                    reduce=_times(one.reduce, factor),
                    gather=_times(one.gather, factor),
                    optimizer=_times(one.optimizer, float(self.gpus[:, stage].max())),
                )
            )
        return tuple(found)

    def ended_s(self, step_s: float) -> float:
        """When a step that takes so long ends, with the stops that fall into it: each begins it anew."""
        began = 0.0
        for fault in sorted((one for one in self.faults if one.recovery_s is not None), key=lambda one: one.from_s):
            assert fault.recovery_s is not None
            if fault.from_s < began + step_s:  # in the step, or while it is being restarted
                began = max(began, fault.from_s + fault.recovery_s)
        return began + step_s

    def _hit(self, instance: int, stage: int) -> bool:
        slow = self.sigma[instance] > 0 or bool((self.gpus[instance, stage] > 1).any())
        return slow or any(bool((factors[instance, stage] > 1).any()) for factors in self.links.values())

    def _collective(self, instance: int, stage: int, operation: str) -> float:
        link = _link(self.setup.grid, GROUPS.get(operation, "ep"))
        return float(self.links[link][instance, stage].max()) if link in self.links else 1.0


def training_faults(
    faults: Sequence[FaultSpec],
    setup: TrainingSetup,
    layers: PricedLayers,
    chunks: tuple[range, ...],
    program: PipelineProgram,
    seed: int,
) -> TrainingFaults | None:
    """The faults of a step, which `check_training_faults` let in; None where there are none."""
    if not faults:
        return None
    ranks = setup.parallel.ep * setup.parallel.expert_tp
    shape = (setup.grid.instances, setup.parallel.pp, ranks)
    gpus, sigma = np.ones(shape), np.zeros(shape[0])
    links: dict[str, Floats] = {}
    for fault in faults:
        if fault.recovery_s is not None:
            continue
        if fault.kind == "jitter":
            sigma[fault.instance] = np.hypot(sigma[fault.instance], fault.sigma or 0.0)
            continue
        assert fault.gpu is not None
        place = (fault.instance, *divmod(fault.gpu, ranks))
        if fault.kind == "slow_gpu":
            gpus[place] *= fault.factor or 1.0
        else:
            links.setdefault(str(fault.link), np.ones(shape))[place] *= (
                REROUTED_FACTOR if fault.kind == "dead_link" else fault.factor or 1.0
            )
    return TrainingFaults(setup, layers, chunks, program, tuple(faults), gpus, links, sigma, seed)


def slowed_pass_s(graph: TaskGraph, routing: Ints, compute: Floats, network: Mapping[str, float]) -> Floats:
    """Seconds of a pass under each of `routing` [micro-batches]: its own stretches by the slowest rank.

    compute: [1 or micro-batches, ranks], factors of computing; network: operation -> factor of its collectives.
    """
    total: Floats = np.zeros(len(routing))
    stretch: Floats = np.zeros((1, 1))
    for task in graph.tasks:
        seconds = np.asarray(task.duration_s, dtype=np.float64)
        if seconds.shape[0] > 1:
            seconds = seconds[routing]
        if task.groups is None:
            stretch = stretch + seconds * compute
            continue
        total = total + stretch.max(axis=1) + seconds.max(axis=1) * network.get(task.operation, 1.0)
        stretch = np.zeros((1, 1))
    return np.asarray(total + stretch.max(axis=1))


def _operations(graph: TaskGraph) -> set[str]:
    return {task.operation for task in graph.tasks if task.groups is not None}


def _times(part: Part, factor: float) -> Part:
    if factor == 1.0:
        return part
    return Part(tuple(replace(one, seconds=one.seconds * factor) for one in part.estimates))
