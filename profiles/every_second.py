"""Leave every second size out of every measured table, and predict it as the product prices.

The protocol: rows equal in every key but the size, at least five of them, sorted; the odd positions are left out, the
last is kept. Predictions see the kept rows alone. The same on the kept rows gives a law of errors (`error_law`), and
how much of what was left out its 90 % intervals cover. Experts run over `expert_load`, the store's over fitted physics.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from profiles.error_law import NINETY, fit_law
from profiles.expert_load import expert_load
from profiles.fit import curve, refined, surface
from profiles.importers.aiconfigurator_network import NCCL_ELEMENT_BYTES, NCCL_KINDS
from profiles.products import Shape, fit_product
from profiles.protocols import MOVING, combined, rule_of_collective
from profiles.raw_tables import Points

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LEAST_POINTS = 5
# Thresholds of the project: median and 90 % quantile of |predicted / measured - 1| by family.
LIMITS = {
    "MoE": (0.02, 0.10),
    "GEMM": (0.03, 0.15),
    "attention": (0.03, 0.10),
    "MLA": (0.03, 0.10),
    "NCCL": (0.03, 0.10),
    "DeepEP": (0.025, 0.10),
}


def every_second(groups: NDArray[np.int64], among: Bools) -> Bools:
    """Which of the rows `among` are left out: odd positions of groups with LEAST_POINTS and more, the last kept."""
    out = np.zeros(len(groups), dtype=bool)
    rows = np.flatnonzero(among)
    own = groups[rows]
    starts = np.flatnonzero(np.concatenate([[True], own[1:] != own[:-1]])) if len(rows) else np.empty(0, dtype=int)
    sizes = np.diff(np.append(starts, len(rows)))
    position = np.arange(len(rows)) - np.repeat(starts, sizes)
    count = np.repeat(sizes, sizes)
    out[rows[(count >= LEAST_POINTS) & (position % 2 == 1) & (position < count - 1)]] = True
    return out


def predicted(points: Points, kept: Bools, left: Bools) -> Floats:
    """Seconds of the rows `left` [points], from the rows `kept` alone; NaN elsewhere and where nothing encloses one."""
    rule = points.kind.rule
    if rule.startswith("grid:"):
        return _on_grids(points, kept, left, "bend" if rule.endswith("bend") else "chord")
    if rule == "collective":
        return _collectives(points, kept, left)
    if rule == "tiles":
        return _products(points, kept, left)
    axis = expert_load(points) if rule == "experts" else points.sizes
    out = np.full(len(points.sizes), np.nan)
    for start, end in _spans(points.groups):
        here, wanted = kept[start:end], left[start:end]
        if not wanted.any():
            continue
        part = curve(axis[start:end][here], points.seconds[start:end][here])
        out[start:end][wanted] = part.price(axis[start:end][wanted])[0]
    return out


def _products(points: Points, kept: Bools, left: Bools) -> Floats:
    """Every curve by the rule that its kernel's kept rows chose."""
    kernels: dict[tuple[str, str], list[tuple[int, int, int, int]]] = {}
    columns = [points.keys[name].to_list() for name in ("gemm_dtype", "kernel_source", "n", "k")]
    for start, end in _spans(points.groups):
        dtype, kernel, n, k = (column[start] for column in columns)
        kernels.setdefault((dtype, kernel), []).append((start, end, n, k))
    out = np.full(len(points.sizes), np.nan)
    for spans in kernels.values():
        shapes = [
            Shape(float(n * k), points.sizes[start:end][kept[start:end]], points.seconds[start:end][kept[start:end]])
            for start, end, n, k in spans
        ]
        product = fit_product([shape for shape in shapes if len(shape.rows)])
        for (start, end, n, k), shape in zip(spans, shapes, strict=True):
            wanted = left[start:end]
            if wanted.any():
                part = curve(shape.rows, shape.seconds, rule=product.rule(n, k), surcharge_s=product.surcharge_s)
                out[start:end][wanted] = part.price(points.sizes[start:end][wanted])[0]
    return out


def gaps(points: Points, kept: Bools, left: Bools) -> Floats:
    """ln ratio of the kept seconds on either side of each row `left` [points]; NaN elsewhere."""
    out = np.full(len(points.sizes), np.nan)
    logs = np.log(points.seconds)
    for start, end in _spans(points.groups):
        here, wanted = np.flatnonzero(kept[start:end]), np.flatnonzero(left[start:end])
        if len(wanted) and len(here) > 1:
            after = np.clip(np.searchsorted(here, wanted), 1, len(here) - 1)
            out[start:end][wanted] = logs[start:end][here[after]] - logs[start:end][here[after - 1]]
    return out


def _collectives(points: Points, kept: Bools, left: Bools) -> Floats:
    """Every curve by the rule of its collective; kept times of one exchange in several dtypes count as one."""
    import polars as pl

    kinds = points.keys["op_name"].replace(NCCL_KINDS)
    others = [name for name in points.keys.columns if name != "nccl_dtype"]
    size = points.sizes * points.keys["nccl_dtype"].replace_strict(NCCL_ELEMENT_BYTES).to_numpy()
    places = points.keys.select(others).with_columns(pl.Series("bytes", size)).select(pl.struct(pl.all()).rank("dense"))
    seconds = points.seconds.copy()
    together = kept & kinds.is_in(MOVING).to_numpy()
    seconds[together] = combined(places.to_series().to_numpy().astype(np.int64)[together], seconds[together])
    out = np.full(len(points.sizes), np.nan)
    for start, end in _spans(points.groups):
        here, wanted = kept[start:end], left[start:end]
        if wanted.any():
            rule = rule_of_collective(kinds[start], "nccl")
            part = curve(points.sizes[start:end][here], seconds[start:end][here], rule=rule)
            out[start:end][wanted] = part.price(points.sizes[start:end][wanted])[0]
    return out


def log_log(points: Points, kept: Bools, left: Bools) -> Floats:
    """The same by plain piecewise log-log interpolation."""
    out = np.full(len(points.sizes), np.nan)
    x, y = np.log(points.sizes), np.log(points.seconds)
    for start, end in _spans(points.groups):
        here, wanted = kept[start:end], left[start:end]
        if wanted.any():
            at = np.interp(x[start:end][wanted], x[start:end][here], y[start:end][here])
            out[start:end][wanted] = np.exp(at)
    return out


def _spans(groups: NDArray[np.int64]) -> Iterable[tuple[int, int]]:
    if not len(groups):
        return ()
    starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
    return zip(starts.tolist(), [*starts[1:].tolist(), len(groups)], strict=True)


def _on_grids(points: Points, kept: Bools, left: Bools, rule: str) -> Floats:
    """Surfaces over batch and length, one for all rows equal in the other keys."""
    import polars as pl

    others = [name for name in points.keys.columns if name != "batch_size"]
    shape = points.keys.select(pl.struct(others).rank("dense").alias("s"))["s"].to_numpy()
    batch = points.keys["batch_size"].to_numpy().astype(np.float64)
    out = np.full(len(points.sizes), np.nan)
    order = np.argsort(shape, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(shape[order])) + 1):
        have, want = rows[kept[rows]], rows[left[rows]]
        if not len(want):
            continue
        part = refined(
            surface(batch[have], points.sizes[have], points.seconds[have]), "bend" if rule == "bend" else "chord"
        )
        out[want] = part.price(batch[want], points.sizes[want])[0]
    return out


@dataclass(frozen=True)
class Left:
    """What was left out of one table: ln(predicted / measured) by the product and by plain log-log, and its sigma.

    ours, plain, sigma: [points]; 1.645 sigma is half of the 90 % interval in ln seconds.
    """

    family: str
    table: str
    system: str
    ours: Floats
    plain: Floats
    sigma: Floats


def leave_out(points: Points) -> Left:
    """Apply the protocol to one table."""
    everything = np.ones(len(points.sizes), dtype=bool)
    left = every_second(points.groups, everything)
    again = every_second(points.groups, ~left)
    truth = np.log(points.seconds)
    inner = np.log(predicted(points, ~left & ~again, again)[again]) - truth[again]
    law = fit_law(gaps(points, ~left & ~again, again)[again], inner)  # of a second halving, inside the kept rows
    here = gaps(points, ~left, left)[left]
    sigma = np.full(len(here), np.nan) if law is None else law.half_width(here) / NINETY
    ours = np.log(predicted(points, ~left, left)[left]) - truth[left]
    plain = np.log(log_log(points, ~left, left)[left]) - truth[left]
    return Left(points.kind.family, points.name, points.system, ours, plain, sigma)
