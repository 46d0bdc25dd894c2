"""The measured tables of aiconfigurator-core as they are filed: which columns are sizes, times and keys.

For checks that must see every table and every key; `importers` turns the tables into a profile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from profiles.store import read_parquet

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Kind:
    """What a table file measures: its family in reports, the size that is interpolated over, and how.

    rule: "experts", "tiles", "chord", "collective", or "grid:chord" / "grid:bend" (`batch_size` is the second size).
    times: the columns of latencies; each is a curve of its own. offset: what a size lacks to count from one.
    """

    family: str
    size: str
    rule: str
    times: tuple[str, ...] = ("latency",)
    offset: float = 0.0


_DEEPEP = ("dispatch_transmit_us", "combine_transmit_us")
_LOW_LATENCY = ("dispatch_avg_t_us", "combine_avg_t_us")
KINDS: dict[str, Kind] = {
    "gemm_perf": Kind("GEMM", "m", "tiles"),
    "moe_perf": Kind("MoE", "num_tokens", "experts"),
    "wideep_moe_perf": Kind("MoE", "num_tokens", "experts"),
    "wideep_context_moe_perf": Kind("MoE", "num_tokens", "experts"),
    "wideep_generation_moe_perf": Kind("MoE", "num_tokens", "experts"),
    "context_attention_perf": Kind("attention prefill", "isl", "grid:bend"),
    "generation_attention_perf": Kind("attention decode", "step", "grid:chord", offset=1.0),
    "context_mla_perf": Kind("MLA prefill", "isl", "grid:bend"),
    "wideep_context_mla_perf": Kind("MLA prefill", "isl", "grid:bend"),
    "generation_mla_perf": Kind("MLA decode", "step", "grid:chord", offset=1.0),
    "wideep_generation_mla_perf": Kind("MLA decode", "isl", "grid:chord", offset=1.0),
    "mla_bmm_perf": Kind("MLA absorb", "num_tokens", "chord"),
    "nccl_perf": Kind("NCCL", "message_size", "collective"),
    "custom_allreduce_perf": Kind("all-reduce", "message_size", "chord"),
    "wideep_deepep_normal_perf": Kind("DeepEP", "num_token", "chord", _DEEPEP),
    "wideep_deepep_ll_perf": Kind("DeepEP", "num_token", "chord", _LOW_LATENCY),
    # What nothing is priced from yet; no threshold.
    "moe_a2a_perf": Kind("all-to-all", "num_tokens", "chord"),
    "trtllm_alltoall_perf": Kind("all-to-all", "num_tokens", "chord"),
    "mla_context_module_perf": Kind("MLA module prefill", "isl", "grid:bend"),
    "mla_generation_module_perf": Kind("MLA module decode", "step", "grid:chord"),
    "encoder_attention_perf": Kind("encoder attention", "isl", "grid:bend"),
    "dsa_context_module_perf": Kind("sparse module prefill", "isl", "grid:bend"),
    "msa_context_module_perf": Kind("sparse module prefill", "isl", "grid:bend"),
    "dsv4_csa_context_module_perf": Kind("sparse module prefill", "isl", "grid:bend"),
    "dsv4_hca_context_module_perf": Kind("sparse module prefill", "isl", "grid:bend"),
    "dsa_generation_module_perf": Kind("sparse module decode", "step", "grid:chord"),
    "msa_generation_module_perf": Kind("sparse module decode", "step", "grid:chord", offset=1.0),
    "dsv4_csa_generation_module_perf": Kind("sparse module decode", "step", "grid:chord", offset=1.0),
    "dsv4_hca_generation_module_perf": Kind("sparse module decode", "step", "grid:chord", offset=1.0),
}
# Families that are judged together.
TOGETHER = {
    "attention prefill": "attention",
    "attention decode": "attention",
    "MLA prefill": "MLA",
    "MLA decode": "MLA",
    "MLA absorb": "MLA",
}
# Columns that follow from the size or were measured beside the time: no key.
BESIDE = ("dp_num_tokens", "rank0_num_tokens")
BESIDE_ENDS = ("_us", "_gbps", "latency", "power", "energy")


@dataclass(frozen=True)
class Points:
    """One time of one table: repeated points are their median.

    groups: int64 [points], numbered by the keys but the size; sorted by group, then size. table: [points] of the keys.
    """

    kind: Kind
    name: str
    system: str
    keys: pl.DataFrame
    groups: Ints
    sizes: Floats
    seconds: Floats


def read_points(data: Path, systems: Sequence[str]) -> Iterator[Points]:
    """Every table of the systems that KINDS knows. Raises BadInput where a system has none or a table is damaged."""
    for system in systems:
        paths = [path for path in sorted((data / system).glob("*/*/*/*.parquet")) if path.stem in KINDS]
        if not paths:
            raise BadInput(f"no tables for the system {system!r}", where=str(data), mend="name a system that has some")
        for path in paths:
            kind = KINDS[path.stem]
            rows = read_parquet(path)
            for time in kind.times:
                yield _points(rows, kind, time, path, system)


def _points(rows: pl.DataFrame, kind: Kind, time: str, path: Path, system: str) -> Points:
    import polars as pl

    for column in (kind.size, time):
        if column not in rows.columns:
            raise BadInput(f"the column {column!r} is missing", where=str(path), mend="fetch the table again")
    key = [name for name in rows.columns if name != kind.size and name not in BESIDE and not name.endswith(BESIDE_ENDS)]
    usable = rows.filter((pl.col(kind.size) + kind.offset > 0) & (pl.col(time) > 0) & pl.col(time).is_finite())
    found = (
        usable.group_by([*key, kind.size])
        .agg(pl.col(time).cast(pl.Float64).median().alias("time"))
        .with_columns(pl.struct(key).rank("dense").cast(pl.Int64).alias("group"))
        .sort("group", kind.size)
    )
    name = "/".join(path.parts[-4:-1]) + f"/{path.stem}" + (f" {time}" if len(kind.times) > 1 else "")
    return Points(
        kind, f"{system}/{name}", system, found.select(key), found["group"].to_numpy(),
        found[kind.size].to_numpy().astype(np.float64) + kind.offset, found["time"].to_numpy(),
    )  # fmt: skip
