"""Explaining steps of graphs drawn at random: paths that add up, waits that add up, savings that shares bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.engine import des, maxplus, whatif
from moesim.engine.critical import critical_path, waits
from moesim.graph.task import Stream
from tests.property.test_executors_agree import random_graph

GRAPHS = 120


def graphs(salt, count, **more):
    for seed in range(count):
        rng = np.random.default_rng([salt, seed])
        yield rng, random_graph(rng, steps=2, links=False, **more)


def assert_a_chain(graph, times, step):
    path = critical_path(graph, times, step=step)
    whole = times.step_s[step]
    assert sum(path.by_operation_s(graph).values()) == pytest.approx(whole, rel=1e-9)
    assert path.start_s[0] == 0.0
    assert path.end_s[-1] == whole
    np.testing.assert_array_equal(path.start_s[1:], path.end_s[:-1])
    for place in range(1, len(path.task)):
        task, other = graph.tasks[path.task[place]], graph.tasks[path.task[place - 1]]
        if path.bound[place] == "dependency":
            assert path.task[place - 1] in task.depends_on
        else:
            assert path.bound[place] == "stream"
            assert other.stream == task.stream
        if path.rank[place] != path.rank[place - 1]:
            assert task.groups is not None
            assert task.groups[path.rank[place]] == task.groups[path.rank[place - 1]]
    return path


def test_the_critical_path_is_a_chain_that_sums_to_the_step():
    for _, graph in graphs(20, GRAPHS):
        times = maxplus.run(graph, timeline=True)
        for step in range(2):
            assert_a_chain(graph, times, step)


def test_the_event_executor_gives_the_same_path_without_contention_and_a_chain_with_it():
    for seed in range(30):
        rng = np.random.default_rng([21, seed])
        graph = random_graph(rng, steps=1, links=True)
        alone = assert_a_chain(graph, des.run(graph, sharing=False, timeline=True), 0)
        fast = critical_path(graph, maxplus.run(graph, timeline=True))
        assert alone.by_operation_s(graph) == pytest.approx(fast.by_operation_s(graph), rel=1e-9, abs=1e-15)
        assert_a_chain(graph, des.run(graph, timeline=True), 0)


def test_waits_by_operation_and_by_rank_are_all_the_waits():
    for _, graph in graphs(22, GRAPHS):
        times = maxplus.run(graph, timeline=True)
        found = waits(graph, times)
        whole = float(times.step_s.max())
        total = sum(found.for_operation_s.values(), np.zeros_like(times.wait_s))
        np.testing.assert_allclose(total, times.wait_s, rtol=1e-9, atol=1e-12 * whole)
        np.testing.assert_allclose(found.for_rank_s.sum(axis=1), times.wait_s.sum(axis=1), rtol=1e-9)
        assert (found.for_rank_s >= 0).all()


def test_making_an_operation_free_saves_at_most_its_part_of_the_critical_path():
    saved = 0
    for _, graph in graphs(23, GRAPHS):
        times = maxplus.run(graph, timeline=True)
        shares = [critical_path(graph, times, step=step).by_operation_s(graph) for step in range(2)]
        for operation in times.busy_s:
            free = maxplus.run(whatif.without_operation(graph, operation)).step_s
            for step in range(2):
                least = times.step_s[step] - shares[step].get(operation, 0.0)
                assert least * (1 - 1e-9) <= free[step] <= times.step_s[step]
            saved += bool((free < times.step_s).any())
    assert saved > GRAPHS  # or nothing was tested


def test_no_what_if_makes_a_step_slower():
    for rng, graph in graphs(24, GRAPHS):
        base = maxplus.run(graph).step_s
        for change in (whatif.infinite_network, whatif.no_host_overhead, whatif.overlapped):
            assert (maxplus.run(change(graph)).step_s <= base).all()
        # Balance is sure to help where ranks are alike: time is convex in the durations, and equal groups of
        # neighbours can be exchanged without changing it. (Odd groups are no deployment's.)
        group = int(rng.choice([size for size in range(1, graph.ranks + 1) if graph.ranks % size == 0]))
        alike = np.arange(graph.ranks) // group
        even = replace(
            graph,
            tasks=tuple(
                task if task.groups is None else replace(task, groups=alike if rng.random() < 0.5 else alike * 0)
                for task in graph.tasks
            ),
        )
        assert (maxplus.run(whatif.balanced(even)).step_s <= maxplus.run(even).step_s * (1 + 1e-12)).all()


def test_perfect_overlap_is_the_longest_stream_where_ranks_do_not_meet():
    for _, graph in graphs(25, 100):
        alone = replace(graph, tasks=tuple(replace(task, groups=None) for task in graph.tasks))
        busy = np.zeros((len(Stream), graph.steps, graph.ranks))
        for task in alone.tasks:
            busy[task.stream] += np.broadcast_to(task.duration_s, (graph.steps, graph.ranks))
        np.testing.assert_allclose(maxplus.run(whatif.overlapped(alone)).step_s, busy.max(axis=(0, 2)), rtol=1e-9)
