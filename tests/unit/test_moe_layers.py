"""What each schedule and each storage makes of one layer, worked out by hand, and what all of them must keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.engine import des, maxplus
from moesim.errors import BadInput
from moesim.graph.layer import build_step
from moesim.graph.moe_layer import LAYERS
from moesim.graph.schedules import forward_backward
from moesim.graph.storage import PCIE_FRACTION, ExpertStorage
from moesim.graph.task import Link, Stream, Task, TaskGraph
from tests.priced_steps import by_hand, part, setup


def graph_of(layers: int, schedule: str, *, storage: str = "", nodes: int = 1, **changes: Any) -> TaskGraph:
    stored = ExpertStorage(storage, 1.0, 1.0 / PCIE_FRACTION, 0.75) if storage else None
    one = setup(layers, {"schedule": schedule}, nodes=nodes, storage=stored)
    priced = by_hand(**changes)
    return build_step(one, [priced, priced] if schedule == "two_batch" else [priced])


def seconds(graph: TaskGraph) -> float:
    found = maxplus.run(graph).step_s[0]
    np.testing.assert_allclose(des.run(graph, sharing=False).step_s[0], found, rtol=1e-9)
    return float(found)


@pytest.mark.parametrize("schedule", ["sequential", "whole_graph"])
def test_sequential_adds_up(schedule: str) -> None:
    assert seconds(graph_of(1, schedule)) == 2 + 1 + 3 + 4 + 6 + 4


def test_a_shared_expert_hides_beside_dispatch_and_combine() -> None:
    # gate ends at 3; dispatch to 7, up 3 to 5; experts to 13; combine to 17, down 13 to 14.
    assert seconds(graph_of(1, "shared_overlap")) == 17
    # Longer than the dispatch, the shared expert delays the experts: up 3 to 5 -> dispatch of 1 ends at 4, experts 5.
    assert seconds(graph_of(1, "shared_overlap", dispatch=part(1.0))) == 5 + 6 + 4


def test_a_shortcut_dispatches_before_attention() -> None:
    # gate 0 to 1, dispatch 1 to 5 beside attention 1 to 3; experts 5 to 11; combine to 15, shared expert 11 to 14.
    assert seconds(graph_of(1, "shortcut")) == 15


def test_a_pipeline_overlaps_its_chunks() -> None:
    half = {"dispatch": part(2.0), "experts": part(3.0), "combine": part(2.0), "chunks": 2}
    # dispatches 6 to 8 and 8 to 10; experts 8 to 11 and 11 to 14; combines 11 to 13 and 14 to 16.
    graph = graph_of(1, "pipeline", **half)
    assert seconds(graph) == 16
    on_the_wire = [task.name for task in graph.tasks if task.stream == Stream.COMMUNICATION]
    assert on_the_wire == ["dispatch", "dispatch", "combine", "combine"]


def test_a_pipeline_of_one_chunk_is_sequential() -> None:
    assert seconds(graph_of(3, "pipeline")) == seconds(graph_of(3, "sequential"))


def test_offload_fetches_two_layers_ahead_and_no_further() -> None:
    assert seconds(graph_of(3, "sequential", storage="offload", fetch=part(10.0))) == 60  # all hidden
    # 30 each: fetches end at 30, 60 and (after the second; experts 0 freed at 36) 90; experts 30, 60, 90; combine 100.
    slow = graph_of(3, "sequential", storage="offload", fetch=part(30.0))
    assert seconds(slow) == 100
    fetches = [task for task in slow.tasks if task.stream == Stream.COPY]
    assert [task.layer for task in fetches] == [0, 1, 2]
    assert fetches[0].depends_on == fetches[1].depends_on == ()
    (freed,) = fetches[2].depends_on
    assert (slow.tasks[freed].name, slow.tasks[freed].layer) == ("experts", 0)


def test_a_pre_gate_fetches_for_the_next_layer() -> None:
    assert seconds(graph_of(3, "sequential", storage="pregated", fetch=part(5.0))) == 60  # all hidden
    # 30 each: gate 0 at 3, fetches to 33 and 63; experts 0 33 to 39; layer 1 gates at 46, the third fetch ends at 93.
    assert seconds(graph_of(3, "sequential", storage="pregated", fetch=part(30.0))) == 93 + 6 + 4


def test_a_cache_fetches_what_it_lacks_after_the_gate() -> None:
    assert seconds(graph_of(3, "sequential", storage="cached", fetch=part(9.0))) == 3 * (3 + 9 + 6 + 4)
    assert seconds(graph_of(3, "sequential", storage="cached", fetch=part(0.0))) == 60
    # A shortcut gates before attention, so that the fetch has attention to hide behind.
    assert seconds(graph_of(1, "shortcut", storage="cached", fetch=part(9.0))) == 1 + 9 + 6 + 4


def test_the_last_chunk_frees_the_weights() -> None:
    graph = graph_of(3, "pipeline", storage="offload", fetch=part(1.0), chunks=2)
    last = next(task for task in graph.tasks if task.stream == Stream.COPY and task.layer == 2)
    experts = [index for index, task in enumerate(graph.tasks) if task.name == "experts" and task.layer == 0]
    assert last.depends_on == (experts[-1],)


def test_a_fetch_and_an_exchange_share_the_link_that_gpu_and_nic_hang_on() -> None:
    graph = graph_of(3, "sequential", storage="offload", fetch=part(10.0), nodes=2)
    exchange = next(task for task in graph.tasks if task.name == "dispatch")
    assert exchange.links == ((Link.NIC, 1.0), (Link.PCIE, 0.75))
    assert des.run(graph).step_s[0] > maxplus.run(graph).step_s[0]


TOGETHER = [
    (schedule, storage)
    for schedule in sorted(LAYERS)
    for storage in ("", "offload", "pregated", "cached")
    if schedule != "two_batch" or not storage  # refused by name, see test_combinations
]


@pytest.mark.parametrize(("schedule", "storage"), TOGETHER)
def test_every_schedule_conforms(schedule: str, storage: str) -> None:
    """The same work as in sequence, never longer where all is resident, never shorter than a stream's work."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        parts = {name: part(rng.exponential(1.0)) for name in ("attention", "gate", "dispatch", "experts", "combine")}
        parts["fetch"] = part(rng.exponential(1.0))
        graph = graph_of(4, schedule, storage=storage, **parts)
        copies = 2 if schedule == "two_batch" else 1
        plain, found = maxplus.run(graph_of(4, "sequential", storage=storage, **parts)), maxplus.run(graph)
        for operation, busy in plain.busy_s.items():
            np.testing.assert_allclose(found.busy_s[operation], busy * copies)
        if not storage:  # work that a fetch would have hidden may stick out where it was moved to
            assert found.step_s[0] <= plain.step_s[0] * copies * (1 + 1e-12)
        for stream in Stream:
            work = sum(float(task.duration_s[0, 0]) for task in graph.tasks if task.stream == stream)
            assert found.step_s[0] >= work * (1 - 1e-12)
        np.testing.assert_allclose(des.run(graph, sharing=False).step_s, found.step_s, rtol=1e-9)
        for index, task in enumerate(graph.tasks):  # tokens arrive before they are computed, and leave after
            if task.name.endswith("experts"):
                assert any(graph.tasks[other].name.endswith("dispatch") for other in task.depends_on), index
            if task.name.endswith("combine"):
                assert any(graph.tasks[other].name.endswith("experts") for other in task.depends_on), index


def chain(*work: tuple[str, Stream, float]) -> list[Task]:
    meets = np.zeros(2, dtype=np.int64)
    return [
        Task(
            name, name, stream, np.array([[duration_s]]), (index - 1,) if index else (),
            meets if stream == Stream.COMMUNICATION else None,
        )
        for index, (name, stream, duration_s) in enumerate(work)
    ]  # fmt: skip


def test_forward_and_backward_hide_each_others_exchanges() -> None:
    compute, exchange = Stream.COMPUTE, Stream.COMMUNICATION
    forward = chain(
        ("attention", compute, 2), ("dispatch", exchange, 1), ("experts", compute, 2), ("combine", exchange, 1)
    )
    backward = chain(
        ("combine'", exchange, 1), ("experts'", compute, 4), ("dispatch'", exchange, 1), ("attention'", compute, 4)
    )
    graph = forward_backward(forward, backward, 1, 2)
    assert [task.name for task in graph.tasks] == [
        "b:combine'", "f:attention", "f:dispatch", "b:experts'", "b:dispatch'", "f:experts", "f:combine",
        "b:attention'",
    ]  # fmt: skip
    # attention to 2, experts' to 6, experts to 8, attention' to 12: the compute stream never waits.
    assert seconds(graph) == 12
    alone = [seconds(TaskGraph(1, 2, tuple(tasks))) for tasks in (forward, backward)]
    assert alone == [6, 10]


def test_forward_backward_keeps_both_lists_and_refuses_a_wrong_one() -> None:
    tasks = chain(("attention", Stream.COMPUTE, 2), ("dispatch", Stream.COMMUNICATION, 1))
    assert len(forward_backward(tasks, [], 1, 2).tasks) == len(forward_backward([], tasks, 1, 2).tasks) == 2
    with pytest.raises(BadInput, match="does not come before it"):
        forward_backward([replace(tasks[0], depends_on=(1,)), tasks[1]], tasks, 1, 2)
