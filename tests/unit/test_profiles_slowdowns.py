"""Measured overlaps: from a profile's table to the slowdown that a plan runs with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from moesim.cost.estimate import Tag
from moesim.cost.overlap import MeasuresOverlap
from moesim.engine.deployment import check_plan, groundwork, resolve
from moesim.errors import Infeasible
from moesim.spec.scenario import load_scenario
from profiles.record import FAMILIES
from profiles.store import polars_schema, write_profile
from tests.scenarios import small, write

BESIDE = "gemm bf16 m=4096 n=7168 k=2048"


def profile(folder: Path, rows: list[tuple[float, float, float]]) -> Path:
    """A profile of overlaps of an all-to-all of 8 GPUs: (bytes, slowdown, of the product)."""
    family = FAMILIES["overlap"]
    text: dict[str, Any] = dict.fromkeys(family.columns, "x") | {
        "work": "all_to_all", "beside": BESIDE, "path": "nccl", "gpus": 8, "nodes": 1, "latency_s": 1e-3,
        "engine": "moesim", "system": "h200_sxm", "tag": "measured",
    }  # fmt: skip
    table = [text | {"bytes": size, "slowdown": slow, "beside_slowdown": product} for size, slow, product in rows]
    write_profile(
        folder,
        {"overlap": pl.DataFrame(table, schema=polars_schema(family))},
        {"system": "h200_sxm", "engine": "moesim"},
    )
    return folder


def plan(folder: Path, profiles: list[str], **parallel: int) -> dict[str, Any]:
    return small(
        policies={"overlap": {"slowdown": "measured"}, "schedule": "two_batch", "dispatch": {"backend": "alltoall"}},
        parallel=parallel or {"attention_dp": 8, "ep": 8},
        placement={"solver": "contiguous"},
        cost={"source": "store", "profiles": profiles, "extrapolate": "allow"},
    )


def test_a_plan_takes_the_median_of_what_its_profile_measured(tmp_path: Path) -> None:
    made = profile(tmp_path / "p", [(1e6, 1.2, 0.9), (1e7, 1.5, 1.1), (1e8, 1.4, 1.3)])
    ground = groundwork(load_scenario(write(tmp_path, plan(tmp_path, ["default", str(made)]))))
    assert isinstance(ground.costs, MeasuresOverlap)
    found = resolve(ground).setup.overlap
    assert found is not None
    slowdown = found.of("normal")
    assert (slowdown.communication, slowdown.compute, slowdown.tag) == (1.4, 1.1, Tag.MEASURED)
    assert BESIDE in slowdown.source
    assert "3 rows" in slowdown.source


def test_nothing_runs_faster_for_company(tmp_path: Path) -> None:
    made = profile(tmp_path / "p", [(1e6, 0.98, 0.9)])
    found = resolve(groundwork(load_scenario(write(tmp_path, plan(tmp_path, ["default", str(made)]))))).setup.overlap
    assert found is not None
    assert (found.of("normal").communication, found.of("normal").compute) == (1.0, 1.0)


@pytest.mark.parametrize(("named", "parallel"), [(False, {}), (True, {"attention_dp": 4, "ep": 4})])
def test_what_no_profile_measured_is_refused(tmp_path: Path, named: bool, parallel: dict[str, int]) -> None:
    made = profile(tmp_path / "p", [(1e6, 1.2, 1.1)])
    profiles = ["default", *([str(made)] if named else [])]
    ground = groundwork(load_scenario(write(tmp_path, plan(tmp_path, profiles, **parallel))))
    with pytest.raises(Infeasible, match="no profile holds"):
        check_plan(ground, ground.scenario)
