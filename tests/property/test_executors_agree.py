"""The two executors against each other, on graphs drawn at random."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine import des, maxplus
from moesim.graph.task import Link, Stream, Task, TaskGraph

GRAPHS = 200
CONTENDED_GRAPHS = 100


def random_graph(rng, *, steps, links):
    """A graph of up to 60 tasks: any stream, any dependencies, several groupings, every shape of durations."""
    ranks = int(rng.integers(1, 9))
    groupings = [rng.integers(0, rng.integers(1, ranks + 1), ranks) for _ in range(3)] + [
        np.zeros(ranks, dtype=np.int64)
    ]
    tasks = []
    for index in range(int(rng.integers(1, 60))):
        shape = [(1, 1), (steps, 1), (1, ranks), (steps, ranks), (ranks,), ()][rng.integers(6)]
        duration_s = rng.exponential(1e-4, shape) * rng.choice([0.0, 1e-3, 1.0, 1.0, 1.0, 100.0])
        depends_on = rng.choice(index, size=min(index, int(rng.integers(0, 4))), replace=False) if index else []
        used = rng.permutation(len(Link))[: rng.integers(0, len(Link) + 1)] if links else []
        tasks.append(
            Task(
                name=f"task {index}",
                operation=f"operation {rng.integers(5)}",
                stream=Stream(int(rng.integers(len(Stream)))),
                duration_s=np.asarray(duration_s, dtype=np.float64),
                depends_on=tuple(int(other) for other in depends_on),
                groups=groupings[rng.integers(4)] if rng.random() < 0.4 else None,
                links=tuple((Link(int(link)), float(rng.uniform(0.01, 1.0))) for link in used),
            )
        )
    return TaskGraph(steps, ranks, tuple(tasks))


def assert_same(fast, careful):
    """Ends within 1e-9 relative; spans, which are differences of ends, within 1e-9 of the step."""
    np.testing.assert_allclose(careful.step_s, fast.step_s, rtol=1e-9)
    np.testing.assert_allclose(careful.rank_end_s, fast.rank_end_s, rtol=1e-9)
    assert careful.busy_s.keys() == fast.busy_s.keys()
    for operation, seconds in fast.busy_s.items():
        np.testing.assert_allclose(careful.busy_s[operation], seconds, rtol=1e-9)
    np.testing.assert_allclose(careful.compute_busy_s, fast.compute_busy_s, rtol=1e-9)
    np.testing.assert_allclose(careful.wait_s, fast.wait_s, rtol=1e-9, atol=1e-9 * float(fast.step_s.max(initial=0.0)))


@pytest.mark.parametrize("block", range(10))
def test_without_contention_both_give_the_same_times(block):
    for seed in range(block * GRAPHS // 10, (block + 1) * GRAPHS // 10):
        rng = np.random.default_rng([0, seed])
        graph = random_graph(rng, steps=int(rng.integers(1, 4)), links=False)
        fast, careful = maxplus.run(graph, timeline=True), des.run(graph, timeline=True)
        assert_same(fast, careful)
        np.testing.assert_allclose(careful.start_s, fast.start_s, rtol=1e-9)
        np.testing.assert_allclose(careful.end_s, fast.end_s, rtol=1e-9)


def test_sharing_off_or_links_that_are_never_full_change_nothing():
    for seed in range(40):
        rng = np.random.default_rng([1, seed])
        graph = random_graph(rng, steps=2, links=True)
        assert_same(maxplus.run(graph), des.run(graph, sharing=False))
        light = tuple(
            Task(
                t.name,
                t.operation,
                t.stream,
                t.duration_s,
                t.depends_on,
                t.groups,
                tuple((k, v / 3) for k, v in t.links),
            )
            for t in graph.tasks
        )
        assert_same(maxplus.run(graph), des.run(TaskGraph(graph.steps, graph.ranks, light)))


def test_links_used_by_one_task_at_a_time_take_the_sharing_path_and_change_nothing():
    # A chain: whatever the streams and shares, no two tasks of a rank run at once, though their shares could clash.
    for seed in range(40):
        rng = np.random.default_rng([2, seed])
        graph = random_graph(rng, steps=1, links=True)
        chain = tuple(
            Task(t.name, t.operation, t.stream, t.duration_s, (i - 1,) if i else (), t.groups, t.links)
            for i, t in enumerate(graph.tasks)
        )
        assert_same(maxplus.run(TaskGraph(1, graph.ranks, chain)), des.run(TaskGraph(1, graph.ranks, chain)))


def test_sharing_never_makes_anything_end_earlier():
    slower = 0
    for seed in range(CONTENDED_GRAPHS):
        rng = np.random.default_rng([3, seed])
        graph = random_graph(rng, steps=1, links=True)
        alone, shared = maxplus.run(graph, timeline=True), des.run(graph, timeline=True)
        assert alone.end_s is not None and shared.end_s is not None
        assert (shared.end_s >= alone.end_s * (1 - 1e-9)).all()
        slower += bool(shared.step_s[0] > alone.step_s[0] * (1 + 1e-6))
    assert slower > CONTENDED_GRAPHS // 10  # or the draws would not have tested anything


def test_one_step_of_many_is_that_step():
    rng = np.random.default_rng(4)
    graph = random_graph(rng, steps=3, links=True)
    every = des.run(graph)
    for step in range(3):
        one = des.run(graph, step=step)
        np.testing.assert_array_equal(one.step_s, every.step_s[step : step + 1])
        np.testing.assert_array_equal(one.wait_s, every.wait_s[step : step + 1])
