"""What kernels and exchanges reach of a datasheet: the time of a small one, and shares of the peaks, by kind.

The figures are fitted to measured tables of seven GPUs (`python -m profiles.reach_fit`), a row of `reach.yaml` for each
kind and type of data, with how far they are off on GPUs of an architecture that the fit did not see.
"""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

from pydantic import Field

from moesim.spec.base import Spec
from moesim.spec.yaml_text import read_yaml

FILE = "reach.yaml"
# Assumed, not measured: how far a formula is off for what `reach` has no measurement of (one standard deviation of ln).
REL_SIGMA = 0.35
# Types of data by the width of their weights; where a kind was measured in one of them only, it stands for the others.
WIDTHS: tuple[tuple[str, ...], ...] = (
    ("bf16", "fp16", "fp32"),
    ("fp8_block", "fp8", "int8"),
    ("nvfp4", "w4a8_mxfp4_mxfp8", "mxfp4", "int4"),
)
PLACES = {name: (width, place) for width, names in enumerate(WIDTHS) for place, name in enumerate(names)}


class Reach(Spec):
    """One kind of kernel at one type of data.

    floor_s: seconds of a call that has next to nothing to do, inside a captured graph. compute: share of the peak
    FLOP/s of the units that compute the type. hbm: share of the datasheet's HBM rate; above 1 where what the formula
    counts stays in the cache. rel_sigma: one standard deviation of ln(true / predicted). points: rows fitted.
    """

    kind: str
    dtype: str
    floor_s: float = Field(gt=0)
    compute: float = Field(gt=0)
    hbm: float = Field(gt=0)
    rel_sigma: float = Field(gt=0)
    median: float = Field(ge=0, description="median of |ln(true / predicted)| on architectures left out")
    points: int = Field(gt=0)
    systems: tuple[str, ...]


class LinkReach(Spec):
    """One kind of collective or exchange.

    floor_s: seconds of one that carries next to nothing, beside the latencies of its links. near: share of the rate of
    a GPU's links inside its domain. sm_bytes_per_s: what one multiprocessor of the exchange's kernel moves inside a
    domain; None of a library that takes as many as it needs. The others as in `Reach`.
    """

    kind: str
    floor_s: float = Field(gt=0)
    near: float = Field(gt=0)
    sm_bytes_per_s: float | None = Field(default=None, gt=0)
    rel_sigma: float = Field(gt=0)
    median: float = Field(ge=0, description="median of |ln(true / predicted)| on architectures left out")
    points: int = Field(gt=0)
    systems: tuple[str, ...]


class ReachFile(Spec):
    """`reach.yaml`: where the rows are from, and the rows."""

    source: str
    kernels: tuple[Reach, ...]
    links: tuple[LinkReach, ...]


@functools.cache
def bundled() -> ReachFile:
    """The figures that ship."""
    path = Path(str(resources.files("moesim") / "cost" / FILE))
    return ReachFile.read(read_yaml(path, what="file of what kernels reach"), where=path)


@functools.cache
def reach(kind: str, dtype: str) -> Reach:
    """The figures of a kind at a type; at the nearest type that was measured where it was not at this one.

    dtype: of attention "queries/cache" (`bf16/fp8`). The nearest type has as wide weights (for attention: as wide a
    cache, then queries as wide), else the nearest width. Raises KeyError for a type that has no width.
    """
    found = [row for row in bundled().kernels if row.kind == kind]
    return min(found, key=lambda row: _apart(row.dtype, dtype))


@functools.cache
def link_reach(kind: str) -> LinkReach:
    """The figures of a kind of collective ("collective all_reduce") or exchange ("exchange normal between domains")."""
    return next(row for row in bundled().links if row.kind == kind)


def _apart(measured: str, asked: str) -> tuple[list[int], bool, list[int]]:
    """How far two types are from each other: in width (of the cache first), else another one, then as listed."""
    pairs = [(PLACES[mine], PLACES[theirs]) for mine, theirs in zip(measured.split("/"), asked.split("/"), strict=True)]
    widths = [abs(mine[0] - theirs[0]) for mine, theirs in reversed(pairs)]
    return widths, measured != asked, [mine[1] for mine, _ in reversed(pairs)]
