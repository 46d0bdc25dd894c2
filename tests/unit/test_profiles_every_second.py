"""The protocol that leaves every second size out, and the rules that prices run by between measured sizes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from moesim.cli import run
from moesim.errors import BadInput
from profiles.check_tables import by_family, every_second_left_out
from profiles.every_second import every_second, leave_out, log_log, predicted
from profiles.expert_load import expert_load
from profiles.fit import OUTSIDE, refined, surface
from profiles.raw_tables import read_points
from profiles.skew_out import leave_distributions_out

SIZES = [1, 2, 4, 8, 16, 32, 64, 128]


def write(root: Path, path: str, rows: list[dict[str, object]]) -> None:
    target = root / "h200_sxm" / f"{path}.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows).write_parquet(target)


def all_gather(sizes: list[int], slope: float = 1e-3, gpus: int = 8) -> list[dict[str, object]]:
    key = {"nccl_dtype": "half", "num_gpus": gpus, "op_name": "all_gather"}
    return [{**key, "message_size": size, "latency": 0.01 + slope * size} for size in sizes]


def test_odd_positions_are_left_out_and_the_last_is_kept() -> None:
    groups = np.array([1] * 6 + [2] * 5 + [3] * 4)
    left = every_second(groups, np.ones(15, dtype=bool))
    assert np.flatnonzero(left).tolist() == [1, 3, 7, 9]


def test_the_same_within_the_kept_rows() -> None:
    groups = np.ones(11, dtype=np.int64)
    left = every_second(groups, np.ones(11, dtype=bool))
    again = every_second(groups, ~left)
    assert np.flatnonzero(again).tolist() == [2, 6]


def test_predictions_never_read_what_was_left_out(tmp_path: Path) -> None:
    write(tmp_path, "comm/nccl/2/nccl_perf", all_gather(SIZES))
    (points,) = read_points(tmp_path, ["h200_sxm"])
    left = every_second(points.groups, np.ones(len(points.sizes), dtype=bool))
    before = predicted(points, ~left, left)
    changed = dataclasses.replace(points, seconds=np.where(left, 1e9, points.seconds))
    after = predicted(changed, ~left, left)
    np.testing.assert_array_equal(before, after)
    assert np.isnan(after[~left]).all()


def test_a_latency_and_a_rate_are_found_exactly_and_log_log_is_not(tmp_path: Path) -> None:
    write(tmp_path, "comm/nccl/2/nccl_perf", all_gather(SIZES))
    (points,) = read_points(tmp_path, ["h200_sxm"])
    found = leave_out(points)
    np.testing.assert_allclose(found.ours, 0.0, atol=1e-12)
    assert np.abs(found.plain).max() > 0.01
    (line,) = by_family([every_second_left_out(points, found)])
    assert line.family == "NCCL"
    assert line.points == 3
    assert line.holds


def test_a_time_held_up_in_one_dtype_is_mended_by_the_other_where_that_is_kept(tmp_path: Path) -> None:
    half = all_gather(SIZES)
    held_up = [{**row, "latency": 1.0} if row["message_size"] == 4 else row for row in half]
    int8 = [{**row, "nccl_dtype": "int8", "message_size": 2 * size} for row, size in zip(half, SIZES, strict=True)]
    write(tmp_path, "comm/nccl/2/nccl_perf", held_up + int8)
    (points,) = read_points(tmp_path, ["h200_sxm"])
    left = every_second(points.groups, np.ones(len(points.sizes), dtype=bool))
    mended = predicted(points, ~left, left)
    own = (points.keys["nccl_dtype"] == "half").to_numpy() & left
    np.testing.assert_allclose(mended[own], points.seconds[own], rtol=0.04)
    other = points.keys["nccl_dtype"].to_numpy() == "int8"
    alone = predicted(points, ~left & ~other, own)
    assert (alone[own][:2] > 3.0 * points.seconds[own][:2]).all()  # a single time cannot tell that it was held up


def test_the_other_dtype_is_read_where_it_is_kept_alone(tmp_path: Path) -> None:
    """The other dtype starts at another size, so it is kept where this one is left out, and the other way round."""
    half = all_gather(SIZES)
    int8 = [{**row, "nccl_dtype": "int8", "message_size": 4 * size} for row, size in zip(half, SIZES, strict=True)]
    write(tmp_path, "comm/nccl/2/nccl_perf", half + int8)
    (points,) = read_points(tmp_path, ["h200_sxm"])
    left = every_second(points.groups, np.ones(len(points.sizes), dtype=bool))
    before = predicted(points, ~left, left)
    changed = dataclasses.replace(points, seconds=np.where(left, 1e-9, points.seconds))
    np.testing.assert_array_equal(predicted(changed, ~left, left), before)


def test_reductions_are_never_mended_by_another_dtype(tmp_path: Path) -> None:
    half = [{**row, "op_name": "all_reduce"} for row in all_gather(SIZES)]
    int8 = [{**row, "nccl_dtype": "int8", "latency": 1e-6} for row in half]
    int8 = [{**row, "message_size": 2 * size} for row, size in zip(int8, SIZES, strict=True)]
    write(tmp_path, "comm/nccl/2/nccl_perf", half + int8)
    (points,) = read_points(tmp_path, ["h200_sxm"])
    own = (points.keys["nccl_dtype"] == "half").to_numpy()
    left = every_second(points.groups, np.ones(len(points.sizes), dtype=bool)) & own
    np.testing.assert_allclose(predicted(points, ~left, left)[left], points.seconds[left], rtol=1e-9)


def test_repeated_rows_are_their_median_and_short_groups_stay_whole(tmp_path: Path) -> None:
    rows = all_gather(SIZES) + all_gather([4], slope=100.0) + all_gather([4]) + all_gather([1, 2, 4, 8], gpus=2)
    write(tmp_path, "comm/nccl/2/nccl_perf", rows)
    (points,) = read_points(tmp_path, ["h200_sxm"])
    assert len(points.sizes) == len(SIZES) + 4
    left = every_second(points.groups, np.ones(len(points.sizes), dtype=bool))
    assert left.sum() == 3
    np.testing.assert_allclose(predicted(points, ~left, left)[left], log_log(points, ~left, left)[left], rtol=0.3)


def test_experts_are_touched_before_they_are_filled(tmp_path: Path) -> None:
    row = {
        "moe_dtype": "fp8", "hidden_size": 4096, "inter_size": 1024, "topk": 8, "num_experts": 64, "moe_tp_size": 1,
        "moe_ep_size": 1, "distribution": "balanced",
    }  # fmt: skip
    skewed = {**row, "distribution": "power_law_1.2"}
    rows = [{**one, "num_tokens": size, "latency": 1.0} for one in (row, skewed) for size in SIZES]
    write(tmp_path, "moe/sglang/1/moe_perf", rows)
    (points,) = read_points(tmp_path, ["h200_sxm"])
    loads = expert_load(points).reshape(2, -1)
    assert (np.diff(loads) > 0).all()
    assert loads[0, 3] / loads[0, 0] == pytest.approx(8.0, rel=0.05)  # 64 pairs touch all 64 experts
    assert loads[0, 5] / loads[0, 3] < 1.2  # four times the tokens, no more weights
    assert (loads[1, 2:] < loads[0, 2:]).all()  # skewed tokens touch fewer experts


def test_below_one_token_an_expert_is_touched_in_proportion(tmp_path: Path) -> None:
    """Skewed rows touch as many experts as have pairs while no expert has a whole token, never more than there are."""
    row = {
        "moe_dtype": "fp8", "hidden_size": 4096, "inter_size": 1024, "topk": 8, "num_experts": 256, "moe_tp_size": 1,
        "moe_ep_size": 1, "latency": 1.0,
    }  # fmt: skip
    names = ("balanced", "power_law_1.01")
    rows = [{**row, "distribution": name, "num_tokens": size} for name in names for size in (1, 2, 4096, 8192)]
    write(tmp_path, "moe/sglang/1/moe_perf", rows)
    (points,) = read_points(tmp_path, ["h200_sxm"])
    balanced, skewed = expert_load(points).reshape(2, -1)
    assert skewed[:2] == pytest.approx(balanced[:2], rel=0.05)
    assert skewed[2:] == pytest.approx(balanced[2:], rel=0.05)


def test_a_grid_bends_between_its_columns_and_learns_from_rows_of_equal_work() -> None:
    batch, length = np.meshgrid([1.0, 2.0, 4.0], 4.0 ** np.arange(5), indexing="ij")
    work = batch * length
    seconds = np.maximum(work, 16.0)  # a kink that chords across a factor of four do not see
    grid = surface(batch.ravel(), length.ravel(), seconds.ravel())
    at = np.array([8.0, 32.0])
    plain = np.abs(np.log(grid.price(np.full(2, 2.0), at)[0] / np.maximum(2.0 * at, 16.0)))
    better = np.abs(np.log(refined(grid, "chord").price(np.full(2, 2.0), at)[0] / np.maximum(2.0 * at, 16.0)))
    assert (better <= plain + 1e-9).all()
    assert better[0] < 0.7 * plain[0]


@pytest.mark.parametrize("rule", ["chord", "bend"])
def test_a_refined_grid_keeps_its_points_and_rises(rule: str) -> None:
    rng = np.random.default_rng(1)
    batch, length = (axis.ravel() for axis in np.meshgrid([1, 2, 4, 8, 16], [1, 16, 64, 100, 512, 2048], indexing="ij"))
    seconds = 1e-5 + 1e-8 * (batch * length) ** 1.2 * rng.uniform(0.9, 1.1, batch.shape)
    keep = batch * length < 10_000
    grid = surface(batch[keep], length[keep], seconds[keep])
    fine = refined(grid, rule)  # type: ignore[arg-type]
    again, tags = fine.price(batch[keep], length[keep])
    first, _ = grid.price(batch[keep], length[keep])
    np.testing.assert_allclose(again, first, rtol=1e-9)
    assert (tags >= 0).all()
    line, known = fine.price(np.full(400, 3.0), np.geomspace(1, 2048, 400))
    assert (np.diff(line[known != OUTSIDE]) >= -1e-15).all()


def test_the_command_prints_what_holds_and_fails_where_a_family_misses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "comm/nccl/2/nccl_perf", all_gather(SIZES))
    arguments = ["profile", "check", "--leave-out", "every-second", "--tables", str(tmp_path), "--systems", "h200_sxm"]
    assert run([*arguments, "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)["families"]
    assert line["median"] < 1e-9
    noisy = [{**row, "latency": 0.01 if place % 2 else 1.0} for place, row in enumerate(all_gather(SIZES))]
    write(tmp_path, "comm/nccl/2/nccl_perf", noisy)
    assert run(arguments) == 1
    assert "missed" in capsys.readouterr().out


def test_a_distribution_is_predicted_from_the_nearest_other_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "moe_dtype": "fp8", "hidden_size": 4096, "inter_size": 1024, "topk": 8, "num_experts": 64, "moe_tp_size": 1,
        "moe_ep_size": 4, "latency": 1.0,
    }  # fmt: skip
    names = ("balanced", "power_law_1.01", "power_law_1.2", "power_law_1.2_eplb")
    rows = [{**row, "distribution": name, "num_tokens": size} for name in names for size in SIZES]
    write(tmp_path, "moe/sglang/1/moe_perf", rows)
    (points,) = read_points(tmp_path, ["h200_sxm"])
    true = dataclasses.replace(points, seconds=expert_load(points) * 1.7)
    found = dict(leave_distributions_out(true))
    assert list(found) == ["power_law_1.01 from power_law_1.2", "power_law_1.2 from power_law_1.01"]
    for residuals in found.values():
        np.testing.assert_allclose(residuals, 0.0, atol=1e-12)
    arguments = ["profile", "check", "--leave-out", "distribution", "--tables", str(tmp_path)]
    assert run([*arguments, "--systems", "h200_sxm", "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["families"][-1]["family"] == "all"


def test_an_unknown_system_or_protocol_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "comm/nccl/2/nccl_perf", all_gather(SIZES))
    arguments = ["profile", "check", "--tables", str(tmp_path), "--leave-out"]
    assert run([*arguments, "every-second", "--systems", "h300"]) == 2
    assert "no tables for the system" in capsys.readouterr().err
    assert run([*arguments, "every-third"]) == 2
    assert "use every-second" in capsys.readouterr().err


def test_a_missing_column_names_the_file(tmp_path: Path) -> None:
    write(tmp_path, "comm/nccl/2/nccl_perf", [{"num_gpus": 2, "latency": 1.0}])
    with pytest.raises(BadInput, match="'message_size' is missing"):
        list(read_points(tmp_path, ["h200_sxm"]))


@pytest.mark.skipif(not os.environ.get("MOESIM_AIC_TABLES"), reason="MOESIM_AIC_TABLES names no unpacked tables")
def test_the_thresholds_on_the_published_tables() -> None:
    from profiles.importers.aiconfigurator import find_package

    data, _ = find_package(Path(os.environ["MOESIM_AIC_TABLES"]))
    lines = {
        line.family: line
        for line in by_family(
            [
                every_second_left_out(points, leave_out(points))
                for points in read_points(data, ["h100_sxm", "h200_sxm", "b200_sxm"])
                if points.kind.family not in ("GEMM", "MoE", "sparse module prefill")  # half a minute and more
            ]
        )
    }
    for family in ("attention", "MLA", "DeepEP", "NCCL"):
        assert lines[family].holds, family
