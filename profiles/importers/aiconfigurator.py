"""Import the measured tables of NVIDIA's aiconfigurator-core: systems/data/<system>/<family>/<engine>/<version>.

Rows that repeat a point (re-collections) become their median. What stays out has a reason, and every row is counted:
those of another GPU, those that no GPU of the kind can have run, those without a time, and what a table's own
converter leaves out.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moesim.errors import BadInput, MissingPart
from moesim.units import BYTES_PER_ELEMENT
from profiles.importers.aiconfigurator_files import TABLES
from profiles.importers.aiconfigurator_tables import (
    PACKAGE,
    ROW,
    Source,
    Table,
    checked_rows,
    refuse_row,
    untimed,
)
from profiles.record import FAMILIES, LATENCY, Family
from profiles.store import empty, polars_schema, read_parquet

if TYPE_CHECKING:
    import polars as pl

# Module -> the package that brings it. The tables are moving into the second (repository ai-dynamo/aisimulate, where
# they lie in the folder python/aisimulate/src/aisimulate_core/systems/data).
PACKAGES = {"aiconfigurator_core": PACKAGE, "aisimulate_core": "aisimulate"}
ENGINES = ("sglang", "trtllm", "vllm")
EVERY = "all"


def find_package(given: Path | None) -> tuple[Path, str]:
    """The folder that holds `<system>/<family>/…` and the package's version. Raises BadInput or MissingPart.

    `given` may be that folder, the package folder above it, or the folder that holds the package.
    """
    if given is None:
        for module, package in PACKAGES.items():
            spec = importlib.util.find_spec(module)
            if spec is not None and spec.submodule_search_locations:
                folder = Path(next(iter(spec.submodule_search_locations))) / "systems" / "data"
                return folder, _installed_version(package)
        raise MissingPart(
            f"{PACKAGE} is not installed", mend="pip install '.[silicon]', or give its folder with --source"
        )
    homes = ("", "systems/data", *(f"{module}/systems/data" for module in PACKAGES), "data")
    for below in homes:
        folder = Path(given) / below
        if folder.is_dir() and any(folder.glob("*/*/*/*/*.parquet")):
            return folder, _unpacked_version(folder)
    raise BadInput(
        "no tables here",
        where=str(given),
        mend="give the folder that holds <system>/<family>/<engine>/<version>/*.parquet",
    )


def package_of(data: Path) -> str:
    """The package that a folder of tables belongs to: by the module in its path, else aiconfigurator-core."""
    return next((package for module, package in PACKAGES.items() if module in data.resolve().parts), PACKAGE)


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _unpacked_version(folder: Path) -> str:
    """The version of an unpacked wheel, read from the name of its dist-info folder."""
    stem = package_of(folder).replace("-", "_")
    for parent in folder.resolve().parents:
        for found in parent.glob(f"{stem}-*.dist-info"):
            return found.name.removeprefix(f"{stem}-").removesuffix(".dist-info")
    return "unknown"


@dataclass
class Count:
    """What became of the rows of one kind of table file, all its files together.

    rows = stored + those left out, by reason. family_rows: rows that were made of the stored ones, before repeated
    points were merged; merged: after. families: where they are.
    """

    families: tuple[str, ...]
    rows: int = 0
    stored: int = 0
    family_rows: int = 0
    merged: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For profile.json."""
        return {**self.__dict__, "families": list(self.families)}


@dataclass
class Ledger:
    """What became of every row: by table file, and the rows of table files that no family takes."""

    tables: dict[str, Count] = field(default_factory=dict)
    without_family: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For profile.json."""
        return {
            "tables": {stem: count.as_dict() for stem, count in sorted(self.tables.items())},
            "without_family": dict(sorted(self.without_family.items())),
        }

    def lines(self) -> list[str]:
        """For people: a line for each table file, what stayed out of it, and what no family takes."""
        told = [f"{'table':<36}{'rows':>9}{'stored':>9}{'left out':>9}  family (rows, repeats merged)"]
        for stem, count in sorted(self.tables.items()):
            out = sum(count.left_out.values())
            families = f"{', '.join(count.families)} ({count.merged})"
            told.append(f"{stem:<36}{count.rows:>9}{count.stored:>9}{out:>9}  {families}")
            told += [f"{'':<36}{number:>27}  {reason}" for reason, number in sorted(count.left_out.items())]
        told += [f"{stem:<36}{rows:>9}{0:>9}{rows:>9}  no family" for stem, rows in sorted(self.without_family.items())]
        return told


def import_tables(
    data: Path,
    *,
    system: str,
    engine: str,
    package_version: str,
    say: Callable[[str], None] = lambda line: None,
    ledger: Ledger | None = None,
) -> dict[str, pl.DataFrame]:
    """All families of one system and engine (or `all` engines), normalised. Raises BadInput.

    `say` is told of what is left out, and of files that no family takes. `ledger` is filled.
    """
    if not (data / system).is_dir():
        known = sorted(path.name for path in data.iterdir() if path.is_dir() and any(path.glob("*/*/*/*.parquet")))
        raise BadInput(f"no tables for the system {system!r}", where=str(data), mend=f"use one of: {', '.join(known)}")
    if engine not in (*ENGINES, EVERY):
        raise BadInput(
            f"unknown engine {engine!r}", where="--engine", mend=f"use one of: {', '.join(ENGINES)}, {EVERY}"
        )
    engines = ENGINES if engine == EVERY else (engine,)
    ledger = Ledger() if ledger is None else ledger
    found: dict[str, list[pl.DataFrame]] = {name: [] for name in FAMILIES}
    gpus_per_node, hbm_bytes_per_s = _described(data.parent / f"{system}.yaml")
    package = package_of(data)
    files: dict[tuple[str, str], list[Path]] = {}  # by name and the folder that they are filed under
    for path in sorted((data / system).glob("*/*/*/*.parquet")):
        files.setdefault((path.stem, path.parent.parent.name), []).append(path)
    for stem, table in TABLES.items():
        for filed_under in dict.fromkeys(folder for one in engines for folder in table.folders(one)):
            for path in files.pop((stem, filed_under), []):
                source = Source(
                    path, system, filed_under, path.parent.name, package_version, package, gpus_per_node,
                    hbm_bytes_per_s,
                )  # fmt: skip
                count = ledger.tables.setdefault(stem, Count(table.families))
                for name, part in _read(table, source, count, say).items():
                    found[name].append(part)
    for (stem, filed_under), paths in files.items():
        if engine == EVERY or filed_under in engines:
            name = f"{stem} of {filed_under}" if stem in TABLES else stem
            rows = sum(read_parquet(path).height for path in paths)
            ledger.without_family[name] = ledger.without_family.get(name, 0) + rows
    for name, number in ledger.without_family.items():
        say(f"{name}: no family takes this table, {number} rows are left out")
    return {name: _whole(parts, FAMILIES[name]) for name, parts in found.items()}


def _read(table: Table, source: Source, count: Count, say: Callable[[str], None]) -> dict[str, pl.DataFrame]:
    """One file as rows of families, repeated points merged; its rows are counted, those left out with a reason."""
    import polars as pl

    rows = checked_rows(read_parquet(source.path), table, source.path)
    count.rows += rows.height
    left_out: dict[str, int] = {}
    for reason, stays_out in {**_another_device(rows, source), **untimed(table), **table.left_out(source)}.items():
        kept = rows.filter(~stays_out)
        if kept.height < rows.height:
            left_out[reason] = rows.height - kept.height
        rows = kept
    found = {}
    stored = []
    for name, made in table.convert(rows, source).items():
        part = _possible(made, source.hbm_bytes_per_s) if name == "experts" and source.hbm_bytes_per_s else made
        if part.height < made.height:
            left_out["weights read faster than the HBM can"] = made.height - part.height
        if name == "gemm":
            part = _by_the_gpu(made)
            if part.height < made.height:
                left_out["the host was timed, not the product"] = made.height - part.height
        stored.append(part[ROW])
        merged = _merged(part, FAMILIES[name], source, one_unit=not table.difference)
        count.family_rows += part.height
        count.merged += merged.height
        found[name] = merged
    count.stored += pl.concat(stored).n_unique()
    for reason, number in left_out.items():
        count.left_out[reason] = count.left_out.get(reason, 0) + number
        say(f"{source.path.name} {source.version}: left out {number} rows: {reason}")
    return found


# A driver that does not know a card's name gives its PCI device: Intel's Arc Pro B60 is 0xe211 (Linux, xe_pciids.h).
ALIASES = {"B60": "[0XE211]"}


def _another_device(rows: pl.DataFrame, source: Source) -> dict[str, pl.Expr]:
    """Rows that were measured on another GPU than the system's (the tables hold a few)."""
    import polars as pl

    if "device" not in rows.columns:
        return {}
    chip = source.system.split("_")[0].upper()
    names = (chip, ALIASES[chip]) if chip in ALIASES else (chip,)
    others = [device for device in rows["device"].unique() if not any(name in device.upper() for name in names)]
    return {f"measured on {device}": pl.col("device") == device for device in sorted(others)}


# Weights this large cannot come from a cache: the largest L2 of these GPUs holds 126 MB (B200).
SURELY_FROM_HBM_BYTES = 5e8
GPUS_PER_NODE = 8  # of every system that the package describes but GB200 and GB300, whose description says 4


def _described(path: Path) -> tuple[int, float]:
    """The GPUs of a node and the datasheet's HBM rate, from the package's own description; (8, 0) where it has none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    parts = content if isinstance(content, dict) else {}
    gpu, node = (parts[name] if isinstance(parts.get(name), dict) else {} for name in ("gpu", "node"))
    rate, gpus = gpu.get("mem_bw"), node.get("num_gpus_per_node")
    return (
        gpus if isinstance(gpus, int) and gpus > 0 else GPUS_PER_NODE,
        float(rate) if isinstance(rate, int | float) and rate > 0 else 0.0,
    )


def _possible(rows: pl.DataFrame, hbm_bytes_per_s: float) -> pl.DataFrame:
    """Leave out balanced rows that would read the touched experts' weights faster than HBM can (there are such).

    Only where tokens are padded for each expert, or one kernel walks all experts: not for the contiguous rows, whose
    balanced runs skip experts by design (see experts.trusted_rows). Kernels that route from logits touch fewer experts
    than a balanced row's label says; the skewed rows beside it are kept, and prices are anchored on them from there on.
    """
    import polars as pl

    element = pl.col("dtype").replace_strict(BYTES_PER_ELEMENT, default=0.5, return_dtype=pl.Float64)
    expert = 3.0 * pl.col("hidden") * pl.col("intermediate") * element
    read = expert * pl.min_horizontal(pl.col("routed"), pl.col("local_experts").cast(pl.Float64))
    impossible = (
        (pl.col("distribution") == "uniform")
        & (pl.col("grouping") != "deepep_normal")
        & (read > SURELY_FROM_HBM_BYTES)
        & (read / pl.col(LATENCY) > hbm_bytes_per_s)
    )
    # From such a row on a kernel, shape and split did not run what its labels say: no larger balanced row is kept.
    split = ["grouping", "dtype", "hidden", "intermediate", "experts", "top_k", "local_experts"]
    first = pl.col("routed").filter(impossible).min().over(split).fill_null(math.inf)
    return rows.filter((pl.col("routed") < first) | (pl.col("distribution") != "uniform"))


# A product of so few rows and weights takes a few microseconds on every GPU here; a kernel whose small products take
# longer than this in the median was timed with the host's launches (vLLM's FP8 block products in 0.12.0: 58 to 420
# microseconds from 1 row to 2,000), which a captured graph does not pay.
SMALL_ROWS, SMALL_WEIGHTS, HOST_TIMED_S = 64, 8 * 2**20, 50e-6


def _by_the_gpu(rows: pl.DataFrame) -> pl.DataFrame:
    """Leave out kernels of dense products whose time is the host's."""
    import polars as pl

    small = (pl.col("m") <= SMALL_ROWS) & (pl.col("n") * pl.col("k") <= SMALL_WEIGHTS)
    by = [name for name in ("dtype", "kernel") if name in rows.columns]
    typical = pl.col(LATENCY).filter(small).median().over(by)
    return rows.filter(typical.fill_null(0.0) <= HOST_TIMED_S)


# A larger job of the same kernel and shape that takes this much less: one of the two is not in the table's unit. The
# units differ by 1,000; the worst pair in 0.12.0 is 191 (a decode of 16 sequences over 128 and over 256 tokens, H200).
JUMP = 500.0


def _merged(part: pl.DataFrame, family: Family, source: Source, *, one_unit: bool) -> pl.DataFrame:
    """The rows of one file with repeated points as their median, sorted. Raises BadInput where units are mixed."""
    import polars as pl

    known = {name: "unknown" for name in ("kernel", "device") if name not in part.columns}
    part = part.with_columns(pl.lit(value).alias(name) for name, value in known.items())
    schema = polars_schema(family)
    shape = [*family.key, "kernel", "device", *family.point[:-1]]
    size = family.point[-1]
    table = part.group_by([*shape, size]).agg(pl.col(LATENCY).median(), pl.col(ROW).min()).sort([*shape, size])
    if one_unit:
        _same_unit(table, shape, size, source)
    told = {
        "system": source.system,
        "engine": source.engine,
        "version": source.version,
        "package": source.package,
        "package_version": source.package_version,
        "tag": "measured",
    }
    table = table.with_columns(pl.lit(value).alias(name) for name, value in told.items())
    return table.select(pl.col(name).cast(kind) for name, kind in schema.items())


def _same_unit(table: pl.DataFrame, shape: list[str], size: str, source: Source) -> None:
    """Refuse a table in which a larger job takes JUMP times less than the next smaller one. Raises BadInput."""
    import polars as pl

    falls = table.select((pl.col(LATENCY) * JUMP < pl.col(LATENCY).shift(1)).arg_true().alias("at"))["at"]
    for at in falls.to_list():
        if table.row(at - 1)[: len(shape)] == table.row(at)[: len(shape)]:
            refuse_row(
                source.path, f"a larger {size} takes {JUMP:g} times less than a smaller one", int(table[ROW][at]),
                "this row or the smaller one is in another unit",
            )  # fmt: skip


def _whole(parts: list[pl.DataFrame], family: Family) -> pl.DataFrame:
    """All tables of a family; points that two files of one version repeat become their median."""
    import polars as pl

    by_version: dict[tuple[str, str], list[pl.DataFrame]] = {}
    for part in parts:
        if part.height:
            by_version.setdefault((part["engine"][0], part["version"][0]), []).append(part)
    if not by_version:
        return empty(family)
    identity = [name for name in family.columns if name != LATENCY]
    whole = []
    for same in by_version.values():
        table = pl.concat(same)
        if len(same) > 1 and table.select(identity).is_duplicated().any():
            table = table.group_by(identity, maintain_order=True).agg(pl.col(LATENCY).median())
        whole.append(table.select(list(family.columns)))
    return pl.concat(whole)
