"""Counts by request, step and domain, where a trace tells them apart: what over-dispersion is fitted on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.tensors import check_cells

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Records:
    """Counts of cells: what the tokens of one request picked in one step.

    counts: float64 [cells, layers, experts]. step, request, domain: int64 [cells], labels; None where the trace has
    none. Without requests a cell is a step of unknown requests, or a whole file.
    """

    counts: Floats
    step: Ints | None = None
    request: Ints | None = None
    domain: Ints | None = None

    def __post_init__(self) -> None:
        for name in ("step", "request", "domain"):
            labels = getattr(self, name)
            if labels is not None and labels.shape != self.counts.shape[:1]:
                raise BadInput(f"{len(labels)} labels `{name}` for {len(self.counts)} cells", mend="give one for each")

    def of_steps(self, steps: Ints) -> Records:
        """The cells of some steps; all of them where steps are not known."""
        if self.step is None:
            return self
        kept = np.isin(self.step, steps)
        return replace(
            self,
            counts=self.counts[kept],
            step=self.step[kept],
            request=None if self.request is None else self.request[kept],
            domain=None if self.domain is None else self.domain[kept],
        )


def records_of(frame: Any, *, layer_ids: Ints, experts: int, where: str) -> Records | None:
    """The cells of a Polars frame with request_id beside layer_id, expert_id, count; None where it has none.

    layer_ids: layers to keep, in order. Steps are numbered as they follow one another. The other columns are those of
    counts that were read; raises BadInput for labels that are missing.
    """
    import polars as pl

    if "request_id" not in frame.columns:
        return None
    frame = frame.filter(pl.col("count").cast(pl.Float64) > 0)
    labels = {name: _labels(frame, name, where) for name in ("request_id", "step", "domain") if name in frame.columns}
    keys = [labels[name] for name in ("request_id", "step") if name in labels]
    cells, first, cell = np.unique(np.stack(keys, axis=1), axis=0, return_index=True, return_inverse=True)
    shape = (len(cells), len(layer_ids), experts)
    check_cells(shape, where=where)
    layer, expert = (frame[name].cast(pl.Int64).to_numpy() for name in ("layer_id", "expert_id"))
    row = np.minimum(np.searchsorted(layer_ids, layer), len(layer_ids) - 1)
    known = layer_ids[row] == layer
    counts = np.zeros(shape)
    amount = frame["count"].cast(pl.Float64).to_numpy()
    np.add.at(counts, (cell.ravel()[known], row[known], expert[known]), amount[known])
    return Records(
        counts,
        step=cells[:, 1] if "step" in labels else None,
        request=cells[:, 0],
        domain=labels["domain"][first] if "domain" in labels else None,
    )


def _labels(frame: Any, name: str, where: str) -> Ints:
    """A column's values numbered in their order: [rows]."""
    import polars as pl

    values = frame[name]
    if values.null_count():
        raise BadInput(f"a row has no {name}", where=where, mend="give every row one, a number or a name")
    ranked = (values.cast(pl.Int64) if name == "step" else values).rank("dense")
    return np.asarray(ranked.to_numpy(), dtype=np.int64) - 1
