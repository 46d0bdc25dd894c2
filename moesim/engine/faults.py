"""What faults do to a step: longer durations on slow GPUs and links, jitter, and a placement without dead ranks.

A slow GPU takes `factor` times as long for all that it computes. A collective over a slow link takes `factor` times as
long on every rank of its group, because all wait for the endpoint that is slow; its own hot endpoint may be another, so
this is an upper bound, tagged `assumed`. Jitter only delays: a rank's computing takes exp(sigma |z|) times as long in a
step, z standard normal, drawn for each step and rank. Durations only grow, so no executor makes a step end earlier.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Estimate
from moesim.engine.batch_state import Plan
from moesim.engine.deployment import Deployment
from moesim.engine.draws import Draw
from moesim.engine.lookups import DecodeAttention, attention_of_ranks
from moesim.engine.stepmodel import StepModel, TimedModel
from moesim.engine.steptable import StepTable, time_grid
from moesim.engine.whatif import HOST_OPERATIONS
from moesim.errors import BadInput
from moesim.graph.priced_step import LayerSetup, Part, PricedStep
from moesim.graph.task import Link, Stream, Task, TaskGraph
from moesim.network.choice import CHOICES
from moesim.spec.faults import FaultSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.plan import ExpertPlacement

Floats = NDArray[np.float64]

# A dead NIC's traffic takes the NIC of the next GPU, which then carries twice what it did.
REROUTED_FACTOR = 2.0
_LINKS = {"nvlink": Link.NVLINK, "nic": Link.NIC}
# Parts of a priced step that a GPU computes, by the ranks of their last axis; the host's parts are not among them.
_BY_DP_RANK = ("head", "projections", "attention", "gate", "shared", "dense", "tail")
_BY_EP_RANK = ("experts",)
_EXCHANGES = ("dispatch", "combine", "replica_choice")
_TP_COLLECTIVES = ("attention_sync", "dense_sync", "gather")


@dataclass(frozen=True)
class FaultState:
    """What is wrong with one instance at one time.

    slow_gpus: (GPU, factor). slow_links: (GPU, link, factor). dead: attention-DP ranks that are gone. sigma: of jitter.
    Several faults of one GPU or link multiply.
    """

    slow_gpus: tuple[tuple[int, float], ...] = ()
    slow_links: tuple[tuple[int, Link, float], ...] = ()
    dead: frozenset[int] = frozenset()
    sigma: float = 0.0

    def gpu_factors(self, gpus: int) -> Floats:
        """How many times as long each GPU computes: [gpus]."""
        found = np.ones(gpus)
        for gpu, factor in self.slow_gpus:
            found[gpu] *= factor
        return found

    def link_factors(self, gpus: int) -> dict[Link, Floats]:
        """How many times as long each GPU's link takes: link -> [gpus]."""
        found: dict[Link, Floats] = {}
        for gpu, link, factor in self.slow_links:
            found.setdefault(link, np.ones(gpus))[gpu] *= factor
        return found

    def slowed(self, graph: TaskGraph, jitter: Floats | None = None) -> TaskGraph:
        """The graph with the durations under this state; jitter: [steps, ranks] factors of computing, at least 1."""
        compute = self.gpu_factors(graph.ranks)[None, :] * (1.0 if jitter is None else jitter)
        links = self.link_factors(graph.ranks)

        def slower(task: Task) -> Task:
            if task.groups is not None:
                factor = _group_factors(task, links)
            elif task.stream == Stream.COMPUTE and task.operation not in HOST_OPERATIONS:
                factor = compute
            else:
                return task
            if (factor == 1.0).all():
                return task
            return replace(task, duration_s=np.asarray(task.duration_s, dtype=np.float64) * factor)

        return replace(graph, tasks=tuple(slower(task) for task in graph.tasks))


def _group_factors(task: Task, links: dict[Link, Floats]) -> Floats:
    """Factor of a collective on each rank [1, ranks]: the slowest of its group over the links that it uses."""
    assert task.groups is not None
    own = np.ones(len(task.groups))
    for link, _ in task.links:
        if link in links:
            own = np.maximum(own, links[link])
    found = np.ones_like(own)
    for group in np.unique(task.groups):
        members = task.groups == group
        found[members] = own[members].max()
    return found[None, :]


def jitter_factors(sigma: float, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Factors exp(sigma |z|) of computing, at least 1: a lognormal folded at its median, because noise only delays."""
    return np.asarray(np.exp(sigma * np.abs(rng.standard_normal(shape))))


def slowed_grid(priced: PricedStep, state: FaultState, setup: LayerSetup, hot: float, slowest: float) -> PricedStep:
    """The priced steps of a table's grid under a state.

    hot, slowest: factors of computing on the rank that the grid puts first (the hottest) and on the slowest other one;
    experts follow the state's own GPUs. A collective counts by the slowest link of any group.
    """
    parallel = setup.parallel
    by_dp = np.full(parallel.attention_dp, slowest)
    by_dp[0] = hot
    by_ep = state.gpu_factors(parallel.gpus).reshape(parallel.ep, parallel.expert_tp).max(axis=1)
    links = {link: float(factors.max()) for link, factors in state.link_factors(parallel.gpus).items()}
    exchange = links.get(Link.NIC if setup.domains > 1 else Link.NVLINK, 1.0)
    factors: dict[str, Floats] = dict.fromkeys(_BY_DP_RANK, by_dp) | dict.fromkeys(_BY_EP_RANK, by_ep)
    factors |= dict.fromkeys(_EXCHANGES, np.asarray([exchange]))
    factors |= dict.fromkeys(_TP_COLLECTIVES, np.asarray([links.get(Link.NVLINK, 1.0)]))
    parts: dict[str, Any] = {name: _times(getattr(priced, name), factor) for name, factor in factors.items()}
    others = tuple(slowed_grid(one, state, setup, hot, slowest) for one in priced.others)
    return replace(priced, others=others, **parts)


def _times(part: Part, factors: Floats) -> Part:
    def slower(one: Estimate) -> Estimate:
        alike = one.seconds.shape[-1] == 1 and len(factors) > 1
        return replace(one, seconds=one.seconds * (factors.max() if alike else factors))

    return Part(tuple(slower(one) for one in part.estimates))


class FaultedTable(TimedModel):
    """A TimedModel under a state: tables timed with slower parts, the slow ranks' attention slower."""

    def __init__(self, model: StepModel, draw: Draw | None, state: FaultState, extra: float = 1.0) -> None:
        """extra: a factor of all computing besides, for jitter."""
        super().__init__(model, draw)
        setup = model.deployment.setup
        if extra != 1.0:
            everywhere = tuple((gpu, extra) for gpu in range(setup.parallel.gpus))
            state = replace(state, slow_gpus=(*state.slow_gpus, *everywhere))
        self.state = state
        self.factors = dp_rank_factors(state, setup.parallel)
        self._link = float(state.link_factors(setup.parallel.gpus).get(Link.NVLINK, np.ones(1)).max())
        self._exchange: DecodeAttention | None = None
        self._position = (1.0, 1.0)

    def __call__(self, plan: Plan) -> float:
        """Seconds of a planned step, by the table in which the plan's hottest rank is as slow as it is."""
        tokens = plan.decode_seqs + plan.prefill_tokens
        hot = int(np.argmax(tokens))
        self._position = float(self.factors[hot]), float(np.delete(self.factors, hot).max(initial=1.0))
        return super().__call__(plan)

    def slowed(self, plan: Plan, attention_s: Floats) -> Floats:
        """Kernels take as long as their GPU, what ranks that share contexts exchange as the slowest link of any."""
        if self.model.deployment.setup.parallel.decode_cp == 1:
            return np.asarray(attention_s * self.factors)
        exchanged_s = self._exchanged_s(plan)
        return np.asarray((attention_s - exchanged_s) * self.factors + exchanged_s * self._link)

    def _exchanged_s(self, plan: Plan) -> Floats:
        """Seconds of a layer's exchanges among ranks that share contexts: [attention-DP ranks]."""
        if self._exchange is None:
            seconds = np.broadcast_to(self.model.decode_exchange().seconds(self.normal), self._attention.seconds.shape)
            self._exchange = self._attention._replace(seconds=np.ascontiguousarray(seconds))
        found: Floats = attention_of_ranks(plan.decode_seqs, plan.decode_kv, self._exchange)
        for rank in np.nonzero(plan.prefill_tokens)[0]:
            seqs = int(plan.prefill_seqs[rank])
            sizes = float(plan.prefill_tokens[rank]) / seqs, float(plan.prefill_prefix[rank]) / seqs
            found[rank] += float(self.model.prefill_exchange(seqs, *sizes).seconds(self.normal)[0, 0])
        return found

    def table(self, kind: str) -> StepTable:
        """The table of decode or prefill steps for the present position of the hottest rank."""
        hot, others = self._position
        key = f"{kind} {hot!r} {others!r}"
        if key not in self._tables:
            grid, setup = self.model.grid(kind), self.model.deployment.setup
            self._tables[key] = time_grid(
                self.model.pricer,
                replace(grid, priced=slowed_grid(grid.priced, self.state, setup, hot, others)),
                longest_attention_s=float(self.attention().seconds.max() * self.factors.max()),
                normal=self.normal,
                load_weights=self.load_weights,
            )
        return self._tables[key]


def dp_rank_factors(state: FaultState, parallel: ParallelSpec) -> Floats:
    """How many times as long each attention-DP rank computes, by the slowest of its TP GPUs: [attention-DP ranks]."""
    return np.asarray(state.gpu_factors(parallel.gpus).reshape(parallel.attention_dp, parallel.tp).max(axis=1))


def gpus_of(dead: frozenset[int], parallel: ParallelSpec) -> list[int]:
    """GPUs of attention-DP ranks that are gone: with one GPU its TP group is."""
    return [rank * parallel.tp + place for rank in sorted(dead) for place in range(parallel.tp)]


def orphans(placement: ExpertPlacement, dead_ranks: Sequence[int]) -> tuple[int, int] | None:
    """The first (absolute layer, expert) all of whose slots are on dead EP ranks; None where every expert survives."""
    alive = ~np.isin(np.arange(placement.slots) // placement.slots_per_rank, list(dead_ranks))
    for row, layer in enumerate(placement.layer_ids.tolist()):
        lost = np.setdiff1d(np.arange(placement.experts), placement.physical_to_logical[row, alive])
        if lost.size:
            return int(layer), int(lost[0])
    return None


def surviving_shares(placement: ExpertPlacement, shares: Floats, dead_ranks: Sequence[int]) -> Floats:
    """Shares [layers, slots] with dead EP ranks' slots at 0, and their tokens spread over the expert's other slots.

    Surviving slots keep their proportions. Every expert must have one.
    """
    dead = np.isin(np.arange(placement.slots) // placement.slots_per_rank, list(dead_ranks))
    kept = np.where(dead[None, :], 0.0, shares)
    whole = np.zeros((placement.layers, placement.experts))
    np.add.at(whole, (np.arange(placement.layers)[:, None], placement.physical_to_logical), kept)
    return np.asarray(kept / np.take_along_axis(whole, placement.physical_to_logical, axis=1))


def model_without(model: StepModel, dead: frozenset[int]) -> StepModel:
    """The step model of the instance after ranks died whose experts all survive elsewhere."""
    setup = model.deployment.setup
    ranks = sorted({gpu // setup.parallel.expert_tp for gpu in gpus_of(dead, setup.parallel)})
    twin = copy.copy(model)
    twin.pricer = copy.copy(model.pricer)
    whole = model.pricer.replicas
    assert whole.shares is not None  # check_faults lets no other choice in
    twin.pricer.replicas = replace(whole, shares=surviving_shares(setup.placement, whole.shares, ranks))
    twin.grids = {}
    twin.base = TimedModel(twin, None)
    return twin


def check_faults(deployment: Deployment, faults: Sequence[FaultSpec]) -> None:
    """Whether the faults can happen to this plan and run. Raises BadInput that names the entry, or the other key."""
    if faults:
        _check_run(deployment)
    setup, instances = deployment.setup, deployment.instances
    parallel = setup.parallel
    for index, fault in enumerate(faults):
        where = f"faults.{index}"
        if fault.instance >= instances:
            raise BadInput(
                f"instance {fault.instance} of {instances}", where=f"{where}.instance", mend="count instances from 0"
            )
        if fault.gpu is not None and fault.gpu >= parallel.gpus:
            raise BadInput(
                f"GPU {fault.gpu} of an instance of {parallel.gpus}", where=f"{where}.gpu", mend="count GPUs from 0"
            )
        if fault.link is not None and fault.recovery_s is None and not _crosses(setup, fault.link):
            inside = "it runs on one node" if setup.nodes == 1 else "it stays inside one NVLink domain"
            raise BadInput(
                f"no operation of this plan is priced over a GPU's {fault.link}: "
                + ("exchanges over nodes go by the NICs" if fault.link == "nvlink" else inside),
                where=f"{where}.link",
                mend="name the other link",
            )
        if fault.kind == "dead_rank" and fault.recovery_s is None:
            _check_survivors(setup, faults[: index + 1], where)


def _check_run(deployment: Deployment) -> None:
    """Whether the serving loop can lose requests of this run: it is sent in turn, and steps stand on their own."""
    serving = deployment.serving
    odd = {
        "serving.roles": deployment.prefill is not None,
        "serving.speculative": serving.speculative is not None,
        "serving.batching.prefix_cache": serving.batching.prefix_cache,
        "serving.balance": serving.balance != "round_robin",
        "serving.memory.admission": serving.memory.admission != "reserve",
        "cluster.background": bool(deployment.ground.cluster.background),
    }
    for key, given in odd.items():
        if given:
            raise BadInput(f"faults are not modelled together with {key}", where="faults", mend=f"leave out {key}")


def _crosses(setup: LayerSetup, link: str) -> bool:
    """Whether the graph of a plan has tasks on a link; see `moesim.graph.layer`."""
    if link == "nic":
        return setup.domains > 1
    return setup.parallel.tp > 1 or (setup.domains == 1 and setup.parallel.gpus > 1)


def _check_survivors(setup: LayerSetup, faults: Sequence[FaultSpec], where: str) -> None:
    """Whether the instance of the last fault can go on without all the ranks that die, whenever they do."""
    parallel = setup.parallel
    dying = [fault for fault in faults if fault.kind == "dead_rank" and fault.recovery_s is None]
    dead = frozenset(int(fault.gpu or 0) // parallel.tp for fault in dying if fault.instance == faults[-1].instance)
    gpus = gpus_of(dead, parallel)
    choice = CHOICES[setup.policies.dispatch.replica]
    if not choice.fixed:
        raise BadInput(
            f"how replica choice {choice.name} goes on without a rank is not modelled",
            where=where,
            mend="give recovery_s, how long the instance is down, or use replica equal or local_first",
        )
    named = f"GPU{'s' if len(gpus) > 1 else ''} {', '.join(map(str, gpus))}"
    if len(dead) == parallel.attention_dp or parallel.expert_tp > 1:
        raise BadInput(
            f"without {named} nothing of the instance can go on: no rank is left, or its GPUs share every expert",
            where=where,
            mend="give recovery_s, how long the instance is down",
        )
    lost = orphans(setup.placement, gpus)
    if lost is not None:
        raise BadInput(
            f"without {named} layer {lost[0]} has no replica of expert {lost[1]}",
            where=where,
            mend="give recovery_s, how long the instance is down, or a placement with a replica of every expert",
        )


def state_at(faults: Sequence[FaultSpec], instance: int, now_s: float, parallel: ParallelSpec) -> FaultState:
    """What is wrong with an instance at a time."""
    gpus: list[tuple[int, float]] = []
    links: list[tuple[int, Link, float]] = []
    dead: set[int] = set()
    sigma = 0.0
    for fault in faults:
        if not fault.active(instance, now_s):
            continue
        if fault.kind == "jitter":
            sigma = float(np.hypot(sigma, fault.sigma or 0.0))  # independent delays: variances of the logarithm add
            continue
        assert fault.gpu is not None
        if fault.kind == "slow_gpu":
            gpus.append((fault.gpu, float(fault.factor or 1.0)))
        elif fault.kind == "slow_link":
            links.append((fault.gpu, _LINKS[str(fault.link)], float(fault.factor or 1.0)))
        elif fault.kind == "dead_link" and fault.reroute:
            links.append((fault.gpu, Link.NIC, REROUTED_FACTOR))
        elif fault.kind == "dead_rank" and fault.recovery_s is None:
            dead.add(fault.gpu // parallel.tp)
    return FaultState(tuple(gpus), tuple(links), frozenset(dead), sigma)
