"""Uneven exchanges: bytes that add up, what keys them, and their price against a machine whose physics is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.cost.estimate import Tag
from moesim.errors import BadInput, OutsideProfile
from profiles.record import FAMILIES
from profiles.shares import KEPT, KEPT_BY_ONE, ONE_WAY, elements, pattern
from profiles.store import empty, polars_schema
from profiles.traffic import endpoint, shared_with, traffic
from profiles.uneven import uneven_cost

LATENCY_S, WIRE_S, COPY_S = 1e-4, 1e-9, 2e-10  # of a byte each
MIB = 2**20


def truth(counts: Any, both_ways: float, together: float) -> float:
    """Seconds on the machine: the busiest rank's wire, then the copies; all linear."""
    flows = traffic(np.asarray(counts))
    moved, kept = flows.busiest(both_ways), float(flows.copies(together).max())
    return float(LATENCY_S + WIRE_S * moved + COPY_S * kept)


def rows(family: str, found: list[dict[str, Any]]) -> Any:
    import polars as pl

    filled = {"system": "s", "engine": "moesim", "version": "1", "kernel": "gloo", "device": "d", "package": "p"}
    found = [{**filled, "package_version": "1", "tag": "measured", **one} for one in found]
    return pl.DataFrame(found, schema=polars_schema(FAMILIES[family])) if found else empty(FAMILIES[family])


def measured(
    ranks: int, both_ways: float, together: float, patterns: tuple[str, ...] = (KEPT, KEPT_BY_ONE, ONE_WAY)
) -> dict[str, Any]:
    """The tables that a sweep of that machine would give."""
    key = {"path": "gloo", "gpus": ranks, "nodes": 1}
    even, uneven = [], []
    for size in (2**power for power in range(12, 27)):
        counts = np.full((ranks, ranks), size // ranks)
        seconds = truth(counts, both_ways, together)
        even.append({**key, "kind": "all_to_all", "bytes": float(size), "latency_s": seconds})
        for name in patterns:
            counts = elements(pattern(name, ranks), size)
            seconds = truth(counts, both_ways, together)
            uneven.append({**key, **endpoint(counts, [0] * ranks), "bytes": float(size), "latency_s": seconds})
    return {"collective": rows("collective", even), "uneven_all_to_all": rows("uneven_all_to_all", uneven)}


@given(st.integers(1, 6), st.sampled_from((KEPT, KEPT_BY_ONE, ONE_WAY, "zipf_0", "zipf_1.2")), st.integers(0, 5000))
def test_no_byte_is_lost_and_the_size_is_the_mean(ranks: int, name: str, each: int) -> None:
    counts = elements(pattern(name, ranks), each)
    assert counts.sum() == ranks * each and (counts >= 0).all()
    found = endpoint(counts, range(ranks))
    assert found["other_way_bytes"] <= found["busiest_bytes"] == traffic(counts).busiest(0.0)
    assert found["off_node_bytes"] == found["busiest_bytes"]  # every rank on a host of its own
    assert endpoint(counts, [0] * ranks)["off_node_bytes"] == 0


def test_the_key_tells_directions_and_hosts_apart() -> None:
    counts = np.array([[5, 7, 11], [1, 3, 2], [4, 6, 8]])
    # Rank 0 sends 18 and receives 5; ranks 0 and 1 share a host.
    assert endpoint(counts, (0, 0, 1)) == {
        "busiest_bytes": 18, "other_way_bytes": 5, "off_node_bytes": 13, "kept_bytes": 8,
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("both_ways", "together"), [(0.0, 0.0), (1.0, 0.3), (0.4, 1.0)])
def test_skews_are_priced_on_a_machine_of_known_physics(ranks: int, both_ways: float, together: float) -> None:
    cost = uneven_cost(measured(ranks, both_ways, together), path="gloo", ranks=ranks)
    assert cost.both_ways == pytest.approx(both_ways, abs=0.01)
    assert cost.together == pytest.approx(together, abs=0.01)
    assert cost.tag == Tag.FORMULA
    rng = np.random.default_rng(ranks)
    for _ in range(20):
        counts = rng.integers(0, 4 * MIB, size=(ranks, ranks))
        priced = cost.seconds(counts, [0] * ranks)
        assert priced == pytest.approx(truth(counts, both_ways, together), rel=0.01)


def test_an_even_exchange_is_priced_as_measured() -> None:
    cost = uneven_cost(measured(2, 1.0, 0.5), path="gloo", ranks=2)
    assert cost.seconds(np.full((2, 2), MIB), (0, 0)) == pytest.approx(truth(np.full((2, 2), MIB), 1.0, 0.5), rel=1e-6)
    assert cost.seconds(np.diag([MIB, MIB]), (0, 0)) == pytest.approx(truth(np.diag([MIB, MIB]), 1.0, 0.5), rel=1e-6)


def test_even_rows_alone_give_an_assumed_price() -> None:
    cost = uneven_cost(measured(2, 0.0, 0.0, patterns=()), path="gloo", ranks=2)
    assert cost.tag == Tag.ASSUMED
    counts = np.array([[0, 3 * MIB], [MIB, 0]])
    assert cost.seconds(counts, (0, 0)) == pytest.approx(LATENCY_S + (WIRE_S + COPY_S) * 3 * MIB, rel=1e-3)


def test_between_hosts_the_card_that_sends_most_counts() -> None:
    tables = {name: table.with_columns(nodes=2) for name, table in measured(4, 0.0, 0.0, patterns=()).items()}
    cost = uneven_cost(tables, path="gloo", ranks=4, nodes=2)
    near, far = np.zeros((4, 4), dtype=np.int64), np.zeros((4, 4), dtype=np.int64)
    near[0, 1] = far[0, 2] = MIB
    hosts = (0, 0, 1, 1)
    assert cost.equal_bytes(near, hosts) == pytest.approx(4 / 3 * MIB)
    assert cost.equal_bytes(far, hosts) == pytest.approx(2 * MIB)  # half of an even exchange leaves the host


def test_what_was_not_measured_is_refused_with_the_command() -> None:
    tables = measured(2, 1.0, 0.0)
    with pytest.raises(BadInput, match="no even all_to_all over nccl"):
        uneven_cost(tables, path="nccl", ranks=2)
    cost = uneven_cost(tables, path="gloo", ranks=2)
    with pytest.raises(OutsideProfile, match=r"--kinds all_to_all --to \d+B .*--pattern kept"):
        cost.seconds(np.full((2, 2), 2**30), (0, 0))


def test_the_share_of_another_user_is_read_backwards_from_both() -> None:
    sizes, seconds = np.array([0.0, 100.0, 200.0]), np.array([0.0, 1.0, 2.0])
    assert shared_with(sizes, seconds, [150.0], [1.0]) == pytest.approx(0.5)


def test_an_unknown_pattern_is_refused() -> None:
    for name in ("gossip", "zipf_", "zipf_nan", "zipf_-1"):
        with pytest.raises(BadInput, match="unknown pattern"):
            pattern(name, 2)
