"""What moesim says of a lab, against sums by hand: the busiest NIC, a slow one, a spine, a delay, two at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.network.topology import build, with_slow_nics
from validate.fabric.calibrate import Figures
from validate.fabric.plan import tokens_of
from validate.fabric.predict import busiest_link, by_executor, cluster_of, payload, seconds_of
from validate.fabric.rank import Case
from validate.fabric.spec import LabSpec

FREE = Figures(message_s=0.0, copy_bytes_per_s=1e15, wire=1.0)
BYTES = 2048 * 800


def lab(**more: Any) -> LabSpec:
    given = {"name": "lab", "nodes": 2, "ranks_per_node": 2, "nic_bits_per_s": 2e8, "bytes_per_rank": BYTES}
    return LabSpec(**given | more)


def one(of: LabSpec, pattern: str = "even", scheme: str = "flat", figures: Figures = FREE) -> float:
    (found,) = seconds_of(of, Case((pattern,), scheme, of.bytes_per_rank), figures)  # type: ignore[arg-type]
    return found


def test_payload_of_ethernet() -> None:
    # 1500 bytes carry 1448 of data behind 52 of IP and TCP, in a frame of 1514.
    assert payload(8e8, 1500) == pytest.approx(1e8 * 1448 / 1514)


def test_even_on_a_shared_and_on_own_nics() -> None:
    # Each of a node's two ranks sends half of its buffer to the other node.
    rate = payload(2e8, 1500)
    assert one(lab()) == pytest.approx(2 * BYTES / 2 / rate)
    assert one(lab(nics_per_node=2)) == pytest.approx(BYTES / 2 / rate)
    for scheme in ("flat", "two_level"):
        assert one(lab(), scheme=scheme) == pytest.approx(2 * BYTES / 2 / rate, rel=1e-6)


def test_a_slow_nic_counts_for_what_crosses_it_alone() -> None:
    slow = lab(nics_per_node=2, slow_nics=[{"node": 1, "nic": 1, "bits_per_s": 5e7}])
    assert one(slow) == pytest.approx(BYTES / 2 / payload(5e7, 1500))
    # A NIC at half the rate that carries little changes nothing.
    skewed = tokens_of(lab(nics_per_node=2), "skewed").flat()
    far = skewed * (np.arange(4)[:, None] // 2 != np.arange(4)[None, :] // 2)
    load = np.maximum(far.sum(axis=1), far.sum(axis=0)) * 2048.0
    rates = np.asarray([payload(2e8, 1500)] * 4)
    calm = int(load.argmin())
    rates[calm] /= 2
    found = lab(nics_per_node=2, slow_nics=[{"node": calm // 2, "nic": calm % 2, "bits_per_s": 1e8}])
    assert one(found, "skewed") == pytest.approx((load / rates).max())


def test_slow_nics_of_a_topology() -> None:
    cluster = cluster_of(lab(nics_per_node=2), FREE)
    plain = build(cluster)
    slow = with_slow_nics(plain, {"nic3": 0.25})
    for edge in plain.graph.edges:
        share = 0.25 if "nic3" in edge and any(end.startswith("leaf") for end in edge) else 1.0
        assert slow.graph.edges[edge]["bytes_per_s"] == share * plain.graph.edges[edge]["bytes_per_s"]
    pair = np.zeros((4, 4))
    pair[0, 3] = 1e6
    assert slow.busiest_s(pair) == pytest.approx(4 * plain.busiest_s(pair))  # also where figures were kept before
    assert plain.busiest_s(pair) == pytest.approx(1e6 / cluster.nic_bytes_per_s)
    for shares in ({"nic9": 0.5}, {"gpu0": 0.5}, {"nic0": 0.0}, {"nic0": 1.5}):
        with pytest.raises(BadInput):
            with_slow_nics(plain, shares)


def test_an_oversubscribed_spine_bounds_what_crosses_it() -> None:
    wide = lab(nodes=4, nodes_per_leaf=2, bytes_per_rank=BYTES)
    narrow = wide.model_copy(update={"spine_bits_per_s": 1e8})
    # Two nodes of two ranks to a leaf; each rank sends half of its buffer to the other leaf.
    assert one(narrow) == pytest.approx(4 * BYTES / 2 / payload(1e8, 1500))
    assert one(wide) == pytest.approx(2 * BYTES * 6 / 8 / payload(2e8, 1500))
    assert "spine" in busiest_link(narrow, Case(("even",), "flat", BYTES), FREE)
    assert "nic" in busiest_link(wide, Case(("even",), "flat", BYTES), FREE)


def test_changing_rails_costs_the_spine_and_two_level_stays_on_them() -> None:
    rails = lab(nics_per_node=2, rails=True, spine_bits_per_s=1e8)
    # Of what a rank sends to the other node, half is for the rank on the other rail.
    assert one(rails) == pytest.approx(max(BYTES / 2 / payload(2e8, 1500), 2 * BYTES / 4 / payload(1e8, 1500)))
    assert one(rails, scheme="two_level") == pytest.approx(BYTES / 2 / payload(2e8, 1500), rel=1e-6)


def test_delay_counts_once_and_messages_each() -> None:
    assert one(lab(delay_s=0.005)) - one(lab()) == pytest.approx(0.005)
    costly = Figures(message_s=1e-4, copy_bytes_per_s=1e15, wire=1.0)
    assert one(lab(), figures=costly) - one(lab()) == pytest.approx(12e-4)  # 4 ranks, 3 messages each
    assert one(lab(), scheme="two_level", figures=costly) - one(lab(), scheme="two_level") == pytest.approx(8e-4)


def test_two_level_sends_a_token_once_to_a_node() -> None:
    tokens = tokens_of(lab(), "routed_contiguous")
    sent = tokens.node_copies(2) * 2048.0
    rate = payload(2e8, 1500)
    assert one(lab(), "routed_contiguous", "two_level") == pytest.approx(
        max(sent[:2, 1].sum(), sent[2:, 0].sum()) / rate, rel=1e-6
    )


def test_two_alike_at_once_take_twice_as_long_and_unlike_ones_share_evenly() -> None:
    alone = one(lab())
    both = seconds_of(lab(), Case(("even", "even"), "flat", BYTES), FREE)
    assert both == pytest.approx([2 * alone, 2 * alone])
    skewed = one(lab(), "skewed")
    together = seconds_of(lab(), Case(("even", "skewed"), "flat", BYTES), FREE)
    assert max(together) <= alone + skewed + 1e-9 and min(together) > max(alone, skewed)
    # The executor shares the same links; where all flows meet on one link, it says the same.
    assert by_executor(lab(), Case(("even", "even"), "flat", BYTES), FREE) == pytest.approx(both, rel=1e-6)
    assert by_executor(lab(), Case(("even",), "flat", BYTES), FREE) == []
