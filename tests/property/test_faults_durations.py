"""Faults of duration: never faster, the same on both executors, and nothing at all where their factor is 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.engine import des, maxplus
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.faults import FaultState, jitter_factors, surviving_shares
from moesim.engine.serving import Served
from moesim.engine.simulate import simulate
from moesim.graph.task import Link
from moesim.network.replicas import replica_shares
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario
from tests.property.test_executors_agree import random_graph
from tests.scenarios import small

GRAPHS = 100


def random_state(rng, ranks):
    gpus = tuple((int(rng.integers(ranks)), float(rng.uniform(1, 4))) for _ in range(rng.integers(0, 3)))
    links = tuple(
        (int(rng.integers(ranks)), Link(int(rng.integers(len(Link)))), float(rng.uniform(1, 4)))
        for _ in range(rng.integers(0, 3))
    )
    return FaultState(slow_gpus=gpus, slow_links=links)


def test_a_faulted_step_is_the_same_on_both_executors_and_nothing_in_it_ends_earlier():
    slower = 0
    for seed in range(GRAPHS):
        rng = np.random.default_rng([30, seed])
        graph = random_graph(rng, steps=2, links=True)
        state = random_state(rng, graph.ranks)
        jitter = jitter_factors(float(rng.uniform(0, 1)), (2, graph.ranks), rng) if rng.random() < 0.5 else None
        faulted = state.slowed(graph, jitter)
        healthy, fast = maxplus.run(graph, timeline=True), maxplus.run(faulted, timeline=True)
        careful = des.run(faulted, sharing=False, timeline=True)
        np.testing.assert_allclose(careful.end_s, fast.end_s, rtol=1e-9)
        np.testing.assert_allclose(careful.step_s, fast.step_s, rtol=1e-9)
        assert healthy.end_s is not None and fast.end_s is not None
        assert (fast.end_s >= healthy.end_s).all()
        slower += bool((fast.step_s > healthy.step_s).any())
    assert slower > GRAPHS // 2  # or nothing was tested


def test_a_larger_factor_never_helps():
    for seed in range(GRAPHS):
        rng = np.random.default_rng([31, seed])
        graph = random_graph(rng, steps=1, links=True)
        gpu, link = int(rng.integers(graph.ranks)), Link(int(rng.integers(len(Link))))
        found = [
            maxplus.run(FaultState(((gpu, factor),), ((gpu, link, factor),)).slowed(graph)).step_s[0]
            for factor in (1.0, 1.1, 2.0, 5.0)
        ]
        assert found == sorted(found)


def test_factors_of_one_and_no_jitter_leave_every_duration_as_it_was():
    for seed in range(50):
        rng = np.random.default_rng([32, seed])
        graph = random_graph(rng, steps=2, links=True)
        state = FaultState(((0, 1.0),), tuple((0, link, 1.0) for link in Link))
        faulted = maxplus.run(state.slowed(graph, jitter_factors(0.0, (2, graph.ranks), rng)), timeline=True)
        np.testing.assert_array_equal(faulted.end_s, maxplus.run(graph, timeline=True).end_s)


def run(faults: list[dict[str, Any]], fidelity: str = "table", **changes: Any) -> tuple[Served, Served]:
    """A closed loop of one instance, whose batches do not depend on time: with the faults, and without."""
    data = small(faults=faults, **changes)
    data["serving"]["workload"] |= {"requests": 48, "osl": 12, "arrivals": {"concurrency": 24}}
    found = simulate(resolve(groundwork(Scenario.read(data, where="test"))), draws=0, fidelity=fidelity)  # type: ignore[arg-type]
    assert found.without_faults is not None
    return found.served, found.without_faults


SLOW = [
    {"kind": "slow_gpu", "gpu": 3, "factor": 1.5},
    {"kind": "slow_gpu", "gpu": 0, "factor": 3.0, "from_s": 0.01, "to_s": 0.03},
    {"kind": "slow_link", "gpu": 2, "link": "nvlink", "factor": 2.0},
    {"kind": "jitter", "sigma": 0.3},
]


@pytest.mark.parametrize("schedule", ["sequential", "two_batch"])
@pytest.mark.parametrize("fidelity", ["table", "maxplus"])
@pytest.mark.parametrize("fault", SLOW, ids=lambda fault: f"{fault['kind']} {fault.get('from_s', '')}")
def test_no_request_of_a_closed_loop_ends_earlier_under_a_fault(fault, fidelity, schedule):
    """In an open loop one may: a step that ends later can take in a request that it would have missed."""
    served, without = run([fault], fidelity, policies={"schedule": schedule})
    assert (served.finish_s >= without.finish_s).all()
    assert (served.first_token_s >= without.first_token_s).all()
    assert served.duration_s > without.duration_s


@pytest.mark.parametrize("fault", [fault for fault in SLOW if "to_s" not in fault], ids=lambda fault: fault["kind"])
def test_requests_of_an_open_loop_take_longer_in_the_mean_under_a_lasting_fault(fault):
    """Under a passing one they need not: prompts that pile up meanwhile are read together, in fewer steps."""
    found = simulate(resolve(groundwork(Scenario.read(small(faults=[fault]), where="test"))), draws=0)
    assert found.without_faults is not None
    with_fault, without = (run.finish_s - run.arrival_s for run in (found.served, found.without_faults))
    np.testing.assert_array_equal(found.served.arrival_s, found.without_faults.arrival_s)
    assert with_fault.mean() > without.mean()
    assert np.percentile(with_fault, 99) >= np.percentile(without, 99)


def test_a_whole_run_under_faults_is_the_same_on_both_executors():
    faults = [SLOW[0], SLOW[2], SLOW[3]]
    fast, careful = (run(faults, fidelity)[0] for fidelity in ("maxplus", "des"))
    np.testing.assert_allclose(careful.finish_s, fast.finish_s, rtol=1e-9)
    np.testing.assert_allclose(careful.step_s, fast.step_s, rtol=1e-9)


@pytest.mark.parametrize("schedule", ["sequential", "two_batch"])
@pytest.mark.parametrize("fidelity", ["table", "maxplus"])
def test_faults_of_factor_one_change_no_request(fidelity, schedule):
    nothing = [
        {"kind": "slow_gpu", "gpu": 3, "factor": 1.0},
        {"kind": "slow_link", "gpu": 2, "link": "nvlink", "factor": 1},
        {"kind": "jitter", "sigma": 0.0},
    ]
    served, without = run(nothing, fidelity, policies={"schedule": schedule})
    np.testing.assert_allclose(served.finish_s, without.finish_s, rtol=1e-12)
    np.testing.assert_allclose(served.step_s, without.step_s, rtol=1e-12)


@pytest.mark.parametrize("fault", SLOW, ids=lambda fault: f"{fault['kind']} {fault.get('from_s', '')}")
def test_the_table_follows_the_step_by_step_run_under_faults(fault):
    table, exact = (run([fault], fidelity)[0] for fidelity in ("table", "maxplus"))
    assert table.duration_s == pytest.approx(exact.duration_s, rel=0.06)


def test_surviving_shares_keep_every_token():
    for seed in range(50):
        rng = np.random.default_rng([33, seed])
        ranks, experts, layers = 4, 8, 3
        first = np.stack([rng.permutation(experts) for _ in range(layers)])
        second = np.roll(first, 2, axis=1)  # every expert a second time, on the next rank
        slots = np.concatenate([first.reshape(layers, ranks, 2), second.reshape(layers, ranks, 2)], axis=2)
        placement = ExpertPlacement(slots.reshape(layers, -1), np.arange(layers), experts, ranks, layers)
        shares = replica_shares(placement, policy=str(rng.choice(["equal", "local_first"])), nodes=2)
        dead = int(rng.integers(ranks))
        kept = surviving_shares(placement, shares, [dead])
        counts = rng.integers(0, 100, (5, layers, experts)).astype(np.float64)
        loads = placement.rank_loads(counts, kept)
        assert (loads[..., dead] == 0).all()
        np.testing.assert_allclose(loads.sum(axis=-1), counts.sum(axis=-1), rtol=1e-12)
        assert (np.delete(loads, dead, axis=-1) >= np.delete(placement.rank_loads(counts, shares), dead, axis=-1)).all()


def test_states_add_up():
    state = FaultState(((1, 2.0), (1, 1.5)), ((0, Link.NIC, 2.0), (0, Link.NIC, 2.0)))
    assert state.gpu_factors(3).tolist() == [1.0, 3.0, 1.0]
    assert state.link_factors(2)[Link.NIC].tolist() == [4.0, 1.0]
    assert replace(state, slow_gpus=()).gpu_factors(2).tolist() == [1.0, 1.0]
