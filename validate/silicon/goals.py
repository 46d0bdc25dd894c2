"""What predictions of measured runs are held against: each goal with its target and its figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from validate.silicon.price import OK, Prediction
from validate.silicon.score import plain, share
from validate.silicon.scored import FIGURES

# By what factor errors may be larger on odd cells than on even ones before calibration has fitted noise.
GAP = 1.3


@dataclass(frozen=True)
class Goal:
    """A goal, in words. met: None where predictions do not tell. rival: what aiconfigurator reaches where it prices."""

    name: str
    target: str
    figure: str
    met: bool | None
    rival: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dict(vars(self))


# Figure of the score of odd cells, its statistic, limit, and aiconfigurator's own on the 60 % of rows that it prices.
_ERRORS = (
    ("tpot", "mape", 0.15, "24 %"),
    ("tpot", "median", 0.10, "15 %"),
    ("ttft", "mape", 0.30, "50 %"),
    ("tokens_per_s_per_gpu", "mape", 0.15, "26 %"),
)
_STATISTICS = {"mape": "mean absolute error", "median": "median absolute error"}
# Goals that predictions do not tell, and where they are told.
_ELSEWHERE = (
    ("published results", "every ratio has the right sign, or its miss is explained", "`moesim validate published`"),
    ("all rows priced in", "at most 10 CPU minutes", "`moesim validate silicon --update`"),
    (
        "costs x 1.5 on purpose",
        "the check fails and names them",
        "`moesim validate silicon --check --scale experts=1.5`",
    ),
)


def goals(found: Sequence[Prediction], scored: Mapping[str, Any]) -> list[Goal]:
    """Every goal, by the score of these predictions; those of odd cells first."""
    odd, even = scored["odd"], scored["even"]
    priced = odd["priced"] / odd["rows"] if odd["rows"] else None
    told = [_goal("rows priced, odd cells", priced, 0.8, share, least=True)]
    for figure, statistic, limit, rival in _ERRORS:
        told.append(_goal(f"{FIGURES[figure]}, {_STATISTICS[statistic]}", odd[figure][statistic], limit, share, rival))
    order = odd["choices"]
    told += [
        _goal("choice groups, mean Spearman", order["spearman"], 0.85, plain, "0.74", least=True),
        _goal("choice groups, mean regret", order["regret"], 0.03, share, "5.1 %"),
        _goal(
            "TPOT under attention DP, mean absolute error",
            odd["tpot_by"]["layout"].get("attention DP", {}).get("mape"),
            0.25,
            share,
            "80 %",
        ),
        _gap(odd, even),
        _goal("rows with prefill and decode pools priced", _pools(found), 0.6, share, least=True),
    ]
    return told + [Goal(name, target, f"see {where}", None) for name, target, where in _ELSEWHERE]


def _goal(
    name: str, value: float | None, limit: float, shown: Callable[[float | None], str], rival: str = "", *,
    least: bool = False,
) -> Goal:  # fmt: skip
    at = shown(limit).replace(".0%", "%")
    met = None if value is None else value >= limit if least else value <= limit
    return Goal(name, f"at {'least' if least else 'most'} {at}", shown(value), met, rival)


def _gap(odd: Mapping[str, Any], even: Mapping[str, Any]) -> Goal:
    """Mean errors on odd cells over those on even ones."""
    gaps = {
        name: odd[figure]["mape"] / even[figure]["mape"]
        for figure, name in FIGURES.items()
        if odd[figure]["mape"] is not None and even[figure]["mape"]
    }
    figure = ", ".join(f"{name} {gap:.2f}x" for name, gap in gaps.items()) or "-"
    met = max(gaps.values()) <= GAP if gaps else None
    return Goal("mean errors, odd cells over even ones", f"at most {GAP:g}x", figure, met)


def _pools(found: Sequence[Prediction]) -> float | None:
    """Share of the disaggregated MoE rows that are priced; None where there are none."""
    ok = [one.status == OK for one in found if one.row.moe and not one.row.aggregated]
    return math.fsum(ok) / len(ok) if ok else None
