"""`place --replica-choices`: which replica tokens go to, in time: what is charged, what is refused, what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim import cli
from moesim.engine.deployment import groundwork, solve
from moesim.engine.steptime import timed_choices
from moesim.network.choice import CHOICES, STALE
from moesim.spec.parallel import ParallelSpec
from moesim.spec.scenario import load_scenario
from placement import dispatch, steps
from tests.scenarios import small, write


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    scenario = load_scenario(write(tmp_path_factory.mktemp("timed"), small()))
    ground = groundwork(scenario)
    plan = solve(ground, "greedy", slots=96, parallel=ParallelSpec(attention_dp=8, ep=8), groups=1, loads=ground.fit)
    return timed_choices(ground, plan, ground.judge, [8, 128], draws=4, seed=1)


def test_every_choice_is_timed_on_the_same_routing(timed: list[Any]) -> None:
    for row in timed:
        assert list(row.step_s) == [*CHOICES, STALE]
        assert row.balance["lp"] < min(row.balance[name] for name in ("equal", "local_first", STALE))


def test_stale_lp_waits_for_nothing_but_its_map(timed: list[Any]) -> None:
    """On steps that scatter, it is behind `lp` in balance; it saves the exchange of counts and the solve."""
    few, many = timed
    assert few.balance[STALE] > many.balance[STALE] > many.balance["lp"]
    for row in timed:
        assert (row.step_s[STALE] < row.step_s["lp"]).all()


@pytest.fixture
def one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch size instead of four: what is priced does not depend on how many there are."""
    for module in (dispatch, steps):
        monkeypatch.setattr(module, "TOKENS_PER_RANK", (32,))


@pytest.fixture
def scenario(repo: Path, tmp_path: Path, one_size: None) -> Path:
    """DeepSeek-V3 with five of its 58 MoE layers: what is priced does not depend on how many there are."""
    bundled = json.loads((repo / "moesim/spec/models/deepseek-ai--DeepSeek-V3.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(bundled["config"] | {"num_hidden_layers": 8}))
    rng = np.random.default_rng(0)
    shared = rng.lognormal(0.0, 0.5, (5, 256))
    for name in ("d", "e"):
        counts = np.zeros((8, 256))
        counts[3:] = 1e4 * shared * rng.lognormal(0.0, 0.2, (5, 256))
        (tmp_path / f"{name}.json").write_text(json.dumps({"logical_count": counts.round().tolist()}))
    data = {
        "model": str(tmp_path / "config.json"),
        "cluster": {"system": "h200_sxm", "nodes": 4, "gpus_per_node": 8},
        "routing": {"loads": [{"file": f"{name}.json", "phase": "decode"} for name in ("d", "e")]},
        "parallel": {"attention_dp": 32, "ep": 32},
        "placement": {"solver": "greedy", "redundant_experts": 32},
        "serving": {"workload": {"isl": 10, "osl": 10, "requests": 1, "arrivals": {"concurrency": 1}}},
    }
    path = tmp_path / "scenario.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(["place", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_choices_that_a_profile_cannot_price_are_left_out_by_name(scenario: Path, capsys: Any) -> None:
    """The shipped profile holds no all-reduce over 32 GPUs, which a choice that waits for counts needs."""
    code, out, _ = run(capsys, str(scenario), "--replica-choices", "--json")
    told = json.loads(out)["replica_choices"]
    assert code == 0
    assert {name for row in told["rows"] for name in row["choices"]} == {"local_first", "equal", "round_robin", STALE}
    assert {one["choice"] for one in told["unpriced"]} == {"fewest_activated", "lp"}
    assert all("all_reduce" in one["reason"] for one in told["unpriced"])
    assert told["reference"] == "equal"


def test_the_table_has_every_choice_where_formulas_may_stand_in(scenario: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, str(scenario), "--replica-choices", "--set", "cost.extrapolate=allow")
    assert code == 0
    for word in ("local first", "round robin", "fewest activated", "stale lp", "which replica tokens go to"):
        assert word in out
    assert "not priced" not in out


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("--holdout", "0"), "held out"),
        (("--slots", "256"), "nothing to choose"),
    ],
)
def test_refusals(more: tuple[str, ...], what: str, scenario: Path, capsys: Any) -> None:
    code, _, err = run(capsys, str(scenario), "--replica-choices", *more)
    assert code == 2
    assert what in err
    assert len(err.strip().splitlines()) == 1


def test_loads_alone_give_no_times(scenario: Path, capsys: Any) -> None:
    folder = scenario.parent
    loads = ("--loads", str(folder / "d.json"), "--loads", str(folder / "e.json"))
    code, _, err = run(capsys, *loads, "--gpus", "32", "--slots", "288", "--replica-choices")
    assert (code, "serving scenario" in err) == (2, True)
