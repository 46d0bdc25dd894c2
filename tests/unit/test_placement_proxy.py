"""Random placements and rank correlations: the draws are legal, and the figures are those of their definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moesim.spec.plan import PlacementRequest, max_over_mean
from placement import proxy
from tests.scenarios import small, write


def request() -> PlacementRequest:
    loads = np.random.default_rng(0).lognormal(0.0, 1.0, (2, 3, 32))
    return PlacementRequest(loads / loads.sum(axis=-1, keepdims=True), np.full(2, 0.5), np.arange(3), 3, 32, 8, nodes=2)


def test_random_placements_are_legal_and_differ() -> None:
    found = proxy.random_placements(request(), 40, np.random.default_rng(1))
    assert len({plan.physical_to_logical.tobytes() for plan in found.values()}) > 30
    assert {plan.slots for plan in found.values()} == {32, 40, 48, 64}
    assert all(plan.duplicates_on_one_rank() == 0 for plan in found.values())
    spread = [float(max_over_mean(plan.rank_loads(request().mix())).mean()) for plan in found.values()]
    assert max(spread) > 1.5 * min(spread)


def test_correlations_of_known_orders() -> None:
    time = np.arange(1.0, 21.0)
    slots = np.repeat([32, 40], 10)
    found = proxy.compare(-time, time * 1.1, time, slots, 8, "normal")
    assert (found.balance, found.cost) == pytest.approx((-1.0, 1.0))
    assert (found.balance_in_budget, found.cost_in_budget) == pytest.approx((-1.0, 1.0))
    assert (found.balance_pairs, found.cost_pairs) == (1.0, 0.0)
    assert found.balance_regret == pytest.approx(19.0)
    assert found.cost_regret == 0.0
    assert found.rel_error == pytest.approx(0.1)


def test_the_command_prints_a_row_for_each_size(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(proxy.main)
    path = write(tmp_path, small())
    asked = [str(path), "--placements", "12", "--tokens", "8", "--tokens", "64"]
    printed = CliRunner().invoke(app, asked)
    assert printed.exit_code == 0
    assert [line.split("|")[1].strip() for line in printed.output.splitlines()[2:]] == ["8", "64"]
    rows = json.loads(CliRunner().invoke(app, [*asked, "--json"]).output)["rows"]
    assert [row["placements"] for row in rows] == [12, 12]
    assert all(row["cost"] > 0.8 for row in rows)
