"""Per-token routing traces: which experts each token picked, counted by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.routing.readers import clean_counts, read_frame, read_loads, table_counts
from moesim.routing.trace import RoutingCounts

FORMATS = (
    "a .parquet with layer_id and experts (a list of expert ids for each token) or expert_id (a row for each pick), "
    "and optionally step; or counts (layer_id, expert_id, count); or SGLang's per_token .pt"
)


def read_trace(path: Path, *, phase: str = "any", weight: float = 1.0, experts: int | None = None) -> RoutingCounts:
    """Count a per-token trace by step. Raises BadInput that names the formats, MissingPart where `.pt` needs torch."""
    path = Path(path)
    if path.suffix == ".pt":
        return read_loads(path, phase=phase, weight=weight)
    if path.suffix != ".parquet":
        raise BadInput(f"{path.suffix!r} is no format of traces", where=str(path), mend=f"give {FORMATS}")
    frame = read_frame(path)
    counts, layer_ids, per_step = table_counts(
        _picks_to_counts(frame, path), experts=experts, where=str(path), first_line=0
    )
    return clean_counts(
        counts, layer_ids, where=str(path), name=path.stem, phase=phase, weight=weight, per_step=per_step
    )


def _picks_to_counts(frame: Any, path: Path) -> Any:
    """Rows of tokens or picks -> rows of counts (unchanged where they are counts already)."""
    import polars as pl

    if "count" in frame.columns:
        return frame
    if "layer_id" not in frame.columns or not {"experts", "expert_id"} & set(frame.columns):
        raise BadInput(f"the columns are {', '.join(frame.columns)[:80]}", where=str(path), mend=f"give {FORMATS}")
    keys = [name for name in ("step", "layer_id") if name in frame.columns]
    if "experts" in frame.columns:
        kind = frame.schema["experts"]
        if not isinstance(kind, pl.List | pl.Array):
            raise BadInput("the column experts is no list", where=str(path), mend=f"give {FORMATS}")
        frame = frame.select(*keys, pl.col("experts").alias("expert_id")).explode("expert_id")
    try:
        return frame.group_by(*keys, "expert_id").agg(pl.len().cast(pl.Float64).alias("count"))
    except pl.exceptions.PolarsError:
        raise BadInput("the columns hold no integers", where=str(path), mend=f"give {FORMATS}") from None
