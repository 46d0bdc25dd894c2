"""The figures of a leave-out check, grouped by family, by system and by table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from profiles import every_second, skew_out
from profiles.error_law import NINETY
from profiles.every_second import LIMITS
from profiles.raw_tables import TOGETHER, Points

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LeftOut:
    """The points left out of one table.

    predicted_over_measured, plain: ln(predicted / measured) by the product and by plain log-log interpolation
    [points], NaN where there is none. sigma: one standard deviation of that logarithm as the kept rows tell it
    [points]. size: of each point [points]. limits: most that the median and the 90 % quantile may be, where the table
    is judged by itself.
    """

    family: str
    system: str
    table: str
    predicted_over_measured: Floats
    plain: Floats
    sigma: Floats
    size: Floats
    limits: tuple[float, float] | None = None


def every_second_left_out(points: Points, left: every_second.Left) -> LeftOut:
    """What `every_second.leave_out` made of one table, with its sizes; the one place that reads `every_second.Left`."""
    chosen = every_second.every_second(points.groups, np.ones(len(points.sizes), dtype=bool))
    sigma = np.broadcast_to(np.asarray(left.sigma, dtype=np.float64), left.ours.shape)
    return LeftOut(left.family, left.system, left.table, left.ours, left.plain, sigma, points.sizes[chosen])


def distributions_left_out(points: Points) -> Iterable[LeftOut]:
    """Leave each skewed distribution of an experts' table out; nothing for other tables."""
    if points.kind.family != "MoE":
        return
    for name, residuals in skew_out.leave_distributions_out(points):
        none = np.full(len(residuals), np.nan)
        stem = points.name.rsplit("/", 1)[-1]
        limits = (skew_out.MEDIAN_LIMIT, math.inf)
        yield LeftOut(f"{stem}: {name}", points.system, points.name, residuals, none, none, none, limits)


@dataclass(frozen=True)
class Figures:
    """How wrong the prices of some tables are, all their points pooled; a figure that there is none of is NaN.

    unpriced: points that nothing enclosed. median, p90: quantiles of |predicted / measured - 1|, log_log_*: the same
    by plain log-log interpolation. covered_90: share of points inside their 90 % interval; mean_half_width: of it,
    relative. *_limit: NaN where nothing is asked.
    """

    family: str
    system: str
    tables: int
    points: int
    unpriced: int
    median: float
    p90: float
    log_log_median: float
    log_log_p90: float
    covered_90: float
    mean_half_width: float
    median_limit: float
    p90_limit: float

    @property
    def judged(self) -> bool:
        """Whether a limit is set."""
        return not math.isnan(self.median_limit)

    @property
    def holds(self) -> bool:
        """Whether both limits are kept and, where there is a rival, plain log-log interpolation is beaten."""
        beaten = math.isnan(self.log_log_median) or self.median < self.log_log_median
        return self.median <= self.median_limit and self.p90 <= self.p90_limit and beaten

    def as_dict(self) -> dict[str, float | str | bool | None]:
        """For JSON: null where there is no figure."""
        found: dict[str, float | str | bool | None] = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }
        return found | ({"holds": self.holds} if self.judged else {})


EVERY_SYSTEM = "all"


def figures(family: str, system: str, parts: Sequence[LeftOut]) -> Figures:
    """Pool the points of some tables. Quantiles are over the points that could be priced."""
    ours = np.concatenate([one.predicted_over_measured for one in parts])
    plain = np.concatenate([one.plain for one in parts])
    half = NINETY * np.concatenate([one.sigma for one in parts])
    inside = np.isfinite(ours)
    errors, rivals = np.abs(np.expm1(ours[inside])), np.abs(np.expm1(plain[inside & np.isfinite(plain)]))
    known = inside & np.isfinite(half)
    own = {one.limits for one in parts}
    median_limit, p90_limit = (own.pop() if len(own) == 1 else None) or LIMITS.get(family, (math.nan, math.nan))
    return Figures(
        family=family,
        system=system,
        tables=len({one.table for one in parts}),
        points=len(ours),
        unpriced=int((~inside).sum()),
        median=_quantile(errors, 0.5),
        p90=_quantile(errors, 0.9),
        log_log_median=_quantile(rivals, 0.5),
        log_log_p90=_quantile(rivals, 0.9),
        covered_90=float((np.abs(ours[known]) <= half[known]).mean()) if known.any() else math.nan,
        mean_half_width=float(np.expm1(half[known]).mean()) if known.any() else math.nan,
        median_limit=median_limit,
        p90_limit=p90_limit,
    )


def _quantile(values: Floats, share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else math.nan


def families(found: Sequence[LeftOut]) -> dict[str, list[LeftOut]]:
    """The tables by family; families that are judged together come as one first, and by themselves after all others."""
    together = list(dict.fromkeys(TOGETHER.get(one.family, one.family) for one in found))
    parts = [name for name in dict.fromkeys(one.family for one in found) if name in TOGETHER]
    grouped = {name: [one for one in found if TOGETHER.get(one.family, one.family) == name] for name in together}
    return grouped | {name: [one for one in found if one.family == name] for name in parts}


def by_family(found: Sequence[LeftOut]) -> list[Figures]:
    """One line a family over all systems."""
    return [figures(name, EVERY_SYSTEM, parts) for name, parts in families(found).items()]


def by_system(found: Sequence[LeftOut]) -> list[Figures]:
    """One line for each family of each system, systems in the order in which they were read."""
    lines = []
    for system in dict.fromkeys(one.system for one in found):
        own = [one for one in found if one.system == system]
        lines += [figures(name, system, parts) for name, parts in families(own).items()]
    return lines


@dataclass(frozen=True)
class TableFigures:
    """One table and its figures."""

    table: str
    figures: Figures

    def as_dict(self) -> dict[str, float | str | bool | None]:
        """For JSON."""
        return {"table": self.table, **self.figures.as_dict()}


def by_table(found: Sequence[LeftOut]) -> list[TableFigures]:
    """One line a table, largest median error first; what no point could price comes last."""
    lines = [TableFigures(one.table, figures(one.family, one.system, [one])) for one in found]
    return sorted(
        (line for line in lines if line.figures.points),
        key=lambda line: -math.inf if math.isnan(line.figures.median) else line.figures.median,
        reverse=True,
    )


# A table with fewer points is too small to be named as one of the worst.
ENOUGH_POINTS = 10


def worst(lines: Sequence[TableFigures], count: int = 10) -> list[TableFigures]:
    """The tables of some size with the largest median errors."""
    return [line for line in lines if line.figures.points - line.figures.unpriced >= ENOUGH_POINTS][:count]


def report_by_family(lines: Sequence[Figures]) -> list[str]:
    """The lines of `by_family` as a table for people."""
    return [_row("family", 20), *(_row(line.family, 20, line) for line in lines)]


def report_by_system(lines: Sequence[Figures]) -> list[str]:
    """The lines of `by_system` as a table for people."""
    head = f"{'system':<14}{_row('family', 40)}"
    return [head, *(f"{line.system:<14}{_row(line.family, 40, line)}" for line in lines)]


def _row(name: str, width: int, line: Figures | None = None) -> str:
    """A line of a table; its head without a line."""
    if line is None:
        cells = ["tables", "points", "median", "90 %", "log-log", "90 %", "covered", "width"]
        end = "limit"
    else:
        cells = [
            str(line.tables), str(line.points), _percent(line.median, 2), _percent(line.p90, 1),
            _percent(line.log_log_median, 2), _percent(line.log_log_p90, 1), _percent(line.covered_90, 1),
            _percent(line.mean_half_width, 1),
        ]  # fmt: skip
        end = ""
        if line.judged:
            most = f"{line.median_limit:.1%}" + (f" and {line.p90_limit:.0%}" if math.isfinite(line.p90_limit) else "")
            end = f"{most}: {'holds' if line.holds else 'missed'}"
    widths = (7, 9, 9, 8, 10, 8, 9, 8)
    shown = f"{name:<{width}}" + "".join(f"{cell:>{wide}}" for cell, wide in zip(cells, widths, strict=True))
    return f"{shown}  {end}" if end else shown


def _percent(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}%}"
