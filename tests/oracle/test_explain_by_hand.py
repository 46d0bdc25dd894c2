"""Explaining three small steps whose answers are worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine import des, maxplus, whatif
from moesim.engine.critical import critical_path, waits
from moesim.errors import BadInput
from moesim.graph.task import Stream, Task, TaskGraph

TOGETHER = np.zeros(2, dtype=np.int64)


def task(name, stream, seconds, depends_on=(), groups=None):
    return Task(name, name, stream, np.asarray([seconds], dtype=np.float64), depends_on, groups)


# Rank 0: attention 1, dispatch 2 (starts at 3), experts 5, combine 1 (starts at 10), overhead 1: ends at 12.
# Rank 1: attention 3, dispatch 2 (starts at 3), experts 4, combine 1 (starts at 10), overhead 1: ends at 12.
LAYER = TaskGraph(
    1,
    2,
    (
        task("attention", Stream.COMPUTE, (1.0, 3.0)),
        task("dispatch", Stream.COMMUNICATION, (2.0,), (0,), TOGETHER),
        task("experts", Stream.COMPUTE, (5.0, 4.0), (1,)),
        task("combine", Stream.COMMUNICATION, (1.0,), (2,), TOGETHER),
        task("engine_overhead", Stream.COMPUTE, (1.0,), (3,)),
    ),
)


@pytest.mark.parametrize("run", [maxplus.run, des.run])
def test_one_layer_goes_by_the_slow_attention_and_the_hot_experts(run):
    times = run(LAYER, timeline=True)
    path = critical_path(LAYER, times)
    assert [LAYER.tasks[index].name for index in path.task] == [
        "attention", "dispatch", "experts", "combine", "engine_overhead",
    ]  # fmt: skip
    assert path.rank.tolist()[:3] == [1, 0, 0]  # attention of rank 1, then rank 0 whose experts are the longer
    assert path.by_operation_s(LAYER) == {
        "attention": 3.0, "dispatch": 2.0, "experts": 5.0, "combine": 1.0, "engine_overhead": 1.0,
    }  # fmt: skip
    assert path.bound == ("start", "dependency", "dependency", "dependency", "dependency")


def test_the_waits_of_that_layer():
    found = waits(LAYER, maxplus.run(LAYER, timeline=True))
    assert found.for_operation_s["attention"].tolist() == [[2.0, 0.0]]  # rank 0 before the dispatch
    assert found.for_operation_s["experts"].tolist() == [[0.0, 1.0]]  # rank 1 before the combine
    assert found.for_rank_s.tolist() == [[1.0, 2.0]]


def test_a_wait_is_told_by_all_that_the_late_rank_did_meanwhile():
    # Rank 0 is ready at 2; rank 1 does the rest of its attention until 3, its gate until 7.
    graph = TaskGraph(
        1,
        2,
        (
            task("attention", Stream.COMPUTE, (1.0, 3.0)),
            task("gate", Stream.COMPUTE, (1.0, 4.0)),
            task("dispatch", Stream.COMMUNICATION, (1.0,), (1,), TOGETHER),
        ),
    )
    found = waits(graph, maxplus.run(graph, timeline=True))
    assert found.for_operation_s["attention"].tolist() == [[1.0, 0.0]]
    assert found.for_operation_s["gate"].tolist() == [[4.0, 0.0]]
    assert found.for_rank_s.tolist() == [[0.0, 5.0]]


@pytest.mark.parametrize(
    ("change", "seconds"),
    [
        (whatif.balanced, 2.0 + 2.0 + 4.5 + 1.0 + 1.0),
        (whatif.infinite_network, 3.0 + 5.0 + 1.0),
        (whatif.overlapped, 3.0 + 4.0 + 1.0),  # rank 1's computing; its communication takes 3
        (whatif.no_host_overhead, 11.0),
        (lambda graph: whatif.without_operation(graph, "experts"), 3.0 + 2.0 + 1.0 + 1.0),
    ],
)
@pytest.mark.parametrize("run", [maxplus.run, des.run])
def test_the_what_ifs_of_that_layer(change, seconds, run):
    assert run(change(LAYER)).step_s.tolist() == pytest.approx([seconds])


def test_a_stream_can_bind_instead_of_a_dependency():
    # Two copies queue on one stream (3 each); what needs the second starts at 6, though its own dependency ended at 1.
    graph = TaskGraph(
        1,
        1,
        (
            task("compute", Stream.COMPUTE, (1.0,)),
            task("copy", Stream.COPY, (3.0,)),
            task("copy", Stream.COPY, (3.0,), (0,)),
            task("last", Stream.COMPUTE, (1.0,), (0, 2)),
        ),
    )
    path = critical_path(graph, maxplus.run(graph, timeline=True))
    assert path.task.tolist() == [1, 2, 3]
    assert path.bound == ("start", "stream", "dependency")
    assert path.by_operation_s(graph) == {"copy": 6.0, "last": 1.0}


def test_making_something_free_saves_less_than_its_share_where_something_else_takes_over():
    # compute 5 beside communication 4, both before the last task: free compute saves 1, not its 5 on the path.
    graph = TaskGraph(
        1,
        1,
        (
            task("compute", Stream.COMPUTE, (5.0,)),
            task("send", Stream.COMMUNICATION, (4.0,)),
            task("last", Stream.COMPUTE, (1.0,), (0, 1)),
        ),
    )
    times = maxplus.run(graph, timeline=True)
    assert critical_path(graph, times).by_operation_s(graph) == {"compute": 5.0, "last": 1.0}
    assert maxplus.run(whatif.without_operation(graph, "compute")).step_s.tolist() == [5.0]
    assert maxplus.run(whatif.without_operation(graph, "send")).step_s.tolist() == [6.0]


def test_times_of_another_graph_are_refused():
    times = maxplus.run(LAYER, timeline=True)
    slower = TaskGraph(1, 2, (*LAYER.tasks[:4], task("other", Stream.COMPUTE, (1.0,), (0,))))
    with pytest.raises(BadInput, match="nothing that it waits for"):
        critical_path(slower, times)
    with pytest.raises(BadInput, match="no timeline"):
        critical_path(LAYER, maxplus.run(LAYER))
    with pytest.raises(BadInput, match="for a graph of 1 tasks"):
        waits(TaskGraph(1, 2, LAYER.tasks[:1]), times)
