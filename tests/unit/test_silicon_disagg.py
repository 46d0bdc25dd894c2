"""Measured runs with two pools: what ran behind a row, the scenario it becomes, its times and their score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.engine.serving import PrefillSide, Served
from moesim.errors import Infeasible
from profiles.store import DATA
from validate.silicon.disagg import Kept, disagg_times, means, rounds_of
from validate.silicon.disagg_launches import Workers, launches, layout_named
from validate.silicon.disagg_rows import Ran, ran
from validate.silicon.disagg_scenario import disagg_scenario, joined_gpus
from validate.silicon.price import Asked, Prediction, kept_for, predict, predictions_csv
from validate.silicon.rows import Layout, PoolRow, SiliconRow, clean_disaggregated
from validate.silicon.score import score, score_table

ONE = Layout(1, 1, 1, 1, 1)


def row(**changes: object) -> SiliconRow:
    """A run of DeepSeek-R1 on GB200 that tells no workers, alone at its concurrency."""
    found = SiliconRow(
        id="one", source="db-dump; silicon_concurrency=666; measured=2026-03-25", engine="trtllm",
        version="0.8.1.post1", model="deepseek-ai/DeepSeek-R1", system="gb200", precision="fp4", mode="disagg",
        isl=1024, osl=1024, dense="", experts="", layout=ONE, batch=1, concurrency=666,
        prefill=PoolRow(Layout(4, 1, 1, 1, 4), 0, 1), decode=PoolRow(Layout(32, 1, 1, 1, 4), 0, 1),
        ttft_ms=100.0, tpot_ms=10.0,
    )  # fmt: skip
    return replace(found, **changes)  # type: ignore[arg-type]


def test_layouts_of_launch_files() -> None:
    assert layout_named("TP4") == Layout(4, 1, 1, 4, 1)
    assert layout_named("TEP8") == Layout(8, 1, 1, 1, 8)
    assert layout_named("DEP32") == Layout(1, 1, 32, 1, 32)
    assert layout_named("DP8") == Layout(1, 1, 8, 8, 1)
    assert all(pool.layout.gpus == pool.layout.expert_tp * pool.layout.ep for one in launches() for pool in
               (one.prefill, one.decode))  # fmt: skip
    assert {one.drafts for one in launches()} == {0, 1, 2, 3}


def test_a_row_without_workers_is_found_by_its_concurrency() -> None:
    assert ran(row()) == Ran(Workers(1, layout_named("DEP4")), Workers(1, layout_named("DEP32")), 16, 0)
    with pytest.raises(Infeasible, match="no launch file this concurrency"):
        ran(row(concurrency=667))
    with pytest.raises(Infeasible, match="no launch file this concurrency"):  # another worker than any file's
        ran(row(prefill=PoolRow(Layout(2, 1, 1, 1, 2), 0, 1)))


def test_what_files_leave_open_is_refused_with_its_reason() -> None:
    both = row(concurrency=12, decode=PoolRow(Layout(8, 1, 1, 1, 8), 0, 1))
    with pytest.raises(Infeasible, match="with speculative decoding and without"):
        ran(both)
    with pytest.raises(Infeasible, match="does not tell its two pools"):
        ran(row(prefill=None))
    several = row(
        engine="sglang", system="gb300", version="0.5.8", concurrency=4096,
        prefill=PoolRow(ONE, 0, 1), decode=PoolRow(ONE, 0, 1),
    )  # fmt: skip
    with pytest.raises(Infeasible, match="several launch files"):
        ran(several)


def test_a_row_that_tells_its_workers_takes_limits_from_the_file_that_has_them() -> None:
    told = row(
        prefill=PoolRow(Layout(1, 1, 4, 1, 4), 1, 16), decode=PoolRow(Layout(1, 1, 32, 1, 32), 1, 16), concurrency=666
    )
    assert ran(told).running == 16
    other = replace(told, concurrency=700)
    assert ran(other) == Ran(Workers(1, Layout(1, 1, 4, 1, 4)), Workers(1, Layout(1, 1, 32, 1, 32)), None, 0)


def test_a_scenario_has_both_roles(tmp_path: Path) -> None:
    (tmp_path / "gb200").mkdir()
    one = row()
    scenario = disagg_scenario(one, ran(one), tmp_path, 3)
    assert scenario.serving is not None
    roles = scenario.serving.roles
    assert roles is not None
    assert (roles.prefill.gpus, roles.decode.gpus) == (4, 32)
    assert roles.decode.batching is not None
    assert roles.decode.batching["max_running_requests_per_dp_rank"] == 16
    assert scenario.serving.workload.requests == 3 * 666
    assert joined_gpus(one, ran(one)) == 32  # NVLink joins the rack, not the tray
    assert joined_gpus(replace(one, system="h200_sxm"), ran(one)) == 8
    with pytest.raises(Infeasible, match="requests were in flight"):
        disagg_scenario(replace(one, concurrency=None), ran(one), tmp_path, 3)
    with pytest.raises(Infeasible, match="no profile of gb200"):
        disagg_scenario(one, ran(one), tmp_path / "gb200", 3)
    squared = Ran(Workers(1, Layout(4, 1, 4, 1, 4)), Workers(1, layout_named("DEP4")), None, 0)
    with pytest.raises(Infeasible, match="contradict each other"):
        disagg_scenario(one, squared, tmp_path, 3)


def test_wide_experts_of_sglang_have_copies(tmp_path: Path) -> None:
    (tmp_path / "gb200").mkdir()
    wide = Ran(Workers(1, layout_named("DEP8")), Workers(1, layout_named("DEP32")), None, 0)
    for engine, redundant in (("sglang", 32), ("trtllm", 0)):
        scenario = disagg_scenario(row(engine=engine, precision="fp8"), wide, tmp_path, 2)
        assert scenario.serving is not None
        assert scenario.serving.roles is not None
        assert (scenario.serving.roles.decode.placement or {})["redundant_experts"] == redundant


def served(joined_s: list[float]) -> Served:
    """Three requests of 11 tokens, sent at once, whose caches arrived after one second."""
    ones, none = np.ones(3), np.zeros(0)
    ints = np.zeros(3, np.int64)
    base = Served(
        arrival_s=0 * ones, first_token_s=ones, finish_s=ones * 12.0, isl=ints + 8, osl=ints + 11, gap_s=none,
        gap_n=ints[:0], duration_s=12.0, steps=0, events=0, step_start_s=none, step_s=none, step_decode_seqs=ints[:0],
        step_prefill_tokens=ints[:0], step_instance=ints[:0], peak_kv_tokens=0,
    )  # fmt: skip
    return replace(base, prefill=PrefillSide(base, 0 * ones, 0.0, ints, ints, np.asarray(joined_s)))


def test_first_tokens_wait_for_a_place_in_the_batch() -> None:
    ttft_s, tpot_s = means(served([2.0, 2.0, 2.0]), 3, 0.5)
    assert (ttft_s, tpot_s) == pytest.approx((2.5, 1.0))
    ttft_s, _ = means(served([2.0, np.nan, 2.0]), 3, 0.0)  # the prefill worker answered
    assert ttft_s == pytest.approx(5.0 / 3)


def test_fewer_rounds_count_for_all_that_the_client_sends() -> None:
    ttft_s, _ = means(served([11.0, 2.0, 2.0]), 1, 0.0)
    assert ttft_s == pytest.approx(0.1 * 11.0 + 0.9 * 2.0)
    assert rounds_of(row(concurrency=4)) > rounds_of(row(concurrency=4096)) == 2


def test_rows_are_scored_apart_with_their_reasons() -> None:
    one, other = row(), row(id="two", concurrency=667, tpot_ms=11.0)
    found = [
        Prediction(one, 0.2, 0.010), Prediction(replace(one, id="again"), 0.2, 0.010),
        Prediction(other, None, None, "no launch file at 667"),
    ]  # fmt: skip
    told = score(found)
    half = told["disaggregated"][one.cell]
    assert (told["disaggregated"]["all_rows"], told["disaggregated"]["all_priced"]) == (3, 2)
    assert (half["rows"], half["priced"]) == (2, 1)
    assert half["reasons"] == {"no launch file at ###": 1}
    assert half["ttft"]["mape"] == pytest.approx(1.0)
    assert half["tpot"]["mape"] == pytest.approx(0.0)
    assert half["tokens_per_s_per_gpu"]["bias"] == pytest.approx((0.1 + 10.23) / (0.2 + 10.23) - 1.0)
    assert told[one.cell]["rows"] == 0
    assert "| disaggregated: rows, priced | " in score_table(told)
    assert "2 " not in predictions_csv(found).splitlines()[3]
    assert len(clean_disaggregated([one, replace(one, id="again"), replace(other, tpot_ms=None)])) == 1


def test_rows_that_ran_alike_are_simulated_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gb200").mkdir()
    runs = []

    def simulated(*asked: object) -> Served:
        runs.append(asked)
        return served([2.0, 2.0, 2.0])

    monkeypatch.setattr("validate.silicon.disagg.simulated", simulated)
    kept = Kept()
    one = row()
    assert disagg_times(one, tmp_path, kept) == disagg_times(replace(one, version="other"), tmp_path, kept)
    assert len(runs) == 1
    assert predict(one, tmp_path, kept=kept).status == "ok"
    assert predict(replace(one, prefill=None), tmp_path, kept=kept).reason == "the row does not tell its two pools"


def test_a_row_is_priced_with_the_shipped_profile() -> None:
    """The pools that it tells, on H200; with dearer costs its times are longer."""
    worker = PoolRow(Layout(8, 1, 1, 8, 1), 1, 4)
    one = row(
        engine="sglang", system="h200_sxm", precision="fp8", concurrency=3, osl=128, prefill=worker, decode=worker
    )
    found = predict(one, DATA)
    assert found.ttft_s is not None
    assert found.tpot_s is not None
    assert 0.05 < found.ttft_s < 1.0
    assert 0.005 < found.tpot_s < 0.03
    dearer = Asked(scale={"experts": 2.0})
    slower = predict(one, DATA, kept=kept_for(dearer), asked=dearer)
    assert (slower.tpot_s or 0.0) > 1.05 * found.tpot_s
