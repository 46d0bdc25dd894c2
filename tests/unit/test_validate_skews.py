"""The skews of `validate exchange`, when a pair counts as decided, and what the profile may not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput
from profiles.capture import Line
from profiles.collective_work import ELEMENT_BYTES
from profiles.traffic import endpoint, traffic
from validate.compare import order_beyond, rank_correlation, split_half, spread_of_medians
from validate.exchange.record import holds, record_of, table
from validate.exchange.run import Case, ExchangeJob, refuse_known, ten_cases

PROFILE = np.random.default_rng(0).dirichlet(np.ones(32))
SIZE = 2**20


def job(cases: tuple[Case, ...], out: Path = Path()) -> ExchangeJob:
    return ExchangeJob("gloo", cases, SIZE, 40, 0, str(out))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ten_skews_send_the_same_bytes_in_all(ranks: int) -> None:
    cases = ten_cases(PROFILE, ranks, source="synthetic routing")
    assert len({case.name for case in cases}) == 10
    counts = [case.counts(SIZE) for case in cases]
    assert {int(one.sum()) * ELEMENT_BYTES for one in counts} == {ranks * SIZE}
    assert len({tuple(endpoint(one, [0] * ranks).values()) for one in counts}) == 10
    busiest = [traffic(one).busiest(1.0) for one in counts]
    assert max(busiest) > 10 * min(busiest)
    even = np.full((ranks, ranks), SIZE // ELEMENT_BYTES // ranks)
    assert not any((one == even).all() for one in counts)


def test_a_job_travels_as_text(tmp_path: Path) -> None:
    import json
    from dataclasses import asdict

    asked = job(ten_cases(PROFILE, 2, source="x"), tmp_path)
    assert ExchangeJob.read(json.dumps(asdict(asked))) == asked


def test_ranks_that_cannot_exchange_are_refused() -> None:
    with pytest.raises(BadInput, match="1 rank exchanges nothing"):
        ten_cases(PROFILE, 1, source="x")
    with pytest.raises(BadInput, match="32 experts do not divide by 3 ranks"):
        ten_cases(PROFILE, 3, source="x")


def test_a_pair_is_decided_beyond_twice_the_larger_spread() -> None:
    measured, spread = np.array([1.0, 1.5, 3.0]), np.array([0.1, 0.3, 0.1])
    right = order_beyond(np.array([5.0, 4.0, 6.0]), measured, spread)
    assert (right.pairs, right.decided, right.agreed, right.undecided) == (3, 2, 2, 1)
    wrong = order_beyond(np.array([5.0, 6.0, 5.0]), measured, spread)
    assert (wrong.decided, wrong.agreed) == (2, 0)  # equal predictions foretell no order


def test_the_spread_is_of_medians_in_order_of_time() -> None:
    steady = np.tile([1.0, 2.0, 3.0, 2.0], (1, 10))
    assert spread_of_medians(steady) == pytest.approx([0.0])
    drifting = np.repeat(np.arange(10.0), 4)[None, :]
    assert spread_of_medians(drifting) == pytest.approx([7.2])  # p90 - p10 of 0 to 9


def test_halves_that_agree_have_a_ceiling_of_one() -> None:
    samples = np.arange(1.0, 6.0)[:, None] * np.random.default_rng(1).uniform(0.99, 1.01, (5, 40))
    half = split_half(samples, np.random.default_rng(0))
    assert half.rank == pytest.approx(1.0)
    assert half.reliability == pytest.approx(1.0, abs=1e-3)
    assert rank_correlation(np.array([1.0, 2.0, 4.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1.0)


def test_a_profile_that_holds_a_skew_is_refused() -> None:
    cases = ten_cases(PROFILE, 2, source="x")
    counts = [case.counts(SIZE) for case in cases]

    def line(key: dict[str, Any], size: float) -> Line:
        key = {"path": "gloo", "gpus": 2, "nodes": 1, **key}
        return Line("uneven_all_to_all", key, {"bytes": size}, "gloo", "d", False, 1.0, 1.0, 1.0, {}, {})

    held = endpoint(counts[3] * ELEMENT_BYTES, (0, 0))
    refuse_known([line(held, 2.0 * SIZE)], job(cases), counts, (0, 0))  # the same bytes of another size
    with pytest.raises(BadInput, match=r"the profile holds the skew '60% and 20% away'"):
        refuse_known([line(held, float(SIZE))], job(cases), counts, (0, 0))


def test_the_record_says_what_the_check_asks(tmp_path: Path) -> None:
    cases = ten_cases(PROFILE, 2, source="x")
    counts = [case.counts(SIZE) for case in cases]
    true_s = np.linspace(1e-3, 3e-3, 10)
    rng = np.random.default_rng(2)
    samples = true_s[:, None] * rng.uniform(0.98, 1.02, (10, 40))
    written = {
        "seconds": (true_s * 1.1).tolist(), "both_ways": 0.5, "together": 0.5, "tag": "formula",
        "predictions": {"file": "predictions.json", "written": "now", "sha256": "0"},
    }  # fmt: skip
    record = record_of(job(cases, tmp_path), counts, (0, 0), written, "later", samples, {"device": "a box"})
    assert record["comparison"]["span"] == pytest.approx(3.0, rel=0.05)
    assert record["comparison"]["error"]["median"] == pytest.approx(0.1, abs=0.02)
    assert record["comparison"]["rank_correlation"] == pytest.approx(1.0)
    assert holds(record)
    pairs = record["comparison"]["beyond_twice_the_spread"]
    assert f"{pairs['agreed']} of {pairs['decided']} ordered right" in table(record)
    assert pairs["decided"] > 30
    scattered = rng.uniform(1e-3, 3e-3, (10, 40))
    undecided = record_of(job(cases, tmp_path), counts, (0, 0), written, "later", scattered, {"device": "a box"})
    assert undecided["comparison"]["beyond_twice_the_spread"]["decided"] == 0
    assert "none, so no order is judged (45 differ less)" in table(undecided)
    backwards = {**written, "seconds": true_s[::-1].tolist()}
    assert not holds(record_of(job(cases, tmp_path), counts, (0, 0), backwards, "later", samples, {"device": "a box"}))
