"""Leave each EP size of a published series out, and predict it from the others.

An inner size lies between two measured ones (interpolated); the outermost are extrapolated, and reported apart. The
order of a series is judged on its decided pairs: two EP sizes whose measured seconds differ by more than their last
digits or told spreads, at least one of them an inner size, which stands there as it was predicted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import BadInput
from profiles.ep_scaling import carried, fit
from profiles.published_exchanges import Point, PublishedSeries, Series, read_series

# The project's threshold for the median of |predicted / measured - 1| over inner EP sizes.
MEDIAN_LIMIT = 0.15
LEAST_SIZES = 3


@dataclass(frozen=True)
class Judged:
    """A series with its predictions: EP size -> seconds, each made without the row of that size."""

    series: Series
    predicted: dict[int, float]

    @property
    def inner(self) -> list[int]:
        """The EP sizes that lie between two others."""
        return [point.ep for point in self.series.points[1:-1]]

    @property
    def edges(self) -> list[int]:
        """The smallest and the largest."""
        return [self.series.points[0].ep, self.series.points[-1].ep]

    def error(self, ep: int) -> float:
        """predicted / measured - 1."""
        measured = next(point.seconds for point in self.series.points if point.ep == ep)
        return self.predicted[ep] / measured - 1.0

    def plain(self, ep: int) -> float:
        """error of a straight line in log-log between the other sizes, for comparison; an inner size."""
        others = [point for point in self.series.points if point.ep != ep]
        logs = np.log([point.seconds for point in others])
        guess = np.exp(np.interp(np.log(ep), np.log([point.ep for point in others]), logs))
        return float(guess / next(point.seconds for point in self.series.points if point.ep == ep) - 1.0)

    def order(self, *, printed: bool = False) -> dict[str, int]:
        """Pairs of the series with an inner size: right, wrong, and undecided by the source itself.

        printed: in what the source printed, which may be a bandwidth, instead of in seconds.
        """
        counts = {"right": 0, "wrong": 0, "undecided": 0}
        inner = set(self.inner)
        for one, other in combinations(self.series.points, 2):
            if one.ep not in inner and other.ep not in inner:
                continue
            measured = _shown(one, one.seconds, printed) - _shown(other, other.seconds, printed)
            within = sum(
                _shown(point, point.seconds, printed) * point.within_s / point.seconds for point in (one, other)
            )
            if abs(measured) <= within:
                counts["undecided"] += 1
                continue
            a, b = (
                _shown(point, self.predicted[point.ep] if point.ep in inner else point.seconds, printed)
                for point in (one, other)
            )
            counts["right" if (a - b) * measured > 0 else "wrong"] += 1
        return counts

    def monotone(self) -> bool:
        """Whether the measured seconds rise or fall throughout, as far as the source decides."""
        steps = [
            np.sign(other.seconds - one.seconds)
            for one, other in pairwise(self.series.points)
            if abs(other.seconds - one.seconds) > one.within_s + other.within_s
        ]
        return len(set(steps)) <= 1


def _shown(point: Point, seconds: float, printed: bool) -> float:
    return point.printed(seconds) if printed else seconds


def leave_out(published: PublishedSeries) -> list[Judged]:
    """Every series of three or more EP sizes, each size predicted from the others."""
    return [_judge(series) for series in published.series if len(series.points) >= LEAST_SIZES]


def _judge(series: Series) -> Judged:
    predicted = {}
    for left in series.points:
        others = [point for point in series.points if point.ep != left.ep]
        seconds = [point.seconds for point in others]
        physics = fit(series.kind, [point.ep for point in others], np.full(len(others), series.tokens), seconds)
        at = np.asarray([series.tokens])
        measured = {point.ep: (at, np.asarray([point.seconds])) for point in others}
        predicted[left.ep] = float(carried(physics, series.kind, measured, left.ep, at)[0])
    return Judged(series, predicted)


def summary(judged: list[Judged], left_out: dict[str, int]) -> dict[str, Any]:
    """Figures for the whole file, and one entry for each series."""
    inner = [abs(one.error(ep)) for one in judged for ep in one.inner]
    plain = [abs(one.plain(ep)) for one in judged for ep in one.inner]
    edges = [abs(one.error(ep)) for one in judged for ep in one.edges]
    orders = [one.order() for one in judged]
    printed = [one.order(printed=True) for one in judged]
    median = float(np.median(inner)) if inner else None
    wrong = sum(order["wrong"] > 0 for order in orders)
    return {
        "series": [_entry(one, order) for one, order in zip(judged, orders, strict=True)],
        "rows_left_out": left_out,
        "inner": {"points": len(inner), "median": median, "p90": float(np.quantile(inner, 0.9)) if inner else None},
        "log_log": {
            "median": float(np.median(plain)) if plain else None,
            "p90": float(np.quantile(plain, 0.9)) if plain else None,
        },
        "edges": {"points": len(edges), "median": float(np.median(edges)) if edges else None, "tag": "extrapolated"},
        "order": {
            "series": len(judged),
            "right": len(judged) - wrong,
            "not_monotone": sum(not one.monotone() for one in judged),
            "pairs": _total(orders),
            "as_printed": {"right": sum(not order["wrong"] for order in printed), "pairs": _total(printed)},
        },
        "median_limit": MEDIAN_LIMIT,
        "holds": median is not None and median <= MEDIAN_LIMIT and wrong == 0,
    }


def _total(orders: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(order[name] for order in orders) for name in ("right", "wrong", "undecided")}


def _entry(one: Judged, order: dict[str, int]) -> dict[str, Any]:
    points = [
        {
            "ep": point.ep,
            "measured_s": point.seconds,
            "predicted_s": one.predicted[point.ep],
            "error": one.error(point.ep),
            "tag": "interpolated" if point.ep in one.inner else "extrapolated",
        }
        for point in one.series.points
    ]
    return {
        "name": one.series.name, "assumed": list(one.series.assumed), "points": points, "order": order,
        "monotone": one.monotone(),
    }  # fmt: skip


def report(found: dict[str, Any]) -> list[str]:
    """The summary for people."""
    out = [
        "each EP size predicted from the others, in microseconds: EP measured>predicted (error); [edge, extrapolated]"
    ]
    for one in found["series"]:
        cells = []
        for point in one["points"]:
            measured, predicted = (f"{point[name] * 1e6:.4g}" for name in ("measured_s", "predicted_s"))
            cell = f"{point['ep']} {measured}>{predicted} ({point['error']:+.0%})"
            cells.append(cell if point["tag"] == "interpolated" else f"[{cell}]")
        order = one["order"]
        verdict = "order right" if not order["wrong"] else f"order wrong in {order['wrong']} of {_decided(order)} pairs"
        out.append(f"{one['name']}: {verdict}{'' if one['monotone'] else ', not monotone'}")
        out.append(f"    {', '.join(cells)}")
    inner, edges, order = found["inner"], found["edges"], found["order"]
    if inner["points"]:
        out.append(
            f"inner EP sizes: {inner['points']} points in {order['series']} series, median error {inner['median']:.1%} "
            f"(limit {found['median_limit']:.0%}), 90 % within {inner['p90']:.1%}; straight in log-log "
            f"{found['log_log']['median']:.1%} and {found['log_log']['p90']:.1%}"
        )
        out.append(f"edges, extrapolated: {edges['points']} points, median error {edges['median']:.1%}")
    pairs = order["pairs"]
    out.append(
        f"order: right in {order['right']} of {order['series']} series, in {pairs['right']} of {_decided(pairs)} pairs "
        f"that the sources decide ({pairs['undecided']} more differ by less than their last digit or spread); "
        f"{order['not_monotone']} series do not rise or fall throughout"
    )
    shown = order["as_printed"]
    out.append(
        f"order of what the sources print (some a bandwidth): right in {shown['right']} of {order['series']} series, "
        f"in {shown['pairs']['right']} of {_decided(shown['pairs'])} pairs"
    )
    out += [f"left out: {count} rows with {reason}" for reason, count in found["rows_left_out"].items()]
    out.append("holds" if found["holds"] else "missed")
    return out


def run(rows: Path, as_json: bool, say: Callable[[str], None]) -> bool:
    """`moesim profile check --leave-out ep-size --rows FILE`: print, and tell whether it holds. Raises BadInput."""
    published = read_series(rows)
    found = summary(leave_out(published), published.left_out)
    if not found["series"]:
        raise BadInput(f"no series of {LEAST_SIZES} EP sizes", where=str(rows), mend="give rows at more EP sizes")
    say(json.dumps({"rows": str(rows), **found}) if as_json else "\n".join(report(found)))
    return bool(found["holds"])


def _decided(order: dict[str, int]) -> int:
    return order["right"] + order["wrong"]
