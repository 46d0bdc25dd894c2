"""What the simulator says of each layout: scenarios as a user writes them, priced by points measured on the spot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import CostModel, Estimate
from moesim.cost.ops import Operation
from moesim.cost.roofline import Roofline
from moesim.engine.training import TrainingRun, simulate_training, training_model
from moesim.engine.training_plan import SharedTraining
from moesim.errors import Infeasible
from moesim.graph.pipeline import Pass
from moesim.graph.training_layer import TrainingSetup
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario, resolve_paths
from moesim.units import BYTES_PER_ELEMENT
from profiles.points import FORMAT, SCHEMA_VERSION, Family, MeasuredPoint, places
from validate.training.job import ONE, PRECISION, Layout, TrainingJob
from validate.training.probe import Asked, Measured

Ints = NDArray[np.int64]

CONFIG_FILE, ROUTING_FILE = "config.json", "routing.npz"
# An operation asked for at more sizes than this is measured at as many that span them.
MOST_SIZES = {"experts": 10, "memory_bound": 6, "collective": 6}
SMALL_SEND_BYTES = 4096.0
DRAWS = 100


@dataclass
class Listening:
    """A cost model that answers by formula and remembers what it was asked."""

    costs: CostModel
    heard: list[Operation]

    def estimate(self, operation: Operation) -> Estimate:
        """Price an operation by formula."""
        self.heard.append(operation)
        return self.costs.estimate(operation)


def scenario(job: TrainingJob, layout: Layout, *, points: Sequence[str], host_s: float = 0.0) -> dict[str, Any]:
    """The scenario of a layout, as it stands in the run's folder. points: files of them; none = by formula.

    host_s: what the host adds to each layer of a micro-batch, see `host_time`.
    """
    cost = {"source": "points", "profiles": list(points)} if points else {"source": "roofline"}
    return {
        "schema_version": 1,
        "model": CONFIG_FILE,
        "cluster": cluster_file(layout.ranks),
        "engine": {"name": "moesim", "version": "0"},
        "precision": PRECISION,
        "cost": cost,
        "routing": {"loads": [{"file": ROUTING_FILE}]},
        "parallel": layout.parallel.model_dump(mode="json"),
        "placement": {"solver": layout.placement},
        "policies": {"dispatch": {"backend": "alltoall"}},
        "training": {
            "sequence_length": job.sequence_length,
            "micro_batch": job.micro_batch,
            "global_batch": job.global_batch,
            "recompute": "none",
            "pipeline": {
                "schedule": layout.schedule,
                "virtual_stages": layout.virtual_stages,
                **({} if layout.layers is None else {"layers": list(layout.layers)}),
            },
            "optimizer": {"distributed": False},
            "host": {"layer_s": host_s},
        },
        "seed": job.seed,
    }


def cluster_file(ranks: int) -> str:
    """Name of the cluster file of so many ranks."""
    return f"cluster-{ranks}.yaml"


def points_file(ranks: int, nodes: int = 1) -> str:
    """Name of the file of points measured on so many ranks; nodes: that its collectives span."""
    return f"points-{ranks}.json" if nodes == 1 else f"points-{ranks}-over-{nodes}.json"


@dataclass(frozen=True)
class Machine:
    """What runs the ranks. hosts: the number of each rank's host. memory_bytes: of a device, or of a host for all."""

    name: str
    memory_bytes: float
    hosts: tuple[int, ...]
    multiprocessors: int = 1

    def nodes(self, ranks: int) -> tuple[int, int]:
        """Nodes that the first `ranks` ranks lie on, and ranks of each. Raises Infeasible where they lie unevenly."""
        mine = self.hosts[:ranks]
        here = mine.count(mine[0])
        if any(host != index // here for index, host in enumerate(mine)) or len(mine) % here:
            raise Infeasible(
                f"{ranks} ranks do not fill nodes of {here} in order",
                where="--ranks",
                mend="use whole nodes, or ranks of one",
                reason="nodes_not_filled",
            )
        return len(mine) // here, here


@dataclass(frozen=True)
class Link:
    """What sends by one kind of link were found to take; points: measured sends behind it, rel_sigma: their scatter."""

    latency_s: float
    bytes_per_s: float
    rel_sigma: float
    points: int


# Without stages nothing is sent, and figures of links price nothing.
NOTHING_SENT = Link(1e-4, 1e9, 0.0, 0)


def cluster(
    ranks: int, machine: Machine, *, flops_per_s: float = 1e9, near: Link = NOTHING_SENT, far: Link = NOTHING_SENT
) -> dict[str, Any]:
    """The machine as a cluster file: each rank a device; the network as sends find it, inside nodes and between them.

    Every device has a NIC of its own, whose rate is what it gets while all others send, too.
    """
    nodes, here = machine.nodes(ranks)
    found: dict[str, Any] = {
        "name": "ranks of this machine" if nodes == 1 else f"ranks on {nodes} nodes",
        "gpu": {
            "name": machine.name,
            "hbm_bytes": machine.memory_bytes,
            "hbm_bytes_per_s": 1e10,
            "flops_per_s": {"bf16": flops_per_s, "fp32": flops_per_s},
            "multiprocessors": machine.multiprocessors,
        },
        "nodes": nodes,
        "gpus_per_node": here,
        "nvlink_bytes_per_s": near.bytes_per_s,
        "nvlink_latency_s": near.latency_s,
        "nic_bytes_per_s": far.bytes_per_s if far.points else near.bytes_per_s,
        "pcie_bytes_per_s": near.bytes_per_s,
        "sources": {
            "nvlink_bytes_per_s": "sends between two ranks",
            "gpu.flops_per_s": "the quickest matrix product of the points",
            "gpu.hbm_bytes_per_s": "not measured; the points price all that it would",
        },
    }
    if far.points:
        found["nic_latency_s"] = far.latency_s
        found["sources"]["nic_bytes_per_s"] = "sends between two nodes, by all ranks at once"
    measured: dict[str, Any] = {}
    for one, names in ((near, ("nvlink_bytes_per_s", "nvlink_latency_s")), (far, ("nic_bytes_per_s", "nic_latency_s"))):
        if one.points:
            told = {"rel_sigma": one.rel_sigma, "points": one.points, "source": "validate training"}
            measured |= {name: dict(told) for name in names}
    return found | ({"measured": measured} if measured else {})


def read(job: TrainingJob, layout: Layout, folder: Path, *, points: Sequence[str], host_s: float = 0.0) -> Scenario:
    """The scenario of a layout with its files in the run's folder."""
    data = scenario(job, layout, points=points, host_s=host_s)
    return resolve_paths(Scenario.read(data, where=f"layout {layout.name}"), folder)


def asked_of(job: TrainingJob, layouts: Iterable[Layout], folder: Path) -> tuple[list[Asked], dict[str, Ints]]:
    """What must be measured to price some layouts, and the slot of each expert under each: [MoE layers, experts].

    The operations are those that the simulator asks for when it prices them. Raises BadInput and Infeasible.
    """
    heard: list[Operation] = []
    slots: dict[str, Ints] = {}
    sends: dict[int, set[float]] = {}
    for layout in layouts:
        found = read(job, layout, folder, points=())
        shared = SharedTraining()
        key, ground, routing = shared.ground(found)
        shared.grounds[key] = (replace(ground, costs=Listening(Roofline(ground.cluster), heard)), routing)
        model = training_model(found, job.seed, shared)
        slots[layout.name] = slots_of(model.setup.placement)
        if layout.pp > 1:
            sends.setdefault(min(2, model.setup.grid.nodes("pp")), set()).add(_send_bytes(model.setup))
    listed = [
        Asked(family, key, size, nodes)
        for nodes, some in sorted(_by_nodes(heard).items())
        for (family, key), sizes in places(some).items()
        for size in _chosen(family, sizes)
    ]
    for nodes, needed in sorted(sends.items()):  # two sizes at least, for a latency and a rate
        small = SMALL_SEND_BYTES if max(needed) > SMALL_SEND_BYTES else min(needed) / 4.0
        listed += [Asked("send", (), size, nodes) for size in sorted({small, *needed})]
    return listed, slots


def _by_nodes(heard: Iterable[Operation]) -> dict[int, list[Operation]]:
    """Operations by the nodes over which ranks meet in them; all others are of one."""
    found: dict[int, list[Operation]] = {}
    for one in heard:
        found.setdefault(getattr(one, "nodes", 1), []).append(one)
    return found


def slots_of(placement: ExpertPlacement) -> Ints:
    """The slot of each expert of a placement without replicas: [MoE layers, experts]."""
    return np.argsort(placement.physical_to_logical, axis=1, kind="stable")


def _send_bytes(setup: TrainingSetup) -> float:
    return setup.local_rows * setup.model.hidden * BYTES_PER_ELEMENT[setup.precision.activations]


def _chosen(family: Family, sizes: Sequence[float]) -> list[float]:
    """The sizes to measure: all where they are few, else some that span them, whole where sizes are whole tokens."""
    most = MOST_SIZES.get(family)
    if most is None or len(sizes) <= most:
        return list(sizes)
    if family == "experts":
        spread = np.geomspace(1.0, np.ceil(sizes[-1]), most).round()
        return sorted({*spread.tolist(), float(np.floor(sizes[0])) or sizes[0]})
    return sorted({float(one) for one in np.geomspace(sizes[0], sizes[-1], most)} | {sizes[0], sizes[-1]})


def points_of(measured: Iterable[Measured]) -> dict[int, list[MeasuredPoint]]:
    """What was measured as points, by the nodes that collectives span; sends are none, which the cluster file holds."""
    found: dict[int, list[MeasuredPoint]] = {}
    for one in measured:
        if one.asked.family == "send":
            continue
        low, middle, high = np.quantile(one.samples, (0.1, 0.5, 0.9)).tolist()
        found.setdefault(one.asked.nodes, []).append(
            MeasuredPoint(
                family=one.asked.family,  # type: ignore[arg-type]
                key=one.asked.key, size=one.asked.size, seconds=middle, p10_s=low, p90_s=high,
            )
        )  # fmt: skip
    return found


def measured_cluster(ranks: int, machine: Machine, measured: Sequence[Measured]) -> dict[str, Any]:
    """The cluster file with what sends and products were found to take."""
    products = [
        2.0 * one.asked.size * float(one.asked.key[0]) * float(one.asked.key[1]) / float(np.median(one.samples))
        for one in measured
        if one.asked.family == "gemm"
    ]
    near, far = (_link([one for one in measured if one.asked.nodes == nodes]) for nodes in (1, 2))
    return cluster(ranks, machine, flops_per_s=max(products), near=near, far=far)


def _link(measured: Iterable[Measured]) -> Link:
    """Latency and rate of the smallest and the largest send among what was measured.

    Where ranks wait for processors the largest may take no longer, and its rate cannot be told: a hundredth of its time
    at least is that of its bytes.
    """
    sends = sorted((one for one in measured if one.asked.family == "send"), key=lambda one: one.asked.size)
    if not sends:
        return NOTHING_SENT
    first, last = (float(np.median(one.samples)) for one in (sends[0], sends[-1]))
    low, high = np.quantile(sends[-1].samples, (0.1, 0.9))
    bytes_s = max(last - first, last / 100.0)
    return Link(
        latency_s=last - bytes_s,
        bytes_per_s=(sends[-1].asked.size - sends[0].asked.size) / bytes_s,
        rel_sigma=float(high - low) / 2.56 / last,
        points=len(sends),
    )


def content(
    points: Sequence[MeasuredPoint], nodes: int, when: str, hardware: dict[str, Any], versions: dict[str, str]
) -> dict[str, Any]:
    """A file of points whose collectives span so many nodes."""
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "measured": when,
        "dtype": "fp32",
        "nodes": nodes,
        "hardware": hardware,
        "versions": versions,
        "points": [one.model_dump(mode="json") for one in points],
    }


def host_time(job: TrainingJob, folder: Path, points: Sequence[str], alone_s: float) -> dict[str, float]:
    """What the host adds to each layer, told from one process that runs the whole model without any parallelism.

    alone_s: measured seconds of a micro-batch, forward and backward. priced_s: what the points make of the same; the
    difference over the layers is layer_s: small kernels between those that are priced, and what starting each costs.
    """
    told = parts(simulate_training(read(job, ONE, folder, points=points), draws=0, seed=job.seed))
    priced_s = float(told["forward"][0] + told["backward"][0])
    return {
        "measured_s": alone_s,
        "priced_s": priced_s,
        "layer_s": max(0.0, (alone_s - priced_s) / job.shape.layers),
    }


def predict(job: TrainingJob, layout: Layout, folder: Path, *, points: Sequence[str], host_s: float) -> dict[str, Any]:
    """What `moesim simulate` says of a layout: the step with its interval, and its parts."""
    run = simulate_training(read(job, layout, folder, points=points, host_s=host_s), draws=DRAWS, seed=job.seed)
    low, high = np.quantile([one.step_s for one in run.drawn], (0.05, 0.95)).tolist()
    return {"layout": layout.name, "ranks": layout.ranks, "step_s": run.step.step_s, "low_s": low, "high_s": high} | {
        "parts_s": parts(run)
    }


def parts(run: TrainingRun) -> dict[str, Any]:
    """A pass of each kind on each stage (mean), and the ends of a step: pipeline, reduction, optimizer."""
    program, step = run.model.program, run.step
    seconds = step.pipeline.duration_s.mean(axis=0)
    mean = {
        kind.name.lower(): [
            float(seconds[(program.kind == kind) & (program.stage == stage)].mean()) for stage in range(program.stages)
        ]
        for kind in (Pass.FORWARD, Pass.BACKWARD)
    }
    pipeline = float(step.pipeline.end_s.max())
    reduced = float((step.pipeline.end_s.max(axis=0) + step.reduce_s).max())
    return {**mean, "pipeline": pipeline, "reduce": reduced - pipeline, "optimizer": step.step_s - reduced}


def measured_parts(layout: Layout, moments: Sequence[Sequence[dict[str, Any]]], kinds: Sequence[Sequence[int]]) -> Any:
    """The same of what was measured: median over repeats. moments: [repeats][ranks]; kinds: of each stage's passes."""
    stage_of = _stages(layout)
    found: dict[str, Any] = {}
    for kind in (Pass.FORWARD, Pass.BACKWARD):
        by_stage: list[list[float]] = [[] for _ in range(layout.pp)]
        for repeat in moments:
            for rank, one in enumerate(repeat):
                stage = stage_of[rank]
                took = [end - start for start, end in one["passes"]]
                mine = [took[at] for at, what in enumerate(kinds[stage]) if what == kind]
                by_stage[stage].append(float(np.mean(mine)))
        found[kind.name.lower()] = [float(np.median(one)) for one in by_stage]
    ends = np.asarray([[[one[name] for name in ENDS] for one in repeat] for repeat in moments]).max(axis=1)
    found["pipeline"] = float(np.median(ends[:, 0]))
    found["reduce"] = float(np.median(ends[:, 1] - ends[:, 0]))
    found["optimizer"] = float(np.median(ends[:, 2] - ends[:, 1]))
    return found


ENDS = ("piped_s", "reduced_s", "done_s")


def _stages(layout: Layout) -> list[int]:
    """The pipeline stage of each rank."""
    members = layout.grid.members("pp")
    found = [0] * layout.ranks
    for row in members.tolist():
        for stage, rank in enumerate(row):
            found[rank] = stage
    return found
