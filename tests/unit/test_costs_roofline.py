"""The roofline: every operation priced, the larger of compute and memory, checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.estimate import Tag
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
from moesim.cost.reach import PLACES, bundled, reach
from moesim.cost.roofline import REL_SIGMA, Roofline
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


def test_all_reduce_moves_twice_what_reduce_scatter_does(costs: Roofline) -> None:
    big = np.array([1e10])
    both, half = (costs.estimate(Collective(kind, big, 8, 1)).seconds[0] for kind in ("all_reduce", "reduce_scatter"))  # type: ignore[arg-type]
    assert both / half == pytest.approx(2.0, rel=1e-3)


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
    assert priced.rel_sigma == (REL_SIGMA if work is None else work.rel_sigma)


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
        assert 0.05 < row.rel_sigma < 1.0 and row.systems
        assert row.rel_sigma >= REL_SIGMA or row.points >= 1000
