"""How a collective's seconds run between its sizes: on lines, with a step where the protocol changes."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cost.estimate import Tag
from moesim.cost.ops import Collective
from profiles.fit import OUTSIDE, curve
from profiles.lookup import along, rule_along
from profiles.protocols import HELD_UP, LEAN, STEP, combined, rule_of_collective
from profiles.refine import Rule

SIZES = 4.0 ** np.arange(1, 8)


@pytest.mark.parametrize("rule", ["lines", "steps"])
def test_one_protocol_is_a_line(rule: Rule) -> None:
    part = curve(SIZES, 10.0 + 0.5 * SIZES, rule=rule)
    at = np.geomspace(SIZES[0], SIZES[-1], 200)
    np.testing.assert_allclose(part.price(at)[0], 10.0 + 0.5 * at, rtol=1e-12)


def test_the_cheaper_of_two_protocols_is_found_between_sizes() -> None:
    """The old one is cheaper up to 90 bytes, the new one from there: the kink lies inside the gap from 64 to 256."""
    true = np.minimum(10.0 + 1.0 * SIZES, 82.0 + 0.2 * SIZES)
    at = np.array([80.0, 90.0, 128.0])
    truth = np.minimum(10.0 + 1.0 * at, 82.0 + 0.2 * at)
    found = curve(SIZES, true, rule="lines").price(at)[0]
    chord = curve(SIZES, true).price(at)[0]
    assert (chord < truth).all()
    # What the chord lacks is made up for by the lean, but for the kink between two nodes.
    np.testing.assert_allclose(found[2] - chord[2], LEAN * (truth - chord)[2], rtol=0.02)
    assert (np.abs(found - truth) < 0.5 * np.abs(chord - truth)).all()


def test_a_latency_that_hides_the_bytes_stays_flat_up_to_the_corner() -> None:
    true = np.maximum(100.0, 1.0 * SIZES)
    found = curve(SIZES, true, rule="lines").price(np.array([80.0]))[0]
    assert found < curve(SIZES, true).price(np.array([80.0]))[0]
    assert found >= 100.0


def test_a_whole_step_comes_late_in_its_gap_and_only_where_protocols_are_chosen() -> None:
    true = np.where(SIZES <= 64.0, 10.0 + 0.01 * SIZES, 40.0 + 0.01 * SIZES)
    at = np.array([64.0, 128.0, 255.9, 256.0])
    steps = curve(SIZES, true, rule="steps").price(at)[0]
    lines = curve(SIZES, true, rule="lines").price(at)[0]
    assert steps[1] == pytest.approx((10.0 + 1.28) ** (7 / 8) * (40.0 + 1.28) ** (1 / 8))
    assert lines[1] > 1.4 * steps[1]  # the chord
    np.testing.assert_allclose(steps[[0, 3]], true[[2, 3]])
    assert steps[2] == pytest.approx(true[3], rel=0.01)


def test_a_difference_smaller_than_a_step_is_the_chord() -> None:
    low = (STEP - 0.1) * 10.0
    true = np.where(SIZES <= 64.0, 10.0 + 1e-9 * SIZES, low + 1e-9 * SIZES)
    part = curve(SIZES, true, rule="steps")
    np.testing.assert_allclose(part.price(np.array([128.0]))[0], curve(SIZES, true).price(np.array([128.0]))[0])


@settings(max_examples=200, deadline=None)
@given(
    logs=st.lists(st.floats(-12.0, -2.0), min_size=2, max_size=9),
    gaps=st.lists(st.floats(0.05, 3.0), min_size=9, max_size=9),
    rule=st.sampled_from(["lines", "steps"]),
)
def test_it_goes_through_its_points_rises_and_stays_between_neighbours(
    logs: list[float], gaps: list[float], rule: Rule
) -> None:
    sizes = np.exp(np.cumsum(gaps[: len(logs)]))
    seconds = np.exp(np.sort(logs))
    part = curve(sizes, seconds, rule=rule)
    again, tags = part.price(sizes)
    np.testing.assert_allclose(again, seconds, rtol=1e-9)
    assert (tags == int(Tag.MEASURED)).all()
    at = np.geomspace(sizes[0], sizes[-1], 301)
    found, tags = part.price(at)
    assert (np.diff(found) >= -1e-12 * found[1:]).all()
    gap = np.clip(np.searchsorted(sizes, at, side="right") - 1, 0, len(sizes) - 2)
    assert (found >= seconds[gap] * (1.0 - 1e-9)).all()
    assert (found <= seconds[gap + 1] * (1.0 + 1e-9)).all()
    assert part.price(2.0 * sizes[-1:])[1][0] == OUTSIDE


def test_measurements_of_one_exchange_are_their_mean_unless_one_was_held_up() -> None:
    places = np.array([7, 3, 7, 3, 5])
    seconds = np.array([1.0, 4.0, 1.02, 9.0, 2.0])
    near, stalled = 1.02**0.5, 4.0 * np.exp(HELD_UP)
    np.testing.assert_allclose(combined(places, seconds), [near, stalled, near, stalled, 2.0])


@pytest.mark.parametrize("kind", ["all_gather", "all_to_all"])
def test_the_product_prices_by_the_same_rule(kind: str) -> None:
    """What `check --leave-out every-second` judges is what a scenario pays."""
    seconds = np.where(SIZES <= 64.0, 10.0 + 0.01 * SIZES, 40.0 + 0.01 * SIZES)
    rows = pl.DataFrame({"kind": kind, "path": "nccl", "bytes": SIZES, "latency_s": seconds, "profile": 0})
    op = Collective(kind, np.geomspace(SIZES[0], SIZES[-1], 50), 8, 1)  # type: ignore[arg-type]
    found = along(rows, "bytes", "a table", 0.1).price(op)[0]
    rule = rule_of_collective(kind, "nccl")
    np.testing.assert_array_equal(found, curve(SIZES, seconds, rule=rule).price(op.bytes)[0])


def test_the_rule_follows_from_the_collective_and_its_library() -> None:
    assert rule_of_collective("all_reduce", "nccl") == "steps"
    assert rule_of_collective("all_to_all", "nccl") == "lines"
    assert rule_of_collective("all_reduce", "custom") == "chord"
    assert rule_of_collective("all_to_all", "gloo") == "chord"
    rows = pl.DataFrame({"kind": ["all_gather"], "path": ["nccl"], "bytes": [1024.0], "m": [16]})
    assert rule_along(rows, "bytes") == "steps"
    assert rule_along(rows, "tokens") == "chord"
