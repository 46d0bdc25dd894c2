"""The careful executor where tasks share links, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.engine import des
from moesim.errors import BadInput
from moesim.graph.task import Link, Stream, Task, TaskGraph

ALL = [0, 0]


def task(name, duration_s, stream, links, after=(), groups=None):
    return Task(
        name,
        name,
        stream,
        np.asarray(duration_s, dtype=np.float64),
        tuple(after),
        None if groups is None else np.asarray(groups, dtype=np.int64),
        links,
    )


def ends(graph):
    found = des.run(graph, timeline=True)
    assert found.end_s is not None
    return found.end_s[:, 0], found


def test_two_full_users_of_a_link_take_turns_evenly():
    full = ((Link.NIC, 1.0),)
    graph = TaskGraph(1, 1, (task("long", 3.0, Stream.COMMUNICATION, full), task("short", 1.0, Stream.COPY, full)))
    end_s, times = ends(graph)
    # Half speed until the short one is over at 2; the long one has 2 of its 3 seconds left then.
    np.testing.assert_allclose(end_s[:, 0], [4.0, 2.0], rtol=1e-12)
    np.testing.assert_allclose(times.busy_s["long"], [[4.0]], rtol=1e-12)
    np.testing.assert_allclose(des.run(graph, sharing=False).step_s, [3.0], rtol=1e-12)


def test_a_light_user_is_not_slowed_and_the_heavy_one_gets_the_rest():
    graph = TaskGraph(
        1,
        1,
        (
            task("heavy", 8.0, Stream.COMMUNICATION, ((Link.NIC, 1.0),)),
            task("light", 5.0, Stream.COPY, ((Link.NIC, 0.2),)),
        ),
    )
    # 0.8 of its speed for 5 s, then 4 s alone.
    np.testing.assert_allclose(ends(graph)[0][:, 0], [9.0, 5.0], rtol=1e-12)


def test_different_links_or_ranks_do_not_share():
    graph = TaskGraph(
        1,
        2,
        (
            task("nic", [[2.0, 0.0]], Stream.COMMUNICATION, ((Link.NIC, 1.0),)),
            task("nvlink", [[2.0, 0.0]], Stream.COPY, ((Link.NVLINK, 1.0),)),
            task("nic of the other", [[0.0, 2.0]], Stream.COMPUTE, ((Link.NIC, 1.0),)),
        ),
    )
    np.testing.assert_allclose(ends(graph)[1].step_s, [2.0], rtol=1e-12)


def test_a_collective_is_slowed_on_all_ranks_by_a_user_of_one():
    graph = TaskGraph(
        1,
        2,
        (
            task("all", 2.0, Stream.COMMUNICATION, ((Link.NIC, 1.0),), groups=ALL),
            task("copy", [[1.0, 0.0]], Stream.COPY, ((Link.NIC, 1.0),)),
        ),
    )
    end_s, times = ends(graph)
    np.testing.assert_allclose(end_s, [[3.0, 3.0], [2.0, 0.0]], rtol=1e-12)
    np.testing.assert_allclose(times.busy_s["all"], [[3.0, 3.0]], rtol=1e-12)


def test_a_rank_whose_part_of_a_collective_is_over_leaves_its_links():
    graph = TaskGraph(
        1,
        2,
        (
            task("all", [[1.0, 4.0]], Stream.COMMUNICATION, ((Link.NIC, 1.0),), groups=ALL),
            task("copy", [[2.0, 0.0]], Stream.COPY, ((Link.NIC, 1.0),)),
        ),
    )
    # To 2 s both at half speed; then rank 0's part is over: the copy has 1 s left alone, the collective 3 s.
    np.testing.assert_allclose(ends(graph)[0], [[2.0, 5.0], [3.0, 0.0]], rtol=1e-12)


def test_a_three_way_crossing_of_two_links():
    graph = TaskGraph(
        1,
        1,
        (
            task("both", 3.0, Stream.COMPUTE, ((Link.NIC, 1.0), (Link.PCIE, 1.0))),
            task("nic", 3.0, Stream.COMMUNICATION, ((Link.NIC, 1.0),)),
            task("pcie", 1.0, Stream.COPY, ((Link.PCIE, 0.5),)),
        ),
    )
    # Halves of both links; pcie asks for no more than its half. Nobody speeds up before nic and both end at 6.
    np.testing.assert_allclose(ends(graph)[0][:, 0], [6.0, 6.0, 1.0], rtol=1e-12)


def test_a_later_start_slows_what_runs():
    graph = TaskGraph(
        1,
        1,
        (
            task("work", 1.0, Stream.COMPUTE, ()),
            task("send", 2.0, Stream.COMMUNICATION, ((Link.NIC, 1.0),)),
            task("copy", 2.0, Stream.COPY, ((Link.NIC, 1.0),), after=(0,)),
        ),
    )
    # send: 1 s alone, 1 s left at half speed to 3; copy: 1 s of 2 done by 3, then alone to 4.
    np.testing.assert_allclose(ends(graph)[0][:, 0], [1.0, 3.0, 4.0], rtol=1e-12)


def test_bad_input_is_named():
    graph = TaskGraph(2, 1, (task("a", 1.0, Stream.COMPUTE, ()),))
    with pytest.raises(BadInput, match="step 2 of a graph of 2 steps"):
        des.run(graph, step=2)
    with pytest.raises(BadInput, match=r"uses 1\.5 of NIC"):
        des.run(TaskGraph(1, 1, (task("a", 1.0, Stream.COMPUTE, ((Link.NIC, 1.5),)),)))
    with pytest.raises(BadInput, match="negative or not finite"):
        des.run(TaskGraph(1, 1, (task("a", np.nan, Stream.COMPUTE, ()),)))
    with pytest.raises(BadInput, match="broadcasts to"):
        des.run(TaskGraph(1, 2, (task("a", [[1.0, 1.0, 1.0]], Stream.COMPUTE, ()),)))


def test_an_empty_graph_takes_no_time():
    assert des.run(TaskGraph(2, 3, ())).step_s.tolist() == [0.0, 0.0]
