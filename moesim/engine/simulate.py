"""Run one deployment under its workload: once as best known, and once for each joint draw."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.engine.batch_rules import flow_of
from moesim.engine.deployment import Deployment
from moesim.engine.dispatch_checks import check_background
from moesim.engine.draws import Draw, joint_draws
from moesim.engine.faults import check_faults
from moesim.engine.losses import Faults
from moesim.engine.outages import FaultClock
from moesim.engine.relayout_checks import check_relayouts
from moesim.engine.relayout_decisions import Relayout
from moesim.engine.relayout_runs import MovingRuns
from moesim.engine.roles import RolePool, Transfer, serve_roles
from moesim.engine.serving import Load, Served, StepTime, serve
from moesim.engine.stepmodel import ExactModel, Fidelity, StepModel
from moesim.engine.steptable import COARSE, FULL
from moesim.engine.workload import lengths
from moesim.engine.workload import make_load as load_of
from moesim.errors import OutsideProfile
from moesim.graph.batch import StepBatch, step_batch

DEFAULT_DRAWS = 20


@dataclass(frozen=True)
class Simulation:
    """A run as best known, the same run under each joint draw, and what they were made with.

    draws_outside: draws under which the run leaves the profile. Where there are any, `drawn` is empty: the rest would
    be the cheaper part of what may be true, and no interval. without_faults: the run as best known without the
    scenario's faults, on the same arrivals; None where there are none. relayouts, without_relayouts: of the run as best
    known, and the same run with its first placement throughout; pauses: instance, start and seconds of each.
    """

    deployment: Deployment
    model: StepModel
    load: Load
    served: Served
    drawn: tuple[Served, ...]
    draws_outside: int
    fidelity: Fidelity
    seed: int
    wall_s: float
    cpu_s: float
    prefill_model: StepModel | None = None
    without_faults: Served | None = None
    relayouts: tuple[Relayout, ...] = ()
    without_relayouts: Served | None = None
    pauses: tuple[tuple[int, float, float], ...] = ()


# A first look simulates this share of the requests, but at least so many, and each place of a closed loop so often.
FIRST_LOOK, FEWEST_REQUESTS, LEAST_ROUNDS = 0.5, 400, 4


def first_requests(load: Load) -> Load:
    """The part of a load that a first look simulates."""
    count = max(int(len(load.isl) * FIRST_LOOK), FEWEST_REQUESTS, LEAST_ROUNDS * (load.concurrency or 0))
    if count >= len(load.isl) or load.blocks is not None:
        return load
    times_s = None if load.arrival_s is None else load.arrival_s[:count]
    return replace(load, isl=load.isl[:count], osl=load.osl[:count], arrival_s=times_s)


def make_load(deployment: Deployment, seed: int) -> Load:
    """The scenario's requests: the same for every plan and draw."""
    serving = (deployment.prefill or deployment).serving
    return load_of(serving.workload, seed, prefix_cache=serving.batching.prefix_cache)


def role_pool(model: StepModel, timed: StepTime) -> RolePool:
    """The instances of one role, their steps timed."""
    deployment = model.deployment
    flow = flow_of(deployment, model.limits)
    return RolePool(model.limits, deployment.setup.parallel.attention_dp, deployment.instances, timed, flow=flow)


def kv_transfer(deployment: Deployment) -> Transfer:
    """How KV cache moves to the decode role: each GPU of a prefill rank sends what it holds through its NIC.

    The rate is the cluster's NIC, shared where GPUs share it; `formula`, and `assumed` to reach the NIC's rate.
    """
    prefill, cluster = deployment.prefill, deployment.ground.cluster
    assert prefill is not None
    roles = deployment.ground.scenario.serving.roles if deployment.ground.scenario.serving else None
    by_stage = [one.kv_bytes_per_token for one in prefill.memory.stages] or [prefill.memory.kv_bytes_per_token]
    gpus = prefill.setup.parallel.tp
    stages = prefill.setup.stages
    return Transfer(
        bytes_per_token=max(by_stage),
        gpus=gpus if stages is None else gpus * sum(by_stage) / max(by_stage),
        bytes_per_s=cluster.shared_nic_bytes_per_s,
        latency_s=cluster.nic_latency_s,
        layers=prefill.setup.model.layers if stages is None else max(len(held) for held in stages.layers),
        by_layer=roles is not None and roles.transfer == "by_layer",
    )


def simulate(
    deployment: Deployment,
    *,
    draws: int = DEFAULT_DRAWS,
    seed: int | None = None,
    fidelity: Fidelity = "table",
    first_look: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Simulation:
    """Simulate a deployment. `progress` is told the share done. Raises OutsideProfile, Infeasible and BadInput.

    first_look: coarse step tables and the first requests only, to sift many plans.
    """
    check_background(deployment.ground.cluster, fidelity=fidelity, draws=draws)
    seed = deployment.scenario.seed if seed is None else seed
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    faults = deployment.scenario.faults
    check_faults(deployment, faults)
    check_relayouts(deployment, fidelity)
    detail = COARSE if first_look else FULL
    model = StepModel(deployment, seed=seed, detail=detail)
    reading = None if deployment.prefill is None else StepModel(deployment.prefill, seed=seed, detail=detail)
    load = make_load(deployment, seed)
    load = first_requests(load) if first_look else load
    load = replace(load, front_end_s=deployment.rules.request.seconds)
    moving = MovingRuns(model, fidelity)

    def run(draw: Draw | None, *, healthy: bool = False, still: bool = False) -> Served:
        timed = ExactModel(model, fidelity) if fidelity != "table" and draw is None else model.under(draw)
        ranks = deployment.setup.parallel.attention_dp
        asked = replace(load, front_end_s=deployment.rules.request.under(None if draw is None else draw.normal))
        if reading is not None:
            first = ExactModel(reading, fidelity) if fidelity != "table" and draw is None else reading.under(draw)
            return serve_roles(
                asked,
                role_pool(reading, first),
                role_pool(model, timed),
                kv_transfer(deployment),
                balance=deployment.serving.balance,
            )
        clock: Faults | None = FaultClock(faults, model, draw, fidelity) if faults and not healthy else None
        clock = clock or moving.clock(draw, still=still)
        return serve(
            asked,
            model.limits,
            ranks=ranks,
            instances=deployment.instances,
            step_time=timed,
            balance=deployment.serving.balance,
            faults=clock,
            flow=flow_of(deployment, model.limits),
        )

    served = run(None)
    without_faults = run(None, healthy=True) if faults else None
    without_relayouts = run(None, still=True) if moving.spec is not None else None
    drawn, outside = [], 0
    for index, draw in enumerate(joint_draws(draws, model.routing.weights, seed)):
        if progress is not None:
            progress((index + 1) / (draws + 1))
        try:
            drawn.append(run(draw))
        except OutsideProfile:
            outside += 1
    return Simulation(
        deployment=deployment,
        model=model,
        prefill_model=reading,
        load=load,
        served=served,
        drawn=() if outside else tuple(drawn),
        draws_outside=outside,
        fidelity=fidelity,
        seed=seed,
        wall_s=time.perf_counter() - wall_s,
        cpu_s=time.process_time() - cpu_s,
        without_faults=without_faults,
        relayouts=moving.events,
        without_relayouts=without_relayouts,
        pauses=moving.pauses,
    )


def typical_decode(simulation: Simulation) -> StepBatch:
    """The decode step that the run spent its time in: tokens weighted by step time, half-grown contexts."""
    served = simulation.served
    decode = (served.step_prefill_tokens == 0) & (served.step_decode_seqs > 0)
    chosen = decode if decode.any() else served.step_decode_seqs >= 0
    seqs = weighted_mean(served.step_decode_seqs[chosen], served.step_s[chosen])
    ranks = simulation.deployment.setup.parallel.attention_dp
    per_rank = max(1, round(seqs / ranks)) * (1 + simulation.model.drafts)  # every token that is verified
    asked = lengths(simulation.deployment.serving.workload)
    context = asked.mean_isl + asked.mean_osl / 2
    padded = float(simulation.model.graphs.padded(per_rank))
    return step_batch(ranks=ranks, decode_seqs=float(per_rank), decode_kv=context, padded_tokens=padded)


def weighted_mean(values: NDArray[np.int64], weights: NDArray[np.float64]) -> float:
    """Mean of `values` weighted by `weights`; 0 where there is no weight."""
    total = float(weights.sum())
    return float((values * weights).sum() / total) if total > 0 else 0.0
