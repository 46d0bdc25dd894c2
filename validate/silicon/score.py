"""How far predictions of measured runs are off: of each half of the cells, of its parts, and as Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from validate.accuracy import choices, errors
from validate.silicon.disagg_score import disagg_cells, disagg_score, kind
from validate.silicon.price import Prediction
from validate.silicon.rows import choice_groups
from validate.silicon.scored import FIGURES, HALVES, SPLITS, Half, halves, parts

# Figures that are split by part; throughput follows from both.
SPLIT = ("tpot", "ttft")
# Fewer rows than this of a part are counted and not told: a figure of so few is one of single rows.
TOLD = 5
# Splits, as a table names them.
NAMES = {
    "layout": "layout",
    "engine": "engine",
    "system": "GPU",
    "model": "model",
    "lengths": "tokens in/out",
    "concurrency": "concurrency",
}
_TITLES = {"odd": "odd cells (blind)", "even": "even cells (calibrated)"}


def score(found: Sequence[Prediction]) -> dict[str, Any]:
    """Errors over clean, measured, aggregated MoE rows: of each half of the cells, and of their parts.

    `disaggregated`: the same halves of the rows with two pools, see `disagg_score`.
    """
    return {**score_of(halves(found)), "disaggregated": disagg_score(found)}


def score_of(sides: Mapping[str, Half]) -> dict[str, Any]:
    """The same of halves that are there already. Half -> figures; `tpot_by` and `ttft_by`: split -> part -> errors."""
    told = {half: _half(side) for half, side in sides.items()}
    for split in SPLITS:
        for name, indices in parts(sides, split).items():
            for half, side in sides.items():
                at = indices[half]
                for figure in SPLIT:
                    one = errors(side.predicted[figure][at], side.measured[figure][at]).as_dict()
                    if len(at) < TOLD:
                        one = dict.fromkeys(one) | {"n": len(at)}
                    told[half][f"{figure}_by"][split][name] = one
    return told


def _half(side: Half) -> dict[str, Any]:
    rate, true_rate = (of["tokens_per_s_per_gpu"] for of in (side.predicted, side.measured))
    order = choices(list(choice_groups(side.rows).values()), rate, true_rate)
    return {
        "rows": len(side.counted),
        "priced": len(side.priced),
        "reasons": dict(Counter(kind(one.reason) for one in side.counted if one.reason).most_common()),
        **{name: errors(side.predicted[name], side.measured[name]).as_dict() for name in FIGURES},
        "choices": {name: None if math.isnan(value) else value for name, value in vars(order).items()},
        **{f"{figure}_by": {split: {} for split in SPLITS} for figure in SPLIT},
    }


def share(value: float | None) -> str:
    """A share, `-` where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.1%}"


def plain(value: float | None) -> str:
    """A figure, `-` where there is none."""
    return "-" if value is None else f"{value:.2f}"


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table; what would part a cell is written as a slash."""
    every = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in every)


def score_table(found: Mapping[str, Any]) -> str:
    """The score for a person, as a Markdown table."""
    lines: list[list[str]] = []

    def row(name: str, of: Callable[[dict[str, Any]], str]) -> None:
        lines.append([name, *(of(found[half]) for half in HALVES)])

    row(
        "rows, priced",
        lambda half: f"{half['rows']}, {half['priced']} ({share(half['priced'] / max(half['rows'], 1))})",
    )
    for key, name in FIGURES.items():
        row(
            f"{name}: MAPE, median, p90, bias",
            lambda half, key=key: ", ".join(share(half[key][one]) for one in ("mape", "median", "p90", "bias")),  # type: ignore[misc]
        )
    row(
        "choice groups: number, Spearman, regret",
        lambda half: (
            f"{half['choices']['groups']}, {plain(half['choices']['spearman'])}, {share(half['choices']['regret'])}"
        ),
    )
    for label in ("TP", "EP", "attention DP"):
        row(
            f"TPOT, {label}: rows, MAPE",
            lambda half, label=label: (  # type: ignore[misc]
                f"{half['tpot_by']['layout'].get(label, {}).get('n', 0)}, "
                f"{share(half['tpot_by']['layout'].get(label, {}).get('mape'))}"
            ),
        )
    lines += disagg_cells(found["disaggregated"])
    return markdown_table(["check", *(_TITLES[half] for half in HALVES)], lines)


def split_cells(found: Mapping[str, Any], split: str) -> list[list[str]]:
    """Lines of one split: part, then for each half its rows, and MAPE, median and bias of each figure of SPLIT."""
    lines = []
    for name in found[HALVES[0]]["tpot_by"][split]:
        cells = [name]
        for half in HALVES:
            by = [found[half][f"{figure}_by"][split][name] for figure in SPLIT]
            cells.append(f"{by[0]['n']:,}")
            cells += [
                "-" if one["mape"] is None else ", ".join(share(one[key]) for key in ("mape", "median", "bias"))
                for one in by
            ]
        lines.append(cells)
    return lines


def split_head(split: str) -> list[str]:
    """The head over `split_cells`."""
    return [NAMES[split], *(f"{half}: {name}" for half in HALVES for name in ("rows", *(FIGURES[f] for f in SPLIT)))]


def split_tables(found: Mapping[str, Any]) -> str:
    """One Markdown table for each split, odd and even half beside each other."""
    tables = [markdown_table(split_head(split), split_cells(found, split)) for split in SPLITS]
    return "\n\n".join(tables)
