"""EP sizes between and beyond measured ones: known physics found again, measured points kept, tags told."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.estimate import Tag
from moesim.cost.ops import MoeExchange
from moesim.cost.roofline import Roofline
from moesim.errors import OutsideProfile
from moesim.network.uniform import Routed
from profiles.costs import StoreCosts
from profiles.ep_between import between, exchanges_between, kind_of
from profiles.ep_scaling import ExchangeKind, ExchangePhysics, carried, fit
from profiles.record import LATENCY
from profiles.store import open_profile
from tests.costs_cluster import h200

LOW_LATENCY = ExchangeKind("expert", Routed(top_k=8, experts=256), 14336.0, 8, 50e9, 450e9)
NORMAL = ExchangeKind("node", Routed(top_k=8, experts=256), 14336.0, 8, 50e9, 450e9)
TRUTH = ExchangePhysics(12e-6, 20e-6, 5e-8, 42e9, 300e9)


def test_seconds_by_hand() -> None:
    physics = ExchangePhysics(1.0, 10.0, 0.1, 2.0, 4.0)
    one = ExchangeKind("expert", Routed(top_k=8, experts=256), 1.0, 8, 50e9, 450e9)
    # 16 ranks: half of the 8 copies leave the node, 8 x (1/2 - 1/16) take NVLink; 15 peers.
    assert float(physics.seconds(one, 16, 100.0)) == 1.0 + 5.0 + 1.5 + 100.0 * max(4.0 / 2.0, 3.5 / 4.0)
    peer = ExchangeKind("peer", Routed(top_k=8, experts=256), 1.0, 8, 50e9, 450e9)
    assert float(physics.seconds(peer, 16, 1.0)) == 1.0 + 10.0 + 1.5 + 8.0 / 2.0
    node = ExchangeKind("node", Routed(top_k=8, experts=256, balanced=True), 1.0, 8, 50e9, 450e9)
    # 4 nodes: agreed on in 2 doublings; 4 nodes visited, 3 of them away; 8 ranks visited, 7 peers inside, 3 nodes.
    assert float(physics.seconds(node, 32, 1.0)) == pytest.approx(1.0 + 20.0 + 1.0 + max(3.0 / 2.0, 7.0 / 4.0))


@pytest.mark.parametrize("kind", [LOW_LATENCY, NORMAL])
def test_a_size_left_out_of_rows_that_follow_the_physics_is_found(kind: ExchangeKind) -> None:
    ranks, tokens = (axis.ravel() for axis in np.meshgrid([8, 16, 64], [1.0, 16.0, 128.0, 1024.0]))
    found = fit(kind, ranks, tokens, TRUTH.seconds(kind, ranks, tokens))
    at = np.asarray([1.0, 16.0, 128.0, 1024.0])
    assert found.seconds(kind, 32, at) == pytest.approx(TRUTH.seconds(kind, 32, at), rel=0.05)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-0.4, 0.4), min_size=3, max_size=3), st.sampled_from([4, 8, 11, 16, 24, 32, 64, 128]))
def test_measured_sizes_are_kept_and_what_lies_between_is_bounded(deviations, ranks) -> None:
    tokens = np.asarray([1.0, 100.0])
    measured = {
        size: (tokens, TRUTH.seconds(LOW_LATENCY, size, tokens) * np.exp(deviation))
        for size, deviation in zip((8, 16, 64), deviations, strict=True)
    }
    found = carried(TRUTH, LOW_LATENCY, measured, ranks, tokens)
    moved = np.log(found / TRUTH.seconds(LOW_LATENCY, ranks, tokens))
    assert (moved <= max(*deviations, 0.0) + 1e-12).all() and (moved >= min(*deviations, 0.0) - 1e-12).all()
    if ranks in measured and (np.diff([seconds for _, seconds in measured.values()], axis=0) >= 0).all():
        assert found == pytest.approx(measured[ranks][1], rel=1e-12)


def test_a_size_that_was_held_up_does_not_lift_what_lies_beyond_it() -> None:
    """pplx's combine takes 62.7 us on 16 ranks and 58.6 on 64: the first cannot be what 16 ranks need."""
    tokens = np.asarray([1.0])
    flat = ExchangePhysics(1e-9, 1e-9, 1e-12, 1e15, 1e15)
    measured = {16: (tokens, np.asarray([62.7e-6])), 64: (tokens, np.asarray([58.6e-6]))}
    held_up, as_it_was = (
        float(carried(flat, LOW_LATENCY, points, 32, tokens)[0])
        for points in (measured, {**measured, 16: (tokens, np.asarray([58.6e-6]))})
    )
    assert held_up == pytest.approx(as_it_was, rel=1e-12)


def exchange(ep: int, nodes: int, tokens=(4.0, 60.0, 128.0), mode="low_latency", step="dispatch") -> MoeExchange:
    dtype = "fp8_block" if step == "dispatch" else "bf16"
    return MoeExchange(step, mode, np.asarray(tokens), 7168, 8, 256, ep, nodes, dtype)


def store(*, allow: bool = False) -> StoreCosts:
    return StoreCosts((open_profile("default", "h200_sxm"),), "sglang", allow, Roofline(h200(8)))


@pytest.mark.parametrize("step", ["dispatch", "combine"])
@pytest.mark.parametrize("mode", ["low_latency", "normal"])
def test_the_store_prices_between_measured_sizes(step: str, mode: str) -> None:
    found = [
        store().estimate(exchange(ep, ep // 8, mode=mode, step=step)) for ep in (16, 24, 32, 48, 64)
    ]  # fmt: skip
    assert [set(one.tags.tolist()) == {int(Tag.INTERPOLATED)} for one in found] == [False, True, False, True, False]
    seconds = np.stack([one.seconds for one in found])
    assert (np.diff(seconds, axis=0) > 0).all() and (np.diff(seconds, axis=1) > 0).all()
    assert "between EP 16 and 32" in found[1].source and "between EP 32 and 64" in found[3].source
    assert found[1].rel_sigma > found[0].rel_sigma  # an EP size of its own that was left out told how wrong


def test_beyond_measured_sizes_it_refuses_or_says_so() -> None:
    for ep, nodes in ((4, 1), (128, 16)):
        with pytest.raises(OutsideProfile, match=f"ep={ep}"):
            store().estimate(exchange(ep, nodes))
        found = store(allow=True).estimate(exchange(ep, nodes))
        assert set(found.tags.tolist()) == {int(Tag.EXTRAPOLATED)}
        assert "beyond EP 8 to 64" in found.source and found.rel_sigma > 0.1
    # Nodes that are filled in another way were not measured either.
    with pytest.raises(OutsideProfile):
        store().estimate(exchange(24, 6))


def test_measured_sizes_cost_what_they_did() -> None:
    """Nothing of this touches a measured size, not even past its largest tokens."""
    rows = open_profile("default", "h200_sxm").table("exchange")
    held = rows.filter(
        (pl.col("version") == "0.5.6.post2") & (pl.col("mode") == "low_latency") & (pl.col("step") == "dispatch")
        & (pl.col("ep") == 16) & (pl.col("experts") == 256)
    ).sort("tokens")  # fmt: skip
    found = store().estimate(exchange(16, 2, tokens=held["tokens"].to_list()))
    measured = held[LATENCY].to_numpy()
    assert found.seconds[2:] == pytest.approx(measured[2:], rel=1e-9)  # the first two are not monotone
    with pytest.raises(OutsideProfile, match="lies outside what was measured"):
        store().estimate(exchange(16, 2, tokens=[4096.0]))


def test_rows_of_one_size_or_of_other_nodes_tell_nothing() -> None:
    rows = open_profile("default", "h200_sxm").table("exchange").filter(
        (pl.col("mode") == "low_latency") & (pl.col("step") == "dispatch") & (pl.col("experts") == 256)
        & (pl.col("hidden") == 7168) & (pl.col("version") == "0.5.6.post2")
    )  # fmt: skip
    op = exchange(24, 3)
    assert between(op, h200(8), rows) is not None
    assert between(op, h200(8), rows.filter(pl.col("ep") == 16)) is None
    assert between(op, h200(8), rows.with_columns(pl.lit(1, dtype=pl.Int64).alias("nodes"))) is None
    assert between(exchange(16, 2), h200(8), rows) is None  # it holds that one
    assert not list(
        exchanges_between(exchange(128, 16), h200(8), [("here", rows)], sigma=lambda rows: 0.1, edges=False)
    )
    assert kind_of(op, h200(8)).domain == 8


def test_two_sizes_are_taken_as_little() -> None:
    rows = open_profile("default", "h200_sxm").table("exchange").filter(
        (pl.col("mode") == "low_latency") & (pl.col("step") == "dispatch") & (pl.col("experts") == 256)
        & (pl.col("hidden") == 7168) & (pl.col("version") == "0.5.6.post2")
    )  # fmt: skip
    few = between(exchange(24, 3), h200(8), rows.filter(pl.col("ep").is_in([16, 32])))
    many = between(exchange(24, 3), h200(8), rows)
    assert few is not None and many is not None
    assert few.sigma == 0.2 and 0.0 < many.sigma < 0.1
