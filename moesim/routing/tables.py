"""Expert counts from tables: CSV, or Parquet, whose rows may also tell of which request and domain they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.routing.parquet import read_parquet
from moesim.routing.tensors import check_cells

Raw = tuple[NDArray[Any], NDArray[np.int64], bool]
LABELS = ("request_id", "domain")


def read_table(path: Path, experts: int | None, *, most: int) -> tuple[NDArray[Any], NDArray[np.int64], bool, Any]:
    """CSV or Parquet with the columns layer_id, expert_id, count and, optionally, step.

    most: layers and experts. Returns counts [steps, layers, experts], layers, whether steps are known, and the table
    itself where it tells requests apart.
    """
    if path.suffix == ".csv":
        return *table_counts(_read_csv(path), experts=experts, where=str(path), first_line=2, most=most), None
    frame = read_parquet(path)
    told = [name for name in LABELS if name in frame.columns]
    counts = table_counts(_summed(frame, told), experts=experts, where=str(path), first_line=0, most=most)
    return *counts, frame if "request_id" in told else None


def _read_csv(path: Path) -> Any:
    import polars as pl
    from polars.exceptions import PanicException, PolarsError

    try:
        return pl.read_csv(path, infer_schema=False)  # all text: numbers are checked by line
    except (PolarsError, PanicException, OSError, ValueError) as error:
        fault = " ".join(str(error).split())[:100]
        raise BadInput(
            f"not a readable .csv file ({fault})", where=str(path), mend="write layer_id,expert_id,count"
        ) from None


def table_counts(frame: Any, *, experts: int | None, where: str, first_line: int, most: int) -> Raw:
    """Counts of a Polars frame with layer_id, expert_id, count and, optionally, step."""
    import polars as pl

    missing = [name for name in ("layer_id", "expert_id", "count") if name not in frame.columns]
    if missing:
        raise BadInput(
            f"the column {missing[0]} is missing", where=where, mend="give the columns layer_id,expert_id,count"
        )
    if frame.height == 0:
        raise BadInput("there are no rows", where=where, mend="record a loaded server")
    columns: dict[str, NDArray[Any]] = {}
    for name in [name for name in ("step", "layer_id", "expert_id", "count") if name in frame.columns]:
        kind = pl.Float64 if name == "count" else pl.Int64
        try:
            values = frame[name].cast(kind, strict=False)
        except pl.exceptions.PolarsError:
            raise BadInput(f"the column {name} holds no numbers", where=where, mend="give numbers") from None
        if values.null_count():
            row = int(values.is_null().arg_true()[0])
            raise BadInput(
                f"this {name} is no {'number' if name == 'count' else 'integer'}",
                where=f"{where}: {'line' if first_line else 'row'} {row + first_line}",
                mend="correct this value",
            )
        columns[name] = values.to_numpy()
    layers, expert_ids = columns["layer_id"], columns["expert_id"]
    for name, values in (("layer_id", layers), ("expert_id", expert_ids)):
        bad = (values < 0) | (values >= most)
        if bad.any():
            row = int(np.nonzero(bad)[0][0])
            raise BadInput(
                f"{name} {values[row]} lies outside 0 to {most - 1}",
                where=f"{where}: {'line' if first_line else 'row'} {row + first_line}",
                mend="correct this value",
            )
    width = int(expert_ids.max()) + 1
    if experts is not None:
        if width > experts:
            raise BadInput(f"expert_id {width - 1} is more than the model has", where=where, mend=f"it has {experts}")
        width = experts
    layer_ids, layer_rows = np.unique(layers, return_inverse=True)
    steps, step_rows = np.unique(columns.get("step", np.zeros(len(layers), np.int64)), return_inverse=True)
    shape = (len(steps), len(layer_ids), width)
    check_cells(shape, where=where)
    flat = np.ravel_multi_index((step_rows.ravel(), layer_rows.ravel(), expert_ids), shape)
    if len(np.unique(flat)) != len(flat):
        order = np.sort(flat)
        step, layer, expert = np.unravel_index(int(order[1:][order[1:] == order[:-1]][0]), shape)
        raise BadInput(
            f"layer {layer_ids[layer]} expert {expert} stands twice in step {steps[step]}",
            where=where,
            mend="give each expert of a layer once",
        )
    counts = np.zeros(shape)
    counts.reshape(-1)[flat] = columns["count"]
    return counts, layer_ids.astype(np.int64), "step" in columns


def _summed(frame: Any, told: list[str]) -> Any:
    """The table without its labels of requests, their counts added up; as it is where it has none."""
    import polars as pl

    if not told or not {"layer_id", "expert_id", "count"} <= set(frame.columns):
        return frame.drop(told)
    amounts = frame["count"].cast(pl.Float64, strict=False)
    if amounts.null_count() or (amounts < 0).any():
        return frame.drop(told)  # whoever reads it says which value is wrong
    keys = [name for name in frame.columns if name not in (*told, "count")]
    return frame.with_columns(amounts).group_by(keys, maintain_order=True).agg(pl.col("count").sum())
