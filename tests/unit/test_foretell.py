"""Loads of workloads that were described and not measured: how they are made, where they count, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.cli import run
from moesim.engine.deployment import groundwork
from moesim.errors import BadInput
from moesim.routing.foretell import Described, Expected, expecting, fit_expecting, foretold, leave_out, powers
from moesim.routing.trace import RoutingCounts
from moesim.spec.scenario import ExpectedWorkload, ExpectSpec, Scenario
from tests.scenarios import small, write

LAYERS, EXPERTS = 16, 64
EXPECT = Expected.of(ExpectSpec(workloads=(ExpectedWorkload(phase="prefill", prompt_tokens=8192),)), 8)


def load(name: str, shares: np.ndarray, phase: str, tokens: float | None, weight: float = 1.0) -> RoutingCounts:
    return RoutingCounts(1e6 * shares[None], np.arange(LAYERS), LAYERS, name, phase, weight, prompt_tokens=tokens)


def on_a_line(tokens: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Shares whose logarithms lie on a line over the logarithm of the length."""
    base, slope = np.random.default_rng(1).normal(size=(2, LAYERS, EXPERTS))
    logs = 0.5 * base + 0.2 * slope * np.log2(tokens / 1024)
    shares = np.exp(logs + noise * np.random.default_rng(seed).normal(size=logs.shape))
    return np.asarray(shares / shares.sum(axis=-1, keepdims=True))


def prefills(*tokens: float) -> list[RoutingCounts]:
    return [load(f"in{one:g}", on_a_line(one), "prefill", one) for one in tokens]


@given(
    known=st.lists(
        st.tuples(st.sampled_from(["prefill", "decode", "any"]), st.none() | st.floats(1, 1e6)), min_size=1, max_size=8
    ),
    tokens=st.none() | st.floats(1, 1e6),
    data=st.data(),
)
def test_powers_sum_to_one_and_follow_the_descriptions(
    known: list[tuple[str, float | None]], tokens: float | None, data: st.DataObject
) -> None:
    described = [Described(*one) for one in known]
    asked = Described(data.draw(st.sampled_from([one.phase for one in described])), tokens)
    found = powers(described, asked)
    assert found.sum() == pytest.approx(1.0) and np.isfinite(found).all()
    order = data.draw(st.permutations(range(len(known))))
    again = powers([described[index] for index in order], asked)
    np.testing.assert_allclose(again, found[list(order)], atol=1e-9)


def test_a_line_goes_on_beyond_the_measured_lengths() -> None:
    """From 512, 1,024 and 2,048 tokens to 8,192: towards it, and nearer than any file or their mean."""
    files, truth = prefills(512, 1024, 2048), on_a_line(8192)
    found = foretold(files, Described("prefill", 8192), 8)
    shares = np.stack([one.profile() for one in files])

    def apart(one: np.ndarray) -> float:
        return float(np.abs(one - truth).sum(axis=-1).mean())

    assert apart(found) < 0.5 * min(map(apart, shares))
    assert apart(found) < 0.4 * apart(shares.mean(axis=0))
    np.testing.assert_allclose(found.sum(axis=-1), 1.0)


def test_twins_are_averaged_and_a_lone_file_of_a_phase_stands_for_it() -> None:
    same = [load(name, on_a_line(1024, 0.3, seed), "prefill", 1024) for seed, name in enumerate("ab")]
    other = load("d", on_a_line(1024, 0.8, 9), "decode", 1000)
    assert powers([Described.of(one) for one in same], Described("prefill", 1024)) == pytest.approx([0.5, 0.5])
    found = powers([Described.of(one) for one in (*same, other)], Described("decode", 4000))
    assert found[2] > 0.85 and found[:2] == pytest.approx([found[0]] * 2)


def test_an_expert_that_counted_nothing_stays_near_nothing() -> None:
    files = prefills(512, 1024)
    for one in files:
        one.counts[:, :, 3] = 0.0
    assert foretold(files, Described("prefill", 2048), 8)[:, 3].max() < 0.1 / EXPERTS


def test_foretold_loads_have_their_share_of_the_weight() -> None:
    files = [replace(one, weight=weight) for one, weight in zip(prefills(512, 1024), (1.0, 3.0), strict=True)]
    found = expecting(files, Expected((Described("prefill", 2048), Described("prefill", 4096)), 0.6, 8))
    assert [one.name for one in found[2:]] == ["foretold: prefill of 2,048 tokens", "foretold: prefill of 4,096 tokens"]
    weights = np.asarray([one.weight for one in found])
    assert weights[2:].sum() / weights.sum() == pytest.approx(0.6)
    assert weights[:2].tolist() == [1.0, 3.0]


def test_a_judged_fit_is_told_of_what_it_is_judged_on() -> None:
    """Not of what the scenario expects, and of no phase that it has no file of."""
    files = prefills(512, 1024, 4096)
    told = fit_expecting(files[:2], files[2:], EXPECT)
    assert [one.name for one in told] == ["in512", "in1024", "foretold: prefill of 4,096 tokens"]
    np.testing.assert_allclose(told[2].profile(), foretold(files[:2], Described("prefill", 4096), 8))
    decode = load("d", on_a_line(1024, 0.5), "decode", 1000)
    assert fit_expecting(files, [decode], EXPECT) == tuple(files)
    assert fit_expecting(files, (), EXPECT)[-1].name == "foretold: prefill of 8,192 tokens"
    assert fit_expecting(files, [decode], None) == tuple(files)


def test_no_expert_is_picked_more_than_once_by_a_token() -> None:
    """However far the lengths go on: a share is at most one of the eight picks."""
    files = prefills(512, 1024, 2048)
    far = foretold(files, Described("prefill", 1e6), 8)
    assert far.max() == pytest.approx(1 / 8)
    np.testing.assert_allclose(far.sum(axis=-1), 1.0)
    assert foretold(files, Described("prefill", 1e6), 2).max() > 0.2
    assert (foretold(files, Described("prefill", 1e6), EXPERTS) == 1 / EXPERTS).all()  # every token picks every expert


def test_left_out_files_say_how_well_it_goes() -> None:
    files = [*prefills(512, 1024, 2048), load("d", on_a_line(1), "decode", None)]
    missed = {one.name: one for one in leave_out(files, 8)}
    assert set(missed) == {"in512", "in1024", "in2048"}  # nothing is like the one of decode
    assert all(one.foretold < 0.6 * one.mean and one.nearest > 0.0 for one in missed.values())


def test_a_phase_that_no_file_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no load is of the phase decode"):
        powers([Described("prefill", 512)], Described("decode", 512))
    data = scenario(tmp_path, {"workloads": [{"phase": "decode"}]})
    with pytest.raises(BadInput, match="no file under loads is of the phase decode"):
        Scenario.read(data, where="test")


def scenario(folder: Path, expect: dict[str, Any] | None) -> dict[str, Any]:
    loads = []
    for one in prefills(512, 1024, 2048):
        (folder / f"{one.name}.json").write_text(json.dumps({"logical_count": one.counts[0].tolist()}))
        loads.append({"file": str(folder / f"{one.name}.json"), "phase": "prefill", "prompt_tokens": one.prompt_tokens})
    routing = {"loads": loads, "holdout": {"by": "none"}} | ({} if expect is None else {"expect": expect})
    return small(routing=routing, placement={"solver": "greedy", "redundant_experts": 8})


FAR = {"workloads": [{"phase": "prefill", "prompt_tokens": 8192}]}


def test_a_foretold_load_is_fitted_to_and_nothing_else(tmp_path: Path) -> None:
    """What is simulated are the files: nobody has measured what was foretold."""
    ground = groundwork(Scenario.read(scenario(tmp_path, FAR), where="test"))
    assert [one.name for one in ground.fit][3:] == ["foretold: prefill of 8,192 tokens"]
    assert [one.name for one in ground.judge] == [one.name for one in ground.fit][:3]
    assert ground.judged_on_fit
    plain = groundwork(Scenario.read(scenario(tmp_path, None), where="test"))
    assert len(plain.fit) == 3
    held = scenario(tmp_path, FAR)
    held["routing"]["holdout"] = {"by": "file", "fraction": 0.34}
    told = groundwork(Scenario.read(held, where="test"))
    (judged,) = told.judge
    assert told.fit[-1].name == f"foretold: prefill of {judged.prompt_tokens:,.0f} tokens"


@pytest.mark.parametrize("solver", ["time", "robust"])
def test_long_prompts_are_placed_for_by_every_solver(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], solver: str
) -> None:
    path = write(tmp_path, scenario(tmp_path, {"workloads": [{"phase": "prefill", "prompt_tokens": 131072}]}))
    assert run(["place", str(path), "--solver", solver, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["expect"]["workloads"][0]["prompt_tokens"] == 131072


def test_files_of_one_name_are_files_of_their_own(tmp_path: Path) -> None:
    """prefill/counts.json and decode/counts.json: the fit of one is told of the other where it has its phase."""
    data = scenario(tmp_path, FAR)
    for place, one in enumerate(data["routing"]["loads"]):
        (tmp_path / str(place)).mkdir()
        one["file"] = str(Path(one["file"]).rename(tmp_path / str(place) / "counts.json"))
    data["routing"]["holdout"] = {"by": "file", "fraction": 0.34}
    ground = groundwork(Scenario.read(data, where="test"))
    assert ground.fit[-1].name == f"foretold: prefill of {ground.judge[0].prompt_tokens:,.0f} tokens"


def test_files_on_the_command_line_are_not_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, data := scenario(tmp_path, FAR))
    assert run(["place", str(path), "--loads", data["routing"]["loads"][0]["file"]]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--loads: nothing says what workloads these files are" in said


def test_a_gate_that_counts_picks_counts_no_foretold_ones(tmp_path: Path) -> None:
    models = []
    for expect in (None, FAR):
        data = scenario(tmp_path, expect) | {"policies": {"gate": {"name": "top_p", "threshold": 0.49}}}
        models.append(groundwork(Scenario.read(data, where="test")).model.moe.top_k)
    assert models[0] == models[1]


def test_place_is_better_on_the_workload_that_was_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A map for prompts of 8,192 tokens, from files of up to 2,048, against one for the files; and what is said."""
    from moesim.spec.placement_file import read_placement
    from placement.judge import balance

    truth, found = load("truth", on_a_line(8192), "prefill", 8192), {}
    for name, expect in (("told", FAR), ("plain", None)):
        out = tmp_path / f"{name}.json"
        assert run(["place", str(write(tmp_path, scenario(tmp_path, expect))), "--out", str(out), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["expect"] is None) == (expect is None)
        found[name] = balance(read_placement(out), [truth]).mean
    assert found["told"] < found["plain"] - 0.05
    assert run(["place", str(write(tmp_path, scenario(tmp_path, FAR)))]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Placed for prefill of 8,192 tokens: 60% of the fit's weight" in text and "Left out, a file lies" in text
