"""The roofline: every operation priced, the larger of compute and memory, checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost import roofline
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
from moesim.cost.roofline import COMPUTE_FRACTION, HBM_FRACTION, LAUNCH_S, Roofline
from tests.costs_cluster import h200

ONE = np.ones(1)
HBM = 4.8e12 * HBM_FRACTION


@pytest.fixture
def costs() -> Roofline:
    return Roofline(h200(nodes=4))


def test_a_wide_gemm_is_bound_by_compute_and_a_thin_one_by_weights(costs: Roofline) -> None:
    wide, thin = costs.estimate(Gemm(np.array([65536.0, 1.0]), 8192, 8192, "bf16")).seconds
    assert wide == pytest.approx(
        2 * 65536 * 8192**2 / (costs.cluster.gpu.peak("bf16") * COMPUTE_FRACTION["bf16"]) + LAUNCH_S, rel=1e-6
    )
    assert thin == pytest.approx((8192**2 * 2 + 2 * 8192 * 2) / HBM + LAUNCH_S, rel=1e-6)


def test_fp8_computes_at_twice_the_peak_of_bf16(costs: Roofline) -> None:
    fp8, bf16 = (costs.estimate(Gemm(np.array([65536.0]), 8192, 8192, dtype)).seconds[0] for dtype in ("fp8", "bf16"))
    assert bf16 / fp8 == pytest.approx(2 * COMPUTE_FRACTION["fp8"] / COMPUTE_FRACTION["bf16"], rel=0.01)


def test_memory_bound_is_bytes_over_the_triad_rate(costs: Roofline) -> None:
    assert costs.estimate(MemoryBound(np.array([4.15e12]), "x")).seconds[0] == pytest.approx(1.0, rel=1e-5)


def test_untouched_experts_read_no_weights(costs: Roofline) -> None:
    tokens = np.array([[4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0]])
    spread, packed = costs.estimate(ExpertGemm(tokens, 7168, 2048, 256, 8, "bf16", "fused")).seconds
    assert spread - packed == pytest.approx(3 * 3 * 7168 * 2048 * 2 / HBM, rel=1e-6)


def test_decode_attention_reads_the_cache_once(costs: Roofline) -> None:
    op = Attention("decode", np.array([64.0]), ONE, np.array([4095.0]), 8, 8, 128, "bf16", "bf16")
    read = 64 * (4096 * 2 * 8 * 128 * 2 + 8 * 2 * 128 * 2)
    assert costs.estimate(op).seconds[0] == pytest.approx(read / HBM + LAUNCH_S, rel=1e-6)


def test_a_window_bounds_what_attention_reads(costs: Roofline) -> None:
    full, windowed = (
        costs.estimate(Attention("decode", ONE * 64, ONE, ONE * 65535, 8, 8, 64, "bf16", "bf16", window)).seconds[0]
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
    assert priced.rel_sigma == roofline.REL_SIGMA
