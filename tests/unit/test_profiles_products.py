"""How dense products run over their rows: what is found of made-up kernels, and what noise must not do."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from profiles.error_law import fit_law
from profiles.fit import curve
from profiles.monotone import isotonic, least_squares
from profiles.products import (
    LEAST_SHAPES,
    Product,
    RowRule,
    Shape,
    aligned_seconds,
    fit_product,
    nodes,
    padded_rows,
    smoothed,
    surcharge,
    unaligned,
)

Floats = NDArray[np.float64]
# The row counts of the published tables: small ones, then pairs around multiples.
ROWS = np.array([*range(1, 18), 32, 33, 48, 49, 64, 65, 96, 97, 128, 129, 192, 193, 256, 257, 512, 513, 768, 769, 1024,
                 1025, 1536, 1537, 2048, 2049, 4096, 4097, 8192, 16384, 32768], dtype=np.float64)  # fmt: skip
EVERY_SECOND = np.arange(len(ROWS)) % 2 == 1


def shapes_of(seconds_of: object, rows: Floats = ROWS, count: int = 40, scatter: float = 0.0) -> list[Shape]:
    """Shapes of a made-up kernel: seconds_of(weights, rows); timings scatter upwards only."""
    rng = np.random.default_rng(0)
    weights = np.geomspace(1e5, 1e8, count)
    exact = [seconds_of(weight, rows) for weight in weights]  # type: ignore[operator]
    return [
        Shape(weight, rows, seconds * (1.0 + scatter * rng.exponential(size=len(rows)) * (rng.random(len(rows)) < 0.3)))
        for weight, seconds in zip(weights, exact, strict=True)
    ]


def tiled(tile: float) -> object:
    return lambda weights, rows: 5e-6 + weights * (2e-13 + 4e-15 * padded_rows(rows, tile))


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_the_nearest_rising_sequence_by_absolute_deviations_is_found(values: list[int]) -> None:
    found = isotonic(np.array(values, dtype=np.float64))
    assert (np.diff(found) >= 0).all()
    rising = (one for one in itertools.product(sorted(set(values)), repeat=len(values)) if list(one) == sorted(one))
    best = min(np.abs(np.array(one) - values).sum() for one in rising)  # an optimum among the values themselves exists
    assert np.abs(found - values).sum() == pytest.approx(best)


def test_one_disturbed_timing_does_not_move_the_others() -> None:
    values = np.array([1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    np.testing.assert_array_equal(isotonic(values), [1, 1, 1, 1, 1, 1, 2])
    assert least_squares(values)[1] > 2.0  # what a mean does


def test_rows_are_padded_to_the_smallest_tile_that_holds_them() -> None:
    rows = np.array([1.0, 16.0, 17.0, 32.0, 33.0, 64.0, 65.0, 128.0, 129.0])
    assert padded_rows(rows, 64.0).tolist() == [16, 16, 32, 32, 64, 64, 128, 128, 192]
    assert padded_rows(rows, 256.0).tolist() == [16, 16, 32, 32, 64, 64, 128, 128, 256]


def test_a_product_steps_at_the_edge_of_a_tile() -> None:
    part = curve(np.array([1.0, 49.0, 113.0, 225.0]), np.array([1.0, 1.1, 2.0, 3.0]), rule=RowRule())
    low, at, above = part.price(np.array([100.0, 128.0, 129.0]))[0]
    assert low == pytest.approx(at, rel=0.1)
    assert above > 1.1 * at
    np.testing.assert_allclose(part.price(np.array([49.0, 113.0]))[0], [1.1, 2.0])


@pytest.mark.parametrize("tile", [64.0, 256.0])
def test_the_tallest_tile_of_a_kernel_is_found_and_predicts_what_was_left_out(tile: float) -> None:
    shapes = shapes_of(tiled(tile), scatter=0.02)
    kept = [Shape(shape.weights, shape.rows[~EVERY_SECOND], shape.seconds[~EVERY_SECOND]) for shape in shapes]
    product = fit_product(kept)
    assert product.rules[-1][1].tile == tile  # the largest shapes; the smallest wait for launches
    errors, others = [], []
    for one, shape in zip(kept, shapes, strict=True):
        for rule, found in ((product.rule(1, int(one.weights)), errors), (RowRule(512.0, 30.0), others)):
            part = curve(one.rows, one.seconds, rule=rule, surcharge_s=product.surcharge_s)
            found.append(np.abs(part.price(ROWS[EVERY_SECOND])[0] / shape.seconds[EVERY_SECOND] - 1.0))
    assert np.quantile(np.concatenate(errors), 0.9) < 0.05
    assert np.median(np.concatenate(errors)) < np.median(np.concatenate(others))


def test_too_few_shapes_take_the_defaults() -> None:
    assert fit_product(shapes_of(tiled(256.0), count=LEAST_SHAPES - 1)) == Product()


def launched(more: float) -> object:
    """A kernel that waits for its launches at small sizes, `more` seconds longer where rows do not align."""
    return lambda weights, rows: np.maximum(180e-6, weights * 4e-15 * rows) + more * unaligned(rows)


def test_a_surcharge_is_found_where_both_kinds_of_rows_were_measured_and_where_large_ones_bound_it() -> None:
    rows = np.concatenate([ROWS[ROWS <= 4097], [16384.0]])
    both = shapes_of(launched(55e-6), rows)
    assert surcharge(both) == pytest.approx(55e-6, rel=0.02)
    odd = rows[unaligned(rows) | (rows > 5000)]
    bounded = [Shape(s.weights, odd, s.seconds[np.isin(rows, odd)]) for s in both]
    assert surcharge(bounded) == pytest.approx(55e-6, rel=0.05)


@pytest.mark.parametrize("kernel", [launched(0.0), tiled(128.0)])
def test_no_surcharge_is_seen_in_noise_or_tiles(kernel: object) -> None:
    assert surcharge(shapes_of(kernel, scatter=0.2)) == 0.0
    assert surcharge(shapes_of(kernel, ROWS[unaligned(ROWS) | (ROWS > 10000)], scatter=0.2)) == 0.0


def test_rows_that_do_not_align_pay_the_surcharge_and_measured_points_keep_their_times() -> None:
    rows = np.array([2.0, 4.0, 5.0, 8.0, 9.0, 16.0, 17.0, 64.0])
    seconds = np.where(unaligned(rows), 240e-6, 180e-6)
    part = curve(rows, seconds, rule=RowRule(), surcharge_s=60e-6)
    np.testing.assert_allclose(part.price(rows)[0], seconds)
    np.testing.assert_allclose(part.price(np.array([6.0, 12.0, 31.0]))[0], [240e-6, 180e-6, 240e-6])
    assert aligned_seconds(rows, seconds, 1.0).min() > 0.0


rising = st.lists(st.floats(0.0, 3.0), min_size=2, max_size=12).map(sorted)


@settings(max_examples=50, deadline=None)
@given(rising, st.sampled_from([64.0, 256.0, 512.0]), st.sampled_from([0.5, 8.0, 30.0]), st.sampled_from([0.0, 0.5]))
def test_prices_rise_with_the_rows(logs: list[float], tile: float, share: float, smoothing: float) -> None:
    rule = RowRule(tile, share, smoothing)
    xs = np.sort(np.random.default_rng(len(logs)).choice(5000, len(logs), replace=False) + 1.0)
    at = np.log(rule.work(xs))
    assert (np.diff(smoothed(at, np.array(logs), smoothing)) >= 0).all()
    places, values = nodes(xs, np.array(logs), rule)
    assert (np.diff(places) > 0).all() and (np.diff(values) >= -1e-12).all()
    part = curve(xs, np.exp(logs), rule=rule)
    sizes = np.arange(1.0, xs[-1] + 1.0)
    assert (np.diff(part.price(sizes)[0]) >= -1e-12).all()


def test_what_is_stored_of_a_kernel_is_read_back_and_nonsense_is_refused() -> None:
    product = fit_product(shapes_of(tiled(128.0)))
    assert Product.from_dict(product.as_dict()).rules == product.rules
    stored = product.as_dict()
    for wrong in (
        {},
        {**stored, "rules": []},
        {**stored, "surcharge_s": -1.0},
        {**stored, "surcharge_s": float("nan")},
    ):
        with pytest.raises((KeyError, ValueError)):
            Product.from_dict(wrong)
    for key, value in (("tile", 0.0), ("share", -1.0), ("smoothing", 2.0)):
        with pytest.raises(ValueError, match="rule"):
            Product.from_dict({**stored, "rules": [{**stored["rules"][0], key: value}]})


def test_errors_that_grow_with_the_gap_are_covered_at_every_gap() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.uniform(0.0, 1.0, 4000) * rng.choice([-1.0, 1.0], 4000)
    errors = rng.normal(size=4000) * (0.01 + 0.2 * np.abs(gaps))
    law = fit_law(gaps[:2000], errors[:2000])
    assert law is not None and (np.diff(law.errors) >= 0).all()
    inside = np.abs(errors[2000:]) <= law.half_width(gaps[2000:])
    for part in np.array_split(np.argsort(np.abs(gaps[2000:])), 4):
        assert 0.84 < inside[part].mean() < 0.96
    assert fit_law(np.array([np.nan]), np.array([0.1])) is None
