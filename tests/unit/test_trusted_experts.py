"""Balanced expert rows faster than the HBM are not trusted; what lies beyond them is anchored on skewed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from moesim.cost.estimate import Estimate, Tag
from moesim.cost.ops import ExpertGemm
from moesim.errors import OutsideProfile
from moesim.spec.hf import load_model
from moesim.spec.scenario import Scenario
from profiles.costs import from_scenario
from profiles.experts import as_balanced, expert_table, skewed_alone, skewed_runs
from profiles.grouped import Physics, Shape, balanced_run, predicted
from profiles.importers.aiconfigurator import Ledger, import_tables
from profiles.leave_out import fit_experts
from profiles.store import write_profile
from tests.costs_cluster import h200

# DeepSeek-V3's 256 experts of 45.4 MB on one rank: 11.63 GB, at H200's 4.8 TB/s 2.42 ms; 128 of them 1.21 ms.
HUGE = {"hidden_size": 7168, "inter_size": 2048, "num_experts": 256, "moe_tp_size": 1, "moe_ep_size": 1, "topk": 8}


def raw(distribution: str, tokens: int, latency_ms: float, **changed: Any) -> dict[str, Any]:
    return {
        "framework": "SGLang", "version": "0.5.14", "device": "NVIDIA H200", "kernel_source": "k", "op_name": "moe",
        "moe_dtype": "fp8_block", "num_tokens": tokens, "distribution": distribution, "latency": latency_ms,
        **HUGE, **changed,
    }  # fmt: skip


def imported(folder: Path, rows: list[dict[str, Any]]) -> tuple[pl.DataFrame, Ledger]:
    path = folder / "systems/data/h200_sxm/moe/sglang/0.5.14/moe_perf.parquet"
    path.parent.mkdir(parents=True)
    pl.DataFrame(rows).write_parquet(path)
    (folder / "systems/h200_sxm.yaml").write_text("gpu: {mem_bw: 4800000000000}\n")
    ledger = Ledger()
    found = import_tables(
        folder / "systems/data", system="h200_sxm", engine="sglang", package_version="0", ledger=ledger
    )
    return found["experts"], ledger


REASON = "weights read faster than the HBM can"


def test_balanced_rows_go_from_the_first_impossible_one_on_and_skewed_rows_stay(tmp_path: Path) -> None:
    balanced = [
        raw("balanced", 16, 1.25),  # 128 experts at 4.65 TB/s: possible
        raw("balanced", 32, 2.5),  # all 256, at 4.65 TB/s
        raw("balanced", 64, 2.4),  # at 4.85 TB/s: impossible, by a hair
        raw("balanced", 512, 9.0),  # possible by itself, and above
    ]
    skewed = [raw(name, tokens, 1.0) for name in ("power_law_1.01", "power_law_1.2") for tokens in (16, 64, 512)]
    half = [raw("balanced", 512, 3.0, moe_ep_size=2)]  # another split: 128 experts, possible
    found, ledger = imported(tmp_path, [*balanced, *skewed, *half])
    kept = found.filter(pl.col("distribution") == "uniform").sort("local_experts", "routed")
    assert kept.select("local_experts", "routed").rows() == [(128, 2048.0), (256, 128.0), (256, 256.0)]
    assert found.filter(pl.col("distribution") != "uniform").height == 6
    count = ledger.tables["moe_perf"]
    assert (count.rows, count.stored, count.left_out) == (11, 9, {REASON: 2})


def test_weights_that_a_cache_may_hold_prove_nothing(tmp_path: Path) -> None:
    """One token's 8 experts are 363 MB, below the 500 MB that are surely read from memory."""
    found, ledger = imported(tmp_path, [raw("balanced", 1, 0.01), raw("balanced", 512, 9.0)])
    assert found.height == 2
    assert ledger.tables["moe_perf"].left_out == {}


# Experts of one rank, or a half of them on each of two: a kernel that is bound by memory, then by computing.
SHAPE = Shape(1024, 512, "bf16", 64, 4, "fused")
PHYSICS = Physics(1e-5, 2e-6, 3e12, 4e14, 2e12, 3.0)
COLUMNS = ("local_experts", "distribution", "routed", "latency_s")


def rows(*found: tuple[int, str, float, float]) -> pl.DataFrame:
    return pl.DataFrame(found, schema=COLUMNS, orient="row")


def balanced_s(slots: int, routed: float) -> float:
    return float(predicted(PHYSICS, SHAPE, [balanced_run(SHAPE, slots, routed, 1.0)])[0])


def skewed_s(slots: int, exponent: float, routed: float) -> float:
    """Model seconds of a skewed row's own draws."""
    ((_, _, run),) = skewed_runs(SHAPE, rows((slots, f"power_law_{exponent}", routed, 1.0)))
    return float(predicted(PHYSICS, SHAPE, [run])[0])


BALANCED = rows(*((64, "uniform", p, balanced_s(64, p)) for p in (4.0, 16.0, 64.0)))
# The skewed rows took 1.3 times as long as the model says.
SLOW = 1.3
SKEWED = rows(*((64, "power_law_1.2", p, SLOW * skewed_s(64, 1.2, p)) for p in (16.0, 512.0, 1024.0, 4096.0)))


def test_only_skewed_rows_beyond_the_last_trusted_one_stand_alone() -> None:
    eplb = rows((64, "power_law_1.01_eplb", 4096.0, 1.0))
    other = rows((32, "power_law_1.2", 16.0, 1.0))  # no balanced row of 32 local experts at all
    alone = skewed_alone(SHAPE, pl.concat([BALANCED, SKEWED, eplb, other]))
    assert alone.columns == list(COLUMNS)
    assert alone.sort("local_experts", "routed")["routed"].to_list() == [16.0, 512.0, 1024.0, 4096.0]
    assert "power_law_1.01_eplb" not in alone["distribution"].to_list()
    contiguous = Shape(1024, 512, "bf16", 64, 4, "deepep_normal")
    assert skewed_alone(contiguous, SKEWED).height == 0


def test_a_run_takes_the_place_of_the_balanced_run_of_its_length() -> None:
    """Against bisection for the pairs; a balanced run takes its own place."""
    runs = [run for _, _, run in skewed_runs(SHAPE, SKEWED)]
    found, seconds = as_balanced(SHAPE, PHYSICS, 64, runs)
    assert seconds.tolist() == [run.seconds for run in runs]
    for pairs, run in zip(found, runs, strict=True):
        asked, low, high = float(predicted(PHYSICS, SHAPE, [run])[0]), 1.0, 2.0**24
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if balanced_s(64, middle) < asked else (low, middle)
        assert pairs == pytest.approx(low, rel=0.03)  # between points an eighth of an octave apart
        assert balanced_s(64, pairs) == pytest.approx(asked, rel=0.005)
    own, _ = as_balanced(SHAPE, PHYSICS, 64, [balanced_run(SHAPE, 64, 300.0, 1.0)])
    assert own[0] == pytest.approx(300.0, rel=0.03)
    far = balanced_run(SHAPE, 64, 2.0**25, 1.0)
    assert len(as_balanced(SHAPE, PHYSICS, 64, [far])[0]) == 0


def test_prices_pass_through_the_trusted_rows_and_then_through_the_skewed_ones() -> None:
    table = expert_table(SHAPE, pl.concat([BALANCED, SKEWED]), (PHYSICS, {}))
    assert table is not None
    curve = table.at(64)
    assert curve is not None
    assert curve.measured

    def price(pairs: float) -> float:
        return float(curve.price(np.full((1, 64), pairs / 64))[0][0])  # type: ignore[union-attr]

    for pairs in (4.0, 16.0, 64.0):
        load = np.array([balanced_s(64, pairs)])
        seconds, tags = curve.by_load.price(load)
        assert seconds == pytest.approx(load, rel=1e-6)
        assert tags[0] == Tag.MEASURED
    assert price(64.0) == pytest.approx(balanced_s(64, 64.0), rel=1e-6)  # one token on each expert, as they ran it
    # A skewed run's measured time is the price of the balanced load that the model holds for as long.
    for pairs in (512.0, 1024.0, 4096.0):
        load = np.array([skewed_s(64, 1.2, pairs)])
        assert curve.by_load.price(load)[0] == pytest.approx(SLOW * load, rel=0.01)
    # Between the last balanced row and the first anchor seconds run in a line over the load.
    low, high = balanced_s(64, 64.0), skewed_s(64, 1.2, 512.0)
    halfway = curve.by_load.price(np.array([(low + high) / 2]))[0][0]
    assert halfway == pytest.approx((low + SLOW * high) / 2, rel=0.01)
    # The skewed row of 16 pairs lies below the last balanced one and moves nothing.
    plain = expert_table(SHAPE, BALANCED, (PHYSICS, {}))
    assert plain is not None
    inside = np.linspace(balanced_s(64, 4.0), low, 9)
    np.testing.assert_allclose(plain.at(64).by_load.price(inside)[0], curve.by_load.price(inside)[0])  # type: ignore[union-attr]
    grown = [price(pairs) for pairs in np.geomspace(64, 4096, 40)]
    assert (np.diff(grown) > 0).all()


def test_skewed_rows_alone_make_a_table_and_rows_of_a_balancer_none() -> None:
    table = expert_table(SHAPE, SKEWED, (PHYSICS, {}))
    assert table is not None
    curve = table.at(64)
    assert curve is not None
    load = skewed_s(64, 1.2, 1024.0)
    assert curve.by_load.price(np.array([load]))[0][0] == pytest.approx(SLOW * load, rel=0.01)
    laid_out = SKEWED.with_columns(distribution=pl.lit("power_law_1.2_eplb"))
    assert expert_table(SHAPE, laid_out, (PHYSICS, {})) is None


def test_a_single_measured_size_is_still_a_price() -> None:
    table = expert_table(SHAPE, BALANCED.filter(pl.col("routed") == 64.0), (PHYSICS, {}))
    assert table is not None
    seconds, _ = table.at(64).price(np.ones((1, 64)))  # type: ignore[union-attr]
    assert seconds[0] == pytest.approx(balanced_s(64, 64.0), rel=1e-6)
    one_skewed = SKEWED.filter(pl.col("routed") == 4096.0)
    assert expert_table(SHAPE, one_skewed, (PHYSICS, {})) is None  # its place is by the model alone
    both = expert_table(SHAPE, pl.concat([BALANCED[:1], one_skewed]), (PHYSICS, {}))
    assert both is not None
    assert len(both.rows[64][0]) == 2


def test_draws_that_leave_the_rank_empty_are_no_anchor() -> None:
    """One pair over 256 experts: rounded, no expert of the draw has a token; the collector's own draw had."""
    shape = Shape(1024, 512, "bf16", 256, 1, "fused")
    found = list(skewed_runs(shape, rows((256, "power_law_1.2", 1.0, 1e-5), (256, "power_law_1.2", 512.0, 1e-4))))
    assert [run.seconds for _, _, run in found] == [1e-4]
    assert all(run.histograms.any() for _, _, run in found)


def profiled(part: pl.DataFrame, engine: str = "sglang", version: str = "1") -> pl.DataFrame:
    """Rows as a profile stores them."""
    columns = {
        "grouping": "fused", "dtype": "bf16", "hidden": 1024, "intermediate": 512, "experts": 64, "top_k": 4,
        "engine": engine, "version": version, "kernel": "k", "device": "d", "system": "h200_sxm", "package": "p",
        "package_version": "0", "tag": "measured",
    }  # fmt: skip
    return part.with_columns(**{name: pl.lit(value) for name, value in columns.items()})


def sizes(exponents: tuple[float, ...], slots: int = 64) -> pl.DataFrame:
    pairs = [2.0**power for power in range(6, 16)]
    found = [(slots, f"power_law_{e}", p, SLOW * skewed_s(slots, e, p)) for e in exponents for p in pairs]
    return rows(*found)


def test_every_other_exponent_judges_what_the_rest_have_anchored() -> None:
    """The world is 1.3 times the model: the fit learns that, and both halves of the skewed rows are met closely."""
    slow = BALANCED.with_columns(latency_s=pl.col("latency_s") * SLOW)
    part = profiled(pl.concat([slow, sizes((1.01, 1.2))]))
    found = fit_experts(part)
    assert list(found["parameters"]) == ["fused|bf16|1024|512|64|4|sglang|1"]
    residuals = found["residuals"]["fused"]
    beyond = 9  # of the ten sizes of exponent 1.2, which is left out; 64 pairs lie on the last balanced row
    assert len(residuals) == beyond
    assert np.abs(residuals).max() < 0.1
    alone = fit_experts(profiled(sizes((1.01,))))["residuals"]["fused"]
    assert len(alone) == 0  # one exponent: nothing is left to judge by


@pytest.mark.parametrize("distribution", ["uniform", "power_law_1.2"])
def test_numbers_of_experts_with_one_row_each_are_no_error(distribution: str) -> None:
    many = Shape(1024, 512, "bf16", 512, 4, "fused")
    part = rows(*((2**k, distribution, 64.0, 1e-4 * (k + 1)) for k in range(10)))
    found = fit_experts(profiled(part).with_columns(experts=pl.lit(many.experts)))
    assert len(found["parameters"]) == (1 if distribution == "uniform" else 0)


def priced(folder: Path, version: str | None, extrapolate: str = "refuse") -> Estimate:
    """One token on each of 64 experts of vLLM's tables."""
    cost = {"profiles": [str(folder)], "extrapolate": extrapolate}
    asked = {
        "model": "deepseek-ai/DeepSeek-V3", "cluster": {"system": "h200_sxm"}, "engine": {"name": "vllm"},
        "cost": cost if version is None else cost | {"experts_version": version},
        "serving": {"workload": {"isl": 9, "osl": 9, "requests": 1, "arrivals": {"concurrency": 1}}},
    }  # fmt: skip
    scenario = Scenario.read(asked, where="test")
    costs = from_scenario(scenario, load_model("deepseek-ai/DeepSeek-V3"), h200(1))
    return costs.estimate(ExpertGemm(np.ones((1, 64)), 1024, 512, 64, 4, "bf16", "fused"))


def two_sizes(seconds: float) -> pl.DataFrame:
    return rows((64, "uniform", 64.0, seconds), (64, "uniform", 128.0, 2 * seconds))


def test_experts_are_priced_by_the_version_that_is_asked_for(tmp_path: Path) -> None:
    seconds = {"0.18.0": 1e-3, "0.19.0": 2e-3, "0.20.0": 3e-3}
    table = pl.concat([profiled(two_sizes(s), "vllm", version) for version, s in seconds.items()])
    write_profile(tmp_path / "p", {"experts": table}, {})
    assert priced(tmp_path / "p", None).seconds[0] == pytest.approx(3e-3)
    assert priced(tmp_path / "p", "0.19.0").seconds[0] == pytest.approx(2e-3)
    assert priced(tmp_path / "p", "0.18.0").seconds[0] == pytest.approx(1e-3)
    with pytest.raises(OutsideProfile):
        priced(tmp_path / "p", "0.17.0")


def test_a_version_binds_no_other_engines_tables(tmp_path: Path) -> None:
    """Where that version lacks the shape, another engine's table of it stands in, whatever its versions are called."""
    write_profile(tmp_path / "p", {"experts": profiled(two_sizes(5e-3), "sglang", "0.5.14")}, {})
    found = priced(tmp_path / "p", "0.19.0", "allow")
    assert found.seconds[0] == pytest.approx(5e-3)
    assert found.tags[0] == Tag.EXTRAPOLATED
    assert "standing in for vllm" in found.source
