"""Experts' products of a kernel that was measured, but at other shapes: priced by its fitted physics.

A kernel's rates (bytes/s, FLOP/s) and launches are its own; widths and numbers of experts enter the model of `grouped`
by their sizes. So the physics fitted to the nearest measured shape gives the model seconds of the asked shape, and the
measured rows of that nearest shape turn model seconds into seconds, as they do for itself. How far that is off is
measured: every shape of the kernel is priced from its nearest other one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moesim.cost.estimate import Tag
from moesim.cost.ops import ExpertGemm
from moesim.units import BYTES_PER_ELEMENT
from profiles.error_law import NINETY
from profiles.experts import ExpertCurve, ExpertTable
from profiles.grouped import Shape, constants
from profiles.lookup import Priced, place_of, versions

if TYPE_CHECKING:
    import polars as pl

Floats = NDArray[np.float64]
Tags = NDArray[np.int8]
SHAPE = ("dtype", "hidden", "intermediate", "experts", "top_k")
# Types whose elements are as large, so that one kernel reads them alike (MXFP4 and int4 by groups).
ALIKE = 1.1
Table = Callable[[Shape, str, "pl.DataFrame"], ExpertTable | None]
_EXTRAPOLATED = np.int8(Tag.EXTRAPOLATED)


def elsewhere(op: ExpertGemm, rows: pl.DataFrame, table_of: Table, unknown: float) -> Iterator[Priced]:
    """The price of `op` by each version of a kernel's rows, none of which has its shape; tagged extrapolated.

    rows: of op's grouping, in any type; types of another size are left out. table_of: shape, words, rows -> lookup.
    unknown: sigma where the kernel has fewer than two shapes, so that its error cannot be measured.
    """
    shape = Shape(op.hidden, op.intermediate, op.dtype, op.experts, op.top_k, op.grouping)
    slots = int(op.tokens.shape[-1])
    for source, part in versions(rows):
        tables = _tables(part, source, op, table_of)
        near = _nearest(shape, tables)
        if near is None:
            continue
        by_load = _carried(near, shape, slots)
        yield Priced(
            _priced(by_load),
            f"{source}, its physics at hidden {near.shape.hidden}, intermediate {near.shape.intermediate}",
            _sigma(tables, unknown),
            f"no row of hidden {shape.hidden}, intermediate {shape.intermediate}",
            profile=place_of(part),
            stand_in=True,
        )


def _priced(by_load: ExpertCurve) -> Callable[[ExpertGemm], tuple[Floats, Tags]]:
    def price(op: ExpertGemm) -> tuple[Floats, Tags]:
        seconds, _ = by_load.price(op.tokens)
        return seconds, np.full(seconds.shape, _EXTRAPOLATED, dtype=np.int8)

    return price


def _tables(part: pl.DataFrame, source: str, op: ExpertGemm, table_of: Table) -> list[ExpertTable]:
    """The lookups of one version's shapes."""
    found = []
    for values, rows in part.partition_by(SHAPE, as_dict=True, maintain_order=True).items():
        dtype = str(values[0])
        if not 1.0 / ALIKE <= BYTES_PER_ELEMENT.get(dtype, 0.0) / BYTES_PER_ELEMENT[op.dtype] <= ALIKE:
            continue
        hidden, intermediate, experts, top_k = (int(value) for value in values[1:])
        table = table_of(Shape(hidden, intermediate, dtype, experts, top_k, op.grouping), source, rows)
        if table is not None:
            found.append(table)
    return found


def _nearest(shape: Shape, tables: list[ExpertTable]) -> ExpertTable | None:
    """The shape of the least sum of |ln| ratios of widths; None of none."""

    def distance(table: ExpertTable) -> float:
        other = table.shape
        ratios = other.hidden / shape.hidden, other.intermediate / shape.intermediate
        return float(np.abs(np.log(ratios)).sum())

    return min(tables, key=distance, default=None)


def _carried(near: ExpertTable, shape: Shape, slots: int) -> ExpertCurve:
    """The curve of `slots` local experts of `shape`: model seconds by the physics of `near`, measured by its rows."""
    measured = min(near.rows, key=lambda count: (abs(np.log(count / slots)), count))
    own = near.at(measured)
    assert own is not None
    numbers = constants(near.physics, shape, shape.rows_served(slots))
    return dataclasses.replace(own, constants=numbers, limit=np.inf, measured=False)


def _sigma(tables: list[ExpertTable], unknown: float) -> float:
    """The error law's sigma of ln(true / predicted) when each shape is priced from its nearest other one."""
    found = []
    for table in tables:
        near = _nearest(table.shape, [other for other in tables if other is not table])
        if near is None:
            continue
        for slots, (routed, seconds) in table.rows.items():
            carried = _carried(near, table.shape, slots)
            loads = dataclasses.replace(table, physics=near.physics).load(slots, routed)
            guessed, _ = carried.by_load.price(loads)
            ends = carried.by_load.xs[0], carried.by_load.xs[-1]
            inside = (loads >= ends[0]) & (loads <= ends[1])
            found.append(np.log(guessed[inside] / seconds[inside]))
    errors = np.concatenate(found) if found else np.empty(0)
    return float(np.quantile(np.abs(errors), 0.9)) / NINETY if len(errors) else unknown
