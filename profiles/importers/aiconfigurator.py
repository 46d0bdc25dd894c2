"""Import the measured tables of NVIDIA's aiconfigurator-core: systems/data/<system>/<family>/<engine>/<version>.

Rows that repeat a point (re-collections) become their median; rows of another GPU, and rows that no GPU of the kind
can have run, are left out and named.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from moesim.errors import BadInput, MissingPart
from moesim.units import BYTES_PER_ELEMENT
from profiles.importers import aiconfigurator_tables as convert_to
from profiles.importers.aiconfigurator_tables import PACKAGE, Source
from profiles.record import FAMILIES, LATENCY, Family
from profiles.store import checked, empty, polars_schema, read_parquet

if TYPE_CHECKING:
    import polars as pl

MODULE = "aiconfigurator_core"
ENGINES = ("sglang", "trtllm", "vllm")
EVERY = "all"


def find_package(given: Path | None) -> tuple[Path, str]:
    """The folder that holds `<system>/<family>/…` and the package's version. Raises BadInput or MissingPart.

    `given` may be that folder, the package folder above it, or the folder that holds the package.
    """
    if given is None:
        spec = importlib.util.find_spec(MODULE)
        if spec is None or not spec.submodule_search_locations:
            raise MissingPart(
                f"{PACKAGE} is not installed", mend="pip install '.[silicon]', or give its folder with --source"
            )
        return Path(next(iter(spec.submodule_search_locations))) / "systems" / "data", _installed_version()
    for below in ("", "systems/data", f"{MODULE}/systems/data", "data"):
        folder = Path(given) / below
        if folder.is_dir() and any(folder.glob("*/*/*/*/*.parquet")):
            return folder, _unpacked_version(folder)
    raise BadInput(
        "no tables here",
        where=str(given),
        mend="give the folder that holds <system>/<family>/<engine>/<version>/*.parquet",
    )


def _installed_version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"


def _unpacked_version(folder: Path) -> str:
    """The version of an unpacked wheel, read from the name of its dist-info folder."""
    for parent in folder.resolve().parents:
        for found in parent.glob(f"{MODULE}-*.dist-info"):
            return found.name.removeprefix(f"{MODULE}-").removesuffix(".dist-info")
    return "unknown"


def import_tables(
    data: Path,
    *,
    system: str,
    engine: str,
    package_version: str,
    say: Callable[[str], None] = lambda line: None,
    read: dict[str, dict[str, int]] | None = None,
) -> dict[str, pl.DataFrame]:
    """All families of one system and engine (or `all` engines), normalised. Raises BadInput.

    `say` is told of what is left out. `read` is filled: table file -> `rows` that it holds in all its versions, and
    `converted`, those that became rows of a family before repeated points were merged.
    """
    if not (data / system).is_dir():
        known = sorted(path.name for path in data.iterdir() if path.is_dir() and any(path.glob("*/*/*/*.parquet")))
        raise BadInput(f"no tables for the system {system!r}", where=str(data), mend=f"use one of: {', '.join(known)}")
    if engine not in (*ENGINES, EVERY):
        raise BadInput(
            f"unknown engine {engine!r}", where="--engine", mend=f"use one of: {', '.join(ENGINES)}, {EVERY}"
        )
    engines = ENGINES if engine == EVERY else (engine,)
    counts = {} if read is None else read
    found: dict[str, list[pl.DataFrame]] = {name: [] for name in FAMILIES}
    hbm_bytes_per_s = _memory_rate(data.parent / f"{system}.yaml")
    for stem, (families, convert, folders) in CONVERTERS.items():
        for filed_under in dict.fromkeys(folder for one in engines for folder in folders(one)):
            for source in _sources(data, system, filed_under, stem, package_version):
                rows = read_parquet(source.path)
                count = counts.setdefault(stem, {"rows": 0, "converted": 0})
                count["rows"] += rows.height
                rows = _of_this_device(rows, source, say)
                for name, table in zip(families, _converted(convert, rows, source), strict=True):
                    ready = _normalised(table, FAMILIES[name], source)
                    if name == "experts" and hbm_bytes_per_s:
                        ready = _possible(ready, hbm_bytes_per_s, source, say)
                    count["converted"] += ready.height
                    found[name].append(ready)
    return {
        name: checked(_merged(tables, FAMILIES[name]), FAMILIES[name], where=f"{data / system}, {name}")
        for name, tables in found.items()
    }


def _converted(convert: Convert, rows: pl.DataFrame, source: Source) -> tuple[pl.DataFrame, ...]:
    """The rows as rows of families. Raises BadInput where a column holds another type than its collector writes."""
    import polars as pl

    try:
        return convert(rows, source)
    except pl.exceptions.PolarsError:
        raise BadInput("a column has the wrong type", where=str(source.path), mend="fetch the table again") from None


def _sources(data: Path, system: str, engine: str, stem: str, package_version: str) -> Iterable[Source]:
    for path in sorted((data / system).glob(f"*/{engine}/*/{stem}.parquet")):
        yield Source(path, system, engine, path.parent.name, package_version)


# A driver that does not know a card's name gives its PCI device: Intel's Arc Pro B60 is 0xe211 (Linux, xe_pciids.h).
ALIASES = {"B60": "[0XE211]"}


def _of_this_device(rows: pl.DataFrame, source: Source, say: Callable[[str], None]) -> pl.DataFrame:
    """Leave out rows that were measured on another GPU than the system's (the tables hold a few)."""
    import polars as pl

    if "device" not in rows.columns:
        return rows
    chip = source.system.split("_")[0].upper()
    device = pl.col("device").str.to_uppercase()
    names = (chip, ALIASES[chip]) if chip in ALIASES else (chip,)
    kept = rows.filter(pl.any_horizontal(device.str.contains(name, literal=True) for name in names))
    if kept.height < rows.height:
        others = sorted(set(rows["device"].unique()) - set(kept["device"].unique()))
        say(f"{source.path.name} {source.version}: left out {rows.height - kept.height} rows of {', '.join(others)}")
    return kept


# Weights this large cannot come from a cache: the largest L2 of these GPUs holds 126 MB (B200).
SURELY_FROM_HBM_BYTES = 5e8


def _memory_rate(path: Path) -> float:
    """The datasheet's HBM rate of the system, from the package's own description; 0 where it says none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return float(content["gpu"]["mem_bw"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return 0.0


def _possible(rows: pl.DataFrame, hbm_bytes_per_s: float, source: Source, say: Callable[[str], None]) -> pl.DataFrame:
    """Leave out balanced rows that would read the touched experts' weights faster than HBM can (there are such).

    Only where tokens are padded for each expert, or one kernel walks all experts: not for the contiguous rows, whose
    balanced runs skip experts by design (see experts.trusted_rows).
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
    # A kernel, shape and split with such a row did not run what its label says: none of its rows in this table is kept.
    split = ["grouping", "dtype", "hidden", "intermediate", "experts", "top_k", "local_experts"]
    kept = rows.filter(~impossible.any().over(split))
    if kept.height < rows.height:
        say(
            f"{source.path.name} {source.version}: left out {rows.height - kept.height} rows at splits that would read "
            "weights faster than the HBM can"
        )
    return kept


def _normalised(table: pl.DataFrame, family: Family, source: Source) -> pl.DataFrame:
    """Add where the rows come from and bring columns into order. Raises BadInput when one is missing."""
    import polars as pl

    have = table.columns
    defaults = {
        "system": source.system,
        "engine": source.engine,
        "version": source.version,
        "kernel": "unknown",
        "device": "unknown",
        "package": PACKAGE,
        "package_version": source.package_version,
        "tag": "measured",
    }
    table = table.with_columns(pl.lit(value).alias(name) for name, value in defaults.items() if name not in have)
    return table.select(pl.col(name).cast(kind) for name, kind in polars_schema(family).items())


def _merged(tables: list[pl.DataFrame], family: Family) -> pl.DataFrame:
    """All tables of a family; repeated points become their median."""
    import polars as pl

    if not tables:
        return empty(family)
    identity = [name for name in family.columns if name != LATENCY]
    table = pl.concat(tables).group_by(identity).agg(pl.col(LATENCY).median())
    return table.select(list(family.columns)).sort([*family.key, "engine", "version", *family.point])


def _own(engine: str) -> tuple[str, ...]:
    return (engine,)


def _nccl(engine: str) -> tuple[str, ...]:
    """NCCL's own folder; one table of B300 is filed under TensorRT-LLM."""
    return ("nccl", engine)


def _oneccl(engine: str) -> tuple[str, ...]:
    return ("oneccl",)


def _with_trtllm(engine: str) -> tuple[str, ...]:
    """Context MLA also from TensorRT-LLM: its expanded kernel is what SGLang's prefill runs, too (see costs.md)."""
    return tuple(dict.fromkeys((engine, "trtllm")))


Convert = Callable[["pl.DataFrame", Source], "tuple[pl.DataFrame, ...]"]
# File -> the families it fills, its converter, and the folders it is looked for in.
CONVERTERS: dict[str, tuple[tuple[str, ...], Convert, Callable[[str], tuple[str, ...]]]] = {
    "gemm_perf": (("gemm",), convert_to.convert_gemm, _own),
    "moe_perf": (("experts",), convert_to.convert_fused, _own),
    "wideep_generation_moe_perf": (("experts",), convert_to.convert_masked, _own),
    "wideep_context_moe_perf": (("experts",), convert_to.convert_contiguous, _own),
    "context_attention_perf": (("attention_prefill",), convert_to.convert_context_attention, _own),
    "generation_attention_perf": (("attention_decode",), convert_to.convert_generation_attention, _own),
    "context_mla_perf": (("mla_prefill",), convert_to.convert_context_mla, _with_trtllm),
    "generation_mla_perf": (("mla_decode",), convert_to.convert_generation_mla, _own),
    "mla_bmm_perf": (("mla_absorb",), convert_to.convert_mla_bmm, _own),
    "nccl_perf": (("collective",), convert_to.convert_nccl, _nccl),
    "oneccl_perf": (("collective",), convert_to.convert_oneccl, _oneccl),
    "custom_allreduce_perf": (("collective",), convert_to.convert_custom_all_reduce, _own),
    "wideep_deepep_normal_perf": (("exchange",), convert_to.convert_deepep_normal, _own),
    "wideep_deepep_ll_perf": (("exchange",), convert_to.convert_deepep_low_latency, _own),
}
