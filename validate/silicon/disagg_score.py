"""The score of disaggregated rows: how many are priced, why the others are not, and the errors, blind cells apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from validate.accuracy import errors
from validate.silicon.rows import SiliconRow, clean_disaggregated

FIGURES = (("tpot", "TPOT"), ("ttft", "TTFT"), ("tokens_per_s_per_gpu", "tokens/s/GPU"))


class Predicted(Protocol):
    """What is predicted of a row; `silicon.Prediction`."""

    @property
    def row(self) -> SiliconRow:
        """The row."""
        ...

    @property
    def ttft_s(self) -> float | None:
        """Seconds, None where it is not priced."""
        ...

    @property
    def tpot_s(self) -> float | None:
        """Seconds, None where it is not priced."""
        ...

    @property
    def reason(self) -> str:
        """Why it is not priced; else empty."""
        ...


def disagg_score(found: Sequence[Predicted]) -> dict[str, Any]:
    """Errors over measured MoE rows with two pools, repeats once: even and odd cells apart.

    all_rows, all_priced: of the table, repeats and rows without measurements included.
    """
    every = [one for one in found if one.row.moe and not one.row.aggregated]
    by_id = {id(one.row): one for one in every}
    rows = clean_disaggregated(one.row for one in every)
    halves: dict[str, Any] = {
        half: _half([by_id[id(row)] for row in rows if row.cell == half]) for half in ("even", "odd")
    }
    return {"all_rows": len(every), "all_priced": sum(not one.reason for one in every), **halves}


def _half(found: Sequence[Predicted]) -> dict[str, Any]:
    priced = [one for one in found if not one.reason]
    ttft, tpot = (np.asarray([getattr(one, name) for one in priced], dtype=np.float64) for name in ("ttft_s", "tpot_s"))
    true_ttft = np.asarray([one.row.ttft_ms for one in priced], dtype=np.float64) * 1e-3
    true_tpot = np.asarray([one.row.tpot_ms for one in priced], dtype=np.float64) * 1e-3
    more = np.asarray([one.row.osl - 1 for one in priced], dtype=np.float64)
    # Requests in flight and GPUs are the same in both rates: what rows do not tell of them leaves the errors alone.
    rate, true_rate = 1.0 / (ttft + tpot * more), 1.0 / (true_ttft + true_tpot * more)
    return {
        "rows": len(found),
        "priced": len(priced),
        "reasons": dict(Counter(kind(one.reason) for one in found if one.reason).most_common()),
        "tpot": errors(tpot, true_tpot).as_dict(),
        "ttft": errors(ttft, true_ttft).as_dict(),
        "tokens_per_s_per_gpu": errors(rate, true_rate).as_dict(),
    }


def kind(reason: str) -> str:
    """A reason without its figures, to count by."""
    return "".join("#" if char.isdigit() else char for char in reason)[:80]


def disagg_cells(found: dict[str, Any]) -> list[list[str]]:
    """Lines of the score's table for a person: name, odd cells, even cells."""
    halves = found["odd"], found["even"]
    counts = [f"{one['rows']}, {one['priced']} ({_share(one['priced'], one['rows'])})" for one in halves]
    lines = [["disaggregated: rows, priced", *counts]]
    for key, name in FIGURES:
        told = [", ".join(_percent(one[key][figure]) for figure in ("mape", "median", "p90", "bias")) for one in halves]
        lines.append([f"disaggregated, {name}: MAPE, median, p90, bias", *told])
    return lines


def _share(part: int, whole: int) -> str:
    return _percent(part / whole if whole else None)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
