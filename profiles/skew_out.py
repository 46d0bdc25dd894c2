"""Leave a whole distribution of tokens over experts out of the MoE tables, and predict it from the nearest other one.

A row of the left-out distribution is predicted as the row at the same sizes of the nearest distribution that is left
(by its exponent), times the ratio of the two in the model of touched weights, products and activations: what was
measured, moved by what the histogram changes. No parameter is fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from profiles.expert_load import expert_load
from profiles.experts import POWER_LAW
from profiles.raw_tables import Points

Floats = NDArray[np.float64]
# The project's threshold for the median of |predicted / measured - 1|.
MEDIAN_LIMIT = 0.08


def skew_of(distribution: str) -> float | None:
    """The exponent of a distribution; 0 for balanced ones, None for those that a balancer changed."""
    if distribution in ("balanced", "uniform"):
        return 0.0
    word = distribution.removeprefix(POWER_LAW)
    if word == distribution or not word.replace(".", "", 1).isdigit():
        return None
    return float(word)


def leave_distributions_out(points: Points) -> Iterator[tuple[str, Floats]]:
    """For every skewed distribution of a MoE table: its name and ln(predicted / measured) of its rows."""
    import polars as pl

    keys = [name for name in points.keys.columns if name != "distribution"]
    rows = points.keys.with_columns(
        pl.Series("tokens", points.sizes),
        pl.Series("seconds", points.seconds),
        pl.Series("load", expert_load(points)),
    ).with_columns(pl.struct([*keys, "tokens"]).rank("dense").alias("place"))
    names: list[str] = sorted(rows["distribution"].unique().to_list())
    skews = {name: skew for name in names if (skew := skew_of(name)) is not None}
    for name, skew in skews.items():
        others = [other for other in skews if other != name]
        if skew == 0.0 or not others:
            continue
        nearest = min(others, key=lambda other: abs(skews[other] - skew))
        own = rows.filter(pl.col("distribution") == name)
        both = own.join(rows.filter(pl.col("distribution") == nearest), on="place", suffix="_near")
        if both.height:
            moved = both["seconds_near"] * both["load"] / both["load_near"]
            yield f"{name} from {nearest}", np.log((moved / both["seconds"]).to_numpy())


def summary(left_out: Iterable[tuple[str, Floats]]) -> list[dict[str, float | str | bool]]:
    """One line for every kind of table and pair of distributions, and one for all.

    left_out: name of both and ln(predicted / measured) [points], of every table.
    """
    found: dict[str, list[Floats]] = {}
    for name, residuals in left_out:
        found.setdefault(name, []).append(residuals)
    lines = [_line(name, np.concatenate(parts)) for name, parts in sorted(found.items())]
    if found:
        every = np.concatenate([part for parts in found.values() for part in parts])
        lines.append({**_line("all", every), "median_limit": MEDIAN_LIMIT})
        lines[-1]["holds"] = all(float(line["median"]) <= MEDIAN_LIMIT for line in lines)
    return lines


def _line(name: str, residuals: Floats) -> dict[str, float | str | bool]:
    errors = np.abs(np.expm1(residuals))
    return {
        "family": name, "points": len(errors), "median": float(np.median(errors)),
        "p90": float(np.quantile(errors, 0.9)),
    }  # fmt: skip


def report(lines: list[dict[str, float | str | bool]]) -> list[str]:
    """The summary as a table for people."""
    out = [f"{'table and distribution':<72}{'points':>9}{'median':>9}{'90 %':>8}"]
    for line in lines:
        text = f"{line['family']:<72}{line['points']:>9}{line['median']:>9.2%}{line['p90']:>8.1%}"
        if "holds" in line:
            text += f"  every median {line['median_limit']:.0%}: {'holds' if line['holds'] else 'missed'}"
        out.append(text)
    return out
