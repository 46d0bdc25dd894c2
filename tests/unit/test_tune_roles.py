"""Searching prefill and decode roles: the space, its legality, the answer, the files, resume, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim.cli import run
from moesim.engine.deployment import groundwork, resolve
from moesim.errors import Infeasible
from moesim.spec.cluster import ClusterSpec
from moesim.spec.parallel import ParallelSpec
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice, Scenario, load_scenario
from placement import space as space_module
from placement.coding import Coding
from placement.layouts import layouts_of
from placement.objective import Evaluator, Outcome
from placement.plans import Plan, baseline_plan, own_plan
from placement.pools import Pool, PoolChecks, sizes, splits, with_pools
from placement.ranking import order
from placement.regret import make_table, read_table, scores
from placement.search_problem import problem_of
from placement.space import Space, enumerate_space
from placement.tune_command import known_recipes
from placement.tuner import Trial
from tests.scenarios import small, write

FOLDER = Path(__file__).resolve().parent.parent / "data" / "regret"
OWN = {
    "prefill": {"gpus": 4, "placement": {"redundant_experts": 0}, "policies": {"dispatch": {"mode": "normal"}}},
    "decode": {"gpus": 2, "replicas": 2, "batching": {"max_running_requests_per_dp_rank": 32}},
}
NARROW = {"solvers": ["greedy"], "redundant_experts": [0]}


def scenario(tmp_path: Path, *, own: dict[str, Any] | None = None, **search: Any) -> Path:
    """own: the scenario's roles; search: its keys of `search`."""
    data = small(search={**NARROW, **search})
    data["serving"]["workload"]["requests"] = 40
    if own is not None:
        data["parallel"] = None
        data["serving"]["roles"] = own
    return write(tmp_path, data)


def space_of(path: Path) -> tuple[Any, Space]:
    ground = groundwork(load_scenario(path))
    return ground, enumerate_space(ground, ground.scenario)


def tuned(path: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str, trials: int = 12) -> dict[str, Any]:
    assert run(["tune", str(path), "--trials", str(trials), "--out", str(out), "--json", *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def cluster(nodes: int, gpus: int = 8) -> ClusterSpec:
    return load_cluster(ClusterChoice(system="h200_sxm", nodes=nodes, gpus_per_node=gpus))


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 2), (1, 8), (2, 8), (4, 8), (3, 6), (16, 8)])
def test_splits_use_every_gpu_and_pools_fill_nodes_or_parts(nodes: int, gpus: int) -> None:
    found = splits(cluster(nodes, gpus))
    assert len(set(found)) == len(found) <= 20
    assert all(first > 0 and second > 0 and first + second == nodes * gpus for first, second in found)
    assert (nodes * gpus // 2, nodes * gpus // 2) in found
    if nodes <= 8:
        assert {(gpus * one, gpus * (nodes - one)) for one in range(1, nodes)} <= set(found)
    for pool in {one for split in found for one in split}:
        assert all(pool % size == 0 and (size % gpus == 0 or gpus % size == 0) for size in sizes(pool, gpus))


def test_auto_holds_plans_with_and_without_roles(tmp_path: Path) -> None:
    ground, space = space_of(scenario(tmp_path, roles="auto"))
    with_roles = [plan for plan in space.plans if plan.prefill is not None]
    plain = [plan for plan in space.plans if plan.prefill is None]
    assert with_roles
    assert plain
    assert all(sum(pool.gpus for pool in plan.pools.values()) == ground.cluster.gpus for plan in with_roles)
    # The plain part is the space without roles, in its order.
    _, without = space_of(scenario(tmp_path))
    assert [plan.label() for plan in plain] == [plan.label() for plan in without.plans]
    names = [tuple(plan.params().values()) for plan in space.plans]
    assert len(set(names)) == len(names)
    assert all(space.find(values) == plan for values, plan in zip(names, space.plans, strict=True))
    assert baseline_plan(ground, ground.scenario).prefill is None
    assert {"split", "prefill", "prefill_placement"} <= set(space.choices)
    assert set(without.choices) == {"layout", "schedule", "placement"}


def test_a_scenario_with_roles_searches_both(tmp_path: Path) -> None:
    ground, space = space_of(scenario(tmp_path, own=OWN))
    assert all(plan.prefill is not None for plan in space.plans)
    own, base = own_plan(ground, ground.scenario), baseline_plan(ground, ground.scenario)
    assert own in space
    assert base in space
    assert [pool.parallel.gpus for pool in own.pools.values()] == [4, 2]
    assert [(pool.solver, pool.redundant_experts) for pool in base.pools.values()] == [("contiguous", 0)] * 2
    assert [pool.parallel for pool in base.pools.values()] == [pool.parallel for pool in own.pools.values()]
    for name in ("split", "layout", "prefill"):
        assert len(space.choices[name]) > 1


def test_a_fixed_layout_keeps_the_roles_and_searches_their_placement(tmp_path: Path) -> None:
    path = scenario(tmp_path, own=OWN, parallel="fixed", solvers=["greedy", "robust"], redundant_experts=[0, 8])
    _, space = space_of(path)
    assert set(space.choices["split"]) == {"4+4"}
    assert len(space.choices["layout"]) == len(space.choices["prefill"]) == 1
    assert len(space.choices["placement"]) > 3


def test_what_a_role_has_of_its_own_stays(tmp_path: Path) -> None:
    """Batching, transfer and dispatch mode of a role are not searched: they stay under every plan."""
    path = scenario(tmp_path, own={**OWN, "transfer": "by_layer"})
    ground, space = space_of(path)
    for plan in space.plans[::50]:
        serving, pool = plan.apply(ground.scenario).serving, plan.prefill
        assert serving is not None
        assert serving.roles is not None
        assert pool is not None
        roles = serving.roles
        assert roles.prefill.policies is not None
        assert roles.transfer == "by_layer"
        assert roles.decode.batching == OWN["decode"]["batching"]
        assert roles.prefill.policies["dispatch"]["mode"] == "normal"
        assert roles.prefill.parallel == pool.parallel
        assert (roles.prefill.gpus, roles.prefill.replicas) == (pool.parallel.gpus, pool.replicas)


def test_every_legal_plan_resolves_and_each_other_is_counted(tmp_path: Path) -> None:
    """DeepSeek-V3 in FP8 on two nodes of H200: no pool of under eight GPUs holds it."""
    path = scenario(tmp_path, roles="auto")
    data = yaml.safe_load(path.read_text())
    data |= {"model": "deepseek-ai/DeepSeek-V3", "cluster": {"system": "h200_sxm", "nodes": 2}}
    data["parallel"] = {"attention_dp": 16, "ep": 16}
    data["precision"] |= {"dense": "fp8_block", "experts": "fp8_block"}
    path.write_text(yaml.safe_dump(data))
    ground, space = space_of(path)
    with_roles = [plan for plan in space.plans if plan.prefill is not None]
    assert with_roles
    assert {tuple(pool.gpus for pool in plan.pools.values()) for plan in with_roles} == {(8, 8)}
    assert space.infeasible["prefill_out_of_memory"] > 0
    assert space.infeasible["decode_out_of_memory"] > 0
    for plan in with_roles[:: max(1, len(with_roles) // 6)]:
        deployment = resolve(ground, plan.apply(ground.scenario))
        assert deployment.prefill is not None
        assert deployment.memory.kv_capacity_tokens > 0
    # One that was left out is refused by the simulator itself.
    small_pool = replace_pool(with_roles[0], 4)
    assert space.why_not(small_pool) == "prefill_out_of_memory"
    with pytest.raises(Infeasible):
        resolve(ground, small_pool.apply(ground.scenario))


def replace_pool(plan: Plan, size: int) -> Plan:
    assert plan.roles is not None
    assert plan.prefill is not None
    pool = replace(plan.prefill, parallel=ParallelSpec(tp=size, ep=size), backend="allreduce", replicas=8 // size)
    return replace(plan, roles=replace(plan.roles, prefill=pool))


def test_two_batch_is_searched_where_a_pool_can(tmp_path: Path) -> None:
    _, space = space_of(scenario(tmp_path, roles="auto", schedules=["sequential", "two_batch"]))
    overlapped = [plan for plan in space.plans if any(pool.schedule == "two_batch" for pool in plan.pools.values())]
    assert overlapped
    pools = [pool for plan in space.plans for pool in plan.pools.values()]
    assert not [pool for pool in pools if pool.backend == "allreduce" and pool.schedule == "two_batch"]


def test_neighbours_differ_in_one_choice_and_points_tell_plans_apart(tmp_path: Path) -> None:
    ground, space = space_of(scenario(tmp_path, roles="auto"))
    recipes = known_recipes(ground, ground.scenario, space)
    one = next(plan for plan in recipes if plan.prefill is not None)
    mine = one.params()
    near = space.grid.neighbours(one)
    for other in near:
        differ = [name for name, value in other.params().items() if value != mine[name]]
        assert other.prefill is None or len(differ) == 1
    assert any(other.prefill is None for other in near)
    plain = next(plan for plan in recipes if plan.prefill is None and plan.parallel == one.parallel)
    assert any(other.prefill is not None for other in space.grid.neighbours(plain))
    points = Coding(space).points(space.grid.rows(space.plans))
    assert len(np.unique(points, axis=0)) == space.size
    assert points.min() >= 0.0
    assert points.max() <= 1.0


def test_known_splits_come_first(tmp_path: Path) -> None:
    ground, space = space_of(scenario(tmp_path, roles="auto"))
    found = {plan.params()["split"] for plan in known_recipes(ground, ground.scenario, space)}
    assert {"2+6", "4+4", "6+2"} <= found


def test_a_space_beyond_what_is_checked_whole_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_module, "ENUMERATED", 100)
    monkeypatch.setattr(space_module, "SAMPLED", 60)
    tokens = "serving.batching.max_batch_tokens_per_dp_rank"
    ground, space = space_of(scenario(tmp_path, roles="auto", axes={tokens: [1024, 4096]}))
    assert space.estimated
    drawn = space.untried(set(), 20, np.random.default_rng(0))
    assert len(drawn) == 20
    assert any(plan.prefill is not None for plan in drawn)
    plan = next(plan for plan in drawn if plan.prefill is not None)
    assert plan in space
    assert space.find(list(plan.params().values())) == plan
    applied = plan.apply(ground.scenario)
    assert applied.serving is not None
    assert applied.serving.batching.max_batch_tokens_per_dp_rank == dict(plan.options)[tokens]


def test_the_answer_simulates_to_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = scenario(tmp_path, own=OWN), tmp_path / "run"
    result = tuned(path, out, capsys)
    best = result["best"]
    assert set(best["roles"]) >= {"prefill", "decode"}
    assert best["roles"]["decode"]["batching"] == OWN["decode"]["batching"]
    assert "Prefill" not in result["verdict"]["code"]
    files = {str(one.relative_to(out)) for one in out.rglob("*") if one.is_file()}
    for role in ("prefill", "decode"):
        assert {f"{role}/plan.yaml", f"{role}/placement.json", f"{role}/sglang/launch.txt"} <= files
        assert f"--disaggregation-mode {role}" in (out / role / "sglang" / "launch.txt").read_text()
    page = (out / "report.html").read_text()
    assert "Prompts are read in a pool of their own" in page
    assert run(["simulate", str(out / "plan.yaml"), "--json", "--draws", "0"]) == 0
    again = json.loads(capsys.readouterr().out)["metrics"]
    for name in ("output_tokens_per_s_per_gpu", "requests_completed"):
        assert again[name] == pytest.approx(best["metrics"][name], rel=1e-12)
    for name in ("ttft_s", "tpot_s"):
        assert again[name]["p50"] == pytest.approx(best["metrics"][f"{name}.p50"], rel=1e-12)
    assert again["roles"]["decode"]["tpot_s"]["p50"] > 0
    # In result.json they are in the form of serving.roles: a scenario takes them as they are.
    data = yaml.safe_load(path.read_text())
    data["serving"]["roles"] = best["roles"]
    write(tmp_path, data, "written.yaml")
    assert run(["simulate", str(tmp_path / "written.yaml"), "--json", "--draws", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == again


def test_each_role_exports_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    tuned(scenario(tmp_path, own=OWN, parallel="fixed"), out, capsys)
    assert run(["export", str(out / "plan.yaml"), "--engine", "sglang"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "prefill/plan.yaml and decode/plan.yaml" in line
    for role, launched in (("prefill", "--tp-size 4"), ("decode", "start this 2 times, each on 2 GPUs")):
        folder = tmp_path / role
        assert run(["export", str(out / role / "plan.yaml"), "--engine", "sglang", "--out", str(folder)]) == 0
        capsys.readouterr()
        told = (folder / "launch.txt").read_text()
        assert launched in told
        assert f"--disaggregation-mode {role}" in told
        assert told == (out / role / "sglang" / "launch.txt").read_text()


def test_roles_and_none_compete_and_workers_and_resume_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = scenario(tmp_path, roles="auto")
    one = tuned(path, tmp_path / "one", capsys, trials=40)
    kinds = {trial["roles"] is None for trial in one["trial_list"]}
    assert kinds == {True, False}
    finalists = [one["best"], *one["alternatives"]]
    assert {plan["roles"] is None for plan in finalists} == {True, False}
    split = next(entry for entry in one["choices"] if entry["choice"] == "split")
    assert split["values"] > 1
    assert one["baseline"]["roles"] is None
    first = [(trial["label"], trial["metrics"]) for trial in one["trial_list"]]
    again = tuned(path, tmp_path / "two", capsys, "--workers", "2", trials=16)
    assert [(trial["label"], trial["metrics"]) for trial in again["trial_list"]] == first[:16]
    tuned(path, tmp_path / "cut", capsys, trials=29)
    resumed = tuned(path, tmp_path / "cut", capsys, "--resume", trials=38)
    assert resumed["run"]["resumed_trials"] == 29
    assert [(trial["label"], trial["metrics"]) for trial in resumed["trial_list"]] == first[:38]
    assert any(trial["roles"] for trial in resumed["trial_list"][29:])


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2", "qmc"])
def test_other_samplers_search_roles(sampler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenario(tmp_path, roles="auto", sampler=sampler)
    result = tuned(path, tmp_path / "run", capsys, trials=44)
    assert len({trial["label"] for trial in result["trial_list"]}) == 44


def test_what_would_change_an_answer_with_roles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenario(tmp_path, own=OWN, parallel="fixed")
    result = tuned(path, tmp_path / "run", capsys, "--what-if", trials=4)
    load = [change for change in result["what_if"]["changes"] if change["what"] == "load"]
    assert [change["factor"] for change in load] == [0.5, 2.0]
    assert all(plan["status"] == "ok" for change in load for plan in change["plans"])


def test_memory_and_balance_are_of_both_pools(tmp_path: Path) -> None:
    ground, space = space_of(scenario(tmp_path, own=OWN))
    plan = own_plan(ground, ground.scenario)
    assert plan in space
    simulation = Evaluator(ground, ground.scenario).run(plan)
    assert simulation.served.prefill is not None
    assert simulation.deployment.prefill is not None
    outcome = Evaluator(ground, ground.scenario).evaluate(plan)
    least = [one.memory.fixed_bytes for one in (simulation.deployment, simulation.deployment.prefill)]
    assert outcome.metrics["memory_peak_bytes"] >= max(least)
    assert 0 < outcome.metrics["kv_cache_share"] <= 1


def test_among_prefill_pools_of_one_decode_pool_ttft_decides(tmp_path: Path) -> None:
    """TPOT is made in the decode pool: what it differs by under another prefill pool is chance."""
    _, space = space_of(scenario(tmp_path, own=OWN))
    ((common, _),) = Counter(plan.decode for plan in space.plans).most_common(1)
    plans = [plan for plan in space.plans if plan.decode == common]

    def trial(number: int, tpot_s: float, ttft_s: float) -> Trial:
        metrics = {"output_tokens_per_s_per_gpu": 1.0, "tpot_s.p50": tpot_s, "ttft_s.p50": ttft_s}
        return Trial(number, plans[number], Outcome("ok", metrics))

    trials = [trial(0, 0.0200, 0.9), trial(1, 0.0202, 0.1), trial(2, 0.0300, 0.05)]
    assert [one.number for one in order(trials, "output_tokens_per_s_per_gpu")] == [1, 0, 2]


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        (["search.roles=auto", "serving.balance=central_queue"], "serving.balance"),
        (["search.roles=auto", "search.parallel=fixed"], "search.roles"),
        (["search.roles=always"], "search.roles"),
        (["parallel={tp: 4, cp: 2, ep: 8}"], "over GPUs of its own is not simulated in serving"),
        (["search.pp=always"], "search.pp"),
        (["search.pp=[0]"], "search.pp"),
        (["search.axes={serving.roles.decode.replicas: [1, 2]}"], "serving.roles"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(
    asked: list[str], where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [part for one in asked for part in ("--set", one)]
    assert run(["tune", str(scenario(tmp_path)), "--trials", "2", "--out", str(tmp_path / "run"), *more]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert where in line


@pytest.mark.skipif(not os.environ.get("MOESIM_WHOLE"), reason="about a CPU minute: MOESIM_WHOLE=1")
def test_the_regret_of_a_tenth_of_a_space_with_roles(tmp_path: Path) -> None:
    """632 plans priced whole: with the recipes, and without them, when the search has to find the answer by itself."""
    problem = problem_of(FOLDER / "roles.yaml")
    make_table(problem, tmp_path / "table.parquet")
    table = read_table(tmp_path / "table.parquet", problem.space)
    trials = problem.space.size // 10
    regret = np.array([one.regret for one in scores(problem, table, "auto", trials, range(10))])
    bare = replace(problem, recipes=())
    alone = np.array([one.regret for one in scores(bare, table, "auto", trials, range(10))])
    random = np.array([one.regret for one in scores(bare, table, "random", trials, range(10))])
    print(f"\n{problem.space.size} plans, {trials} evaluated: regret {regret}, no recipes {alone}, at random {random}")
    assert np.median(regret) <= 0.01
    assert regret.max() <= 0.03
    assert np.median(alone) < np.median(random)


def test_off_is_what_yaml_makes_of_it(tmp_path: Path) -> None:
    path = scenario(tmp_path)
    text = path.read_text().replace("search:\n", "search:\n  roles: off\n")
    path.write_text(text)
    assert load_scenario(path).search.roles == "off"


def test_where_no_pair_of_pools_fits_the_nearest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V3 in FP8 on eight H100: 671 GB of weights, 640 GB of memory, and both pools hold all of them."""
    data = small(
        model="deepseek-ai/DeepSeek-V3",
        cluster={"system": "h100_sxm", "nodes": 1, "gpus_per_node": 8},
        precision={"dense": "fp8_block", "experts": "fp8_block"},
        search={"schedules": ["sequential", "two_batch"]},
    )
    data["parallel"] = None
    data["serving"]["roles"] = {"prefill": {"gpus": 4}, "decode": {"gpus": 4}}
    path = write(tmp_path, data)
    assert run(["tune", str(path), "--trials", "4", "--out", str(tmp_path / "run")]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    label, told = line.split("nearest: ")[1].split("% of a GPU's memory short")[0].rsplit(", ", 1)

    ground = groundwork(load_scenario(path))
    checks, worst = PoolChecks(ground), {}
    for totals in splits(ground.cluster):
        for prefill, decode in itertools.product(*(plain_pools(gpus) for gpus in totals)):
            spec = with_pools(ground.scenario, prefill, decode)
            worst[f"prefill {prefill.label()}; decode {decode.label()}"] = max(
                lacking(checks, name, spec) for name in ("prefill", "decode")
            )
    assert worst[label] == min(worst.values()) > 0
    assert told == f"{min(worst.values()):.0%}".removesuffix("%")


def plain_pools(gpus: int) -> list[Pool]:
    """Every layout of a pool on one node of 8, with no more experts than there are."""
    return [
        Pool(parallel, backend, "greedy" if parallel.ep > 1 else "contiguous", 0, "sequential", gpus // size)
        for size in sizes(gpus, 8)
        for parallel, backend in layouts_of(size)
    ]


def lacking(checks: PoolChecks, name: str, spec: Scenario) -> float:
    """What share of a GPU's memory a role lacks; infinity where it is something else that it lacks."""
    try:
        checks.check(name, spec)
    except Infeasible as error:
        return math.inf if error.over is None else error.over
    return 0.0
