"""Over-dispersion by request, domain and time: known components are found again, and real records tell theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from moesim.errors import BadInput
from moesim.routing.components import between_loads, fit_components
from moesim.routing.dispersion import Dispersion, default_dispersion, dispersion_of
from moesim.routing.drift import cut_in_blocks
from moesim.routing.readers import read_loads
from moesim.routing.records import Records
from moesim.routing.trace import RoutingCounts
from moesim.spec.drift import DriftSpec

LAYERS, EXPERTS, TOP_K = 12, 128, 1


def generated(
    seed: int, *, request: float, domain: float, time: float, domains: int = 6, steps: int = 24, life: int = 3
) -> Records:
    """Records of requests that live a few steps, eight at a time, with factors of known cv2 for each layer.

    A token picks one expert by its shares. That these sum to 1 takes about 2 / EXPERTS off a factor's cv2, relatively.
    """
    rng = np.random.default_rng(seed)
    together, tokens = 8, 160

    def factors(cv2: float, count: int) -> np.ndarray:
        if cv2 == 0.0:
            return np.ones((count, LAYERS, EXPERTS))
        return rng.gamma(1.0 / cv2, cv2, size=(count, LAYERS, EXPERTS))

    requests = steps // life * together
    base = rng.dirichlet(np.full(EXPERTS, 4.0), size=LAYERS)
    of_domain, of_step, of_request = factors(domain, domains), factors(time, steps), factors(request, requests)
    domain_of = rng.integers(domains, size=requests)
    step, place = (axis.ravel() for axis in np.indices((steps, together)))
    asked = step // life * together + place
    chance = base * of_domain[domain_of[asked]] * of_request[asked] * of_step[step]
    counts = rng.multinomial(tokens, chance / chance.sum(axis=2, keepdims=True)).astype(float)
    return Records(counts, step=step, request=asked, domain=domain_of[asked])


@pytest.mark.parametrize(
    "truth",
    [
        {"request": 0.4, "domain": 0.1, "time": 0.02},
        {"request": 0.05, "domain": 0.3, "time": 0.0},
        {"request": 0.2, "domain": 0.0, "time": 0.1},
        {"request": 0.0, "domain": 0.0, "time": 0.0},
    ],
    ids=str,
)
def test_known_components_are_found_again(truth: dict[str, float]) -> None:
    """Within three of the errors that the fit states, and these errors are small beside what they are of."""
    for seed in range(2):
        found = fit_components(generated(seed, **truth), TOP_K)
        for name, wanted in truth.items():
            one = getattr(found, name)
            assert one is not None
            assert one.error is not None
            assert one.error < 0.02 + 0.1 * wanted
            assert abs(one.cv2 - wanted) < 3 * one.error + 2 * wanted / EXPERTS, (name, seed)


def test_two_requests_by_hand() -> None:
    """Request 0 picks expert 0 with both tokens, request 1 expert 1: they agree within, and never across."""
    counts = np.asarray([[[2.0, 0.0, 1.0]], [[0.0, 2.0, 1.0]]])  # the third expert is picked once by each; top-k 1.5
    found = fit_components(Records(counts, request=np.arange(2)), top_k=1)
    # Pairs of tokens of one request: 3 x 2 = 6 ordered ones each, of which 2 agree: 4 of 12. Across: 9 x 2 = 18, of
    # which 1 x 1 x 2 = 2 agree. (4 / 12) / (2 / 18) - 1 = 2.
    assert found.request is not None
    assert found.request.cv2 == pytest.approx(2.0)
    assert found.request.error is None  # one layer
    assert found.domain is None
    assert found.time is None


def test_what_labels_do_not_tell_is_not_told() -> None:
    records = generated(0, request=0.2, domain=0.1, time=0.05)
    plain = fit_components(Records(records.counts), TOP_K)
    assert (plain.request, plain.domain, plain.time) == (None, None, None)
    one_domain = fit_components(Records(records.counts, records.step, records.request), TOP_K)
    assert one_domain.domain is None
    assert one_domain.request is not None
    one_step = fit_components(Records(records.counts, np.zeros(len(records.counts), int), records.request), TOP_K)
    assert one_step.time is None
    with pytest.raises(BadInput, match="labels `step`"):
        Records(records.counts, step=np.arange(3))


def trace(records: Records, **columns: Any) -> pl.DataFrame:
    """The table that such a trace is."""
    cell, layer, expert = np.nonzero(records.counts)
    assert records.step is not None
    assert records.request is not None
    assert records.domain is not None
    return pl.DataFrame(
        {
            "step": records.step[cell] + 7,
            "layer_id": layer + 3,
            "expert_id": expert,
            "count": records.counts[cell, layer, expert],
            "request_id": [f"r{one}" for one in records.request[cell]],
            "domain": records.domain[cell],
            **columns,
        }
    )


def test_a_trace_with_request_ids_brings_its_own_dispersion(tmp_path: Path) -> None:
    records = generated(1, request=0.4, domain=0.1, time=0.05)
    trace(records).write_parquet(tmp_path / "t.parquet")
    load = read_loads(tmp_path / "t.parquet", experts=EXPERTS)
    assert load.records is not None
    assert load.counts.shape == (24, LAYERS, EXPERTS)
    assert load.layer_ids.tolist() == list(range(3, 3 + LAYERS))
    np.testing.assert_array_equal(load.records.counts.sum(axis=0), load.counts.sum(axis=0))
    found, direct = dispersion_of([load], top_k=TOP_K), fit_components(records, TOP_K)
    assert found.tag == "measured"
    assert [found.tag_of(name) for name in ("request", "domain", "time")] == ["measured"] * 3
    for name in ("request", "domain", "time"):
        assert getattr(found, f"{name}_cv2") == pytest.approx(getattr(direct, name).cv2, rel=1e-9)
    # Requests have domains: both average out with them, the time does not.
    assert found.step_cv2(10) == pytest.approx((found.request_cv2 + found.domain_cv2) / 10 + found.time_cv2)
    trace(records).drop("step", "domain").group_by("layer_id", "expert_id", "request_id").agg(
        pl.col("count").sum()
    ).write_parquet(tmp_path / "whole.parquet")
    less = dispersion_of([read_loads(tmp_path / "whole.parquet", experts=EXPERTS)], top_k=TOP_K)
    assert less.tag_of("request") == "measured"
    assert less.tag_of("time") == less.tag_of("domain") == "assumed"
    assert less.time_cv2 == default_dispersion().time_cv2
    assert less.tag == "assumed"  # a part of what is drawn is


def test_token_rows_are_counted_by_request(tmp_path: Path) -> None:
    rows = {"step": [0, 0, 1], "layer_id": [0, 0, 0], "experts": [[0, 1], [1, 2], [2, 0]], "request_id": [5, 5, 9]}
    pl.DataFrame(rows).write_parquet(tmp_path / "t.parquet")
    load = read_loads(tmp_path / "t.parquet")
    assert load.counts.tolist() == [[[1, 2, 1]], [[1, 0, 1]]]
    assert load.records is not None
    assert load.records.counts.tolist() == [[[1, 2, 1]], [[1, 0, 1]]]
    assert load.records.of_steps(np.asarray([1])).counts.tolist() == [[[1, 0, 1]]]


@pytest.mark.parametrize(
    ("column", "says"),
    [({"request_id": None}, "a row has no request_id"), ({"domain": None}, "a row has no domain")],
    ids=["request", "domain"],
)
def test_rows_without_a_label_are_refused(column: dict[str, Any], says: str, tmp_path: Path) -> None:
    frame = trace(generated(0, request=0.2, domain=0.1, time=0.05)).with_columns(
        pl.when(pl.int_range(pl.len()) == 5).then(None).otherwise(pl.col(name)).alias(name) for name in column
    )
    frame.write_parquet(tmp_path / "t.parquet")
    with pytest.raises(BadInput, match=says):
        read_loads(tmp_path / "t.parquet", experts=EXPERTS)


@pytest.mark.parametrize("value", [-1.0, float("nan"), 1e20])
def test_a_count_that_is_none_is_refused_as_without_requests(value: float, tmp_path: Path) -> None:
    frame = trace(generated(0, request=0.2, domain=0.1, time=0.05))
    frame.with_columns(
        pl.when(pl.int_range(pl.len()) == 5).then(value).otherwise(pl.col("count")).alias("count")
    ).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(BadInput):
        read_loads(tmp_path / "t.parquet", experts=EXPERTS)


def test_shares_are_not_taken_for_counts() -> None:
    shares = [RoutingCounts(np.full((1, 2, 8), 1 / 8), np.arange(2), 2, name=name) for name in "ab"]
    assert between_loads(shares, 2) is None
    assert between_loads(shares[:1], 2) is None


def test_domains_of_steps_do_not_average_out() -> None:
    by_step = Dispersion(0.4, 0.1, 0.0, tag="measured", source="test")
    assert by_step.step_cv2([1, 100]).tolist() == pytest.approx([0.5, 0.104])
    assert by_step.tag_of("domain") == "measured"


@pytest.mark.data
def test_real_workloads_of_one_phase_differ_as_docs_say(shared_data: Path) -> None:
    folder = shared_data / "routing"
    for phase, files in (("prefill", 4), ("decode", 2)):
        loads = [read_loads(path, phase=phase) for path in sorted(folder.glob(f"deepseek_r1_{phase}_*.json"))]
        assert len(loads) == files
        found = between_loads(loads, 8)
        assert found is not None
        assert found.error is not None
        assert found.cv2 == pytest.approx(0.047, abs=0.005)  # docs/explanation/routing.md
        assert found.error < 0.15 * found.cv2
    everything = between_loads([read_loads(path) for path in sorted(folder.glob("deepseek_r1_*.json"))], 8)
    assert everything is not None
    assert everything.cv2 > 1.5 * 0.047  # phases differ more than the workloads of one


@pytest.mark.data
def test_a_real_run_s_time_component_grows_with_the_time_it_spans(shared_data: Path) -> None:
    load = read_loads(shared_data / "routing" / "smartmoe_ae_counts_first300.npz")
    settled = load.counts[200:]

    def over(steps: int) -> float:
        found = fit_components(Records(settled[:steps], step=np.arange(steps)), 1).time
        assert found is not None
        assert found.error is not None
        assert found.error < 0.35 * found.cv2
        return found.cv2

    assert default_dispersion().time_cv2 < over(20) < over(100) < 0.01
    blocks = cut_in_blocks([load], DriftSpec(blocks=6, block_s=1.0))
    apart = between_loads(blocks, 1)
    assert apart is not None
    assert apart.cv2 > 5 * over(100)  # the start of training drifts most


@pytest.mark.parametrize(
    "labels",
    [
        pl.Series([[1], [2], [1]]),
        pl.Series([{"a": 1}, {"a": 2}, {"a": 1}]),
        pl.Series([True, False, True]),
        pl.Series([float("nan"), 0.5, float("nan")]),
        pl.Series(["x", "", "x"]),
        pl.Series([b"x", b"", b"x"]),
    ],
    ids=["list", "struct", "bool", "float", "text", "binary"],
)
def test_labels_may_be_of_any_kind(labels: pl.Series, tmp_path: Path) -> None:
    frame = pl.DataFrame({"layer_id": [0, 0, 0], "expert_id": [0, 1, 0], "count": [3.0, 4.0, 5.0]})
    frame.with_columns(labels.alias("request_id")).write_parquet(tmp_path / "t.parquet")
    load = read_loads(tmp_path / "t.parquet")
    assert load.counts.tolist() == [[[8, 4]]]
    assert load.records is not None
    assert sorted(load.records.counts.tolist()) == [[[0, 4]], [[8, 0]]]
