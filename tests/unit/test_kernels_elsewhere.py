"""A kernel that is named is priced at shapes that its rows lack by its physics, and says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from moesim.cost.estimate import Estimate, Tag
from moesim.cost.ops import ExpertGemm
from moesim.errors import BadInput, OutsideProfile
from moesim.spec.hf import load_model
from moesim.spec.scenario import Scenario
from profiles.costs import UNKNOWN_SIGMA, from_scenario
from profiles.grouped import Physics, Shape, balanced_run, predicted
from profiles.store import write_profile
from tests.costs_cluster import h200

PHYSICS = Physics(1e-5, 2e-6, 3e12, 4e14, 2e12, 3.0)
PAIRS = [2.0**power for power in range(3, 16)]
NEAR, FAR = Shape(4096, 1024, "int4", 64, 4, "fused"), Shape(7168, 512, "int4", 64, 4, "fused")
ASKED = Shape(2880, 1440, "mxfp4", 64, 4, "fused")


def rows(shape: Shape, kernel: str, slower: float = 1.0, engine: str = "vllm") -> pl.DataFrame:
    """Balanced rows of 64 local experts, whose times the physics gives, `slower` times."""
    runs = [balanced_run(shape, 64, pairs, 1.0) for pairs in PAIRS]
    seconds = slower * predicted(PHYSICS, shape, runs)
    found = [(64, "uniform", pairs, float(s)) for pairs, s in zip(PAIRS, seconds, strict=True)]
    columns = {
        "grouping": shape.grouping, "dtype": shape.dtype, "hidden": shape.hidden, "intermediate": shape.intermediate,
        "experts": shape.experts, "top_k": shape.top_k, "engine": engine, "version": "1", "kernel": kernel,
        "device": "d", "system": "h200_sxm", "package": "p", "package_version": "0", "tag": "measured",
    }  # fmt: skip
    table = pl.DataFrame(found, schema=("local_experts", "distribution", "routed", "latency_s"), orient="row")
    return table.with_columns(**{name: pl.lit(value) for name, value in columns.items()})


def price(folder: Path, tokens: float, extrapolate: str = "allow", kernel: str = "Marlin") -> Estimate:
    """So many tokens on each of 64 experts of ASKED."""
    asked = {
        "model": "deepseek-ai/DeepSeek-V3", "cluster": {"system": "h200_sxm"}, "engine": {"name": "vllm"},
        "cost": {"profiles": [str(folder)], "extrapolate": extrapolate, "experts_kernel": kernel},
        "serving": {"workload": {"isl": 9, "osl": 9, "requests": 1, "arrivals": {"concurrency": 1}}},
    }  # fmt: skip
    costs = from_scenario(Scenario.read(asked, where="test"), load_model("deepseek-ai/DeepSeek-V3"), h200(1))
    shape = (ASKED.hidden, ASKED.intermediate, ASKED.experts, ASKED.top_k, ASKED.dtype, ASKED.grouping)
    return costs.estimate(ExpertGemm(np.full((1, 64), tokens), *shape))


def truth(tokens: float) -> float:
    return float(predicted(PHYSICS, ASKED, [balanced_run(ASKED, 64, 64 * tokens, 1.0)])[0])


def profile(folder: Path, *tables: pl.DataFrame) -> Path:
    write_profile(folder / "p", {"experts": pl.concat(tables)}, {})
    return folder / "p"


def test_physics_of_the_named_kernel_prices_a_shape_that_it_lacks(tmp_path: Path) -> None:
    """The other kernel has the very shape and is three times as slow; it is not asked."""
    folder = profile(tmp_path, rows(NEAR, "wna16_marlin"), rows(FAR, "wna16_marlin"), rows(ASKED, "triton", 3.0))
    for tokens in (1.0, 16.0, 256.0):
        found = price(folder, tokens)
        assert found.seconds[0] == pytest.approx(truth(tokens), rel=0.05)
        assert found.tags[0] == Tag.EXTRAPOLATED
        assert "its physics at hidden 4096, intermediate 1024" in found.source
        assert found.rel_sigma < 0.1  # measured between the two shapes, which obey one physics


def test_the_error_between_shapes_is_the_sigma(tmp_path: Path) -> None:
    """A kernel half as quick at one of its shapes carries that; one shape tells nothing of it."""
    folder = profile(tmp_path, rows(NEAR, "marlin"), rows(FAR, "marlin", 2.0))
    assert price(folder, 16.0).rel_sigma == pytest.approx(np.log(2.0) / 1.645, rel=0.15)
    alone = profile(tmp_path / "alone", rows(NEAR, "marlin"))
    assert price(alone, 16.0).rel_sigma == UNKNOWN_SIGMA


def test_what_the_named_kernel_measured_stays_measured(tmp_path: Path) -> None:
    folder = profile(tmp_path, rows(NEAR, "marlin"), rows(ASKED, "marlin", 1.5), rows(ASKED, "triton", 3.0))
    found = price(folder, 16.0)
    assert found.seconds[0] == pytest.approx(1.5 * truth(16.0), rel=1e-3)
    assert found.tags[0] in (Tag.MEASURED, Tag.INTERPOLATED)


def test_types_of_another_size_and_other_scenarios_are_left_alone(tmp_path: Path) -> None:
    wide = Shape(NEAR.hidden, NEAR.intermediate, "bf16", 64, 4, "fused")
    folder = profile(tmp_path, rows(wide, "marlin", 9.0), rows(FAR, "marlin"))
    assert "hidden 7168" in price(folder, 16.0).source
    with pytest.raises(OutsideProfile):
        price(folder, 16.0, extrapolate="refuse")


def test_a_kernel_that_no_table_names_is_refused_by_name(tmp_path: Path) -> None:
    folder = profile(tmp_path, rows(NEAR, "marlin"), rows(ASKED, "triton"))
    with pytest.raises(BadInput, match=r"\*cutlass\*") as caught:
        price(folder, 16.0, kernel="cutlass")
    assert "marlin, triton" in caught.value.line()
