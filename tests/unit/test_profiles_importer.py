"""The importer of aiconfigurator-core's tables, on small synthetic tables."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from moesim.cli import run
from moesim.errors import BadInput
from profiles.importers.aiconfigurator import Ledger, find_package, import_tables
from profiles.leave_out import fit_experts
from profiles.record import FAMILIES

COMMON = {"framework": "SGLang", "version": "0.5.14", "device": "NVIDIA H200", "kernel_source": "k"}


def write(root: Path, path: str, rows: list[dict[str, object]]) -> Path:
    target = root / "h200_sxm" / f"{path}.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame([{**COMMON, **row} for row in rows]).write_parquet(target)
    return target


def moe_row(**changed: object) -> dict[str, object]:
    row = {
        "op_name": "moe", "moe_dtype": "fp8_block", "num_tokens": 64, "hidden_size": 512, "inter_size": 256, "topk": 8,
        "num_experts": 64, "moe_tp_size": 2, "moe_ep_size": 4, "distribution": "balanced", "latency": 0.5,
    }  # fmt: skip
    return {**row, **changed}


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    write(
        tmp_path,
        "gemm/sglang/0.5.14/gemm_perf",
        [
            {"gemm_dtype": "bfloat16", "m": 1, "n": 64, "k": 32, "latency": latency}
            for latency in (0.010, 0.012, 0.200)  # one point, three collections
        ],
    )
    write(tmp_path, "moe/sglang/0.5.14/moe_perf", [moe_row(), moe_row(distribution="power_law_1.2", latency=0.9)])
    write(
        tmp_path,
        "mla/sglang/0.5.14/generation_mla_perf",
        [
            {
                "mla_dtype": "float16", "kv_cache_dtype": "fp8", "num_heads": 128, "batch_size": 4, "isl": 1,
                "tp_size": 1, "step": 1023, "latency": 0.03,
            }
        ],
    )  # fmt: skip
    write(
        tmp_path,
        "comm/nccl/2.29.2/nccl_perf",
        [
            {"nccl_dtype": dtype, "num_gpus": 8, "message_size": 1024, "op_name": "alltoall", "latency": 0.02}
            for dtype in ("half", "int8")
        ],
    )
    shape = {"node_num": 4, "hidden_size": 7168, "num_token": 64, "num_topk": 8, "num_experts": 256}
    times = {
        "dispatch_sms": 20, "dispatch_transmit_us": 70.0, "dispatch_notify_us": 30.0,
        "combine_sms": 20, "combine_transmit_us": 150.0, "combine_notify_us": 50.0,
    }  # fmt: skip
    write(
        tmp_path,
        "comm/sglang/0.5.6.post2/wideep_deepep_normal_perf",
        [{**shape, **times}, {**shape, **times, "num_token": 128, "device": "NVIDIA H100"}],
    )
    return tmp_path


def convert(root: Path) -> tuple[dict[str, pl.DataFrame], list[str]]:
    said: list[str] = []
    found = import_tables(root, system="h200_sxm", engine="sglang", package_version="0.12.0", say=said.append)
    return found, said


def test_repeated_points_become_their_median_in_seconds(tables: Path) -> None:
    gemm = convert(tables)[0]["gemm"]
    assert gemm.height == 1
    assert gemm["latency_s"][0] == pytest.approx(12e-6)
    assert gemm["dtype"][0] == "bf16"


def test_moe_tokens_count_the_whole_ep_group(tables: Path) -> None:
    experts = convert(tables)[0]["experts"].sort("distribution")
    assert experts["distribution"].to_list() == ["power_law_1.2", "uniform"]
    assert experts["routed"].to_list() == [64 * 8 / 4] * 2
    assert experts["local_experts"].to_list() == [16, 16]
    assert experts["intermediate"].to_list() == [128, 128]


def test_generation_attends_to_step_and_itself(tables: Path) -> None:
    mla = convert(tables)[0]["mla_decode"]
    assert mla["kv_tokens"].to_list() == [1024]
    assert (mla["form"][0], mla["dtype"][0], mla["kv_dtype"][0]) == ("absorbed", "bf16", "fp8")


def test_nccl_sizes_are_elements_of_half(tables: Path) -> None:
    collective = convert(tables)[0]["collective"]
    assert collective["bytes"].to_list() == [2048]
    assert collective["kind"].to_list() == ["all_to_all"]


def test_what_only_moves_is_one_point_in_both_dtypes_and_what_adds_up_is_half(tmp_path: Path) -> None:
    def row(kind: str, dtype: str, size: int, latency: float) -> dict[str, object]:
        return {"nccl_dtype": dtype, "num_gpus": 8, "message_size": size, "op_name": kind, "latency": latency}

    rows = [
        row("alltoall", "half", 512, 0.0200), row("alltoall", "int8", 1024, 0.0202),  # the same within 2 %: their mean
        row("alltoall", "half", 1024, 0.0220), row("alltoall", "int8", 2048, 0.0600),  # one was held up
        row("all_reduce", "half", 512, 0.0100), row("all_reduce", "int8", 1024, 0.0200),
    ]  # fmt: skip
    write(tmp_path, "comm/nccl/2.29.2/nccl_perf", rows)
    found = convert(tmp_path)[0]["collective"].sort("kind", "bytes")
    assert found["kind"].to_list() == ["all_reduce", "all_to_all", "all_to_all"]
    assert found["bytes"].to_list() == [1024, 1024, 2048]
    assert found["latency_s"].to_list() == pytest.approx([10e-6, 20.1e-6, 22.67e-6], rel=1e-3)


def test_a_deepep_step_takes_transmit_and_notify(tables: Path) -> None:
    exchange = convert(tables)[0]["exchange"].sort("step")
    assert exchange["latency_s"].to_list() == pytest.approx([200e-6, 100e-6])
    assert exchange["ep"].to_list() == [32, 32]
    assert exchange["dtype"].to_list() == ["bf16", "fp8"]


def test_rows_of_another_gpu_are_left_out_and_named(tables: Path) -> None:
    found, said = convert(tables)
    assert 128.0 not in found["exchange"]["tokens"].to_list()
    assert any("H100" in line and "1 rows" in line for line in said)


def test_products_that_timed_the_host_are_left_out(tmp_path: Path) -> None:
    """One kernel takes 230 us for any number of rows; the other follows the work."""
    rows = [
        {"gemm_dtype": "fp8_block", "kernel_source": kernel, "m": m, "n": 2048, "k": 1024, "latency": latency}
        for m in (1, 16, 64, 4096)
        for kernel, latency in (("eager", 0.230 + m * 1e-6), ("graphed", 0.004 + m * 1e-5))
    ]
    write(tmp_path, "gemm/sglang/0.5.14/gemm_perf", rows)
    found, said = convert(tmp_path)
    assert set(found["gemm"]["kernel"]) == {"graphed"}
    assert any("left out 4 rows: the host was timed" in line for line in said)


def test_rows_that_outrun_the_memory_are_left_out(tmp_path: Path) -> None:
    data = tmp_path / "systems" / "data"
    huge = {"hidden_size": 7168, "inter_size": 2048, "num_experts": 256, "moe_tp_size": 1, "moe_ep_size": 1}
    # 256 experts of 44 MB in 1 ms would be 11 TB/s.
    write(data, "moe/sglang/0.5.14/moe_perf", [moe_row(**huge, latency=1.0), moe_row()])
    (data.parent / "h200_sxm.yaml").write_text("gpu: {mem_bw: 4800000000000}\n")
    found, said = convert(data)
    assert found["experts"]["hidden"].to_list() == [512]
    assert any("faster than the HBM" in line for line in said)


def test_every_row_says_where_it_comes_from(tables: Path) -> None:
    for name, table in convert(tables)[0].items():
        assert table.columns == list(FAMILIES[name].columns)
        if table.height:
            assert set(table["package"]) == {"aiconfigurator-core"}
            assert set(table["package_version"]) == {"0.12.0"}
            assert set(table["tag"]) == {"measured"}


def test_a_missing_column_is_one_line(tables: Path) -> None:
    path = tables / "h200_sxm/gemm/sglang/0.5.14/gemm_perf.parquet"
    pl.read_parquet(path).drop("k").write_parquet(path)
    with pytest.raises(BadInput, match="column 'k' is missing") as error:
        convert(tables)
    assert str(path) in error.value.line()


@pytest.mark.parametrize("damage", ["truncate", "text", "empty"])
def test_a_damaged_table_is_one_line(tables: Path, damage: str) -> None:
    path = tables / "h200_sxm/gemm/sglang/0.5.14/gemm_perf.parquet"
    content = path.read_bytes()
    path.write_bytes({"truncate": content[: len(content) // 2], "text": b"not parquet", "empty": b""}[damage])
    with pytest.raises(BadInput, match="not a readable Parquet file"):
        convert(tables)


def test_unknown_system_and_engine_name_what_there_is(tables: Path) -> None:
    with pytest.raises(BadInput, match="use one of: h200_sxm"):
        import_tables(tables, system="h300", engine="sglang", package_version="0")
    with pytest.raises(BadInput, match="use one of: sglang"):
        import_tables(tables, system="h200_sxm", engine="other", package_version="0")


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("latency", -0.02, "latency is -0.02 in row 0"),
        ("latency", float("nan"), "latency is nan in row 0"),
        ("latency", "slow", "holds String"),
        ("message_size", None, "message_size is None in row 0"),
        ("nccl_dtype", 3, "holds Int64"),
    ],
)
def test_damaged_collectives_are_one_line(tmp_path: Path, column: str, value: object, said: str) -> None:
    row = {"nccl_dtype": "half", "num_gpus": 8, "message_size": 512, "op_name": "alltoall", "latency": 0.02}
    rows = pl.DataFrame([{**row, column: value}], schema_overrides={"message_size": pl.Int64})
    target = tmp_path / "h200_sxm/comm/nccl/2.29.2/nccl_perf.parquet"
    target.parent.mkdir(parents=True)
    rows.write_parquet(target)
    with pytest.raises(BadInput, match=said):
        convert(tmp_path)


def test_all_engines_come_in_one_command_and_every_source_row_is_counted(tables: Path) -> None:
    write(tables, "gemm/vllm/1/gemm_perf", [{"gemm_dtype": "fp8", "m": 1, "n": 64, "k": 32, "latency": 0.01}])
    write(tables, "mtp/sglang/1/foreign_perf", [{"a": 1}, {"a": 2}])
    write(tables, "gemm/abacus/1/gemm_perf", [{"a": 1}])
    ledger, said = Ledger(), []
    found = import_tables(tables, system="h200_sxm", engine="all", package_version="0", ledger=ledger, say=said.append)
    assert sorted(found["gemm"]["engine"]) == ["sglang", "vllm"]
    gemm = ledger.tables["gemm_perf"]
    assert (gemm.rows, gemm.stored, gemm.family_rows, gemm.merged, gemm.left_out) == (4, 4, 4, 2, {})
    deepep = ledger.tables["wideep_deepep_normal_perf"]  # one row of H100; two steps of the other
    assert (deepep.rows, deepep.stored, deepep.family_rows) == (2, 1, 2)
    assert deepep.left_out == {"measured on NVIDIA H100": 1}
    assert ledger.without_family == {"foreign_perf": 2, "gemm_perf of abacus": 1}
    assert any("foreign_perf" in line and "2 rows" in line for line in said)
    assert {line.split()[0] for line in ledger.lines()} >= {*ledger.tables, "foreign_perf"}


def test_attention_without_windows_and_another_library(tmp_path: Path) -> None:
    attention = {
        "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "num_heads": 8, "num_key_value_heads": 8,
        "head_dim": 128, "batch_size": 1, "isl": 16, "step": 0, "beam_width": 1, "latency": 0.1,
    }  # fmt: skip
    write(tmp_path, "attention/sglang/0.5.10/context_attention_perf", [attention])
    collective = {"nccl_dtype": "half", "num_gpus": 2, "message_size": 256, "op_name": "all_gather", "latency": 0.02}
    write(tmp_path, "comm/oneccl/2021/oneccl_perf", [collective])
    found, _ = convert(tmp_path)
    assert found["attention_prefill"]["window"].to_list() == [0]
    assert found["collective"].select("path", "engine", "kernel").row(0) == ("oneccl", "oneccl", "oneCCL")


TEN = (
    "a100_sxm", "h100_sxm", "h200_sxm", "b200_sxm", "b300_sxm", "gb200", "gb300", "l40s", "rtx_pro_6000_server", "b60",
)  # fmt: skip


# Columns beside a point: what names the file, the times, and what was measured beside them.
BESIDE = {"framework", "version", "power", "power_limit", "backend", "implementation", "architecture"}
BESIDE |= {"dp_num_tokens", "rank0_num_tokens"}  # of a draw of the routing
RANKS = {"context_mla_perf", "generation_mla_perf"}  # whose heads are of one of `tp_size` ranks, as it may be
TIMES = ("latency", "avg_ms", "_us", "_gbps")
# Tables whose points are not their rows: half the width on two ranks is the same product, and some never ran.
FEWER = ("moe_perf", "custom_allreduce_perf")


def _counted(stem: str, parts: list[pl.DataFrame], left_out: dict[str, int]) -> tuple[int, int]:
    """Rows of raw tables of one kind; and those of this GPU, with a time, that differ in more than the time."""
    points = 0
    for part in parts:
        times = [name for name in part.columns if name.endswith(TIMES)]
        others = [reason.removeprefix("measured on ") for reason in left_out if reason.startswith("measured on ")]
        part = part.filter(~pl.col("device").is_in(others)) if others else part  # noqa: PLW2901
        beside = BESIDE | ({"tp_size"} if stem in RANKS else set())
        points += part.filter(pl.col(times[0]) > 0).select(pl.exclude(*times, *beside)).n_unique()
    return sum(part.height for part in parts), points


@pytest.mark.skipif(not os.environ.get("MOESIM_AIC_TABLES"), reason="MOESIM_AIC_TABLES names no unpacked tables")
@pytest.mark.parametrize("system", TEN)
def test_every_system_imports_and_its_rows_are_counted(system: str) -> None:
    data, version = find_package(Path(os.environ["MOESIM_AIC_TABLES"]))
    ledger = Ledger()
    found = import_tables(data, system=system, engine="all", package_version=version, ledger=ledger)
    files: dict[str, list[Path]] = {}
    for path in (data / system).glob("*/*/*/*.parquet"):
        files.setdefault(path.stem, []).append(path)
    assert set(ledger.tables) == set(files)
    assert ledger.without_family == {}
    merged: Counter[tuple[str, ...]] = Counter()
    for stem, count in ledger.tables.items():
        steps = 2 if stem.startswith("wideep_deepep") else 1  # a row times a dispatch and a combine
        rows, points = _counted(stem, [pl.read_parquet(path) for path in files[stem]], count.left_out)
        assert count.rows == rows, stem
        assert count.rows == count.stored + sum(count.left_out.values()), stem
        assert count.family_rows == count.stored * steps, stem
        assert count.merged < points if stem in FEWER and count.left_out else count.merged <= points * steps, stem
        assert stem in FEWER or count.merged == points * steps, stem
        merged[count.families] += count.merged
    for families, number in merged.items():
        assert number == sum(found[name].height for name in families)
    assert found["gemm"].height > 0
    assert found["experts"].height > 0


def test_the_package_is_found_in_any_folder_above_its_tables(tmp_path: Path) -> None:
    data = tmp_path / "aiconfigurator_core" / "systems" / "data"
    write(data, "moe/sglang/0.5.14/moe_perf", [moe_row()])
    (tmp_path / "aiconfigurator_core-0.12.0.dist-info").mkdir()
    for given in (tmp_path, tmp_path / "aiconfigurator_core", data):
        assert find_package(given) == (data, "0.12.0")
    with pytest.raises(BadInput, match="no tables here"):
        find_package(tmp_path / "aiconfigurator_core-0.12.0.dist-info")


def test_tables_are_found_in_the_package_that_they_move_to(tmp_path: Path) -> None:
    data = tmp_path / "aisimulate_core" / "systems" / "data"
    write(data, "moe/sglang/0.5.14/moe_perf", [moe_row()])
    (tmp_path / "aisimulate-0.13.0.dist-info").mkdir()
    assert find_package(tmp_path) == (data, "0.13.0")
    assert convert(data)[0]["experts"]["package"].to_list() == ["aisimulate"]


def test_experts_of_a_type_that_no_scenario_names_are_kept_and_not_fitted(tmp_path: Path) -> None:
    rows = [moe_row(moe_dtype="w4afp8", num_tokens=2**power) for power in range(10)]
    write(tmp_path, "moe/sglang/0.5.14/moe_perf", rows)
    experts = convert(tmp_path)[0]["experts"]
    assert experts.height == 10
    assert fit_experts(experts)["parameters"] == {}


def _with(**changed: list[object]) -> pl.DataFrame:
    """Six rows of a product; a column is replaced."""
    columns: dict[str, list[object]] = {
        "gemm_dtype": ["fp8"] * 6, "m": [1, 2, 4, 8, 16, 32], "n": [64] * 6, "k": [32] * 6,
        "latency": [0.010, 0.010, 0.011, 0.011, 0.012, 0.013],
    }  # fmt: skip
    return pl.DataFrame({**{name: [value] * 6 for name, value in COMMON.items()}, **columns, **changed}, strict=False)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (_with(latency=[0.01, 0.01, float("nan"), 0.01, 0.01, 0.01]), "latency is nan in row 2"),
        (_with(latency=[0.01, 0.01, 0.01, -0.01, 0.01, 0.01]), "latency is -0.01 in row 3"),
        (_with(latency=[0.01, 0.01, 0.01, None, 0.01, 0.01]), "latency is None in row 3"),
        (_with(latency=[0.01, 0.01, 0.01, 4e6, 0.01, 0.01]), "latency is 4000000.0 in row 3"),
        (_with(latency=[0.01, 0.01, 11.0, 0.011, 0.012, 0.013]), "another unit"),
        (_with(latency=["10 us"] * 6), "'latency' holds String"),
        (_with(m=[1, 2, 0, 8, 16, 32]), "m is 0 in row 2"),
        (_with(m=[1.0, 2.0, 4.5, 8.0, 16.0, 32.0]), "m is 4.5 in row 2"),
        (_with(gemm_dtype=[8] * 6), "'gemm_dtype' holds Int64"),
        (_with(device=["NVIDIA H200"] * 5 + [None]), "device is None in row 5"),
        (_with().rename({"latency": "latency_us"}), "'latency' is missing"),
        (pl.DataFrame({"a": [1]}), "is missing"),
    ],
)
def test_a_wrong_table_is_one_line_and_an_older_profile_stays(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], rows: pl.DataFrame, told: str
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    path = source / "h200_sxm/gemm/sglang/0.5.14/gemm_perf.parquet"
    path.parent.mkdir(parents=True)
    command = [
        "profile",
        "import",
        "aiconfigurator",
        "--system",
        "h200_sxm",
        "--source",
        str(source),
        "--out",
        str(out),
    ]
    _with().write_parquet(path)
    assert run(command) == 0
    before = {found.name: found.read_bytes() for found in out.iterdir()}
    capfd.readouterr()
    rows.write_parquet(path)
    assert run(command) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert told in line
    assert str(path) in line
    assert {found.name: found.read_bytes() for found in out.iterdir()} == before


def test_profile_json_keeps_the_count_of_every_table(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tables, "mtp/sglang/1/foreign_perf", [{"a": 1}])
    out = tables / "out"
    command = [
        "profile",
        "import",
        "aiconfigurator",
        "--system",
        "h200_sxm",
        "--source",
        str(tables),
        "--engine",
        "all",
    ]
    assert run([*command, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["source_rows"]
    assert json.loads((out / "profile.json").read_text())["source_rows"] == told
    assert told["without_family"] == {"foreign_perf": 1}
    assert told["tables"]["nccl_perf"] == {
        "families": ["collective", "collective_variant"], "rows": 2, "stored": 2, "family_rows": 2, "merged": 2,
        "left_out": {},
    }  # fmt: skip
    assert run([*command, "--out", str(out), "--priced"]) == 0
    assert "foreign_perf" in capsys.readouterr().out
    assert not (out / "collective_variant.parquet").exists()
    assert (out / "collective.parquet").exists()
