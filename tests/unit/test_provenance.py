"""Where step times come from: every operation counts, and what no table holds is outside the profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesim.engine.deployment import groundwork, resolve
from moesim.engine.simulate import Simulation, simulate
from moesim.output.metrics import cost_shares, outside_share, provenance
from moesim.spec.scenario import load_scenario
from tests.scenarios import DEMO, small, write


def run_of(path: Path, *overrides: str) -> Simulation:
    return simulate(resolve(groundwork(load_scenario(path, overrides))), draws=0)


@pytest.mark.parametrize("schedule", ["sequential", "two_batch"])
def test_attention_counts_and_weighs_more_in_long_contexts(schedule: str, tmp_path: Path) -> None:
    found = []
    for isl in (64, 2048):
        data: dict[str, Any] = small(policies={"schedule": schedule})
        data["serving"]["workload"]["isl"] = isl
        shares = cost_shares(run_of(write(tmp_path, data)))
        assert sum(shares.values()) == pytest.approx(1.0)
        found.append(sum(share for (family, _), share in shares.items() if family == "attention"))
    assert 0.0 < found[0] < found[1]


def test_an_engine_without_tables_is_outside_the_profile() -> None:
    """The default profile has none of vLLM's kernels: where that is allowed others stand in, and the share says so."""
    few = ("serving.workload.requests=40",)
    assert outside_share(run_of(DEMO, *few)) < 0.05
    outside = run_of(DEMO, *few, "engine.name=vllm")
    shares = provenance(outside)
    assert shares["extrapolated"] + shares["formula"] > 0.9
    assert min(shares["extrapolated"], shares["formula"]) > 0.1
    assert outside_share(outside) > 0.3
