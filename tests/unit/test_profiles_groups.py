"""Groups of ranks: inside hosts, along rails, neighbours; and what `nodes` says of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import BadInput
from profiles.groups import DEFAULT, PRETEND, partitions, pretended_hosts

TWO_NODES = (0, 0, 0, 0, 1, 1, 1, 1)


def test_two_nodes_have_groups_within_and_across() -> None:
    every, inside, rail, pairs = partitions(TWO_NODES, (*DEFAULT, "2"))
    assert every.groups == ((0, 1, 2, 3, 4, 5, 6, 7),) and every.nodes == 2
    assert inside.groups == ((0, 1, 2, 3), (4, 5, 6, 7)) and inside.nodes == 1
    assert rail.groups == ((0, 4), (1, 5), (2, 6), (3, 7)) and rail.nodes == 2
    assert pairs.groups == ((0, 1), (2, 3), (4, 5), (6, 7)) and pairs.nodes == 1
    assert rail.group_of(6) == (2, 6)


def test_ranks_of_a_host_need_not_be_neighbours() -> None:
    _, inside, rail = partitions((0, 1, 0, 1), DEFAULT)
    assert inside.groups == ((0, 2), (1, 3)) and inside.nodes == 1
    assert rail.groups == ((0, 1), (2, 3)) and rail.nodes == 2


def test_one_host_has_one_group_and_one_rank_is_a_group() -> None:
    assert [one.name for one in partitions((0, 0), DEFAULT)] == ["all"]
    assert [one.name for one in partitions((0,), DEFAULT)] == ["all"]
    # One rank a host: inside has nobody to talk to, and the rail is everybody.
    assert [(one.name, one.nodes) for one in partitions((0, 1, 2), DEFAULT)] == [("all", 3)]


@given(st.integers(1, 4), st.sampled_from((1, 2, 4, 8)), st.randoms(use_true_random=False))
def test_every_rank_is_in_one_group_and_nodes_are_true(nodes: int, each: int, random: object) -> None:
    hosts = [host for host in range(nodes) for _ in range(each)]
    random.shuffle(hosts)  # type: ignore[attr-defined]
    for partition in partitions(hosts, (*DEFAULT, "1", str(each))):
        assert sorted(rank for group in partition.groups for rank in group) == list(range(nodes * each))
        assert {len(group) for group in partition.groups} == {partition.ranks}
        assert {len({hosts[rank] for rank in group}) for group in partition.groups} == {partition.nodes}


@pytest.mark.parametrize(
    ("hosts", "wanted", "words"),
    [
        (TWO_NODES, ("ring",), "unknown group 'ring'"),
        (TWO_NODES, ("0",), "unknown group '0'"),
        (TWO_NODES, ("3",), "4 ranks of a host do not divide by 3"),
        ((0, 0, 1), ("rail",), "different numbers of ranks"),
        ((0, 0), ("rail",), "no group has two ranks"),
    ],
)
def test_wrong_groups_are_refused(hosts: tuple[int, ...], wanted: tuple[str, ...], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        partitions(hosts, wanted)


def test_a_wrong_number_of_pretended_hosts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PRETEND, "two")
    with pytest.raises(BadInput, match="no number of hosts"):
        pretended_hosts()
    monkeypatch.setenv(PRETEND, "2")
    assert pretended_hosts() == 2
