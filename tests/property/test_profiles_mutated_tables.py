"""The reader of aiconfigurator-core's tables: 2,000 damaged ones that each give one line or counted rows."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from moesim.errors import BadInput
from profiles.importers.aiconfigurator import Ledger, import_tables
from profiles.record import FAMILIES, LATENCY

WHERE = {"framework": "SGLang", "version": "1", "device": "NVIDIA GB200", "kernel_source": "k"}
MOE = {"hidden_size": 512, "topk": 4, "num_experts": 64}
BLOCK = {
    "op_name": "dsa_context_module", "model": "m", "mla_dtype": "bfloat16", "kv_cache_dtype": "fp8", "num_heads": 8,
    "gemm_type": "fp8_block", "batch_size": 4, "tp_size": 1, "step": 0,
}  # fmt: skip
# Table file -> its folders, what is fixed, the size that runs, and the columns of times.
KINDS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    "gemm_perf": ("gemm/sglang/1", {"gemm_dtype": "fp8", "n": 64, "k": 32}, "m", ("latency",)),
    "moe_perf": (
        "moe/sglang/1",
        {**MOE, "moe_dtype": "fp8", "inter_size": 256, "moe_tp_size": 1, "moe_ep_size": 4, "distribution": "balanced"},
        "num_tokens",
        ("latency",),
    ),
    "dsa_context_module_perf": ("attention/sglang/1", BLOCK, "isl", ("latency",)),
    "nccl_perf": (
        "comm/nccl/2", {"nccl_dtype": "half", "num_gpus": 4, "op_name": "alltoall"}, "message_size", ("latency",),
    ),
    "wideep_deepep_normal_perf": (
        "comm/sglang/1",
        {"node_num": 2, "hidden_size": 512, "num_topk": 4, "num_experts": 64, "dispatch_sms": 20, "combine_sms": 20},
        "num_token",
        ("dispatch_transmit_us", "dispatch_notify_us", "combine_transmit_us", "combine_notify_us"),
    ),
    "trtllm_alltoall_perf": (
        "comm/trtllm/1",
        {**MOE, "op_name": "alltoall_dispatch", "kernel_source": "NVLinkOneSided", "moe_dtype": "nvfp4",
         "moe_ep_size": 8, "distribution": "balanced"},
        "num_tokens",
        ("latency",),
    ),
}  # fmt: skip
SIZES = (1, 2, 4, 8, 16, 32)
ODD: tuple[Any, ...] = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e300, 0.5, None, 2**62, 1e-12, 7.0)


def table(stem: str) -> pl.DataFrame:
    _, fixed, size, times = KINDS[stem]
    rows = [{**WHERE, **fixed, size: at, **dict.fromkeys(times, 1.0 + at / 10)} for at in SIZES]
    return pl.DataFrame(rows)


def changed(rows: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """One column dropped, renamed or retyped, or one value changed."""
    name = rows.columns[int(rng.integers(rows.width))]
    match int(rng.integers(10)):
        case 0:
            return rows.drop(name)
        case 1:
            return rows.rename({name: f"{name}_us"})
        case 2:
            kinds = (
                (pl.String, pl.Binary)
                if rows.schema[name] == pl.String
                else (pl.String, pl.Float32, pl.Int8, pl.Boolean)
            )
            return rows.with_columns(pl.col(name).cast(kinds[int(rng.integers(len(kinds)))], strict=False))
        case 3:
            return rows.with_columns(pl.lit(None).alias(name))
        case 4:
            return rows.with_columns(pl.col(name).implode().first().alias(name))
        case _:
            at, value = int(rng.integers(rows.height)), ODD[int(rng.integers(len(ODD)))]
            whole = value is None or float(value).is_integer()
            kind = (
                pl.String
                if rows.schema[name] == pl.String
                else pl.Int64
                if whole and rng.random() < 0.5
                else pl.Float64
            )
            if kind == pl.Int64 and value is not None and abs(value) > 2**62:
                value = 2**62
            found = rows[name].cast(kind).to_list()
            found[at] = (
                str(value)
                if kind == pl.String and value is not None
                else value
                if value is None
                else kind.to_python()(value)
            )
            return rows.with_columns(pl.Series(name, found, dtype=kind))


def test_damaged_tables_give_one_line_or_counted_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(7)
    whole = {}
    for stem, (folder, *_) in KINDS.items():
        path = tmp_path / stem / "gb200" / folder / f"{stem}.parquet"
        path.parent.mkdir(parents=True)
        table(stem).write_parquet(path)
        whole[stem] = path, path.read_bytes()
    refused: Counter[str] = Counter()
    for turn in range(2000):
        stem = list(KINDS)[turn % len(KINDS)]
        path, content = whole[stem]
        if turn % 5 < 3:
            changed(table(stem), rng).write_parquet(path, statistics=False)
        else:
            data = bytearray(content)
            if turn % 5 == 3:
                del data[int(rng.integers(len(data))) :]
            for _ in range(int(rng.integers(1, 5)) if data else 0):
                data[int(rng.integers(len(data)))] = int(rng.integers(256))
            path.write_bytes(bytes(data))
        ledger = Ledger()
        try:
            found = import_tables(tmp_path / stem, system="gb200", engine="all", package_version="0", ledger=ledger)
        except BadInput as error:
            assert "\n" not in error.line()
            assert path.name in error.line()
            refused["row" if re.search(r"in row \d+", error.line()) else "file"] += 1
        else:
            count = ledger.tables[stem]
            assert count.rows == count.stored + sum(count.left_out.values())
            assert count.merged == sum(rows.height for rows in found.values())
            for name, rows in ((name, rows) for name, rows in found.items() if rows.height):
                sizes = rows.select(*FAMILIES[name].point, LATENCY)
                assert sizes.select(pl.all_horizontal((pl.all() > 0) & pl.all().is_finite()).all()).item()
    assert capfd.readouterr().err == ""  # not even Polars' own, which panics on some of them
    assert refused["row"] > 200
    assert refused["file"] > 500
    assert refused.total() < 1900
