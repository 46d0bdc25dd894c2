"""Measured serving runs by deployment: what was run, and how far predictions on record are off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.spec.evidence import layout_trait
from moesim.spec.parallel import ParallelSpec
from validate.silicon.coverage import FORMAT, Group, Summary
from validate.silicon.price import Prediction
from validate.silicon.rows import SiliconRow
from validate.silicon.score import TOLD
from validate.silicon.scored import FIGURES, Half, halves
from validate.silicon.settings import layout_of, measured_on, settings_of

DIGITS = 4


def groups(found: Sequence[Prediction]) -> list[Group]:
    """The groups of the clean, measured, aggregated MoE rows that were priced; in order of name."""
    told = []
    for half, side in halves(found).items():
        by_key: dict[tuple[Any, ...], list[int]] = {}
        for index, row in enumerate(side.rows):
            by_key.setdefault(_key(row), []).append(index)
        told += [_group(half, side, key, indices) for key, indices in by_key.items()]
    return sorted(told, key=lambda one: (one.model, one.system, one.engine, one.experts, one.layout, one.drafts))


def _key(row: SiliconRow) -> tuple[Any, ...]:
    layout = layout_of(row)
    settings = settings_of(row, layout)
    sizes = ParallelSpec(tp=layout.tp, attention_dp=layout.attention_dp, ep=layout.ep, expert_tp=layout.expert_tp)
    backend = "allreduce" if layout.attention_dp == 1 else "allgather_reducescatter"
    return row.model, row.system, row.engine, settings.experts, layout_trait(sizes, backend), settings.drafts


def _group(half: str, side: Half, key: tuple[Any, ...], at: Sequence[int]) -> Group:
    rows = [side.rows[index] for index in at]
    errors = {
        name: round(float(np.abs(side.predicted[name][list(at)] / side.measured[name][list(at)] - 1.0).mean()), DIGITS)
        if len(at) >= TOLD
        else None
        for name in FIGURES
    }

    def ends(values: Sequence[int]) -> tuple[int, int]:
        return min(values), max(values)

    days = sorted(measured_on(row) for row in rows)
    return Group(
        **dict(zip(("model", "system", "engine", "experts", "layout", "drafts"), key, strict=True)),
        half=half,
        runs=len(rows),
        isl=ends([row.isl for row in rows]),
        osl=ends([row.osl for row in rows]),
        concurrency=ends([row.in_flight or 0 for row in rows]),
        measured=(days[0], days[-1]),
        versions=tuple(sorted({row.version for row in rows if row.version})),
        tpot=errors["tpot"],
        ttft=errors["ttft"],
    )


def summary(found: Sequence[Prediction], table_sha256: str, version: str) -> Summary:
    """The summary of a record of predictions."""
    return Summary(
        format=FORMAT, table_sha256=table_sha256, package_version=version, groups=tuple(groups(found))
    )  # fmt: skip
