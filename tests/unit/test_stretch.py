"""Overlapping streams slow each other: by hand, within bounds, alike for both executors; sources of the figures."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.estimate import Tag
from moesim.cost.overlap import NOTHING, Slowdown, StreamOverlap, by_multiprocessors
from moesim.engine import des, maxplus, stretch
from moesim.engine.stream_overlap import stream_overlap
from moesim.engine.stretch import stretched
from moesim.errors import Infeasible
from moesim.graph.schedules import two_batch
from moesim.graph.task import Stream, Task, TaskGraph
from moesim.spec.parallel import ParallelSpec
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice, PoliciesSpec
from tests.property.test_executors_agree import random_graph

CLUSTER = load_cluster(ClusterChoice(system="h200_sxm", nodes=1))
PARALLEL = ParallelSpec(attention_dp=8, ep=8)


def slowdown(compute=1.0, communication=1.0):
    return Slowdown(compute, communication, 0, Tag.ASSUMED, "test")


def task(name, stream, seconds, after=(), operation=None):
    groups = np.zeros(1, dtype=np.int64) if stream == Stream.COMMUNICATION else None
    return Task(name, operation or name, stream, np.array([[float(seconds)]]), after, groups)


def beside(compute_s, exchange_s, **more):
    """A computation and an exchange that both start at 0."""
    return TaskGraph(
        1, 1, (task("work", Stream.COMPUTE, compute_s, **more), task("exchange", Stream.COMMUNICATION, exchange_s))
    )


def durations(graph):
    return [float(one.duration_s[0, 0]) for one in graph.tasks]


def test_a_computation_is_slowed_for_as_long_as_the_exchange_lasts():
    # 2 seconds beside at half pace are 1 second of work; 5 are left.
    assert durations(stretched(beside(6, 2), slowdown(compute=2.0))) == [7.0, 2.0]
    # Beside all along: twice as long.
    assert durations(stretched(beside(2, 10), slowdown(compute=2.0))) == [4.0, 10.0]


def test_an_exchange_is_slowed_too():
    assert durations(stretched(beside(4, 100), slowdown(communication=2.0))) == [4.0, 102.0]


def test_what_runs_alone_and_what_the_host_or_a_copy_does_is_not_slowed():
    chained = TaskGraph(1, 1, (task("work", Stream.COMPUTE, 3), task("exchange", Stream.COMMUNICATION, 2, (0,))))
    assert durations(stretched(chained, slowdown(2.0, 2.0))) == [3.0, 2.0]
    assert durations(stretched(beside(6, 2, operation="engine_overhead"), slowdown(2.0, 2.0))) == [6.0, 2.0]
    copy = TaskGraph(1, 1, (task("work", Stream.COMPUTE, 3), task("fetch", Stream.COPY, 2)))
    assert durations(stretched(copy, slowdown(2.0, 2.0))) == [3.0, 2.0]


def test_without_a_slowdown_it_is_the_same_graph():
    graph = beside(6, 2)
    assert stretched(graph, NOTHING) is graph


def test_random_graphs_stay_within_bounds_and_both_executors_agree():
    slower = 0
    for seed in range(40):
        rng = np.random.default_rng([7, seed])
        graph = random_graph(rng, steps=2, links=False)
        cost = slowdown(1.0 + rng.random(), 1.0 + rng.random())
        found = stretched(graph, cost)
        for before, after in zip(graph.tasks, found.tasks, strict=True):
            alone = np.broadcast_to(before.duration_s, (2, graph.ranks))
            most = {Stream.COMPUTE: cost.compute, Stream.COMMUNICATION: cost.communication}.get(before.stream, 1.0)
            assert (after.duration_s >= alone).all()
            assert (after.duration_s <= alone * most * (1 + 1e-12)).all()
        fast, careful, plain = maxplus.run(found), des.run(found), maxplus.run(graph)
        np.testing.assert_allclose(careful.step_s, fast.step_s, rtol=1e-9)
        assert (fast.step_s >= plain.step_s * (1 - 1e-12)).all()
        slower += bool((fast.step_s > plain.step_s * (1 + 1e-6)).any())
    assert slower > 20


def test_the_step_settles():
    """Two batches of chains that slow each other: one pass more moves the step by less than a thousandth."""
    for seed in range(10):
        rng = np.random.default_rng([8, seed])
        a, b = (
            [task(str(i), Stream(i % 2), rng.exponential(1.0), (i - 1,) if i else ()) for i in range(20)] for _ in "ab"
        )
        graph, cost = two_batch(a, b, 1, 1), slowdown(1.3, 1.2)
        found = maxplus.run(stretched(graph, cost)).step_s[0]
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(stretch, "PASSES", 40)
            patched.setattr(stretch, "SETTLED", 0.0)
            assert found == pytest.approx(maxplus.run(stretched(graph, cost)).step_s[0], rel=1e-3)
        assert found > maxplus.run(graph).step_s[0]


def test_multiprocessors_that_an_exchange_takes():
    found = by_multiprocessors(20, 132)
    assert (found.compute, found.communication, found.tag) == (132 / 112, 1.0, Tag.FORMULA)
    policies = PoliciesSpec.model_validate({"overlap": {"slowdown": "multiprocessors"}})
    overlap = stream_overlap(policies, CLUSTER, PARALLEL, object())
    assert overlap.of("normal") == found
    assert overlap.of("low_latency") == NOTHING


def test_given_figures_are_assumed():
    policies = PoliciesSpec.model_validate({"overlap": {"slowdown": {"compute": 1.2}}})
    overlap = stream_overlap(policies, CLUSTER, PARALLEL, object())
    assert [overlap.of(mode).compute for mode in ("normal", "low_latency")] == [1.2, 1.2]
    assert overlap.of("normal").tag == Tag.ASSUMED
    assert stream_overlap(PoliciesSpec(), CLUSTER, PARALLEL, object()) is None


class Measured:
    """A cost model that knows one overlap."""

    def overlap(self, work, gpus, nodes):
        known = (work, gpus, nodes) == ("all_to_all", 8, 1)
        return Slowdown(1.3, 1.1, 0, Tag.MEASURED, "here") if known else None


def test_measured_figures_come_from_the_cost_model_or_are_refused_by_name():
    policies = PoliciesSpec.model_validate({"overlap": {"slowdown": "measured"}})
    assert stream_overlap(policies, CLUSTER, PARALLEL, Measured()) == StreamOverlap(
        dict.fromkeys(("normal", "low_latency"), Slowdown(1.3, 1.1, 0, Tag.MEASURED, "here"))
    )
    two = ParallelSpec(attention_dp=4, ep=4)
    for costs, parallel in ((object(), PARALLEL), (Measured(), two)):
        with pytest.raises(Infeasible, match=r"no profile holds what all_to_all of \d GPUs.*--beside gemm") as refused:
            stream_overlap(policies, CLUSTER, parallel, costs)
        assert refused.value.reason == "overlap_not_measured"
