"""Loads that shift by name while experts are laid out anew: what it does to a run, and the contract's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.simulate import Simulation, simulate
from moesim.spec.scenario import load_scenario
from tests.scenarios import small, write


def hot(folder: Path, name: str, first: int) -> dict[str, Any]:
    """A load file in which eight neighbouring experts of every layer, which share a rank, take half of the tokens."""
    counts = np.ones((16, 64))
    counts[:, first : first + 8] = 7.0
    (folder / f"{name}.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    return {"file": str(folder / f"{name}.json"), "phase": "any"}


def shifting(folder: Path, rebalance: dict[str, Any] | None, period_s: float, **changes: Any) -> Simulation:
    """Two workloads in turn, under a placement fitted to neither."""
    routing = {
        "loads": [hot(folder, "low", 0), hot(folder, "high", 40)],
        "holdout": {"by": "none"},
        "shifts": [{"at_s": period_s * turn, "loads": {("low", "high")[turn % 2]: 1.0}} for turn in range(40)],
    }
    placement: dict[str, Any] = {"solver": "contiguous", "redundant_experts": 0}
    if rebalance is not None:
        placement["rebalance"] = {"solver": "greedy", "solve_s": 0.0, **rebalance}
    data = small(routing=routing, placement=placement)
    data["serving"]["workload"] = {"isl": 64, "osl": 64, "requests": 1500, "arrivals": {"concurrency": 512}}
    data.update(changes)
    return simulate(resolve(groundwork(load_scenario(write(folder, data)))), draws=0)


def test_rebalancing_pays_where_a_workload_lasts_and_not_where_it_changes_faster(tmp_path: Path) -> None:
    every = {"window_steps": 10, "interval_steps": 20}
    lasting = shifting(tmp_path, every, period_s=1e6)
    assert lasting.without_relayouts is not None
    assert lasting.served.duration_s < lasting.without_relayouts.duration_s
    first = lasting.relayouts[0]
    assert first.balance_after < first.balance_before
    assert first.step_after_s < first.step_before_s
    assert first.break_even_steps == pytest.approx(first.pause_s / (first.step_before_s - first.step_after_s))
    # From the second on the placement is what the solver would say again, but for the noise of the counts.
    step_s = float(lasting.served.step_s.mean())
    hasty = shifting(tmp_path, every, period_s=20 * step_s)
    assert hasty.without_relayouts is not None

    def saved(found: Simulation) -> float:
        assert found.without_relayouts is not None
        return 1.0 - found.served.duration_s / found.without_relayouts.duration_s

    assert saved(hasty) < saved(lasting)


def test_pauses_stand_between_steps_and_sum_to_what_is_told(tmp_path: Path) -> None:
    whole = shifting(tmp_path, {"window_steps": 10, "interval_steps": 20}, period_s=1e6)
    parts = shifting(tmp_path, {"window_steps": 10, "interval_steps": 20, "layers_per_chunk": 4}, period_s=1e6)
    for found, chunks in ((whole, 1), (parts, 4)):
        told = sum(one.pause_s for one in found.relayouts[: len(found.pauses) // chunks])
        assert sum(seconds for _, _, seconds in found.pauses[: len(found.pauses) // chunks * chunks]) == pytest.approx(
            told
        )
        ends = found.served.step_start_s + found.served.step_s
        for _, start_s, seconds in found.pauses:
            if seconds == 0:
                continue
            assert not ((found.served.step_start_s < start_s + seconds - 1e-12) & (ends > start_s + 1e-12)).any()


def test_even_ranks_are_left_alone(tmp_path: Path) -> None:
    skipped = shifting(tmp_path, {"window_steps": 10, "interval_steps": 20, "skip_above": 0.01}, period_s=1e6)
    assert skipped.relayouts
    assert all(one.placement is None for one in skipped.relayouts)
    assert skipped.without_relayouts is not None
    np.testing.assert_array_equal(skipped.served.finish_s, skipped.without_relayouts.finish_s)


def test_the_same_seed_gives_the_same_run_and_shifts_alone_change_it(tmp_path: Path) -> None:
    every = {"window_steps": 10, "interval_steps": 20}
    one, other = (shifting(tmp_path, every, period_s=0.2) for _ in range(2))
    np.testing.assert_array_equal(one.served.finish_s, other.served.finish_s)
    still = shifting(tmp_path, None, period_s=1e6)
    steady = shifting(
        tmp_path, None, period_s=1e6, routing={"loads": [hot(tmp_path, "low", 0)], "holdout": {"by": "none"}}
    )
    np.testing.assert_allclose(still.served.duration_s, steady.served.duration_s, rtol=0.02)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["simulate", "--fidelity", "des"], "not modelled together with --fidelity des"),
        (["simulate", "--set", "faults=[{kind: jitter, sigma: 0.1}]"], "not modelled together with faults"),
        (["simulate", "--set", "routing.shifts=[{at_s: 1, loads: {nothing: 1}}]"], "no judged load is named 'nothing'"),
        (["tune", "--trials", "2"], "tune does not model placement.rebalance"),
        (["place", "--gpus", "8", "--slots", "72"], "place does not model placement.rebalance"),
    ],
)
def test_what_is_not_modelled_is_refused_by_name(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, small(placement={"solver": "greedy", "redundant_experts": 8, "rebalance": {}}))
    assert run([arguments[0], str(path), *arguments[1:]]) == 2
    assert told in capsys.readouterr().err


def test_the_contracts_keys_and_the_lines_for_a_person(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rebalance = {"window_steps": 10, "interval_steps": 20}
    path = write(tmp_path, small(placement={"solver": "contiguous", "redundant_experts": 8, "rebalance": rebalance}))
    asked = ["simulate", str(path), "--draws", "2", "--timeline", str(tmp_path / "t.json.gz")]
    assert run([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    told = found["relayouts"]
    assert told["count"] + told["skipped"] == len(told["list"]) > 0
    assert told["moved_experts"] == sum(one["moved_experts"] for one in told["list"])
    assert told["pause_s_total"] == pytest.approx(sum(one["pause_s"] for one in told["list"]))
    assert found["memory"]["ledger"]["relayout_staging"] > 0
    assert found["intervals"]
    assert run(asked) == 0
    assert "re-layouts" in capsys.readouterr().out
