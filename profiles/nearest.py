"""The nearest measured kernel and shape, where a scenario allows going on beyond the tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from moesim.cost.ops import Attention, Collective, ExpertGemm, Gemm, MlaAbsorb, MlaAttention, MoeExchange, Operation

if TYPE_CHECKING:
    import polars as pl

Rows = Callable[..., "pl.DataFrame"]

# For each type of operation: its family of rows, the fields that must agree, and the fields that may differ.
# Collectives are not here: a measurement inside a node says nothing of the network between nodes.
RELATED: dict[type, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    Gemm: ("gemm", ("dtype",), ("n", "k")),
    ExpertGemm: ("experts", ("grouping", "dtype"), ("hidden", "intermediate", "experts", "top_k")),
    MlaAbsorb: ("mla_absorb", ("side", "dtype"), ("heads", "kv_lora_rank", "head_dim")),
    MoeExchange: ("exchange", ("step", "mode", "dtype"), ("nodes", "ep", "hidden", "top_k", "experts")),
}
_ATTENTION = (("dtype", "kv_dtype", "window"), ("heads", "kv_heads", "head_dim"))
_MLA = (
    ("dtype", "kv_dtype"),
    ("heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "value_head_dim"),
)


def nearest(op: Operation, rows_of: Rows) -> Operation | None:
    """The operation at the measured shape that is nearest: least sum of |ln| ratios; None where nothing is related.

    Experts under DeepEP whose shape was only measured fused are priced by the fused kernel first: the same weights and
    products in another kernel are nearer than another model's experts. rows_of: family and key -> rows.
    """
    if isinstance(op, ExpertGemm) and op.grouping != "fused":
        fused = dataclasses.replace(op, grouping="fused")
        if _rows(fused, rows_of, RELATED[ExpertGemm][2]).height:
            return fused
    related = _related(op)
    if related is None:
        return None
    may_differ = related[2]
    found = _rows(op, rows_of, ())
    if not found.height:
        return None
    shapes = found.select(may_differ).unique(maintain_order=True)
    distance = np.zeros(shapes.height)
    for name in may_differ:
        distance += np.abs(np.log(shapes[name].to_numpy() / getattr(op, name)))
    picked = shapes.row(int(distance.argmin()), named=True)
    if isinstance(op, Collective | MoeExchange):
        picked["domains"] = 0  # measured on neighbouring nodes
    return dataclasses.replace(op, **picked)


def _related(op: Operation) -> tuple[str, tuple[str, ...], tuple[str, ...]] | None:
    if isinstance(op, Attention):
        return (f"attention_{op.phase}", *_ATTENTION)
    if isinstance(op, MlaAttention):
        return (f"mla_{op.phase}", *_MLA)
    return RELATED.get(type(op))


def _rows(op: Operation, rows_of: Rows, also: tuple[str, ...]) -> pl.DataFrame:
    related = _related(op)
    assert related is not None
    family, must_agree, _ = related
    return rows_of(family, **{name: getattr(op, name) for name in (*must_agree, *also)})
