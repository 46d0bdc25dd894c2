"""The edge of what was measured: it lies inside, and a refusal beyond it says where it is and what to lower."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.estimate import Tag
from moesim.cost.ops import Attention, ExpertGemm, MoeExchange
from moesim.cost.roofline import Roofline
from moesim.errors import OutsideProfile
from profiles.costs import StoreCosts
from profiles.fit import Surface
from profiles.lookup import longest_at
from profiles.store import open_profile
from tests.costs_cluster import h200

PAIRS = 131072.0  # the most pairs of a balanced row of DeepSeek-V3's experts, all of them on a rank


def costs(allow: bool = False) -> StoreCosts:
    return StoreCosts((open_profile("default", "h200_sxm"),), "sglang", allow, Roofline(h200(1)))


def experts(tokens: np.ndarray) -> ExpertGemm:
    return ExpertGemm(tokens, 7168, 256, 256, 8, "fp8_block", "fused")


def uneven(pairs: float, spread: float) -> np.ndarray:
    shares = np.random.default_rng(5).lognormal(0.0, spread, 256)
    return shares / shares.sum() * pairs


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_as_many_pairs_as_were_measured_lie_inside_however_they_lie(spread: float) -> None:
    priced = costs().estimate(experts(uneven(PAIRS, spread)[None]))
    assert priced.tags[0] <= Tag.INTERPOLATED
    balanced = costs().estimate(experts(np.full((1, 256), PAIRS / 256)))
    assert priced.seconds[0] == pytest.approx(balanced.seconds[0], rel=0.05)
    assert priced.seconds[0] <= costs(allow=True).estimate(experts(uneven(PAIRS * 1.01, spread)[None])).seconds[0]


def test_more_pairs_lie_outside_and_the_refusal_names_the_key() -> None:
    with pytest.raises(OutsideProfile, match="up to 131072 pairs a rank balanced") as refused:
        costs().estimate(experts(uneven(PAIRS * 1.01, 0.3)[None]))
    assert "lower serving.batching.max_batch_tokens_per_dp_rank" in refused.value.line()


def test_a_refusal_says_how_far_the_asked_batch_was_measured() -> None:
    with pytest.raises(OutsideProfile) as refused:
        costs().estimate(
            Attention("decode", np.array([4096.0]), np.ones(1), np.array([40000.0]), 8, 1, 128, "bf16", "bf16")
        )
    assert "asked kv_tokens 40001 at batch 4096" in refused.value.line()
    assert "lower serving.batching.max_running_requests_per_dp_rank" in refused.value.line()


def test_the_longest_length_at_a_batch() -> None:
    known = np.array([[0, 0, 0], [0, 0, -1], [0, -1, -1]], dtype=np.int8)
    grid = Surface(np.array([1.0, 2.0, 4.0]), np.array([10.0, 20.0, 30.0]), np.ones((3, 3)), known)
    assert [longest_at(grid, batch) for batch in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)] == [30, 30, 20, 20, 10, 10, 0]


@pytest.mark.parametrize("hidden", [7168, 4096])
def test_a_price_scaled_from_another_shape_is_no_surer_than_the_formula(hidden: int) -> None:
    op = MoeExchange("combine", "normal", np.array([2048.0]), hidden, 8, 256, 16, 2, "bf16")
    priced, formula = costs(allow=True).estimate(op), Roofline(h200(2)).estimate(op)
    scaled = "scaled from" in priced.source
    assert scaled == (hidden == 4096)
    assert (priced.rel_sigma >= formula.rel_sigma) == scaled
