"""A table of aiconfigurator-core: which columns it must have, what may stand in them, and what stays out and why.

The meanings were looked up in the collectors that wrote the tables, in the public repository ai-dynamo/aiconfigurator;
every converter (`aiconfigurator_kernels`, `_attention`, `_network`) names its collector, and
docs/explanation/costs.md tells the whole. Latencies there are milliseconds unless the column ends in `_us`; here they
are seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moesim.errors import BadInput
from moesim.units import MICRO, MILLI
from profiles.record import LATENCY

if TYPE_CHECKING:
    import polars as pl

PACKAGE = "aiconfigurator-core"

# Their names of element types -> ours; others keep the name that the table gives.
DTYPES = {
    "bfloat16": "bf16",
    # Older collectors wrote float16 for tensors made as torch.bfloat16 (collector/sglang/collect_mla.py).
    "float16": "bf16",
    "half": "fp16",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_block": "fp8_block",
    "int8": "int8",
    "int8_wo": "int8",
    "int4_wo": "int4",
    "w4a16_mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
}
ROW = "_row"  # the number of a row in its file, from 0
MOST = 2**40  # above every size and shape: a count beyond it is no count
AN_HOUR_S = 3600.0  # no collector waits that long for one operation; the longest in 0.12.0 takes 52 s
LEAST_S = 1e-9  # below a clock tick of any GPU: nothing was measured
UNTIMED = "no time was measured"

Converted = Mapping[str, "pl.DataFrame"]  # family -> its rows, with ROW


@dataclass(frozen=True)
class Source:
    """One table file of the package, and what the package says of its system (gpus_per_node, hbm_bytes_per_s)."""

    path: Path
    system: str
    engine: str
    version: str
    package_version: str
    package: str = PACKAGE
    gpus_per_node: int = 8
    hbm_bytes_per_s: float = 0.0


def none_left_out(source: Source) -> dict[str, pl.Expr]:
    """No row stays out for what it is."""
    return {}


def own(engine: str) -> tuple[str, ...]:
    """The folder of the engine itself."""
    return (engine,)


@dataclass(frozen=True)
class Table:
    """How one kind of table file is read.

    convert: checked rows -> rows of families. counts: columns of whole numbers from 1; zeros: from 0; texts: columns of
    text; optional: columns that older tables lack -> what stands for them. times: columns of latencies, milliseconds
    unless they end in `_us`; untimed: those of them that cannot be 0 (all, where it is empty): a row that has 0 there
    stays out; difference: the times are differences of others, so two of them say nothing of their unit. left_out:
    reason -> which rows stay out, the first that holds counts. folders: engine -> folders that are searched.
    """

    families: tuple[str, ...]
    convert: Callable[[pl.DataFrame, Source], Converted]
    counts: tuple[str, ...]
    zeros: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    optional: Mapping[str, str | int] = field(default_factory=dict)
    times: tuple[str, ...] = ("latency",)
    untimed: tuple[str, ...] = ()
    difference: bool = False
    left_out: Callable[[Source], dict[str, pl.Expr]] = none_left_out
    folders: Callable[[str], tuple[str, ...]] = own

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that must be there."""
        return (*self.counts, *self.zeros, *self.texts, *self.times)


# Beside the columns of its own, a table has these, or some of them.
WHERE_MEASURED = ("kernel_source", "device")


def unit_of(time: str) -> float:
    """Seconds in the unit of a column of latencies."""
    return MICRO if time.endswith("_us") else MILLI


def checked_rows(rows: pl.DataFrame, table: Table, path: Path) -> pl.DataFrame:
    """The rows with whole counts, text and times as they must be, numbered in ROW; other columns are dropped.

    Raises BadInput that names the file, the column and the first bad row.
    """
    import polars as pl

    for name in table.columns:
        if name not in rows.columns:
            _refuse(path, f"the column {name!r} is missing", "use a version whose tables have it (0.12.0's do)")
    lacking = {name: value for name, value in table.optional.items() if name not in rows.columns}
    rows = rows.with_columns(pl.lit(value).alias(name) for name, value in lacking.items())
    zeros = (*table.zeros, *(name for name, value in table.optional.items() if isinstance(value, int)))
    texts = (*table.texts, *(name for name, value in table.optional.items() if isinstance(value, str)))
    texts = tuple(dict.fromkeys((*texts, *(name for name in WHERE_MEASURED if name in rows.columns))))
    for name in texts:
        if rows.schema[name] != pl.String:
            _refuse(path, f"the column {name!r} holds {rows.schema[name]}, not text")
        _refuse_row(rows, pl.col(name).is_null(), name, path, "the row names nothing there")
    for name in (*table.counts, *zeros, *table.times):
        if not rows.schema[name].is_numeric():
            _refuse(path, f"the column {name!r} holds {rows.schema[name]}, not numbers")
    for name in (*table.counts, *zeros):
        least = 0 if name in zeros else 1
        value = pl.col(name)
        inside = value.is_between(least, MOST)
        if not rows.schema[name].is_integer():
            inside = inside & (value.floor() == value)
        _refuse_row(rows, ~inside.fill_null(False), name, path, f"it must be a whole number from {least}")
    for name in table.times:
        most = AN_HOUR_S / unit_of(name)
        inside = pl.col(name).is_between(0.0, most)
        _refuse_row(rows, ~inside.fill_null(False), name, path, "times are finite, from 0 to an hour")
    counts = (pl.col(name).cast(pl.Int64) for name in (*table.counts, *zeros))
    times = (pl.col(name).cast(pl.Float64) for name in table.times)
    return rows.select(*counts, *times, *texts).with_row_index(ROW)


def _refuse_row(rows: pl.DataFrame, bad: pl.Expr, name: str, path: Path, mend: str) -> None:
    found = rows.select(bad.alias("bad").fill_null(True))["bad"]
    if found.any():
        number = found.arg_max()
        assert number is not None
        _refuse(path, f"{name} is {str(rows[name][number])[:40]} in row {number}", mend)


def _refuse(path: Path, what: str, mend: str = "fetch the table again") -> NoReturn:
    raise BadInput(what, where=str(path), mend=mend)


def refuse_row(path: Path, what: str, row: int, mend: str) -> NoReturn:
    """Refuse a table for one row. Raises BadInput."""
    _refuse(path, f"{what} in row {row}", mend)


def dtype(column: str) -> pl.Expr:
    """An element type under our name."""
    import polars as pl

    return pl.col(column).replace(DTYPES)


def seconds(column: str = "latency") -> pl.Expr:
    """A time in seconds, by the unit of its column."""
    import polars as pl

    return (pl.col(column) * unit_of(column)).alias(LATENCY)


def origin(rows: pl.DataFrame) -> list[pl.Expr]:
    """Kernel, GPU and row number, as far as the table tells them."""
    import polars as pl

    kernel = [pl.col("kernel_source").alias("kernel")] if "kernel_source" in rows.columns else []
    device = [pl.col("device")] if "device" in rows.columns else []
    return [*kernel, *device, pl.col(ROW)]


def untimed(table: Table) -> dict[str, pl.Expr]:
    """Rows of which nothing was measured: their time is 0."""
    import polars as pl

    names = table.untimed or table.times
    return {UNTIMED: pl.any_horizontal(pl.col(name) * unit_of(name) < LEAST_S for name in names)}
