"""DeepSeek-R1's real counts in time: budgets, many GPUs, and what balance is worth as a stand-in for time."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim.engine.deployment import groundwork
from moesim.engine.steptime import timed_placements
from moesim.routing.foretell import fit_expecting
from moesim.routing.readers import read_loads
from moesim.routing.trace import RoutingCounts
from moesim.spec.scenario import Scenario, load_scenario
from placement import budget, planning, proxy
from placement.budget import Budgets, judge_budgets
from placement.compare import make_splits
from placement.costs import layer_costs
from placement.judge import balance
from placement.problem import request_from_loads, solve
from tests.regression.test_foretold_loads import ANY, PROMPTS

pytestmark = [pytest.mark.data, pytest.mark.slow]

WHOLE = bool(os.environ.get("MOESIM_WHOLE"))
"""All batch sizes, budgets and folds: some five minutes more."""


def scenario(folder: Path, shared_data: Path, gpus: int) -> Path:
    """The six workloads; what no table holds goes on by formula, as 18 nodes were never measured."""
    files = sorted((shared_data / "routing").glob("deepseek_r1_*.json"))
    loads = [{"file": str(path), "phase": "decode" if "decode" in path.name else "prefill"} for path in files]
    data: dict[str, Any] = {
        "model": "deepseek-ai/DeepSeek-R1",
        "cluster": {"system": "h200_sxm", "nodes": gpus // 8},
        "cost": {"extrapolate": "allow"},
        "routing": {"loads": loads},
        "parallel": {"attention_dp": gpus, "ep": gpus},
        "placement": {"solver": "greedy", "redundant_experts": 32},
        "serving": {"workload": {"isl": 2000, "osl": 256, "requests": 10, "arrivals": {"concurrency": 1}}},
    }
    path = folder / "six.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def described(shared_data: Path) -> list[RoutingCounts]:
    """The six workloads with what their names say of them."""
    found = []
    for path in sorted((shared_data / "routing").glob("deepseek_r1_*.json")):
        load = read_loads(path, phase=path.stem.split("_")[2])
        found.append(replace(load, prompt_tokens=PROMPTS[path.stem.removeprefix("deepseek_r1_")]))
    return found


def budgets(spec: Scenario, solver: str) -> Budgets:
    asked = planning.ask(
        scenario=spec, load_files=[], gpus=None, nodes=None, slots=None, groups=None, solver=solver, holdout=None,
        seed=None,
    )  # fmt: skip
    request = request_from_loads(asked.loads, slots=asked.slots, ranks=asked.ranks, nodes=asked.nodes)
    splits = make_splits(asked.loads, asked.holdout, np.random.default_rng(asked.seed))
    return judge_budgets(spec, splits, request, solver, (0, 32, 128), 60)


def test_where_replicas_pay(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens: none. 128 tokens a rank: 32, which is told to be faster than none, and 128 are told to be slower."""
    monkeypatch.setattr(budget, "TOKENS_PER_RANK", (8, 128, 512) if WHOLE else (8, 128))
    found = budgets(load_scenario(scenario(tmp_path, shared_data, 32)), "robust" if WHOLE else "greedy")
    rows = {row.tokens_per_rank: row for row in found.rows}
    assert rows[8].recommended == 0
    assert rows[8].gain[32].high < 0
    assert rows[128].mode == "low_latency"
    assert rows[128].recommended == 32
    assert rows[128].gain[32].low > 0
    assert rows[128].gain[128].high < 0
    if WHOLE:  # 512 sequences of 2,128 tokens do not fit beside the weights
        assert rows[512].recommended is None


def test_144_gpus_of_18_nodes_leave_one_out(tmp_path: Path, shared_data: Path) -> None:
    spec = load_scenario(scenario(tmp_path, shared_data, 144))
    ground = groundwork(spec)
    loads = described(shared_data)
    unseen: dict[str, list[float]] = {"eplb": [], "time": [], "told": []}
    for left_out, load in enumerate(loads):
        if left_out not in (0, 5) and not WHOLE:
            continue
        fit = [one for index, one in enumerate(loads) if index != left_out]
        request = request_from_loads(fit, slots=288, ranks=144, nodes=18)
        fitted = layer_costs(ground, fit, 0).at(128)
        plans = {
            "eplb": solve(request, "eplb").placement,
            "time": solve(replace(request, cost=fitted.cost), "time").placement,
        }
        told = fit_expecting(fit, [load], ANY)
        request = request_from_loads(told, slots=288, ranks=144, nodes=18)
        plans["told"] = solve(replace(request, cost=layer_costs(ground, told, 0).at(128).cost), "time").placement
        for name, plan in plans.items():
            unseen[name].append(balance(plan, [load]).mean)
        (timed,) = timed_placements(ground, plans, [replace(load, phase="decode")], [128], 0, 0, mode=fitted.mode)
        assert timed.step_s["time"][0] < timed.step_s["eplb"][0]
        assert timed.step_s["told"][0] < timed.step_s["eplb"][0]
        print(load.name, {name: f"{one[-1]:.3f} {1e3 * timed.step_s[name][0]:.2f} ms" for name, one in unseen.items()})
    # All six: 0.087, and 0.20 where the fit is told the phase and the prompts of what comes.
    assert np.mean(unseen["time"]) < np.mean(unseen["eplb"]) - 0.08
    assert np.mean(unseen["told"]) < np.mean(unseen["eplb"]) - 0.18


def test_balance_misleads_at_few_tokens_and_the_layer_cost_does_not(tmp_path: Path, shared_data: Path) -> None:
    rows = proxy.measure(scenario(tmp_path, shared_data, 32), 80, (8, 128), 0)
    few, many = rows
    assert few.balance < 0.8
    assert few.balance_pairs > 0.15
    assert many.balance > 0.95
    for row in rows:
        assert row.cost > 0.99
        assert row.rel_error < 0.02
        assert row.cost_regret < 0.01


def test_the_solver_on_time_is_faster_than_balanced_ones_on_workloads_it_has_not_seen(
    tmp_path: Path, shared_data: Path
) -> None:
    """8 tokens a rank: it fills the slots that must be filled with what is hardly ever read."""
    spec = load_scenario(scenario(tmp_path, shared_data, 32))
    ground = groundwork(spec)
    loads = [read_loads(path) for path in sorted((shared_data / "routing").glob("deepseek_r1_*.json"))]
    for left_out in (0, 3) if WHOLE else (0,):
        fit = [one for index, one in enumerate(loads) if index != left_out]
        request = request_from_loads(fit, slots=288, ranks=32, nodes=4)
        fitted = layer_costs(ground, fit, 0).at(8)
        plans = {name: solve(request, name).placement for name in ("eplb", "robust")}
        plans["time"] = solve(replace(request, cost=fitted.cost), "time").placement
        judge = [replace(loads[left_out], phase="decode")]
        (timed,) = timed_placements(ground, plans, judge, [8], 0, 0, mode=fitted.mode)
        best = min(timed.step_s["eplb"][0], timed.step_s["robust"][0])
        assert timed.step_s["time"][0] < best * 0.99
