"""Fit what kernels reach of a datasheet to imported tables: `python -m profiles.reach_fit PROFILE... [--out FILE]`.

A profile is a folder that `moesim profile import aiconfigurator --engine all --priced` wrote. Each kind of kernel at
each type of data gets three figures (`moesim.cost.reach`), fitted to all systems; how far they are off is told on the
systems of an architecture that was left out, each in turn. Collectives and exchanges: `profiles.link_fit`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.ops import Attention, ExpertGemm, Gemm, MlaAbsorb, MlaAttention, Operation
from moesim.cost.reach import PLACES, LinkReach, Reach, ReachFile
from moesim.cost.roofline import Roofline, Work
from moesim.errors import BadInput, MoesimError
from moesim.files import write_text
from profiles import link_fit
from profiles.error_law import NINETY
from profiles.reach_rows import (
    LEAST_ROWS,
    architecture,
    cluster_of,
    drawn_by_bin,
    groups_of,
    numbers,
    quantile,
    softened,
    surest,
    weights,
)
from profiles.store import Profile

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]

LEAST = {
    "n": 512,
    "k": 512,
    "hidden": 1024,
    "intermediate": 256,
    "heads": 2,
    "head_dim": 64,
    "new_tokens": 16,
    "kv_tokens": 64,
}
"""Shapes below these are no model's; tables have them."""

MOST = {"head_dim": 128}
"""Above it are models without experts; engines run them with kernels of their own."""

BALANCED = ("balanced", "uniform")
WINDOW = " window"

LOWEST, HIGHEST = (1e-7, 0.005, 0.02), (1e-3, 1.0, 1.5)
STARTS = ((5e-6, 0.5, 0.7), (3e-5, 0.3, 0.7))


@dataclass(frozen=True)
class Rows:
    """Measured calls of one kind at one type: [rows] each; system by name; group: system and bin."""

    kind: str
    dtype: str
    compute_s: Floats
    hbm_s: Floats
    seconds: Floats
    group: NDArray[np.int64]
    system: NDArray[np.str_]

    def of(self, chosen: NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        return Rows(
            self.kind,
            self.dtype,
            self.compute_s[chosen],
            self.hbm_s[chosen],
            self.seconds[chosen],
            self.group[chosen],
            self.system[chosen],
        )


def read(folder: Path) -> tuple[str, pl.DataFrame]:
    """A profile's system and its calls: kind, dtype, compute_s, hbm_s, seconds.

    Of engines, kernels and versions that measured the same work, the quickest: tables have kernels that no engine
    picks. Raises BadInput where there is no profile, no call of a kernel in it, or no preset of its GPU.
    """
    import polars as pl

    profile = Profile(folder)
    system = str(profile.description.get("system", ""))
    roofline = Roofline(cluster_of(system))
    parts = []
    for family, make in MAKERS.items():
        table = profile.table(family)
        least = [pl.col(name) >= value for name, value in LEAST.items() if name in table.columns]
        most = [pl.col(name) <= value for name, value in MOST.items() if name in table.columns]
        table = table.filter(*least, *most) if least or most else table
        keys = [name for name in table.columns if name not in (*SIZES[family], "latency_s", *AFTER)]
        for key, rows in table.group_by(keys, maintain_order=True):
            named = dict(zip(keys, key, strict=True))
            if any(named[name] not in PLACES for name in ("dtype", "kv_dtype") if name in named):
                continue
            operation = make(named, rows)
            if operation is None:
                continue
            work = roofline.work(operation)
            assert isinstance(work, Work)
            parts.append(
                pl.DataFrame(
                    {
                        "kind": work.kind,
                        "dtype": work.dtype,
                        "compute_s": work.compute_s,
                        "hbm_s": work.hbm_s,
                        "seconds": rows["latency_s"],
                    }
                )
            )
    if not parts:
        raise BadInput("no call of a kernel is in this profile", where=str(folder), mend="import it with --engine all")
    calls = pl.concat(parts).filter(pl.col("compute_s") > 0, pl.col("seconds") > 0)
    same = ["kind", "dtype", "compute_s", "hbm_s"]
    return system, calls.group_by(same).agg(pl.col("seconds").min()).sort(same)


AFTER = ("version", "package", "package_version", "device", "tag", "system")
SIZES = {
    "gemm": ("m",),
    "experts": ("routed",),
    "attention_prefill": ("batch", "new_tokens"),
    "attention_decode": ("batch", "kv_tokens"),
    "mla_prefill": ("batch", "new_tokens"),
    "mla_decode": ("batch", "kv_tokens"),
    "mla_absorb": ("tokens",),
}


def _gemm(key: dict[str, Any], rows: pl.DataFrame) -> Operation | None:
    return Gemm(numbers(rows, "m"), key["n"], key["k"], key["dtype"])


def _experts(key: dict[str, Any], rows: pl.DataFrame) -> Operation | None:
    if key["distribution"] not in BALANCED:
        return None
    local = key["local_experts"]
    each, more = np.divmod(np.round(numbers(rows, "routed")), local)
    tokens = each[:, None] + (np.arange(local)[None, :] < more[:, None])
    names = ("hidden", "intermediate", "experts", "top_k", "dtype", "grouping")
    return ExpertGemm(tokens, *(key[name] for name in names))


def _attention(phase: str) -> Callable[[dict[str, Any], pl.DataFrame], Operation | None]:
    def make(key: dict[str, Any], rows: pl.DataFrame) -> Operation | None:
        names = ("heads", "kv_heads", "head_dim", "dtype", "kv_dtype", "window")
        return Attention(phase, *_sequences(phase, rows), *(key[name] for name in names))  # type: ignore[arg-type]

    return make


def _mla(phase: str) -> Callable[[dict[str, Any], pl.DataFrame], Operation | None]:
    def make(key: dict[str, Any], rows: pl.DataFrame) -> Operation | None:
        if key["form"] != ("expanded" if phase == "prefill" else "absorbed"):
            return None
        names = ("heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "value_head_dim", "dtype", "kv_dtype")
        return MlaAttention(phase, *_sequences(phase, rows), *(key[name] for name in names))  # type: ignore[arg-type]

    return make


def _sequences(phase: str, rows: pl.DataFrame) -> tuple[Floats, Floats, Floats]:
    """Sequences, new tokens and tokens before them."""
    batch = numbers(rows, "batch")
    if phase == "prefill":
        return batch, numbers(rows, "new_tokens"), np.zeros(len(batch))
    return batch, np.ones(len(batch)), numbers(rows, "kv_tokens")


def _absorb(key: dict[str, Any], rows: pl.DataFrame) -> Operation | None:
    names = ("heads", "kv_lora_rank", "head_dim", "dtype")
    return MlaAbsorb(key["side"], numbers(rows, "tokens"), *(key[name] for name in names))


MAKERS: dict[str, Callable[[dict[str, Any], Any], Operation | None]] = {
    "gemm": _gemm,
    "experts": _experts,
    "attention_prefill": _attention("prefill"),
    "attention_decode": _attention("decode"),
    "mla_prefill": _mla("prefill"),
    "mla_decode": _mla("decode"),
    "mla_absorb": _absorb,
}


def gather(folders: list[Path], seed: int = 0) -> Iterator[Rows]:
    """Calls of all profiles by kind and type, drawn as `drawn_by_bin` does."""
    import polars as pl

    calls = pl.concat([found.with_columns(system=pl.lit(system)) for system, found in map(read, folders)])
    kept = drawn_by_bin(calls, ["kind", "dtype"], seed)
    for (kind, dtype), rows in kept.group_by(["kind", "dtype"], maintain_order=True):
        if len(rows) >= LEAST_ROWS:
            yield Rows(
                str(kind),
                str(dtype),
                numbers(rows, "compute_s"),
                numbers(rows, "hbm_s"),
                numbers(rows, "seconds"),
                groups_of(rows),
                rows["system"].to_numpy().astype(np.str_),
            )


def seconds_of(figures: Floats, rows: Rows) -> Floats:
    """By the formula: figures are floor_s, compute and hbm."""
    floor_s, compute, hbm = figures
    return np.asarray(floor_s + np.maximum(rows.compute_s / compute, rows.hbm_s / hbm))


def fitted(rows: Rows) -> Floats:
    """floor_s, compute and hbm, by least squares of ln with long tails counted less; every group weighs alike."""
    from scipy.optimize import least_squares

    weight = np.sqrt(weights(rows))
    best = None
    for start in STARTS:
        found = least_squares(
            lambda logs: weight * softened(np.log(seconds_of(np.exp(logs), rows) / rows.seconds)),
            np.log(start),
            bounds=(np.log(LOWEST), np.log(HIGHEST)),
        )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    return np.asarray(np.exp(best.x))


def left_out(rows: Rows, base: Rows) -> Floats:
    """ln(measured / predicted) of each row by the fit to the other architectures; to other systems where one has all.

    base: rows of the kind that is fitted, `rows` themselves but for windowed attention.
    """
    sources = np.asarray([architecture(name) for name in base.system])
    parts = np.asarray([architecture(name) for name in rows.system])
    if len(set(parts)) < 2:
        parts, sources = rows.system, base.system
    off = np.zeros(len(rows.seconds))
    for part in sorted(set(parts)):
        own = parts == part
        others = sources != part
        figures = fitted(base.of(others) if others.any() else base)
        off[own] = np.log(rows.seconds[own] / seconds_of(figures, rows.of(own)))
    return off


def fit(folders: list[Path]) -> ReachFile:
    """The whole file."""
    kernels = []
    found = {(rows.kind, rows.dtype): rows for rows in gather(folders)}
    for rows in found.values():
        # What windowed kernels read of a cache beyond the window differs too much for figures of their own.
        base = found.get((rows.kind.removesuffix(WINDOW), rows.dtype))
        if base is None:
            continue
        floor_s, compute, hbm = fitted(base)
        off = left_out(rows, base)
        kernels.append(
            Reach(
                kind=rows.kind,
                dtype=rows.dtype,
                floor_s=float(f"{floor_s:.3g}"),
                compute=float(f"{compute:.3g}"),
                hbm=float(f"{hbm:.3g}"),
                rel_sigma=float(f"{max(quantile(off, rows, 0.9) / NINETY, surest(rows)):.2g}"),
                median=float(f"{quantile(off, rows, 0.5):.2g}"),
                points=len(rows.seconds),
                systems=tuple(sorted(set(rows.system.tolist()))),
            )
        )
    return ReachFile(
        source=f"tables of {', '.join(sorted(set().union(*map(packages, folders))))}",
        kernels=tuple(kernels),
        links=link_fit.fit(folders),
    )


def packages(folder: Path) -> set[str]:
    """Where a profile's rows of the fitted families were published, with the version."""
    profile = Profile(folder)
    names = [profile.table(family).select("package", "package_version").unique() for family in MAKERS]
    return {f"{package} {version}" for table in names for package, version in table.iter_rows()}


def written(found: ReachFile) -> str:
    """The file's text: a line for each kind and type."""
    import yaml

    lines = [
        "# What kernels reach of a datasheet (moesim/cost/reach.py says what each figure is).",
        "# Made by `python -m profiles.reach_fit PROFILE... --out moesim/cost/reach.yaml`.",
        f"source: {found.source}",
    ]
    for heading, row in _headed(found):
        lines += [heading] if heading else []
        text = yaml.safe_dump(
            row.model_dump(mode="json", exclude_none=True), default_flow_style=True, width=10_000, sort_keys=False
        )
        lines.append(f"- {text.strip()}")
    return "\n".join(lines) + "\n"


def _headed(found: ReachFile) -> Iterator[tuple[str, Reach | LinkReach]]:
    """Every row, and what stands above the first of its list."""
    for name in ("kernels", "links"):
        for place, row in enumerate(getattr(found, name)):
            yield f"{name}:" if place == 0 else "", row


def markdown(found: ReachFile) -> str:
    """The table of kernels on the page on costs."""
    lines = [
        "| kernel | type | a small call | of peak FLOP/s | of HBM | off on GPUs not seen, median | sigma | rows |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.kind} | {row.dtype} | {1e6 * row.floor_s:.1f} µs | {row.compute:.2f} | {row.hbm:.2f} "
        f"| {np.expm1(row.median):.0%} | {row.rel_sigma:.2f} | {row.points:,} |".replace("%", " %")
        for row in found.kernels
    ]
    return "\n".join(lines)


def markdown_links(found: ReachFile) -> str:
    """The table of collectives and exchanges on the page on costs."""
    lines = [
        "| collective or exchange | a small one | of the link inside a domain | GB/s a multiprocessor "
        "| off on GPUs not seen, median | sigma | rows |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found.links:
        each = "" if row.sm_bytes_per_s is None else f"{1e-9 * row.sm_bytes_per_s:.1f}"
        lines.append(
            f"| {row.kind} | {1e6 * row.floor_s:.1f} µs | {row.near:.2f} | {each} | {np.expm1(row.median):.0%} "
            f"| {row.rel_sigma:.2f} | {row.points:,} |".replace("%", " %")
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print the figures; with --out write them."""
    parser = argparse.ArgumentParser(prog="python -m profiles.reach_fit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profiles", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    try:
        text = written(fit(asked.profiles))
        if asked.out is not None:
            write_text(asked.out, text)
    except MoesimError as error:
        sys.stderr.write(f"error: {error.line()}\n")
        return error.exit_code
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
