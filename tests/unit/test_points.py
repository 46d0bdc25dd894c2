"""Costs of measured points: what is measured, between, beyond and missing, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cost.estimate import Tag
from moesim.cost.ops import Attention, Collective, ExpertGemm, Gemm, MemoryBound, MoeExchange
from moesim.errors import BadInput, OutsideProfile
from profiles.points import LEAST_SIGMA, MeasuredPoint, PointCosts, places, read_points

ONE = np.ones((1, 1))


def point(family: str, key: tuple[Any, ...], size: float, seconds: float, spread: float = 0.0) -> MeasuredPoint:
    return MeasuredPoint(
        family=family, key=key, size=size, seconds=seconds, p10_s=seconds * (1 - spread), p90_s=seconds * (1 + spread)
    )  # type: ignore[arg-type]


POINTS = [
    point("gemm", (8, 4), 100.0, 2.0, spread=0.5),
    point("gemm", (8, 4), 200.0, 3.0, spread=0.5),
    point("experts", (4, 6), 1.0, 1.0),
    point("experts", (4, 6), 11.0, 3.0),
    point("collective", ("all_gather", 2), 1000.0, 5.0),
    point("attention", (16, 0, 4, 2, 8, 0), 1.0, 7.0),
]


def costs(*, beyond: bool = False) -> PointCosts:
    return PointCosts.of(POINTS, "points.json", dtype="fp32", beyond=beyond)


def gemm(m: float) -> Gemm:
    return Gemm(m=m * ONE, n=8, k=4, dtype="fp32")


def test_a_point_is_measured_and_between_two_it_is_interpolated() -> None:
    both = costs().estimate(Gemm(m=np.asarray([100.0, 150.0, 200.0, 0.0]), n=8, k=4, dtype="fp32"))
    assert both.seconds.tolist() == [2.0, 2.5, 3.0, 0.0]
    assert both.tags.tolist() == [Tag.MEASURED, Tag.INTERPOLATED, Tag.MEASURED, Tag.MEASURED]
    assert both.family == "gemm"
    assert both.rel_sigma == pytest.approx(1.0 / 2.56)
    assert costs().estimate(Collective("all_gather", 1000.0 * ONE, 2, 1)).rel_sigma == LEAST_SIGMA


def test_experts_are_the_sum_of_each_and_one_without_tokens_costs_nothing() -> None:
    tokens = np.asarray([[[1.0, 0.0, 6.0], [11.0, 11.0, 0.0]]])
    found = costs().estimate(
        ExpertGemm(tokens=tokens, hidden=4, intermediate=6, experts=6, top_k=1, dtype="fp32", grouping="fused")
    )
    assert found.seconds.tolist() == [[3.0, 6.0]]
    assert found.tags.tolist() == [[Tag.INTERPOLATED, Tag.MEASURED]]


def test_attention_is_told_by_its_lengths_and_heads() -> None:
    asked = Attention("prefill", ONE, 16.0 * ONE, 0.0 * ONE, 4, 2, 8, "fp32", "fp32")
    assert costs().estimate(asked).seconds.tolist() == [[7.0]]
    with pytest.raises(OutsideProfile, match="new_tokens 17"):
        costs().estimate(Attention("prefill", ONE, 17.0 * ONE, 0.0 * ONE, 4, 2, 8, "fp32", "fp32"))


@pytest.mark.parametrize("m", [99.0, 201.0])
def test_beyond_the_points_it_refuses_or_says_so(m: float) -> None:
    with pytest.raises(OutsideProfile, match=r"reach from 100 to 200.*extrapolate: allow"):
        costs().estimate(gemm(m))
    assert costs(beyond=True).estimate(gemm(m)).tags.tolist() == [[Tag.EXTRAPOLATED]]


def test_beyond_the_points_the_last_slope_goes_on_and_one_point_grows_in_proportion() -> None:
    assert costs(beyond=True).estimate(gemm(300.0)).seconds.item() == pytest.approx(4.0)
    one = costs(beyond=True)
    assert one.estimate(Collective("all_gather", 3000.0 * ONE, 2, 1)).seconds.item() == pytest.approx(15.0)
    assert one.estimate(Collective("all_gather", 10.0 * ONE, 2, 1)).seconds.item() == pytest.approx(5.0)


def test_what_no_point_holds_is_named() -> None:
    with pytest.raises(OutsideProfile, match="no point of gemm with n 9, k 4"):
        costs(beyond=True).estimate(Gemm(m=ONE, n=9, k=4, dtype="fp32"))
    exchange = MoeExchange("dispatch", "normal", ONE, 4, 1, 6, 2, 1, "bf16")
    with pytest.raises(OutsideProfile, match="points hold no MoeExchange"):
        costs().estimate(exchange)


def test_other_types_and_more_nodes_are_refused() -> None:
    with pytest.raises(OutsideProfile, match=r"points are of fp32, Gemm in fp8_block"):
        costs(beyond=True).estimate(Gemm(m=100.0 * ONE, n=8, k=4, dtype="fp8_block"))
    with pytest.raises(OutsideProfile, match=r"over 2 is asked for"):
        costs(beyond=True).estimate(Collective("all_gather", 1000.0 * ONE, 2, 2))


def test_collectives_over_more_nodes_have_points_of_their_own() -> None:
    wide = [point("collective", ("all_gather", 2), 1000.0, 40.0)]
    both = PointCosts.of_nodes({1: POINTS, 2: wide}, "two files", dtype="fp32")
    assert [both.estimate(Collective("all_gather", 1000.0 * ONE, 2, nodes)).seconds.item() for nodes in (1, 2)] == [
        5.0, 40.0,
    ]  # fmt: skip
    assert both.estimate(gemm(100.0)).seconds.item() == 2.0
    with pytest.raises(OutsideProfile, match=r"all_reduce, gpus 2 over 2 nodes"):
        both.estimate(Collective("all_reduce", 1000.0 * ONE, 2, 2))
    with pytest.raises(OutsideProfile, match=r"of 1, 2 node\(s\), a collective over 4"):
        both.estimate(Collective("all_gather", 1000.0 * ONE, 2, 4))


def test_places_lists_what_would_have_to_be_measured() -> None:
    found = places([gemm(5.0), gemm(3.0), gemm(0.0), MemoryBound(bytes=2.0 * ONE, name="norm")])
    assert found == {("gemm", (8, 4)): [3.0, 5.0], ("memory_bound", ("norm",)): [2.0]}


def file_of(**changes: Any) -> dict[str, Any]:
    return {
        "format": "moesim-points",
        "schema_version": 1,
        "measured": "2026-11-26T00:00:00+00:00",
        "dtype": "fp32",
        "nodes": 1,
        "hardware": {},
        "versions": {},
        "points": [one.model_dump(mode="json") for one in POINTS],
        **changes,
    }


def test_a_file_of_points_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    path.write_text(json.dumps(file_of()))
    assert list(read_points(path).points) == POINTS


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not valid JSON"),
        ("[]", "points.json"),
        (json.dumps(file_of(format="other")), "format"),
        (json.dumps(file_of(points=[])), "points"),
        (json.dumps(file_of(points=[POINTS[0].model_dump() | {"seconds": 0.0}])), "seconds"),
        (json.dumps(file_of(points=[POINTS[0].model_dump() | {"key": [1]}])), "a key of gemm has n, k"),
        (json.dumps(file_of(points=[POINTS[0].model_dump() | {"family": "magic"}])), "family"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        read_points(path)
    assert word in caught.value.line()
    assert str(path) in caught.value.line()
    assert "\n" not in caught.value.line()
