"""How operations meet tables: keys, versions, prepared lookups."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from moesim.cost.ops import (
    Attention,
    Collective,
    ExpertGemm,
    Gemm,
    MemoryBound,
    MlaAbsorb,
    MlaAttention,
    MoeExchange,
    Operation,
)
from profiles.experts import ExpertCurve
from profiles.fit import OUTSIDE, SAME, Curve, Surface, completed, curve, medians, refined, surface
from profiles.monotone import isotonic
from profiles.products import Product, aligned_seconds
from profiles.protocols import rule_of_collective
from profiles.record import DEEPEP, LATENCY, MEASURED_ENGINE
from profiles.refine import Rule

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]
Tags = NDArray[np.int8]

NOTHING: Mapping[str, Product] = {}
# The fields of each operation that hold sizes; all others are the key.
SIZES: dict[type, tuple[str, ...]] = {
    Gemm: ("m",),
    ExpertGemm: ("tokens",),
    Attention: ("batch", "new_tokens", "prefix_tokens"),
    MlaAttention: ("batch", "new_tokens", "prefix_tokens"),
    MlaAbsorb: ("tokens",),
    MemoryBound: ("bytes",),
    Collective: ("bytes",),
    MoeExchange: ("tokens",),
}


@dataclass(frozen=True)
class Priced:
    """What one version of a table says of an operation.

    price: operation -> seconds and tags. hull: the measured range, for people; reach: what of it holds for the first of
    the operation's refused points, where the range is no box. clamp: the operation moved to the edge
    of the hull; None where `price` carries on by a model of its own. under: operation -> true where a size lies below
    the smallest measured one, at which `price` holds it. profile: the place of its profile in the scenario's list.
    stand_in: priced between measured shapes.
    """

    price: Callable[[Any], tuple[Floats, Tags]]
    source: str
    sigma: float
    hull: str
    clamp: Callable[[Any], Any] | None = None
    under: Callable[[Any], NDArray[np.bool_]] | None = None
    profile: int = 0
    stand_in: bool = False
    reach: Callable[[Any, NDArray[np.bool_]], str] | None = None


@functools.cache
def key_fields(kind: Any) -> tuple[str, ...]:
    """The fields of an operation that are not sizes."""
    return tuple(entry.name for entry in dataclasses.fields(kind) if entry.name not in SIZES[kind])


def key_of(op: Operation) -> tuple[object, ...]:
    """What is fixed about an operation; for experts also the number of local slots."""
    kind: Any = type(op)
    fixed = tuple(getattr(op, name) for name in key_fields(kind))
    return (type(op), *fixed, op.tokens.shape[-1] if isinstance(op, ExpertGemm) else 0)


def where_key(table: pl.DataFrame, **key: object) -> pl.DataFrame:
    """Rows whose columns equal the key."""
    import polars as pl

    return table.filter(*(pl.col(name) == value for name, value in key.items())) if key else table


# The column that tells which of the scenario's profiles a row comes from.
PROFILE = "profile"


def versions(rows: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """The rows of each profile, engine and version, with the words that name them.

    Profiles come in the scenario's order (rows without PROFILE are one's); within one the newest version comes first.
    """
    import polars as pl

    if PROFILE not in rows.columns:
        rows = rows.with_columns(pl.lit(0, dtype=pl.Int64).alias(PROFILE))
    parts = rows.partition_by([PROFILE, "engine", "version"], as_dict=True)
    ordered = sorted(parts.items(), key=lambda item: newness(str(item[0][2])), reverse=True)
    for (_, engine, version), part in sorted(ordered, key=lambda item: item[0][0]):
        kernels = ", ".join(sorted(part["kernel"].unique()))
        first = part.row(0, named=True)
        where = f" on {first['device']}" if engine == MEASURED_ENGINE else ""
        yield f"{engine} {version} {kernels}{where} ({first['package']} {first['package_version']})", part


def at_multiprocessors(found: Iterator[tuple[str, pl.DataFrame]], sms: int) -> Iterator[tuple[str, pl.DataFrame]]:
    """The rows of each version at so many multiprocessors.

    DeepEP's own tests run at another number than its default (24, not 20): of their logs the nearest number answers,
    and its words say so.
    """
    import polars as pl

    for source, table in found:
        exact = where_key(table, sms=sms)
        if exact.height:
            yield source, exact
        elif sms and table["engine"][0] == DEEPEP:
            nearest = min(table["sms"].unique().to_list(), key=lambda number: (abs(number - sms), number))
            yield (
                f"{source} at {nearest or 'an unstated number of'} SMs, not {sms}",
                table.filter(pl.col("sms") == nearest),
            )


def place_of(table: pl.DataFrame) -> int:
    """Which of the scenario's profiles the rows of one version come from."""
    return int(table[PROFILE][0])


def newness(version: str) -> tuple[tuple[int, ...], int]:
    """Orders versions: numbers as numbers, a release candidate before its release, a post-release after."""
    candidate = re.search(r"(?:rc|a|b|dev)(\d*)", version)
    release = version[: candidate.start()] if candidate else version
    numbers = tuple(int(part) for part in re.findall(r"\d+", release))
    return numbers, int(candidate.group(1) or 0) if candidate else 1_000_000


def rule_of(size: str) -> Rule:
    """How seconds run between measured sizes of a family, as `record` names them: a latency and a rate, or a bend."""
    return "bend" if size == "new_tokens" else "chord"


def rule_along(rows: pl.DataFrame, size: str) -> Rule:
    """The same for rows of one key; that of a collective depends on which it is, and on the library."""
    if size == "bytes" and "kind" in rows.columns:
        return rule_of_collective(rows["kind"][0], rows["path"][0])
    return rule_of(size)


def along(rows: pl.DataFrame, size: str, source: str, sigma: float) -> Priced:
    """A lookup along one size, in the rows of one version."""
    by_size = curve(rows[size].to_numpy(), rows[LATENCY].to_numpy(), rule=rule_along(rows, size))
    return dataclasses.replace(along_curve(by_size, size, source, sigma), profile=place_of(rows))


def along_rows(rows: pl.DataFrame, source: str, sigma: float, products: Mapping[str, Product]) -> Priced:
    """A lookup along the rows of a product of one shape, in one version, by what its kernel was found to do."""
    m, seconds = rows["m"].to_numpy(), rows[LATENCY].to_numpy()
    product = product_of(rows, products)
    by_size = curve(m, seconds, rule=product.rule(rows["n"][0], rows["k"][0]), surcharge_s=product.surcharge_s)
    return dataclasses.replace(along_curve(by_size, "m", source, sigma), profile=place_of(rows))


def product_name(dtype: str, engine: str, version: str, kernel: str) -> str:
    """The name under which a profile keeps what it found of a kernel of dense products."""
    return f"{dtype} {engine} {version} {kernel}"


def product_of(rows: pl.DataFrame, products: Mapping[str, Product]) -> Product:
    """What was found of the kernel of these rows of one version; the defaults where nothing was.

    Where a version takes several kernels for one shape, the one with most rows; a surcharge is one kernel's alone.
    """
    kernels = rows["kernel"].value_counts(sort=True)
    first = rows.row(0, named=True)
    name = product_name(first["dtype"], first["engine"], first["version"], kernels["kernel"][0])
    found = products.get(name, Product())
    return found if kernels.height == 1 else dataclasses.replace(found, surcharge_s=0.0)


def along_curve(by_size: Curve, size: str, source: str, sigma: float) -> Priced:
    """A lookup along one size on a curve that is there already."""
    smallest, largest = float(by_size.xs[0]), by_size.largest

    def under(op: Any) -> NDArray[np.bool_]:
        sizes = np.asarray(getattr(op, size), dtype=np.float64)
        return np.asarray((sizes > 0) & (sizes < smallest * (1.0 - SAME)))

    def price(op: Any) -> tuple[Floats, Tags]:
        return by_size.price(getattr(op, size))

    def clamp(op: Any) -> Any:
        return dataclasses.replace(op, **{size: np.minimum(getattr(op, size), largest)})

    return Priced(price, source, sigma, f"{size} up to {largest:g}", clamp, under)


def between_shapes(table: pl.DataFrame, n: int, k: int, products: Mapping[str, Product] = NOTHING) -> Curve | None:
    """The curve of a product [m, k] x [k, n] between the four measured shapes around it; None outside them.

    Bilinear in ln n and ln k of ln seconds, at every m that all of them have. products: as `product_of` takes them.
    """
    import polars as pl

    corners = table.select("n", "k").unique()
    ns, ks = corners["n"].unique().sort().to_numpy(), corners["k"].unique().sort().to_numpy()
    around_n, around_k = _around(ns, n), _around(ks, k)
    if around_n is None or around_k is None:
        return None
    total: Floats | None = None
    common: Floats | None = None
    product = product_of(table, products)
    parts = []
    for at_n, weight_n in around_n:
        for at_k, weight_k in around_k:
            if weight_n * weight_k == 0.0:
                continue
            rows = table.filter((pl.col("n") == at_n) & (pl.col("k") == at_k))
            if not rows.height:
                return None
            ms, seconds = medians(rows["m"].to_numpy(), rows[LATENCY].to_numpy())
            common = ms if common is None else np.intersect1d(common, ms)
            level = aligned_seconds(ms, seconds, product.surcharge_s)
            parts.append((weight_n * weight_k, ms, isotonic(np.log(level))))
    if common is None or not len(common):
        return None
    for weight, ms, logs in parts:
        at = weight * logs[np.searchsorted(ms, common)]
        total = at if total is None else total + at
    assert total is not None
    between = curve(common, np.exp(total), rule=product.rule(n, k), exact=False)
    return dataclasses.replace(between, surcharge_s=product.surcharge_s)


def _around(axis: NDArray[np.int64], value: int) -> tuple[tuple[int, float], tuple[int, float]] | None:
    """The two measured values around `value`, with their weights in the logarithm; None outside."""
    if value < axis[0] or value > axis[-1]:
        return None
    high = int(np.searchsorted(axis, value))
    if axis[high] == value:
        return (int(axis[high]), 1.0), (int(axis[high]), 0.0)
    low = high - 1
    share = float(np.log(value / axis[low]) / np.log(axis[high] / axis[low]))
    return (int(axis[low]), 1.0 - share), (int(axis[high]), share)


def by_experts(by_slots: ExpertCurve, source: str, sigma: float, place: int) -> Priced:
    """A lookup by histogram; place: that of its profile."""
    kind = "measured" if by_slots.measured else "between measured numbers of local experts"
    return Priced(
        lambda op: by_slots.price(op.tokens),
        f"{source}, {kind}",
        sigma,
        f"up to {by_slots.pairs:g} pairs a rank balanced",
        under=by_slots.under,
        profile=place,
    )


def on_grid(
    rows: pl.DataFrame, size: str, source: str, sigma: float, formula: Callable[[Floats, Floats], Floats] | None
) -> Priced:
    """A lookup over batch and length; `formula` fills the corners that the grid lacks, where that is allowed."""
    grid = surface(*(rows[name].to_numpy() for name in ("batch", size, LATENCY)))
    if formula is not None:
        grid = completed(grid, formula(*np.meshgrid(grid.axis_a, grid.axis_b, indexing="ij")))
    grid = refined(grid, rule_of(size))
    most_batch, most_length = float(grid.axis_a[-1]), float(grid.axis_b[-1])
    hull = f"batch up to {most_batch:g}, {size} up to {most_length:g}, long ones in small batches"

    def at(op: Any) -> tuple[Floats, Floats]:
        """Batch and length as the grid counts them."""
        batch = np.asarray(op.batch, dtype=np.float64)
        if size == "new_tokens":
            return batch, causal_length(op)
        return batch * np.asarray(op.new_tokens, dtype=np.float64), np.asarray(op.prefix_tokens, dtype=np.float64) + 1.0

    def reach(op: Any, outside: NDArray[np.bool_]) -> str:
        batch, length = (float(np.broadcast_to(sizes, outside.shape)[outside][0]) for sizes in at(op))
        longest = longest_at(grid, batch)
        told = f"up to {longest:g}" if longest else "not at all"
        return f"asked {size} {length:g} at batch {batch:g}, measured there {told}; {hull}"

    least_batch, least_length = float(grid.axis_a[0]), float(grid.axis_b[0])

    def under(op: Any) -> NDArray[np.bool_]:
        batch, length = at(op)
        small = (batch < least_batch * (1.0 - SAME)) | (length < least_length * (1.0 - SAME))
        return np.asarray(small & (batch > 0) & (length > 0))

    if size == "new_tokens":

        def clamp_prefill(op: Any) -> Any:
            length = np.minimum(causal_length(op), most_length)
            batch = np.minimum(np.asarray(op.batch, dtype=np.float64), most_batch)
            return dataclasses.replace(op, batch=batch, new_tokens=length, prefix_tokens=np.zeros_like(length))

        return Priced(
            functools.partial(_prefill, grid), source, sigma, hull, clamp_prefill, under, place_of(rows), reach=reach
        )

    def clamp_decode(op: Any) -> Any:
        length = np.minimum(np.asarray(op.prefix_tokens) + np.asarray(op.new_tokens), most_length)
        new = np.minimum(np.asarray(op.new_tokens, dtype=np.float64), length)
        batch = np.minimum(np.asarray(op.batch, dtype=np.float64), most_batch)
        return dataclasses.replace(op, batch=batch, new_tokens=new, prefix_tokens=length - new)

    return Priced(
        functools.partial(_decode, grid), source, sigma, hull, clamp_decode, under, place_of(rows), reach=reach
    )


def longest_at(grid: Surface, batch: float) -> float:
    """The longest length that the grid prices at this batch: known at both measured batches around it; 0 for none."""
    if batch > grid.axis_a[-1] * (1.0 + SAME):
        return 0.0
    above = min(int(np.searchsorted(grid.axis_a, batch * (1.0 - SAME))), len(grid.axis_a) - 1)
    exact = abs(grid.axis_a[above] - batch) <= SAME * batch or above == 0
    known = (grid.known[above if exact else above - 1] != OUTSIDE) & (grid.known[above] != OUTSIDE)
    return float(grid.axis_b[known].max(initial=0.0))


def causal_length(op: Attention | MlaAttention) -> Floats:
    """The prompt without a prefix that has as many causal pairs: s^2 = new^2 + 2 new prefix."""
    new = np.asarray(op.new_tokens, dtype=np.float64)
    length: Floats = np.sqrt(new * (new + 2.0 * np.asarray(op.prefix_tokens, dtype=np.float64)))
    return length


def _prefill(grid: Surface, op: Attention | MlaAttention) -> tuple[Floats, Tags]:
    """Prompts; after a prefix by the causal work, which is a formula on a measured price."""
    batch = np.asarray(op.batch, dtype=np.float64)
    seconds, tags = grid.price(batch, causal_length(op))
    after = (np.asarray(op.prefix_tokens) > 0) & (tags != OUTSIDE) & (seconds > 0)
    return seconds, np.where(after, np.maximum(tags, int(Tag.FORMULA)), tags).astype(np.int8)


def _decode(grid: Surface, op: Attention | MlaAttention) -> tuple[Floats, Tags]:
    """One token each over the mean length, itself included."""
    batch = np.asarray(op.batch, dtype=np.float64) * np.asarray(op.new_tokens, dtype=np.float64)
    return grid.price(batch, np.asarray(op.prefix_tokens, dtype=np.float64) + 1.0)


def nothing(sizes: Floats) -> tuple[Floats, Tags]:
    """No time at all."""
    return np.zeros(np.shape(sizes)), np.zeros(np.shape(sizes), dtype=np.int8)


def fastest(one: tuple[Floats, Tags], other: tuple[Floats, Tags]) -> tuple[Floats, Tags]:
    """The smaller of two prices that are inside; outside only where both are."""
    usable = other[1] != OUTSIDE
    take = usable & ((one[1] == OUTSIDE) | (other[0] < one[0]))
    return np.where(take, other[0], one[0]), np.where(take, other[1], one[1]).astype(np.int8)


def at_best(price: Callable[[Any], tuple[Floats, Tags]], tag: Tag) -> Callable[[Any], tuple[Floats, Tags]]:
    """The same lookup with no tag better than `tag`; what is outside stays so."""

    def tagged(op: Any) -> tuple[Floats, Tags]:
        seconds, tags = price(op)
        return seconds, np.where(tags == OUTSIDE, OUTSIDE, np.maximum(tags, int(tag))).astype(np.int8)

    return tagged


def never_free(price: Callable[[Any], tuple[Floats, Tags]]) -> Callable[[Any], tuple[Floats, Tags]]:
    """The same lookup with sizes held above zero: an empty exchange costs as much as the smallest measured one."""

    def held(op: Any) -> tuple[Floats, Tags]:
        return price(dataclasses.replace(op, tokens=np.maximum(np.asarray(op.tokens, dtype=np.float64), FLOOR)))

    return held


FLOOR = 1e-6  # a size below every measured one, above zero
