"""The roofline: every operation priced, the larger of compute and memory, checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.estimate import Tag
from moesim.cost.links import LAUNCH_S
from moesim.cost.ops import (
    Attention,
    Collective,
    ExpertGemm,
    Gemm,
    MemoryBound,
    MlaAbsorb,
    MlaAttention,
    MoeExchange,
    Operation,
)
from moesim.cost.reach import PLACES, REL_SIGMA, bundled, link_reach, reach
from moesim.cost.roofline import Roofline
from moesim.spec.cluster import MeasuredFigure
from moesim.units import BYTES_PER_ELEMENT
from tests.costs_cluster import h200

ONE = np.ones(1)
HBM = 4.8e12


@pytest.fixture
def costs() -> Roofline:
    return Roofline(h200(nodes=4))


def test_a_wide_gemm_is_bound_by_compute_and_a_thin_one_by_weights(costs: Roofline) -> None:
    own = reach("gemm", "bf16")
    wide, thin = costs.estimate(Gemm(np.array([65536.0, 1.0]), 8192, 8192, "bf16")).seconds
    assert wide == pytest.approx(
        2 * 65536 * 8192**2 / (costs.cluster.gpu.peak("bf16") * own.compute) + own.floor_s, rel=1e-6
    )
    assert thin == pytest.approx((8192**2 * 2 + 2 * 8192 * 2) / (HBM * own.hbm) + own.floor_s, rel=1e-6)


def test_fp8_computes_at_twice_the_peak_of_bf16(costs: Roofline) -> None:
    fp8, bf16 = (costs.estimate(Gemm(np.array([65536.0]), 8192, 8192, dtype)).seconds[0] for dtype in ("fp8", "bf16"))
    assert bf16 / fp8 == pytest.approx(2 * reach("gemm", "fp8").compute / reach("gemm", "bf16").compute, rel=0.01)


def test_memory_bound_is_bytes_over_the_triad_rate(costs: Roofline) -> None:
    assert costs.estimate(MemoryBound(np.array([4.15e12]), "x")).seconds[0] == pytest.approx(1.0, rel=1e-5)


def test_untouched_experts_read_no_weights(costs: Roofline) -> None:
    tokens = np.array([[4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0]])
    spread, packed = costs.estimate(ExpertGemm(tokens, 7168, 2048, 256, 8, "bf16", "fused")).seconds
    own = reach("experts fused", "bf16")
    assert spread - packed == pytest.approx(3 * 3 * 7168 * 2048 * 2 / (HBM * own.hbm), rel=1e-6)


def test_grouped_products_alone_are_three_plain_ones_and_as_unsure_as_what_was_not_measured(costs: Roofline) -> None:
    op = ExpertGemm(np.full((1, 8), 4096.0), 4096, 1536, 128, 8, "bf16", "grouped")
    own = reach("gemm", "bf16")
    priced = costs.estimate(op)
    flops = 6 * 8 * 4096 * 4096 * 1536
    assert priced.seconds[0] == pytest.approx(flops / (costs.cluster.gpu.peak("bf16") * own.compute) + 3 * own.floor_s)
    assert priced.rel_sigma == max(REL_SIGMA, own.rel_sigma)


def test_decode_attention_reads_the_cache_once(costs: Roofline) -> None:
    op = Attention("decode", np.array([64.0]), ONE, np.array([4095.0]), 8, 8, 128, "bf16", "bf16")
    read = 64 * (4096 * 2 * 8 * 128 * 2 + 8 * 2 * 128 * 2)
    own = reach("attention decode", "bf16/bf16")
    assert costs.estimate(op).seconds[0] == pytest.approx(read / (HBM * own.hbm) + own.floor_s, rel=1e-6)


def test_a_window_bounds_what_attention_reads(costs: Roofline) -> None:
    full, windowed = (
        costs.estimate(Attention("decode", ONE * 640, ONE, ONE * 65535, 8, 8, 64, "bf16", "bf16", window)).seconds[0]
        for window in (0, 128)
    )
    assert windowed < full / 50


def test_a_collective_takes_an_empty_one_latencies_and_bytes(costs: Roofline) -> None:
    """Rings: an all-reduce goes round twice, the others once; each over the share of NVLink that it reaches."""
    for kind, steps in (("all_reduce", 2), ("reduce_scatter", 1), ("all_gather", 1), ("all_to_all", 1)):
        own = link_reach(f"collective {kind}")
        told = costs.estimate(Collective(kind, np.array([1e3, 1e9]), 8, 1))  # type: ignore[arg-type]
        empty = own.floor_s + steps * 3 * 2e-6
        assert told.seconds == pytest.approx(empty + steps * 7 / 8 * np.array([1e3, 1e9]) / (own.near * 450e9))
        assert told.rel_sigma == own.rel_sigma


def test_between_nodes_a_collective_is_no_surer_than_an_assumption(costs: Roofline) -> None:
    """Tables have collectives of one node; an all-to-all over four sends three quarters over NICs."""
    told = costs.estimate(Collective("all_to_all", np.array([1e9]), 32, 4))
    own = link_reach("collective all_to_all")
    assert told.rel_sigma == max(REL_SIGMA, own.rel_sigma)
    assert told.seconds[0] == pytest.approx(own.floor_s + 5 * 2e-6 + 2 * 5e-6 + 0.75e9 / 45e9)


def test_normal_exchanges_are_as_fast_as_their_multiprocessors(costs: Roofline) -> None:
    """20 of them move a token's copies to 5.25 of 8 ranks; on twice as quick links they move no more."""
    tokens = np.array([65536.0])
    op = MoeExchange("dispatch", "normal", tokens, 7168, 8, 256, 8, 1, "fp8")
    own, copies = link_reach("exchange normal"), 8 * (1 - (7 / 8) ** 8)
    assert own.sm_bytes_per_s is not None and 20 * own.sm_bytes_per_s < own.near * 450e9
    moved = 65536 * 7168 * copies
    assert costs.estimate(op).seconds[0] == pytest.approx(own.floor_s + 2e-6 + moved / (20 * own.sm_bytes_per_s))
    quick = costs.cluster.model_copy(update={"nvlink_bytes_per_s": 900e9})
    assert Roofline(quick).seconds(op)[0] == costs.seconds(op)[0]
    slow = costs.cluster.model_copy(update={"nvlink_bytes_per_s": 200e9})  # H800
    assert Roofline(slow).seconds(op)[0] == pytest.approx(own.floor_s + 2e-6 + moved / (own.near * 200e9))


def test_an_empty_low_latency_exchange_runs(costs: Roofline) -> None:
    op = MoeExchange("combine", "low_latency", 0 * ONE, 7168, 8, 256, 8, 1, "bf16")
    assert costs.estimate(op).seconds[0] == pytest.approx(link_reach("exchange low_latency").floor_s + 2e-6)


def test_measured_links_stand_as_they_are() -> None:
    """A measured rate is no datasheet's, and a measured latency has the library's own time in it."""
    figure = MeasuredFigure(rel_sigma=0.1, points=9)
    names = ("nvlink_bytes_per_s", "nvlink_latency_s")
    cluster = h200(1).model_copy(update={"nvlink_bytes_per_s": 300e9, "measured": dict.fromkeys(names, figure)})
    told = Roofline(cluster).seconds(Collective("all_gather", np.array([1e9]), 8, 1))[0]
    assert told == pytest.approx(7 / 8 * 1e9 / 300e9 + 3 * 2e-6 + LAUNCH_S)
    empty = link_reach("exchange low_latency").floor_s + 2e-6
    for latency_s, least in ((2e-6, empty), (8e-6, empty), (50e-6, 50e-6)):  # what the library took is not taken twice
        slow = cluster.model_copy(update={"nvlink_latency_s": latency_s})
        nothing = MoeExchange("combine", "low_latency", 0 * ONE, 7168, 8, 256, 8, 1, "bf16")
        assert Roofline(slow).seconds(nothing)[0] == pytest.approx(least)
    exchange = MoeExchange("dispatch", "low_latency", np.array([1024.0]), 7168, 8, 256, 8, 1, "fp8")
    assert Roofline(cluster).seconds(exchange)[0] == pytest.approx(empty + 1024 * 8 * 7168 / 300e9)


def test_the_network_is_slower_than_nvlink(costs: Roofline) -> None:
    inside = costs.estimate(Collective("all_to_all", np.array([1e8]), 8, 1)).seconds[0]
    across = costs.estimate(Collective("all_to_all", np.array([1e8]), 8, 2)).seconds[0]
    assert across > 2 * inside


def test_low_latency_sends_more_copies_than_normal(costs: Roofline) -> None:
    tokens = np.array([4096.0])
    normal, copies = (
        costs.estimate(MoeExchange("dispatch", mode, tokens, 7168, 8, 256, 32, 4, "fp8")).seconds[0]  # type: ignore[arg-type]
        for mode in ("normal", "low_latency")
    )
    assert copies > 2 * normal


EMPTY: list[Operation] = [
    Gemm(0 * ONE, 64, 64, "bf16"),
    ExpertGemm(np.zeros((1, 4)), 64, 64, 8, 2, "fp8_block", "fused"),
    Attention("prefill", 0 * ONE, ONE, ONE, 8, 8, 64, "bf16", "bf16"),
    MlaAttention("decode", 0 * ONE, ONE, ONE, 8, 512, 128, 64, 128, "bf16", "fp8"),
    MlaAbsorb("post", 0 * ONE, 8, 512, 128, "bf16"),
    MemoryBound(0 * ONE, "norm"),
    Collective("all_gather", 0 * ONE, 8, 1),
    MoeExchange("combine", "normal", 0 * ONE, 64, 2, 8, 8, 1, "bf16"),
]


@pytest.mark.parametrize("op", EMPTY, ids=lambda op: type(op).__name__)
def test_nothing_costs_nothing(costs: Roofline, op: Operation) -> None:
    priced = costs.estimate(op)
    assert priced.seconds.tolist() == [0.0]
    assert (priced.tags == Tag.FORMULA).all()
    work = costs.work(op)
    assert priced.rel_sigma == work.rel_sigma


def test_another_type_stands_in_where_one_was_not_measured() -> None:
    assert reach("gemm", "fp16") == reach("gemm", "bf16")
    assert reach("gemm", "w4a8_mxfp4_mxfp8").dtype == "nvfp4"
    assert reach("attention prefill", "fp8/bf16").dtype == "bf16/bf16"  # as wide a cache before queries as wide
    assert reach("attention decode", "fp8/fp8").dtype == "bf16/fp8"
    assert reach("experts deepep_normal", "bf16").dtype == "fp8_block"


def test_every_type_that_weights_may_have_has_a_width() -> None:
    assert set(PLACES) == set(BYTES_PER_ELEMENT)


def test_a_type_that_stands_in_is_no_surer_than_the_formula(costs: Roofline) -> None:
    tokens = np.full((1, 8), 64.0)
    for grouping in ("deepep_normal", "deepep_low_latency"):
        priced = costs.estimate(ExpertGemm(tokens, 7168, 2048, 256, 8, "bf16", grouping))  # type: ignore[arg-type]
        assert priced.rel_sigma >= REL_SIGMA


def test_figures_that_ship_are_physical() -> None:
    """No kernel computes above the peak; a call that does nothing takes microseconds; every row names its GPUs."""
    rows = bundled().kernels
    assert len({(row.kind, row.dtype) for row in rows}) == len(rows) > 25
    for row in rows:
        assert 1e-6 < row.floor_s < 1e-3
        assert row.compute <= 1.0 and 0.1 < row.hbm <= 1.5
    for link in bundled().links:
        assert 1e-6 < link.floor_s < 1e-4 and 0.3 < link.near <= 1.0 and len(link.systems) >= 2
        assert (link.sm_bytes_per_s is not None) == link.kind.startswith("exchange normal")
        assert 0.05 < row.rel_sigma < 1.0 and row.systems
        assert row.rel_sigma >= REL_SIGMA or row.points >= 1000
