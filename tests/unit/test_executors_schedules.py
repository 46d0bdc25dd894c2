"""Schedules: the order that they give, and that two micro-batches hide each other's communication."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine import des, maxplus
from moesim.errors import BadInput
from moesim.graph.schedules import sequential, stages, two_batch
from moesim.graph.task import Stream, Task


def layers(count, *, compute_s=1.0, communicate_s=1.0):
    """attention, dispatch, experts, combine in each layer; each after the one before it."""
    tasks = []
    for layer in range(count):
        for name in ("attention", "dispatch", "experts", "combine"):
            communication = name in ("dispatch", "combine")
            tasks.append(
                Task(
                    name,
                    name,
                    Stream.COMMUNICATION if communication else Stream.COMPUTE,
                    np.array([[communicate_s if communication else compute_s]]),
                    (len(tasks) - 1,) if tasks else (),
                    np.zeros(2, dtype=np.int64) if communication else None,
                    layer=layer,
                )
            )
    return tasks


def names(graph):
    return [task.name for task in graph.tasks]


def test_stages_end_with_their_communication():
    tasks = layers(2)
    assert stages(tasks) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert stages(tasks[:3]) == [range(0, 2), range(2, 3)]
    assert stages([tasks[0], tasks[1], tasks[1], tasks[0]]) == [range(0, 3), range(3, 4)]
    assert stages([]) == []


def test_stages_of_the_two_alternate():
    graph = two_batch(layers(1), layers(1), 1, 2)
    assert names(graph) == [
        "a:attention", "a:dispatch", "b:attention", "b:dispatch", "a:experts", "a:combine", "b:experts", "b:combine",
    ]  # fmt: skip
    assert [task.depends_on for task in graph.tasks] == [(), (0,), (), (2,), (1,), (4,), (3,), (6,)]


def test_a_delay_lets_the_first_go_ahead():
    graph = two_batch(layers(2), layers(2), 1, 2, delay=2)
    assert [name.partition(":")[0] for name in names(graph)[::2]] == ["a", "a", "a", "b", "a", "b", "b", "b"]


def test_lists_of_different_length_are_both_kept():
    graph = two_batch(layers(3), layers(1), 1, 2)
    assert sorted(names(graph)).count("a:attention") == 3
    assert len(graph.tasks) == 16
    assert len(two_batch(layers(1), [], 1, 2).tasks) == 4


def test_overlap_hides_the_communication_of_equal_halves():
    count = 10
    one = maxplus.run(sequential(layers(count), 1, 2))
    assert one.step_s[0] == 4.0 * count
    both = maxplus.run(two_batch(layers(count), layers(count), 1, 2))
    # The compute stream never idles but while the last combine of b runs.
    assert both.step_s[0] == 4.0 * count + 1.0
    np.testing.assert_allclose(des.run(two_batch(layers(count), layers(count), 1, 2)).step_s, both.step_s, rtol=1e-9)


def test_overlap_cannot_hide_more_than_there_is_to_compute():
    both = maxplus.run(two_batch(layers(5, communicate_s=3.0), layers(5, communicate_s=3.0), 1, 2))
    assert both.step_s[0] >= 2 * 5 * 2 * 3.0


def test_bad_input_is_named():
    with pytest.raises(BadInput, match="delay of -1"):
        two_batch(layers(1), layers(1), 1, 2, delay=-1)
    with pytest.raises(BadInput, match="does not come before it"):
        two_batch(layers(1)[::-1], layers(1), 1, 2)
