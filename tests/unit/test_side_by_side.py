"""moesim beside aiconfigurator: what is read, mapped, compared and told, without aiconfigurator."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from moesim.engine.serving import Served
from moesim.errors import BadInput, MissingPart, MoesimError
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import Scenario, load_scenario
from validate.side_by_side.__main__ import spread
from validate.side_by_side.compare import (
    OVERLAP,
    SCHEDULE,
    Both,
    agreement,
    at_one_load,
    distinct,
    finite,
    lost,
    of_trial,
    tpot_apart,
)
from validate.side_by_side.plans import (
    ATTENTION,
    EXPERTS,
    GROUPS,
    OWN,
    Seen,
    SidePlan,
    aic_grouped,
    alike,
    assumed,
    grouped,
    plan_of,
    rungs,
    scenario_for,
    steady,
)
from validate.side_by_side.sweep import (
    AicPoint,
    AicPrice,
    AicRow,
    AicTask,
    find_executable,
    interpreter_of,
    price,
    read_rows,
    run_child,
    sweep,
    task_of,
)
from validate.side_by_side.told import WHY, _lost

# Columns as aiconfigurator 0.12 writes them (those that are read, and a few more); figures made up.
HEAD = "model,isl,osl,concurrency,bs,ttft,tpot,tokens/s/gpu,tp,pp,dp,moe_tp,moe_ep,cp,kvcache,memory,ctx_tokens"
ROWS = (
    "m,2000,256,512,64,1750.5,94.5,640.25,1,1,8,1,8,1,fp8,98.5,4000",
    "m,2000,256,8,8,350,14,61,8,1,1,8,1,1,fp8,92.5,4000",
    "m,2000,256,24,12,350,14,31,2,2,2,1,4,1,fp8,92.5,2000",
)
TASK = AicTask("deepseek-ai/DeepSeek-V3", "h200_sxm", 32, "sglang", "0.5.14", 2000, 256, 20000.0, 100.0)
CLOSED = (
    "serving.workload.arrivals={concurrency: 64}",
    "serving.workload.requests=128",
    "objective.slo={ttft_p99_ms: 20000, ttft_p50_ms: 15000, tpot_p50_ms: 100}",
)
DEEPEP = AicPrice(
    ttft_ms=1750.5,
    tpot_ms=94.5,
    tokens_per_s_per_gpu=640.25,
    memory_gib=98.5,
    comm={"context": "deepep_ht", "generation": "deepep_ll"},
    kv_cache="fp8",
    power_law=1.01,
)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "best_config_topn.csv"
    path.write_text("\n".join((HEAD, *ROWS)) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def closed(repo: Path) -> Scenario:
    return load_scenario(repo / "notebooks/scenarios/demo.yaml", CLOSED)


def program(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def seen(rate: float, ttft_s: float = 1.0, tpot_s: float = 0.05) -> Seen:
    return Seen(tokens_per_s_per_gpu=rate, ttft_s=ttft_s, tpot_s=tpot_s)


def plan(concurrency: int = 2048, **changed: Any) -> SidePlan:
    parallel = ParallelSpec(attention_dp=8, ep=8)
    return dataclasses.replace(SidePlan(parallel, "deepep", concurrency, 4000, 64, "aiconfigurator"), **changed)


def test_rows_are_read(table: Path) -> None:
    rows = read_rows(table)
    assert rows[0] == AicRow(AicPoint(1, 8, 1, 8, 64, 4000), 1750.5, 94.5, 640.25, 98.5, "fp8")
    assert [row.point.gpus for row in rows] == [8, 8, 8]
    assert [row.point.concurrency for row in rows] == [512, 8, 48]


@pytest.mark.parametrize(
    ("head", "row", "told"),
    [
        (HEAD.replace("moe_ep", "experts"), ROWS[0], "moe_ep"),
        (HEAD, ROWS[0].replace("94.5", "fast"), "fast"),
        (HEAD, ROWS[0].replace("94.5", "nan"), "nan"),
        (HEAD, ROWS[0].replace(",64,", ",0,"), "bs 0"),
        (HEAD, ROWS[0].replace(",64,", ",6.5,"), "bs 6.5"),
        (HEAD, "m,2000", "TypeError"),
    ],
)
def test_a_table_that_is_none_is_told_in_one_line(table: Path, head: str, row: str, told: str) -> None:
    table.write_text(f"{head}\n{row}\n", encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        read_rows(table)
    assert str(table) in caught.value.line() and told in caught.value.line()
    assert "\n" not in caught.value.line()


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_rows(tmp_path / "none.csv")


def test_instances_are_replicated_to_fill_the_gpus() -> None:
    found = plan_of(AicPoint(1, 8, 1, 8, 64, 4000), DEEPEP, 32)
    assert isinstance(found, SidePlan)
    assert found.concurrency == 4 * 512
    assert (found.backend, found.batch_tokens, found.running) == ("deepep", 4000, 64)
    assert found.point(32, 2000) == AicPoint(1, 8, 1, 8, 64, 4000)


@pytest.mark.parametrize(
    ("point", "backend"),
    [
        (AicPoint(8, 1, 8, 1, 8, 4000), "allreduce"),
        (AicPoint(2, 4, 1, 8, 8, 4000), "allgather_reducescatter"),
    ],
)
def test_without_deepep_ranks_gather_or_reduce(point: AicPoint, backend: str) -> None:
    found = plan_of(point, dataclasses.replace(DEEPEP, comm={}), 32)
    assert isinstance(found, SidePlan) and found.backend == backend
    assert found.point(32, 2000) == point


def test_what_moesim_cannot_run_is_counted_by_reason(table: Path) -> None:
    rows = read_rows(table)
    plans, left = distinct([*rows, rows[0]], [DEEPEP] * 4, 32)
    assert len(plans) == 2  # the same plan twice is one
    assert list(left.values()) == [1] and "PP2" in next(iter(left))
    assert "do not fill" in str(plan_of(AicPoint(1, 8, 1, 8, 64, 4000), DEEPEP, 20))
    assert plan_of(AicPoint(1, 8, 1, 8, 64, 4000), AicPrice(error="no rows"), 32) == "no rows"


def test_the_task_has_the_tightest_limits(closed: Scenario) -> None:
    task = task_of(closed, 32)
    assert (task.ttft_ms, task.tpot_ms, task.isl, task.osl) == (15000.0, 100.0, 2000, 256)
    assert "--backend-version 0.5.14" in " ".join(task.options())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("serving.workload.arrivals={poisson: {requests_per_s: 4}}", "closed loops only"),
        ("serving.workload.range_ratio=0.8", "fixed lengths"),
        ("engine.name=moesim", "no such engine"),
        ("objective.slo={ttft_p50_ms: 10}", "objective.slo"),
        ("serving.speculative={method: mtp, draft_tokens: 1, acceptance: 0.6}", "one kind of instance"),
    ],
)
def test_a_task_without_words_for_it(repo: Path, override: str, told: str) -> None:
    spec = load_scenario(repo / "notebooks/scenarios/demo.yaml", (*CLOSED, override))
    with pytest.raises(BadInput, match=told):
        task_of(spec, 32)


def test_views_lead_one_step_at_a_time_to_the_scenario() -> None:
    steps = rungs(DEEPEP)
    assert (steps[0].power_law, steps[0].in_order, steps[0].kv_cache, steps[0].mixed) == (1.01, True, "fp8", True)
    for one, next_ in itertools.pairwise(steps):
        changed = [
            field.name
            for field in dataclasses.fields(one)
            if field.name != "name" and getattr(one, field.name) != getattr(next_, field.name)
        ]
        assert len(changed) == 1
    assert dataclasses.replace(steps[-1], name=OWN.name) == OWN


def test_a_plan_under_a_view(closed: Scenario) -> None:
    spec = scenario_for(closed, plan(options=(("policies.dispatch.replica", "equal"),)), assumed(DEEPEP))
    assert spec.serving is not None and spec.routing.synthetic is not None and spec.parallel is not None
    assert (spec.parallel.attention_dp, spec.policies.dispatch.replica) == (8, "equal")
    assert (spec.routing.synthetic.kind, spec.routing.synthetic.exponent) == ("power_law", 1.01)
    assert (spec.placement.solver, spec.placement.redundant_experts) == ("contiguous", 0)
    assert (spec.precision.kv_cache, spec.serving.batching.mixed_chunk) == ("fp8", True)
    own = scenario_for(closed, plan(), OWN)
    assert (own.routing, own.placement, own.precision) == (closed.routing, closed.placement, closed.precision)


def test_a_trial_keeps_its_options(closed: Scenario) -> None:
    trial = {
        "parallel": {"attention_dp": 8, "ep": 8},
        "backend": "deepep",
        "schedule": "two_batch",
        "solver": "greedy",
        "redundant_experts": 8,
        "options": {
            "serving.batching.max_batch_tokens_per_dp_rank": 4096,
            "policies.dispatch.replica": "equal",
        },
    }
    found = of_trial(trial, 512, closed)
    assert (found.batch_tokens, found.running) == (4096, 128)
    assert found.options == (("policies.dispatch.replica", "equal"),)


def test_operations_keep_their_sum_in_groups() -> None:
    theirs = {"generation_moe": 20.0, "generation_moe_dispatch": 1.5, "generation_attention": 11.0, "new_thing": 2.0}
    found = aic_grouped(theirs)
    assert sum(found.values()) == pytest.approx(sum(theirs.values()) / 1e3)
    assert found[EXPERTS] == pytest.approx(0.02) and found["new_thing"] == pytest.approx(0.002)
    ours = {"experts": 0.015, "dispatch": 0.002, "combine": 0.003, "attention": 0.01, "tp_collective": 0.001}
    assert grouped(ours) == pytest.approx({EXPERTS: 0.015, "exchange": 0.006, ATTENTION: 0.01})


def test_an_expert_block_in_one_figure_is_met_by_the_sum_of_its_parts() -> None:
    theirs = aic_grouped({"generation_moe_overlap": 30.0, "generation_mla_block": 10.0})
    ours = grouped({"experts": 0.015, "dispatch": 0.002, "gate": 0.001, "shared_expert": 0.002, "attention": 0.012})
    found = alike(theirs, ours)
    assert found[0][0] == "expert block" and found[0][1:] == pytest.approx((0.03, 0.02))
    assert sum(one[2] for one in found) == pytest.approx(sum(ours.values()))
    assert [abs(b - a) for _, a, b in found] == sorted((abs(b - a) for _, a, b in found), reverse=True)


def test_regret_is_of_the_choice_that_keeps_the_choosers_limits() -> None:
    rates = np.asarray([100.0, 90.0, 80.0])
    judged = np.asarray([50.0, 70.0, 80.0])
    yes = np.ones(3, dtype=bool)
    assert lost(rates, yes, judged, yes) == pytest.approx((1 - 50 / 80, False))
    assert lost(rates, np.asarray([False, True, True]), judged, yes) == pytest.approx((1 - 70 / 80, False))
    broken, breaks = lost(rates, yes, judged, np.asarray([False, True, False]))
    assert breaks and broken == pytest.approx(1 - 50 / 70)
    assert math.isnan(lost(rates, np.zeros(3, dtype=bool), judged, yes)[0])


def test_agreement_leaves_out_plans_without_a_figure() -> None:
    def both(theirs: AicPrice, ours: Seen) -> Both:
        return Both(plan(), theirs, ours, ours)

    def priced(rate: float, tpot_ms: float = 50.0) -> AicPrice:
        return dataclasses.replace(DEEPEP, tokens_per_s_per_gpu=rate, tpot_ms=tpot_ms)

    plans = [
        both(priced(100), seen(10)),
        both(priced(90), seen(20)),
        both(priced(80), seen(30, tpot_s=0.2)),
        both(AicPrice(error="no rows"), seen(99)),
        both(priced(99), Seen(error="out of memory")),
    ]
    found = agreement(plans, TASK, lambda one: one.own)
    assert (found.plans, found.spearman) == pytest.approx((3, -1.0))
    assert (found.theirs_lost, found.ours_lost) == pytest.approx((0.5, 0.1))
    assert not found.theirs_breaks and not found.ours_breaks


def test_layouts_are_compared_at_the_commonest_load() -> None:
    plans = [Both(plan(load), DEEPEP, seen(1), seen(1)) for load in (64, 128, 128, 64, 128)]
    assert [one.plan.concurrency for one in at_one_load(plans)] == [128] * 3


@pytest.mark.parametrize("rounds", [3, 6])
def test_a_steady_closed_loop_turns_over_its_places(rounds: int) -> None:
    """Four places, each request two seconds to its first token and one for each of eight more: Little's law."""
    places, osl = 4, 9
    arrival_s = np.repeat(np.arange(rounds) * 10.0, places)
    served = SimpleNamespace(
        arrival_s=arrival_s,
        first_token_s=arrival_s + 2.0,
        finish_s=arrival_s + 10.0,
        osl=np.full(rounds * places, osl),
    )
    rate, ttft_s, tpot_s = steady(cast(Served, served), places, 2)
    assert (rate, ttft_s, tpot_s) == pytest.approx((places * osl / 10.0 / 2, 2.0, 1.0))


def test_a_front_is_taken_evenly() -> None:
    rows = [AicRow(AicPoint(1, 8, 1, 8, n, 2000), 1.0, 1.0, 1.0, 1.0, "fp8") for n in range(1, 12)]
    assert [row.point.batch for row in spread(rows, 3)] == [1, 6, 11]
    assert spread(rows, 0) == [] and len(spread(rows, 99)) == 11


def test_numbers_that_json_has_no_word_for() -> None:
    assert json.loads(
        json.dumps(finite({"a": math.nan, "b": (1.0, math.inf), 1: np.float64(2.0)}), allow_nan=False)
    ) == {
        "a": None,
        "b": [1.0, None],
        "1": 2.0,
    }


def test_no_aiconfigurator_is_a_missing_part(monkeypatch: pytest.MonkeyPatch, repo: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingPart) as caught:
        find_executable()
    assert caught.value.exit_code == 3
    assert "pip install aiconfigurator" in caught.value.line()
    with pytest.raises(BadInput, match="no such program"):
        find_executable(tmp_path / "none")


def test_the_command_fails_in_one_line(repo: Path, tmp_path: Path) -> None:
    words = [word for one in CLOSED for word in ("--set", one)]
    command = [sys.executable, "-m", "validate.side_by_side", "notebooks/scenarios/demo.yaml", *words]
    told = subprocess.run(
        [*command, "--executable", str(tmp_path / "none")], cwd=repo, capture_output=True, text=True, check=False
    )
    assert told.returncode == 2
    assert told.stderr.startswith("error: --executable") and told.stderr.count("\n") == 1
    assert told.stdout == ""


def test_the_interpreter_of_a_script(tmp_path: Path) -> None:
    script = program(tmp_path / "aiconfigurator", f"#!{sys.executable}\n")
    assert interpreter_of(script) == Path(sys.executable)
    with pytest.raises(BadInput, match="interpreter"):
        interpreter_of(program(tmp_path / "other", "#!/bin/sh\n"))
    beside = program(tmp_path / "python", "#!/bin/sh\n")
    assert interpreter_of(script) == beside


def test_a_sweep_that_fails_says_its_last_line(tmp_path: Path) -> None:
    script = program(tmp_path / "aiconfigurator", "#!/bin/sh\necho 'ValueError: no such system' >&2\nexit 1\n")
    with pytest.raises(MoesimError, match="no such system") as caught:
        sweep(TASK, script, tmp_path / "out", top=3)
    assert "\n" not in caught.value.line()


def test_prices_without_an_answer(tmp_path: Path) -> None:
    script = program(tmp_path / "aiconfigurator", "#!/bin/sh\n")
    program(tmp_path / "python", "#!/bin/sh\necho 'ImportError: aiconfigurator' >&2\nexit 1\n")
    with pytest.raises(MoesimError, match="ImportError: aiconfigurator"):
        price(TASK, script, [AicPoint(1, 8, 1, 8, 64, 4000)])


def test_a_child_past_its_limit_ends_with_its_own_children(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    script = program(tmp_path / "slow", f"#!/bin/sh\nsleep 60 &\necho $! > {mark}\nwait\n")
    started = time.perf_counter()
    with pytest.raises(MoesimError, match=r"took over 1 s"):
        run_child([str(script)], 1.0, what="it")
    assert time.perf_counter() - started < 30
    pid = int(mark.read_text())
    for _ in range(100):
        if not _alive(pid):
            break
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def steps(overlaps: float = 0.0) -> Both:
    """A plan whose steps both tools tell apart; moesim's are `overlaps` seconds shorter than their parts."""
    priced = dataclasses.replace(
        DEEPEP,
        tpot_ms=90.0,
        decode_step_ms=40.0,
        mixed_step_ms=240.0,
        decode_by_operation_ms={"generation_moe": 30.0, "generation_attention": 10.0},
        mixed_by_operation_ms={"context_moe": 200.0, "context_moe_dispatch": 40.0},
    )
    ours = Seen(
        tpot_s=0.11,
        decode_step_s=0.05 - overlaps,
        mixed_step_s=0.2 - overlaps,
        decode_by_group_s={EXPERTS: 0.02, ATTENTION: 0.03},
        mixed_by_group_s={EXPERTS: 0.12, "exchange": 0.08},
    )
    return Both(plan(), priced, ours, ours)


def test_the_difference_in_tpot_adds_up_part_by_part() -> None:
    """By hand: 90 = w 240 + (1 - w) 40, so w = 1/4."""
    parts = dict(tpot_apart(steps()))
    assert parts[EXPERTS] == pytest.approx(0.75 * (0.02 - 0.03) + 0.25 * (0.12 - 0.2))
    assert parts[ATTENTION] == pytest.approx(0.75 * 0.02)
    assert parts["exchange"] == pytest.approx(0.25 * 0.04)
    assert parts[SCHEDULE] == pytest.approx(0.11 - (0.75 * 0.05 + 0.25 * 0.2))
    assert sum(parts.values()) == pytest.approx(0.11 - 0.09)
    assert OVERLAP not in parts


def test_what_overlaps_stands_by_itself() -> None:
    parts = dict(tpot_apart(steps(overlaps=0.01)))
    assert parts[OVERLAP] == pytest.approx(-0.01)
    assert sum(parts.values()) == pytest.approx(0.11 - 0.09)


def test_without_a_figure_nothing_is_taken_apart() -> None:
    assert tpot_apart(dataclasses.replace(steps(), priced=AicPrice(error="no rows"))) == []
    assert tpot_apart(dataclasses.replace(steps(), assumed=Seen(error="out of memory"))) == []


def test_the_text_says_what_each_choice_loses() -> None:
    def text(**changed: Any) -> str:
        found = {"theirs_lost": 0.074, "theirs_breaks": False, "ours_lost": 0.155, "ours_breaks": True} | changed
        return _lost(found, "theirs") + " / " + _lost(found, "ours")

    assert text() == "loses 7.4% / breaks the limits (-15.5% beside the best rate that keeps them)"
    assert text(theirs_lost=None).startswith("cannot be judged")


def test_every_reason_is_of_a_group_that_there_is() -> None:
    assert set(WHY) <= {*GROUPS.values(), "expert block", SCHEDULE}
