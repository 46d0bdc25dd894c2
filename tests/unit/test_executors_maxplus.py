"""The fast executor on graphs small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine import maxplus
from moesim.errors import BadInput
from moesim.graph.task import Stream, Task, TaskGraph


def task(name, duration_s, after=(), *, stream=Stream.COMPUTE, groups=None, operation=None):
    return Task(
        name,
        operation or name,
        stream,
        np.asarray(duration_s, dtype=np.float64),
        tuple(after),
        None if groups is None else np.asarray(groups, dtype=np.int64),
    )


def test_streams_run_in_order_and_overlap_with_each_other():
    graph = TaskGraph(
        1,
        1,
        (
            task("a", [[2.0]]),
            task("send", [[5.0]], (0,), stream=Stream.COMMUNICATION),
            task("b", [[1.0]]),
            task("c", [[1.0]], (1,)),
        ),
    )
    times = maxplus.run(graph, timeline=True)
    assert times.start_s is not None and times.end_s is not None
    assert times.start_s[:, 0, 0].tolist() == [0.0, 2.0, 2.0, 7.0]
    assert times.end_s[:, 0, 0].tolist() == [2.0, 7.0, 3.0, 8.0]
    assert times.step_s.tolist() == [8.0]
    assert times.compute_busy_s.tolist() == [[4.0]]
    assert times.exposed_communication_s().tolist() == [[4.0]]
    assert times.wait_s.tolist() == [[0.0]]


def test_a_collective_starts_when_the_last_of_its_group_is_ready():
    graph = TaskGraph(
        2,
        4,
        (
            task("work", [[1.0, 2.0, 3.0, 4.0], [4.0, 1.0, 1.0, 1.0]]),
            task("pairs", [[1.0]], (0,), stream=Stream.COMMUNICATION, groups=[7, 3, 3, 7]),
            task("all", [[1.0, 1.0, 1.0, 2.0]], (1,), stream=Stream.COMMUNICATION, groups=[5, 5, 5, 5]),
        ),
    )
    times = maxplus.run(graph)
    assert times.rank_end_s.tolist() == [[6.0, 6.0, 6.0, 7.0], [6.0, 6.0, 6.0, 7.0]]
    assert times.wait_s.tolist() == [[3.0 + 0.0, 1.0 + 1.0, 0.0 + 1.0, 0.0], [0.0, 3.0, 3.0, 3.0]]
    assert times.step_s.tolist() == [7.0, 7.0]


def test_an_operation_adds_up_over_its_tasks():
    graph = TaskGraph(1, 2, (task("a", [[1.0, 2.0]], operation="gemm"), task("b", [[3.0]], operation="gemm")))
    assert maxplus.run(graph).busy_s["gemm"].tolist() == [[4.0, 5.0]]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 1), (2, 1), (1, 3), (2, 3)])
def test_any_shape_that_broadcasts_is_read(shape):
    duration = np.arange(1.0, 1.0 + np.prod(shape)).reshape(shape)
    times = maxplus.run(TaskGraph(2, 3, (task("a", duration), task("b", np.broadcast_to(duration, (2, 3)), (0,)))))
    np.testing.assert_array_equal(times.rank_end_s, 2 * np.broadcast_to(duration, (2, 3)))


def test_blocks_of_steps_do_not_show(monkeypatch):
    rng = np.random.default_rng(0)
    graph = TaskGraph(7, 3, tuple(task(str(i), rng.random((7, 3)), groups=[0, 0, 1]) for i in range(5)))
    whole = maxplus.run(graph)
    monkeypatch.setattr(maxplus, "BLOCK_DURATIONS", 30)
    np.testing.assert_array_equal(maxplus.run(graph).rank_end_s, whole.rank_end_s)


@pytest.mark.parametrize("graph", [TaskGraph(3, 2, ()), TaskGraph(0, 2, (task("a", [[1.0]]),))])
def test_an_empty_graph_takes_no_time(graph):
    times = maxplus.run(graph)
    assert times.step_s.tolist() == [0.0] * graph.steps
    assert times.rank_end_s.shape == (graph.steps, graph.ranks)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_a_duration_that_is_no_time_is_named(wrong):
    with pytest.raises(BadInput, match="task second has a duration of"):
        maxplus.run(TaskGraph(1, 2, (task("first", [[1.0, 1.0]]), task("second", [[1.0, wrong]]))))


def test_a_duration_that_does_not_broadcast_is_named():
    with pytest.raises(BadInput, match=r"task a has durations of shape \(1, 3\)"):
        maxplus.run(TaskGraph(1, 2, (task("a", [[1.0, 1.0, 1.0]]),)))
