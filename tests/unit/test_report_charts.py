"""The chart functions: scales that hold their data, marks where they belong, colours that can be read."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.output import pictures
from moesim.output.charts import INK, SURFACE, Bar, axis, heatmap, nice_step, on_top_of, shade, stacked, whisker
from moesim.output.page import number, percent, signed

FINITE = st.floats(-1e12, 1e12, allow_nan=False)


@given(FINITE, FINITE)
def test_an_axis_holds_its_data_between_round_ticks(one: float, two: float) -> None:
    low, high = min(one, two), max(one, two)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-12):
        low = high
    made = axis(low, high, 0.0, 100.0)
    assert made.low <= low + 1e-6 * (made.high - made.low)
    assert made.high >= high - 1e-6 * (made.high - made.low)
    assert 2 <= len(made.ticks) <= 9
    assert len({label for _, label in made.ticks}) == len(made.ticks)
    assert made.at(made.low) == pytest.approx(0.0)
    assert made.at(made.high) == pytest.approx(100.0)


@given(st.floats(1e-12, 1e12))
def test_steps_are_round_and_just_large_enough(rough: float) -> None:
    step = nice_step(rough)
    assert rough * (1 - 1e-9) <= step <= 2.5 * rough * (1 + 1e-9)
    digits = f"{step:.6e}".split("e")[0].rstrip("0").rstrip(".")
    assert digits in ("1", "2", "2.5", "5")


def test_bars_are_as_long_as_their_figures() -> None:
    drawn = stacked([Bar("a", (("x", 1.0, "#111111"), ("y", 3.0, "#222222")))], unit="s", label="test")
    widths = [float(found) for found in re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)"', drawn)]
    assert widths[1] == pytest.approx(3 * widths[0], rel=1e-3)


def test_a_hot_rank_is_red_a_cold_one_blue_and_an_even_one_neither() -> None:
    def channels(ratio: float) -> tuple[int, ...]:
        return tuple(int(shade(ratio)[start : start + 2], 16) for start in (1, 3, 5))

    red, _, blue = channels(1.0)
    assert red > 2 * blue
    red, _, blue = channels(-1.0)
    assert blue > 2 * red
    assert max(channels(0.0)) - min(channels(0.0)) < 5
    drawn = heatmap(np.array([[0.1, 1.0, 1.9]]), [7], top=2.0)
    assert "layer 7: hottest rank 2 at 1.90 times the mean" in drawn
    assert drawn.count("<path") == 3


def test_a_rank_without_any_load_is_drawn_as_the_coldest() -> None:
    assert shade(-1.0) in heatmap(np.array([[0.0, 2.0]]), [0], top=2.0)


@pytest.mark.parametrize(
    "colour",
    sorted(
        {*pictures.OPERATIONS.values(), *pictures.MEMORY.values(), pictures.KV_USED, pictures.KV_FREE}
        | {colour for colour, _ in pictures.PROVENANCE.values()}
    ),
)
def test_figures_on_bars_can_be_read(colour: str) -> None:
    def luminance(text: str) -> float:
        values = [int(text[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    words = on_top_of(colour)
    assert words in (INK, SURFACE)
    light, dark = sorted((luminance(words), luminance(colour)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.1, AA


def test_a_whisker_keeps_its_order_and_its_column() -> None:
    drawn = whisker(5.0, 2.0, 9.0, 0.0, 10.0, "#000000")
    (start, end) = re.findall(r'x1="([\d.]+)" y1="5.0" x2="([\d.]+)" y2="5.0" stroke="#000000"', drawn)[0]
    point = float(re.findall(r'cx="([\d.]+)"', drawn)[0])
    assert 4 <= float(start) < point < float(end) <= 92
    assert 'cx="4.0"' in whisker(1.0, 1.0, 1.0, 1.0, 1.0, "#000000")


@given(st.floats(1e-9, 1e15), st.integers(2, 5))
def test_numbers_keep_their_significant_digits(value: float, digits: int) -> None:
    assert float(number(value, digits).replace(",", "")) == pytest.approx(value, rel=0.51 * 10.0 ** (1 - digits))


def test_numbers_as_a_person_reads_them() -> None:
    assert [number(value, 3) for value in (0.0, 0.012345, 9.996, 1234.0, 16135.0)] == [
        "0",
        "0.0123",
        "10.0",
        "1,230",
        "16,100",
    ]
    assert percent(0.004) == "under 1 %"
    assert percent(0.0) == "0 %"
    assert signed(-0.0481) == "\u22124.8 %"
