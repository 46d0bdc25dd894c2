"""Costs of single operations measured for one model on one machine: `cost: {source: points, profiles: [FILE]}`.

Where the store (profiles/store.py) holds tables of kernels over many shapes, such a file holds the very operations that
some scenarios are made of, each at one size or at several. Between sizes it interpolates; beyond them it refuses, or
goes on with the last slope where the scenario allows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moesim.cost.estimate import CostModel, Estimate, Tag, estimate
from moesim.cost.ops import Attention, Collective, ExpertGemm, Gemm, MemoryBound, Operation
from moesim.cost.roofline import family_of
from moesim.errors import BadInput, OutsideProfile
from moesim.files import read_text
from moesim.spec.base import Spec
from moesim.spec.cluster import ClusterSpec
from moesim.spec.model import ModelSpec
from moesim.spec.scenario import Scenario

Floats = NDArray[np.float64]

FORMAT, SCHEMA_VERSION = "moesim-points", 1
# One standard deviation of ln of a shared error where a family's points tell less: what clocks and placement in memory
# do between two processes that measure the same.
LEAST_SIGMA = 0.02

# What tells one operation from another, its size apart, in order; each key is that of a point.
KEYS: dict[str, tuple[str, ...]] = {
    "gemm": ("n", "k"),
    "memory_bound": ("name",),
    "experts": ("hidden", "intermediate"),
    "attention": ("new_tokens", "prefix_tokens", "heads", "kv_heads", "head_dim", "window"),
    "collective": ("kind", "gpus"),
}
SIZES = {
    "gemm": "m", "memory_bound": "bytes", "experts": "tokens of one expert", "attention": "sequences",
    "collective": "bytes",
}  # fmt: skip

Family = Literal["gemm", "memory_bound", "experts", "attention", "collective"]
Key = tuple[str | int, ...]


class MeasuredPoint(Spec):
    """One operation at one size: key as KEYS lists it, size as SIZES says, and seconds."""

    family: Family
    key: tuple[str | int, ...]
    size: float = Field(gt=0)
    seconds: float = Field(gt=0)
    p10_s: float = Field(gt=0)
    p90_s: float = Field(gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.key) != len(KEYS[self.family]):
            raise ValueError(f"a key of {self.family} has {', '.join(KEYS[self.family])}")
        return self


class PointsFile(Spec):
    """Measured points with where and when they were measured."""

    format: Literal["moesim-points"]
    schema_version: Literal[1]
    measured: str
    dtype: str = Field(description="element type of all operations that have one, as scenarios name it")
    nodes: int = Field(gt=0, description="nodes that collectives span")
    hardware: dict[str, Any]
    versions: dict[str, str]
    points: tuple[MeasuredPoint, ...] = Field(min_length=1)


@dataclass(frozen=True, eq=False)
class _Line:
    """The points of one key: sizes rising [points], their seconds."""

    sizes: Floats
    seconds: Floats


@dataclass(frozen=True, eq=False)
class PointCosts:
    """A cost model of measured points.

    lines: by family, key and the nodes that are spanned (1 but for collectives). sigma: of each family; dtype, nodes:
    of what was measured; beyond: whether it may go on past the last point.
    """

    lines: dict[tuple[str, Key, int], _Line]
    sigma: dict[str, float]
    dtype: str
    nodes: tuple[int, ...]
    source: str
    beyond: bool

    @classmethod
    def of(
        cls, points: Iterable[MeasuredPoint], source: str, *, dtype: str, nodes: int = 1, beyond: bool = False
    ) -> PointCosts:
        """A cost model of some points; those of one key and size are averaged."""
        return cls.of_nodes({nodes: points}, source, dtype=dtype, beyond=beyond)

    @classmethod
    def of_nodes(
        cls, points: Mapping[int, Iterable[MeasuredPoint]], source: str, *, dtype: str, beyond: bool = False
    ) -> PointCosts:
        """A cost model of points by the nodes that their collectives span; see `of`."""
        found: dict[tuple[str, Key, int], dict[float, list[float]]] = {}
        scatter: dict[str, list[float]] = {}
        for nodes, one in ((nodes, one) for nodes, some in points.items() for one in some):
            name: tuple[str, Key, int] = (one.family, one.key, nodes if one.family == "collective" else 1)
            found.setdefault(name, {}).setdefault(one.size, []).append(one.seconds)
            scatter.setdefault(one.family, []).append(max(one.p90_s - one.p10_s, 0.0) / one.seconds)
        lines = {}
        for name, sized in found.items():
            sizes = sorted(sized)
            lines[name] = _Line(np.asarray(sizes), np.asarray([float(np.mean(sized[size])) for size in sizes]))
        # p90 - p10 of a normal distribution is 2.56 standard deviations.
        sigma = {name: max(LEAST_SIGMA, float(np.median(each)) / 2.56) for name, each in scatter.items()}
        return cls(lines, sigma, dtype, tuple(sorted(points)), source, beyond)

    def estimate(self, operation: Operation) -> Estimate:
        """Price an operation. Raises OutsideProfile where no point holds it."""
        family, key, sizes = _place(operation)
        self._refuse_others(operation)
        nodes = getattr(operation, "nodes", 1)
        line = self.lines.get((family, key, nodes))
        told = ", ".join(f"{name} {value}" for name, value in zip(KEYS[family], key, strict=True))
        if line is None:
            raise OutsideProfile(
                f"no point of {family} with {told}" + (f" over {nodes} nodes" if nodes > 1 else ""),
                where=self.source,
                mend="measure it, or use another cost.source",
            )
        seconds, tags = self._at(line, sizes, f"{family} with {told}")
        if family == "experts":
            seconds, tags = seconds.sum(axis=-1), tags.max(axis=-1)
        return estimate(seconds, tags, family_of(operation), self.sigma[family], self.source)

    def _refuse_others(self, operation: Operation) -> None:
        """What is of another element type, or spans as many nodes as nothing measured does. Raises OutsideProfile."""
        dtype, nodes = getattr(operation, "dtype", self.dtype), getattr(operation, "nodes", self.nodes[0])
        if dtype != self.dtype:
            raise OutsideProfile(
                f"the points are of {self.dtype}, {type(operation).__name__} in {dtype} is asked for",
                where=self.source, mend=f"set precision to {self.dtype}, or measure {dtype}",
            )  # fmt: skip
        if nodes not in self.nodes:
            raise OutsideProfile(
                f"the points are of {', '.join(map(str, self.nodes))} node(s), a collective over {nodes} is asked for",
                where=self.source, mend="measure it there, or use another cost.source",
            )  # fmt: skip

    def _at(self, line: _Line, sizes: Floats, told: str) -> tuple[Floats, NDArray[np.int8]]:
        """Seconds and tags at sizes [...]; nothing costs nothing."""
        some = sizes > 0
        if not self.beyond and np.any(some & ((sizes < line.sizes[0]) | (sizes > line.sizes[-1]))):
            raise OutsideProfile(
                f"{told}: points reach from {line.sizes[0]:g} to {line.sizes[-1]:g}, {sizes[some].min():g} to "
                f"{sizes.max():g} are asked for",
                where=self.source,
                mend="measure more of them, or set cost.extrapolate: allow",
            )
        seconds = np.interp(sizes, line.sizes, line.seconds)
        if len(line.sizes) > 1:
            slope = (line.seconds[-1] - line.seconds[-2]) / (line.sizes[-1] - line.sizes[-2])
            seconds = seconds + np.maximum(sizes - line.sizes[-1], 0.0) * max(slope, 0.0)
        else:  # one size: in proportion beyond it, whole below it
            seconds = seconds * np.maximum(sizes / line.sizes[-1], 1.0)
        tags = np.where(np.isin(sizes, line.sizes), Tag.MEASURED, Tag.INTERPOLATED)
        tags = np.where((sizes < line.sizes[0]) | (sizes > line.sizes[-1]), Tag.EXTRAPOLATED, tags)
        return np.where(some, seconds, 0.0), np.where(some, tags, Tag.MEASURED).astype(np.int8)


def _place(operation: Operation) -> tuple[str, Key, Floats]:
    """Family, key and size of an operation. Raises OutsideProfile for a kind that points do not hold."""
    match operation:
        case Gemm():
            return "gemm", (operation.n, operation.k), operation.m
        case MemoryBound():
            return "memory_bound", (operation.name,), operation.bytes
        case ExpertGemm():
            return "experts", (operation.hidden, operation.intermediate), operation.tokens
        case Collective():
            return "collective", (operation.kind, operation.gpus), operation.bytes
        case Attention() if operation.new_tokens.size == 1 and operation.prefix_tokens.size == 1:
            key = (
                round(float(operation.new_tokens.item())),
                round(float(operation.prefix_tokens.item())),
                operation.heads,
                operation.kv_heads,
                operation.head_dim,
                operation.window,
            )
            return "attention", key, operation.batch
        case _:
            raise OutsideProfile(
                f"points hold no {type(operation).__name__}",
                where="cost.source",
                mend="use dispatch backend alltoall, grouped-query attention and one length, or cost.source store",
            )


def places(operations: Iterable[Operation]) -> dict[tuple[Family, Key], list[float]]:
    """What would have to be measured to price some operations: sizes asked for, rising, by family and key."""
    found: dict[tuple[Family, Key], set[float]] = {}
    for one in operations:
        family, key, sizes = _place(one)
        asked = np.asarray(sizes, dtype=np.float64)
        found.setdefault((family, key), set()).update(asked[asked > 0].tolist())  # type: ignore[arg-type]
    return {name: sorted(sizes) for name, sizes in found.items() if sizes}


def read_points(path: Path) -> PointsFile:
    """Read a file of points. Raises BadInput that names the place."""
    try:
        data = json.loads(read_text(path, what="points"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not valid JSON: {error}", where=str(path), mend="measure it again") from None
    return PointsFile.read(data, where=path)


def from_scenario(scenario: Scenario, model: ModelSpec, cluster: ClusterSpec) -> CostModel:
    """The cost model of `cost: {source: points, profiles: [FILE, ...]}`, files by nodes. Raises BadInput."""
    names = scenario.cost.profiles
    if "default" in names:
        raise BadInput(
            "source points needs files of points", where="cost.profiles", mend="name the points.json that holds them"
        )
    files = [read_points(Path(name)) for name in names]
    dtypes = {one.dtype for one in files}
    if len(dtypes) > 1:
        raise BadInput("files of several element types", where="cost.profiles", mend="name files of one type")
    points: dict[int, list[MeasuredPoint]] = {}
    for one in files:
        points.setdefault(one.nodes, []).extend(one.points)
    beyond = scenario.cost.extrapolate == "allow"
    return PointCosts.of_nodes(points, ", ".join(names), dtype=dtypes.pop(), beyond=beyond)
