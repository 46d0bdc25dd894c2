"""Runs whose placement or loads change: when that pays and when not, what is told, and what is refused by name."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.relayout_decisions import EPLB_S_PER_SLOT, decide, solver_of, solver_seconds
from moesim.engine.serving import Served
from moesim.engine.simulate import Simulation, simulate
from moesim.errors import BadInput
from moesim.routing.drift import load_drift
from moesim.routing.readers import read_loads
from moesim.spec.rebalance import RebalanceSpec
from moesim.spec.scenario import Scenario
from tests.property.test_fuzz_scenarios import mutate
from tests.scenarios import small, write
from tests.training_scenarios import training

LAYERS, EXPERTS = 16, 64
# An exchange that routing does not enter: normal-mode traffic is modelled on all steps of a grid together.
GATHERED = {"dispatch": {"backend": "allgather_reducescatter"}}
EVERY = {"interval_steps": 100, "window_steps": 20, "solver": "greedy", "solve_s": 0.0}


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two loads, each with twelve hot experts of its own in every layer."""
    folder, rng = tmp_path_factory.mktemp("domains"), np.random.default_rng(0)
    order = np.stack([rng.permutation(EXPERTS) for _ in range(LAYERS)])
    files = []
    for place, name in enumerate("ab"):
        counts = np.full((LAYERS, EXPERTS), 1000.0)
        np.put_along_axis(counts, order[:, 12 * place : 12 * place + 12], 5000.0, axis=1)
        (folder / f"{name}.json").write_text(json.dumps({"logical_count": counts.tolist()}))
        files.append(str(folder / f"{name}.json"))
    return files


def turns(seconds: float) -> dict[str, Any]:
    """One domain, then the other, for so long each, again and again."""
    points = [{"at_s": 0, "weights": [1, 0]}, {"at_s": seconds, "weights": [0, 1]}]
    return {"points": points, "repeat_s": 2 * seconds}


def moving(
    domains: list[str], *, rebalance: dict[str, Any] | None = None, drift: dict[str, Any] | None = None,
    requests: int = 1200, solver: str = "greedy", **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """A closed loop of 512 prompts on the two domains."""
    data = small(
        routing={"loads": [{"file": file} for file in domains], "holdout": {"by": "none"}},
        placement={"solver": solver, "redundant_experts": 0},
    )
    if drift is not None:
        data["routing"]["drift"] = drift
    if rebalance is not None:
        data["placement"]["rebalance"] = rebalance
    data["serving"]["workload"] = {"isl": 1024, "osl": 64, "requests": requests, "arrivals": {"concurrency": 512}}
    return data | changes


def simulated(data: dict[str, Any], **options: Any) -> Simulation:
    return simulate(resolve(groundwork(Scenario.read(data, where="test"))), **{"draws": 0, **options})


def without(simulation: Simulation) -> Served:
    """The same run with its first placement throughout."""
    assert simulation.without_relayouts is not None
    return simulation.without_relayouts


@pytest.mark.parametrize(("phase_s", "pays"), [(20.0, True), (1.3, False)])
def test_new_placements_pay_when_phases_last_and_cost_when_they_are_over_before_the_next(
    domains: list[str], phase_s: float, pays: bool
) -> None:
    """A hundred steps and a pause take some 1.3 s: at as long a phase each placement comes when its loads are gone."""
    found = simulated(moving(domains, rebalance=EVERY, drift=turns(phase_s), requests=2400))
    events = found.relayouts
    assert len(events) >= 4
    assert (found.served.duration_s < without(found).duration_s) == pays
    judged = [
        event for event in events if event.next_balance_after is not None and event.next_balance_before is not None
    ]
    for event in judged:
        assert event.balance_after < event.balance_before  # every one looked good on the window that it was made from
    if not pays:  # and was worse than what it replaced on the steps that came
        assert np.mean([event.next_balance_after for event in judged]) > np.mean(
            [event.next_balance_before for event in judged]
        )


def test_the_solver_answers_what_it_answered_before_and_nothing_moves(domains: list[str]) -> None:
    data = moving(domains[:1], rebalance=EVERY)
    deployment = resolve(groundwork(Scenario.read(data, where="test")))
    spec = deployment.scenario.placement.rebalance
    assert spec is not None
    old = deployment.setup.placement
    mix = np.mean([load.profile() for load in deployment.ground.fit], axis=0)
    window = deployment.ground.fit[0].__class__(1e6 * mix[None], old.layer_ids, old.absolute_layers, name="window")
    found = decide(spec, deployment.setup, solver_of(deployment, spec), old, window)
    assert found.placement is not None
    np.testing.assert_array_equal(found.placement.physical_to_logical, old.physical_to_logical)
    assert found.before == found.after > 1.0
    content = spec.model_copy(update={"skip_above": 0.5})
    even = decide(content, deployment.setup, solver_of(deployment, content), old, window)
    assert even.placement is None
    assert not even.solved


def test_a_least_gain_keeps_what_is_good_enough(domains: list[str]) -> None:
    """Counts of a window scatter, so that a solver always finds something to move; `min_gain` tells it from drift."""
    still = simulated(moving(domains, rebalance={**EVERY, "min_gain": 0.2}))
    events = still.relayouts
    assert len(events) == 2
    assert all(event.placement is None and event.pause_s == 0.0 for event in events)
    np.testing.assert_array_equal(still.served.finish_s, without(still).finish_s)
    always = simulated(moving(domains, rebalance=EVERY)).relayouts
    assert all(event.moved_experts > 0 for event in always)


def test_an_instance_that_never_idles_steps_or_stands_still(domains: list[str]) -> None:
    for mode in ({}, {"layers_per_chunk": 3}, {"mode": "async"}):
        found = simulated(moving(domains, rebalance={**EVERY, **mode}))
        pauses = np.asarray([seconds for _, _, seconds in found.pauses])
        assert found.served.step_s.sum() + pauses.sum() == pytest.approx(found.served.duration_s, rel=1e-12)
        assert sum(event.pause_s for event in found.relayouts) == pytest.approx(pauses.sum(), rel=1e-12)
        for event in found.relayouts:
            assert event.moved_bytes == event.pair_bytes.sum() == sum(event.bytes_by_level.values())


def test_chunks_and_async_spread_the_pause(domains: list[str]) -> None:
    whole, chunked, beside = (
        simulated(moving(domains, rebalance={**EVERY, "interval_steps": 120, **mode}))
        for mode in ({}, {"layers_per_chunk": 4}, {"mode": "async"})
    )
    assert [event.moved_experts for event in whole.relayouts][:1] == [
        event.moved_experts for event in chunked.relayouts
    ][:1]
    assert chunked.relayouts[0].pause_s == pytest.approx(whole.relayouts[0].pause_s, rel=1e-12)
    longest = [max(seconds for _, _, seconds in one.pauses) for one in (whole, chunked, beside)]
    assert longest[0] > 2 * longest[1] > 4 * longest[2]
    assert len(chunked.pauses) == LAYERS // 4 * len([event for event in chunked.relayouts if event.done_s is not None])
    first = beside.relayouts[0]
    assert 0 < first.delay_s < whole.relayouts[0].pause_s
    assert first.pause_s < whole.relayouts[0].pause_s / 5  # only the copy into place
    assert whole.relayouts[0].delay_s == 0
    assert first.done_s is not None
    assert first.done_s > first.at_s


def test_the_solver_s_time_is_waited_for_unless_it_runs_beside(domains: list[str]) -> None:
    asked = {**EVERY, "solve_s": 0.25}
    waits, beside = (simulated(moving(domains, rebalance={**asked, **mode})) for mode in ({}, {"mode": "async"}))
    assert all(event.pause_s > 0.25 for event in waits.relayouts)
    assert all(event.pause_s < 0.01 for event in beside.relayouts)
    deployment = resolve(groundwork(Scenario.read(moving(domains), where="test")))
    assert solver_seconds(deployment.setup, RebalanceSpec()) == EPLB_S_PER_SLOT * LAYERS * EXPERTS


def test_same_seed_same_run(domains: list[str]) -> None:
    data = moving(domains, rebalance=EVERY, drift=turns(0.9))
    one, two, other = (simulated(data), simulated(data), simulated(data, seed=1))
    assert one.relayouts == two.relayouts
    np.testing.assert_array_equal(one.served.finish_s, two.served.finish_s)
    assert one.relayouts[0].balance_before != other.relayouts[0].balance_before


def test_steps_one_by_one_agree_with_the_table(domains: list[str]) -> None:
    data = moving(domains, rebalance={**EVERY, "layers_per_chunk": 5}, drift=turns(0.95))
    table, exact = (simulated(data, fidelity=fidelity) for fidelity in ("table", "maxplus"))
    assert exact.served.duration_s == pytest.approx(table.served.duration_s, rel=0.01)
    ours, theirs = table.relayouts[0], exact.relayouts[0]
    assert theirs.balance_before == pytest.approx(ours.balance_before, rel=0.05)
    assert theirs.moved_experts == pytest.approx(ours.moved_experts, rel=0.1)


def test_a_drift_that_stays_is_that_load_alone(domains: list[str]) -> None:
    stays = {"points": [{"at_s": 0, "weights": [1, 0]}]}
    drifting = simulated(moving(domains, drift=stays, solver="contiguous", policies=GATHERED))
    alone = simulated(moving(domains[:1], solver="contiguous", policies=GATHERED))
    np.testing.assert_allclose(drifting.served.finish_s, alone.served.finish_s, rtol=1e-12)


def test_each_time_is_served_by_its_own_load(domains: list[str], tmp_path: Path) -> None:
    """After the switch steps take as long as under the second load, which a map fitted to the first does not suit."""
    deployment = resolve(groundwork(Scenario.read(moving(domains[:1]), where="test")))
    deployment.setup.placement.write(tmp_path / "fit.json")
    drift = {"points": [{"at_s": 0, "weights": [1, 0]}, {"at_s": 1.0, "weights": [0, 1]}]}
    placement = {"file": str(tmp_path / "fit.json")}
    switched, first, second = (
        simulated(moving(files, placement=placement, drift=one, policies=GATHERED))
        for files, one in ((domains, drift), (domains[:1], None), (domains[1:], None))
    )
    late = switched.served.step_start_s >= 1.0
    reading = switched.served.step_prefill_tokens > 0
    np.testing.assert_allclose(switched.served.step_s[~late], first.served.step_s[: (~late).sum()], rtol=1e-9)
    assert (switched.served.step_s >= first.served.step_s * (1 - 1e-9)).all()
    # In the first files' draws the second load has another seed: the same step, other draws of its counts.
    np.testing.assert_allclose(switched.served.step_s[late], second.served.step_s[late], rtol=0.02)
    assert (switched.served.step_s[late & reading] > 1.02 * first.served.step_s[late & reading]).any()


def test_runs_under_draws_take_the_same_placements_again(domains: list[str]) -> None:
    found = simulated(moving(domains, rebalance=EVERY, drift=turns(0.9)), draws=3)
    assert len(found.drawn) == 3
    assert len({one.duration_s for one in found.drawn}) == 3


def test_the_command_tells_what_they_cost_and_brought(
    domains: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, trace = write(tmp_path, moving(domains, rebalance=EVERY, drift=turns(20.0))), tmp_path / "t.json.gz"
    assert run(["simulate", str(path), "--json", "--draws", "1", "--timeline", str(trace)]) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["relayouts"]
    assert found["count"] + found["skipped"] == len(found["list"]) == 2
    assert found["moved_experts"] == sum(event["moved_experts"] for event in found["list"])
    moved = found["moved_bytes"]
    assert moved["nvlink"] == found["moved_experts"] * 3 * 2048 * 1024 * 2
    assert moved["nic"] == 0
    assert 0 < moved["copied"] < 0.3 * moved["nvlink"]  # few stay on their rank and change their slot
    assert found["pause_s_total"] == pytest.approx(sum(event["pause_s"] for event in found["list"]))
    assert found["balance_after"] < found["balance_before"]
    assert found["tag"] == "assumed"  # the preset's link rates are datasheet figures
    first = found["list"][0]
    gain_s = first["step_before_s"] - first["step_after_s"]
    assert first["break_even_steps"] == pytest.approx(first["pause_s"] / gain_s)
    change = result["metrics"]["duration_s"] / found["without"]["duration_s"] - 1
    assert found["change"]["duration_s"] == pytest.approx(change)
    # On one node every byte goes over the sender's and the receiver's own NVLink.
    assert sum(link["bytes"] for link in found["bytes_by_link"]) == pytest.approx(2 * moved["nvlink"])
    slots = EXPERTS // 8
    assert result["memory"]["ledger"]["relayout_staging"] == slots * 3 * 2048 * 1024 * 2
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    pauses = [event for event in events if event.get("name") == "re-layout"]
    assert len(pauses) == 2
    assert sum(event["dur"] for event in pauses) == pytest.approx(found["pause_s_total"] * 1e6, abs=2.0)
    assert run(["simulate", str(path), "--draws", "0"]) == 0
    printed = capsys.readouterr().out
    assert "With and without re-layouts (2)" in printed
    assert "experts" in printed
    assert "pays back after" in printed


def test_a_run_too_short_for_a_decision_says_so(
    domains: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, moving(domains, rebalance={}, requests=64))
    assert run(["simulate", str(path), "--draws", "0"]) == 0
    assert "no instance took 3000 steps" in capsys.readouterr().out


def test_without_new_placements_there_is_no_staging_and_no_key(
    domains: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, moving(domains, drift=turns(0.9), requests=64))
    assert run(["simulate", str(path), "--json", "--draws", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "relayouts" not in result
    assert "relayout_staging" not in result["memory"]["ledger"]


ROLES = {"prefill": {"gpus": 4}, "decode": {"gpus": 4}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"placement": {"rebalance": {"window_steps": 10, "interval_steps": 5}}}, "window_steps may be at most"),
        ({"placement": {"rebalance": {"mode": "async", "layers_per_chunk": 2}}}, "leave layers_per_chunk out"),
        ({"placement": {"rebalance": {"solver": "best"}}}, "unknown solver 'best'"),
        ({"routing": {"drift": {"points": [{"at_s": 1, "weights": [1, 0]}]}}}, "at_s of the points starts at 0"),
        ({"routing": {"drift": {"points": [{"at_s": 0, "weights": [1]}]}}}, "1 weights for 2 loads"),
        ({"routing": {"drift": {"points": [{"at_s": 0, "weights": [0, 0]}]}}}, "no prefill load has a weight"),
        ({"routing": {"drift": {"blocks": 2}}}, "blocks need block_s"),
        ({"routing": {"drift": {"blocks": 2, "block_s": 1}}}, "the load is one aggregate"),
        ({"routing": {"drift": turns(1.0), "holdout": {"by": "file"}}}, "would be missing from the drift"),
        ({"serving": {"roles": ROLES}, "parallel": None, "placement": {"rebalance": {}}}, "with serving.roles"),
        ({"serving": {"roles": ROLES}, "parallel": None, "routing": {"drift": turns(1.0)}}, "with serving.roles"),
        ({"faults": [{"kind": "jitter", "sigma": 0.1}], "placement": {"rebalance": {}}}, "together with faults"),
        (
            {
                "cluster": {"background": [{"kind": "stream", "gpus": [0], "to": [1], "bytes_per_s": 1e9}]},
                "placement": {"rebalance": {}},
            },
            "together with cluster.background",
        ),
        ({"policies": {"storage": "offload"}, "placement": {"rebalance": {}}}, "storage offload"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_modelled_is_refused_by_name(
    changes: dict[str, Any], says: str, domains: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = moving(domains, requests=64)
    for key, more in changes.items():
        data[key] = {**data[key], **more} if isinstance(data.get(key), dict) and isinstance(more, dict) else more
    fidelity = "des" if "background" in says else "table"
    assert run(["simulate", str(write(tmp_path, data)), "--draws", "0", "--fidelity", fidelity]) in (1, 2)
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


CHANGES = {"rebalance": {"rebalance": {}}, "drift": {"drift": turns(1.0)}, "mix": {"mix": "request"}}


def changed(data: dict[str, Any], what: str) -> dict[str, Any]:
    part = "placement" if what == "rebalance" else "routing"
    return {**data, part: {**data.get(part, {}), **CHANGES[what]}}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("command", [["tune", "--trials", "2"], ["place"]])
def test_commands_that_compare_plans_refuse_what_changes(
    what: str, command: list[str], domains: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, changed(moving(domains), what))
    assert run([command[0], str(path), *command[1:]]) == 2
    error = capsys.readouterr().err
    assert f"{'placement' if what == 'rebalance' else 'routing'}.{what}: {command[0]} does not model" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("what", CHANGES)
def test_training_knows_none_of_it(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["simulate", str(write(tmp_path, changed(training(), what)))]) == 2
    assert "training does not model" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["rebalance", "drift"])
def test_the_shared_links_of_des_are_not_for_runs_that_change(
    what: str, domains: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, changed(moving(domains, requests=64), what))
    assert run(["simulate", str(path), "--draws", "0", "--fidelity", "des"]) == 2
    assert "not modelled together with --fidelity des" in capsys.readouterr().err


def test_mutated_keys_are_read_or_refused_in_one_line(domains: list[str]) -> None:
    whole = {
        "rebalance": {"solver": "greedy", "window_steps": 5, "interval_steps": 9, "mode": "async", "min_gain": 0.1},
        "drift": {"points": [{"at_s": 0.0, "weights": [1, 0]}, {"at_s": 1.0, "weights": [0, 1]}], "repeat_s": 3.0},
    }
    read = 0
    for seed in range(150):
        changes = mutate(whole, random.Random(seed))
        data = moving(domains)
        data["placement"]["rebalance"], data["routing"]["drift"] = changes.get("rebalance"), changes.get("drift")
        try:
            scenario = Scenario.read(data, where="test")
            if scenario.routing.drift is not None:
                load_drift(scenario.routing.drift, [read_loads(Path(file)) for file in domains])
            read += 1
        except BadInput as error:
            assert "\n" not in error.line()
    assert 10 < read < 140
