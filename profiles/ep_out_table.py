"""Leave each EP size of a profile's exchanges out, at all its tokens, and predict it from the other sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.cost.ops import MoeExchange
from moesim.errors import BadInput
from moesim.spec.cluster import ClusterSpec
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice
from profiles.ep_between import kind_of, leave_out, sizes_of
from profiles.ep_out import LEAST_SIZES
from profiles.store import open_profile

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]
# Rows that agree in these differ in EP size, nodes and tokens only.
SAME = ("engine", "version", "step", "mode", "hidden", "top_k", "experts", "dtype", "sms")


def summary(table: pl.DataFrame, cluster: ClusterSpec) -> list[dict[str, Any]]:
    """One line for each mode and step, inner sizes and edges apart: series, points, median and 90 % of the error."""
    found: dict[tuple[str, str, bool], list[Floats]] = {}
    for rows in table.partition_by(SAME):
        by_size = sizes_of(rows, cluster.gpus_per_node)
        if len(by_size) < LEAST_SIZES:
            continue
        one = rows.row(0, named=True)
        op = MoeExchange(
            tokens=np.ones(1), ep=max(by_size), nodes=1,
            **{name: one[name] for name in ("step", "mode", "hidden", "top_k", "experts", "dtype")},
        )  # fmt: skip
        for inner in (True, False):
            errors = leave_out(kind_of(op, cluster), by_size, inner=inner)
            if len(errors):
                found.setdefault((one["mode"], one["step"], inner), []).append(errors)
    return [
        _line(mode, step, inner, parts)
        for (mode, step, inner), parts in sorted(found.items(), key=lambda item: (not item[0][2], *item[0][:2]))
    ]


def run(profile: str, system: str, as_json: bool, say: Callable[[str], None]) -> None:
    """`moesim profile check --leave-out ep-size [PROFILE]`: print. Raises BadInput where no series is long enough."""
    opened = open_profile(profile, system)
    own = str(opened.description.get("system", system))
    lines = summary(opened.table("exchange"), load_cluster(ClusterChoice(system=own)))
    if not lines:
        raise BadInput(
            f"no exchange at {LEAST_SIZES} EP sizes",
            where=f"profile {opened.folder.name}",
            mend="name a profile that has them, or --rows FILE.csv",
        )
    say(json.dumps({"profile": str(opened.folder), "ep_sizes": lines}) if as_json else "\n".join(report(lines)))


def _line(mode: str, step: str, inner: bool, parts: list[Floats]) -> dict[str, Any]:
    errors = np.abs(np.expm1(np.concatenate(parts)))
    return {
        "mode": mode, "step": step, "tag": "interpolated" if inner else "extrapolated", "series": len(parts),
        "points": len(errors), "median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9)),
    }  # fmt: skip


def report(lines: list[dict[str, Any]]) -> list[str]:
    """The summary for people."""
    out = [f"{'EP sizes left out':<42}{'series':>8}{'points':>8}{'median':>9}{'90 %':>8}"]
    for line in lines:
        name = f"{line['mode']} {line['step']}, {'inner' if line['tag'] == 'interpolated' else 'edges, extrapolated'}"
        out.append(f"{name:<42}{line['series']:>8}{line['points']:>8}{line['median']:>9.1%}{line['p90']:>8.0%}")
    return out
