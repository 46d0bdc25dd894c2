"""A price carries the error figure of the profile that it comes from, and none that a few points tell by chance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesim.cost.ops import Collective, Gemm
from moesim.cost.roofline import Roofline
from profiles.costs import LEAST_ERRORS, UNKNOWN_SIGMA, StoreCosts
from profiles.importers.gathered import description, tables_of_rows
from profiles.record import LATENCY, PUBLISHED
from profiles.store import DESCRIPTION, open_profile, write_profile
from profiles.whose import asked_system
from tests.costs_cluster import h200

PROVENANCE = {
    "system": "h200_sxm", "version": "1", "kernel": "k", "device": "a GPU", "package": "p", "package_version": "1",
    "tag": "measured",
}  # fmt: skip
ALL_TO_ALL = Collective("all_to_all", np.array([3e5]), 2, 2)
ALL_REDUCE = Collective("all_reduce", np.array([3e5]), 8, 1)


def folder(path: Path, sizes: int) -> str:
    """A profile of an all-to-all over two nodes: 1 us and 1 GB/s, every second size 1 % off."""
    key = {"kind": "all_to_all", "path": "nccl", "gpus": 2, "nodes": 2, "engine": "nccl"}
    rows = [
        (
            "collective",
            {**key, "bytes": 4.0**power, LATENCY: (1e-6 + 4.0**power * 1e-9) * (1 + power % 2 / 100), **PROVENANCE},
        )
        for power in range(4, 4 + sizes)
    ]
    tables = tables_of_rows(rows)
    write_profile(path, tables, description(tables, asked_system("h200_sxm"), "nccl", []))
    return str(path)


def model(*names: str) -> StoreCosts:
    opened = tuple(open_profile(name, "h200_sxm") for name in names)
    return StoreCosts(opened, "sglang", allow=False, roofline=Roofline(h200(2)))


def test_few_points_tell_no_error(tmp_path: Path) -> None:
    few = folder(tmp_path / "few", 8)  # three points are left out
    assert 0 < json.loads((Path(few) / DESCRIPTION).read_text())["errors"]["collective"]["points"] < LEAST_ERRORS
    assert model(few).estimate(ALL_TO_ALL).rel_sigma == UNKNOWN_SIGMA
    # Nor does another profile's figure speak for these rows.
    assert model(few, "default").estimate(ALL_TO_ALL).rel_sigma == UNKNOWN_SIGMA
    many = folder(tmp_path / "many", 2 * LEAST_ERRORS + 2)
    assert 0.0 < model(many).estimate(ALL_TO_ALL).rel_sigma < 0.03


def test_each_price_has_the_error_of_its_own_profile(tmp_path: Path) -> None:
    many = folder(tmp_path / "many", 2 * LEAST_ERRORS + 2)
    alone = model("default").estimate(ALL_REDUCE)
    for names in ((many, "default"), ("default", many)):
        both = model(*names)
        assert both.estimate(ALL_REDUCE).rel_sigma == alone.rel_sigma == pytest.approx(0.0582, abs=5e-4)
        assert both.estimate(ALL_TO_ALL).rel_sigma < 0.03


def test_published_figures_price_for_every_engine(tmp_path: Path) -> None:
    key = {"dtype": "fp8_block", "n": 100, "k": 200, "engine": PUBLISHED}
    tables = tables_of_rows([("gemm", {**key, "m": m, LATENCY: m * 1e-6, **PROVENANCE}) for m in (64.0, 128.0)])
    write_profile(tmp_path / "p", tables, description(tables, asked_system("h200_sxm"), PUBLISHED, []))
    found = model(str(tmp_path / "p")).estimate(Gemm(np.array([64.0]), 100, 200, "fp8_block"))
    assert found.seconds[0] == pytest.approx(64e-6) and "published 1 k" in found.source
