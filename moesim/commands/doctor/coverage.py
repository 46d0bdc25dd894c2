"""How a scenario's prices are covered by its profiles, for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moesim.commands.doctor.findings import Finding
from moesim.cost.estimate import Tag
from moesim.engine.coverage import LABELS, REFUSED, Coverage

FORMULA, EXTRAPOLATED = Tag.FORMULA.label, Tag.EXTRAPOLATED.label
# What a refusal advises that a scenario with extrapolated prices has done already.
ALLOW = ", or set cost.extrapolate: allow"
# Columns of the table that a person sees.
_SHAPE_WIDTH, _SIZES_WIDTH = 44, 32


def summary(rows: Sequence[Coverage]) -> Finding:
    """The whole in one line: shares over all prices asked, and what is refused or goes beyond the tables."""
    total = sum(row.prices for row in rows)
    shares = {label: sum(row.shares.get(label, 0.0) * row.prices for row in rows) / total for label in LABELS}
    told = ", ".join(f"{percent(share)} {label}" for label, share in shares.items() if share)
    kernels = len({(row.kernel, str(row.shape)) for row in rows})
    detail = f"{kernels} kernels and shapes, {total:,} prices over all batch sizes: {told}"
    never = [row for row in rows if row.refused == 1.0]
    if never:
        first = f"{never[0].phase} {name(never[0])}"
        more = f" and {len(never) - 1} more" if len(never) > 1 else ""
        return Finding("coverage", "fault", f"{detail}; nothing prices {first}{more}", never[0].mend)
    missing = [row for row in rows if row.refused or row.shares.get(EXTRAPOLATED)]
    if missing:
        what = "refused" if any(row.refused for row in missing) else "beyond the tables"
        names = ", ".join(dict.fromkeys(f"{row.phase} {row.kernel}" for row in missing))
        return Finding("coverage", "warn", f"{detail}; at some sizes {what}: {names}", "see the table for the commands")
    return Finding("coverage", "ok", detail)


def percent(share: float) -> str:
    """A share that never rounds to nothing or to all: `under 0.1 %`, `99.9 %`."""
    if 0 < share < 0.001:
        return "under 0.1 %"
    return f"{min(100 * share, 99.9 if share < 1 else 100.0):.3g} %"


def name(row: Coverage) -> str:
    """A kernel and its shape: `Gemm n=2112 k=7168 dtype=fp8_block`."""
    shown = [f"{key}={value}" for key, value in row.shape.items() if (key, value) != ("phase", row.phase)]
    return " ".join([row.kernel, *shown])


def table(rows: Sequence[Coverage]) -> list[str]:
    """Shares of the prices asked in percent by kernel, then what is missing and what would measure it."""
    labels = [label for label in LABELS if any(label in row.shares for row in rows)]
    out = ["profile coverage, % of the prices that the steps' batch sizes ask for (ranges in --json)"]
    out.append(_line("phase", "kernel and shape", "sizes", {label: label for label in labels}))
    for row in _merged(rows):
        cells = {label: _cell(row.shares.get(label, 0.0)) for label in labels}
        out.append(_line(row.phase, name(row), _sizes(row), cells))
    return out + _missing(rows)


def _line(phase: str, kernel: str, sizes: str, cells: Mapping[str, str]) -> str:
    """One line, columns as wide as their labels."""
    start = f"{phase:<9}{_short(kernel, _SHAPE_WIDTH):<{_SHAPE_WIDTH + 2}}{_short(sizes, _SIZES_WIDTH):<{_SIZES_WIDTH}}"
    return start + "".join(f"{cell:>{len(label) + 2}}" for label, cell in cells.items())


def _cell(share: float) -> str:
    return percent(share).removesuffix(" %").replace("under 0.1", "< 0.1") if share else "."


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _sizes(row: Coverage) -> str:
    """Ranges of the sizes over all labels: `tokens 1..128`."""
    found: dict[str, tuple[float, float]] = {}
    for ranges in row.ranges.values():
        for size, (low, high) in ranges.items():
            before = found.get(size, (low, high))
            found[size] = (min(low, before[0]), max(high, before[1]))
    varied = {size: ends for size, ends in found.items() if ends[0] < ends[1]}
    return _ends(varied or found)


def _ends(ranges: Mapping[str, tuple[float, float]]) -> str:
    return ", ".join(f"{size} {_range(*ends)}" for size, ends in ranges.items() if ends[1] > 0)


def _range(low: float, high: float) -> str:
    return _number(low) if low == high else f"{_number(low)}..{_number(high)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _merged(rows: Sequence[Coverage]) -> list[Coverage]:
    """Kernels that are priced by formula throughout, as one row for each phase."""
    found: list[Coverage] = []
    places: dict[tuple[str, str], int] = {}
    names: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        key = (row.phase, row.kernel)
        if row.shares.get(FORMULA, 0.0) < 1.0:
            found.append(row)
            continue
        names.setdefault(key, []).append(str(row.shape.get("name", name(row))))
        if key not in places:
            places[key] = len(found)
            found.append(row)
        else:
            first = found[places[key]]
            found[places[key]] = replace(first, prices=first.prices + row.prices, ranges={})
    for key, place in places.items():
        if len(names[key]) > 1:
            found[place] = replace(found[place], shape={"of": ", ".join(dict.fromkeys(names[key]))}, ranges={})
    return found


def _missing(rows: Sequence[Coverage]) -> list[str]:
    """Where prices are refused or go beyond the tables, by what would measure them."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for label in (REFUSED, EXTRAPOLATED):
            share = row.shares.get(label, 0.0)
            if share:
                told = f"  {row.phase} {name(row)}: {percent(share)}, at {_ends(row.ranges[label])}"
                mend = row.mend.removesuffix(ALLOW) if label == EXTRAPOLATED else row.mend
                found.setdefault((label, mend), []).append(told)
    out = []
    for (label, mend), lines in found.items():
        out += ["", f"{label}; {mend}:" if mend else f"{label}:", *lines]
    return out
