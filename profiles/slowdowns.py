"""What a measured profile knows of transfers and products that run at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesim.cost.estimate import Tag
from moesim.cost.overlap import Slowdown

if TYPE_CHECKING:
    import polars as pl

VALUES = ("slowdown", "beside_slowdown")  # of the transfer, and of the product beside it


def slowdown_of(rows: pl.DataFrame, work: str) -> Slowdown | None:
    """The slowdowns that rows of the table `overlap` agree on: the median over their sizes; None without rows.

    A figure below 1 is chance (nothing runs faster for company) and counts as 1.
    """
    if rows.is_empty():
        return None
    communication, compute = (max(1.0, float(np.median(rows[name].to_numpy()))) for name in VALUES)
    sizes = rows["bytes"].to_numpy()
    beside = f"{work} of {sizes.min():.0f} to {sizes.max():.0f} bytes beside {rows['beside'][0]}"
    return Slowdown(compute, communication, 0, Tag.MEASURED, f"overlap, {rows.height} rows: {beside}")
