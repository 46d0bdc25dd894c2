"""Leave every second size out of every measured table, and predict it as the product prices.

The protocol: rows equal in every key but the size, at least five of them, sorted; the odd positions are left out, the
last is kept. Predictions see the kept rows alone. The same on the kept rows gives the uncertainty that a profile made
of them would carry, and how much of what was left out its 90 % intervals cover.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moesim.units import BYTES_PER_ELEMENT
from profiles.fit import curve, refined, surface
from profiles.importers.aiconfigurator_tables import DTYPES
from profiles.raw_tables import TOGETHER, Points

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LEAST_POINTS = 5
# Half the width of a normal 90 % interval in standard deviations.
NINETY = 1.645
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
    axis = expert_load(points) if rule == "experts" else points.sizes
    out = np.full(len(points.sizes), np.nan)
    for start, end in _spans(points.groups):
        here, wanted = kept[start:end], left[start:end]
        if not wanted.any():
            continue
        part = curve(
            axis[start:end][here], points.seconds[start:end][here], rule="tiles" if rule == "tiles" else "chord"
        )
        out[start:end][wanted] = part.price(axis[start:end][wanted])[0]
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


# Rates that place the kinks of an expert curve, from the datasheets: HBM in bytes/s and dense bf16 in FLOP/s (NVIDIA
# H100, H200, B200, B300, A100, L40S, RTX Pro 6000 Blackwell); only their ratio matters here.
DATASHEET = {
    "h100": (3.35e12, 989e12),
    "h200": (4.8e12, 989e12),
    "b200": (8e12, 2250e12),
    "gb200": (8e12, 2250e12),
    "b300": (8e12, 2250e12),
    "gb300": (8e12, 2250e12),
    "a100": (2.04e12, 312e12),
    "l40s": (864e9, 362e12),
    "rtx": (1.8e12, 504e12),
}
# What kernels reach of them, and how much faster 8-bit products run than 16-bit ones in practice.
HBM_REACHED, FLOPS_REACHED, BYTE_PRODUCTS = 0.8, 0.6, 1.6


def expert_load(points: Points) -> Floats:
    """Model seconds of each row's experts [points]: the touched experts' weights, the products, the activations.

    Added up: a step is partly bound by one and partly by the other.
    """
    hbm, flops = DATASHEET.get(points.system.split("_")[0], DATASHEET["h200"])
    keys = points.keys
    columns = ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size", "distribution")
    rows = zip(points.sizes.tolist(), keys["moe_dtype"].to_list(), *(keys[name].to_list() for name in columns),
               strict=True)  # fmt: skip
    return np.array([_load(hbm * HBM_REACHED, flops * FLOPS_REACHED, *row) for row in rows])


@lru_cache(maxsize=1_000_000)
def _load(
    hbm: float, flops: float, tokens: float, dtype: str, hidden: int, inter: int, top_k: int, experts: int, tp: int,
    ep: int, distribution: str,
) -> float:  # fmt: skip
    touched, pairs = _touched(tokens, top_k, experts, ep, distribution)
    element = BYTES_PER_ELEMENT.get(DTYPES.get(dtype, dtype), 0.5)
    width = inter / tp
    weights = touched * 3.0 * hidden * width * element
    # bf16 rows in and out of both products, and the rows of all tokens read, quantised and written.
    activations = pairs * 2.0 * (4.0 * hidden + 3.0 * width) + tokens * 6.0 * hidden
    products = pairs * 6.0 * hidden * width / (flops * (BYTE_PRODUCTS if element < 2.0 else 1.0))
    return (weights + activations) / hbm + products


# Draws of a skewed distribution; the same for all sizes, so that more tokens never touch fewer experts by chance.
DRAWS = 16


@lru_cache(maxsize=100_000)
def _touched(tokens: float, top_k: int, experts: int, ep: int, distribution: str) -> tuple[float, float]:
    """Touched local experts and (token, expert) pairs of a collector's row."""
    local = max(experts // ep, 1)
    pairs = tokens * top_k / ep
    words = distribution.split("_")
    if words[0] != "power" or experts % ep:
        return min(pairs, float(local)), pairs
    loads = _mean_loads(int(tokens), top_k, experts, ep, float(words[2]))
    return float((1.0 - np.exp(-loads)).sum(axis=1).mean()), float(loads.sum(axis=1).mean())


def _mean_loads(tokens: int, top_k: int, experts: int, ep: int, exponent: float) -> Floats:
    """Mean tokens of each local expert of the fullest rank [DRAWS, experts / ep] under the collectors' power law.

    Means, not the collectors' whole numbers: their expected number of touched experts grows smoothly with the tokens.
    Source of the law: `grouped.power_law_histograms`.
    """
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    power = 1.0 - exponent
    u = np.random.default_rng(0).random((DRAWS, experts))
    wanted = ((high**power - low**power) * u + low**power) ** (1.0 / power)
    loads = np.minimum(wanted * tokens * top_k / wanted.sum(axis=1, keepdims=True), tokens)
    by_rank = loads.reshape(DRAWS, ep, experts // ep)
    fullest: Floats = by_rank[np.arange(DRAWS), by_rank.sum(axis=2).argmax(axis=1)]
    return fullest


@dataclass(frozen=True)
class Left:
    """What was left out of one table: ln(predicted / measured) by the product and by plain log-log, and its sigma."""

    family: str
    table: str
    system: str
    ours: Floats
    plain: Floats
    sigma: float


def leave_out(points: Points) -> Left:
    """Apply the protocol to one table."""
    everything = np.ones(len(points.sizes), dtype=bool)
    left = every_second(points.groups, everything)
    again = every_second(points.groups, ~left)
    truth = np.log(points.seconds)
    inner = np.log(predicted(points, ~left & ~again, again)[again]) - truth[again]
    sizes = np.abs(inner[np.isfinite(inner)])  # a second halving, inside the kept rows
    sigma = float(np.quantile(sizes, 0.6827)) if len(sizes) else float("nan")
    ours = np.log(predicted(points, ~left, left)[left]) - truth[left]
    plain = np.log(log_log(points, ~left, left)[left]) - truth[left]
    return Left(points.kind.family, points.name, points.system, ours, plain, sigma)


def summary(found: Iterable[Left]) -> list[dict[str, float | str | bool]]:
    """One line a family (and one for families that are judged together), errors of all its tables pooled."""
    tables = list(found)
    names = list(dict.fromkeys(TOGETHER.get(one.family, one.family) for one in tables))
    parts = [name for name in dict.fromkeys(one.family for one in tables) if name in TOGETHER]
    lines = []
    for name in [*names, *parts]:
        own = [one for one in tables if one.family == name or (name in names and TOGETHER.get(one.family) == name)]
        lines.append(_line(name, own))
    return lines


def _line(name: str, tables: list[Left]) -> dict[str, float | str | bool]:
    ours = np.concatenate([one.ours for one in tables])
    plain = np.concatenate([one.plain for one in tables])
    half = NINETY * np.concatenate([np.full(len(one.ours), one.sigma) for one in tables])
    inside = np.isfinite(ours)
    errors, rivals = np.abs(np.expm1(ours[inside])), np.abs(np.expm1(plain[inside]))
    known = inside & np.isfinite(half)
    figures = {
        "median": _quantile(errors, 0.5),
        "p90": _quantile(errors, 0.9),
        "log_log_median": _quantile(rivals, 0.5),
        "log_log_p90": _quantile(rivals, 0.9),
        "covered_90": float((np.abs(ours[known]) <= half[known]).mean()) if known.any() else float("nan"),
        "mean_half_width": float(np.expm1(half[known]).mean()) if known.any() else float("nan"),
    }
    line: dict[str, float | str | bool] = {
        "family": name, "tables": len(tables), "points": len(ours), "unpriced": int((~inside).sum()), **figures,
    }  # fmt: skip
    if name in LIMITS:
        median, p90 = LIMITS[name]
        better = figures["median"] < figures["log_log_median"]
        holds = figures["median"] <= median and figures["p90"] <= p90 and better
        line |= {"median_limit": median, "p90_limit": p90, "holds": holds}
    return line


def _quantile(values: Floats, share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else float("nan")


def report(lines: list[dict[str, float | str | bool]]) -> list[str]:
    """The summary as a table for people."""
    head = f"{'family':<20}{'tables':>7}{'points':>9}{'median':>9}{'90 %':>8}{'log-log':>10}{'90 %':>8}"
    out = [head + f"{'covered':>9}{'width':>8}  limit"]
    for line in lines:
        text = f"{line['family']:<20}{line['tables']:>7}{line['points']:>9}{line['median']:>9.2%}{line['p90']:>8.1%}"
        text += f"{line['log_log_median']:>10.2%}{line['log_log_p90']:>8.1%}{line['covered_90']:>9.1%}"
        text += f"{line['mean_half_width']:>8.1%}"
        if "holds" in line:
            text += (
                f"  {line['median_limit']:.1%} and {line['p90_limit']:.0%}: {'holds' if line['holds'] else 'missed'}"
            )
        out.append(text)
    return out
