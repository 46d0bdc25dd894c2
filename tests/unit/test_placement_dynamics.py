"""When to lay experts out anew: what a run takes, what policies may know, what is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesim import cli
from moesim.errors import BadInput
from moesim.spec.plan import PlacementRequest
from moesim.spec.scenario import Scenario
from placement.dynamics.adaptive import MOST_LOST, Adaptive
from placement.dynamics.command import prices_of
from placement.dynamics.forecast import Forecast
from placement.dynamics.policies import Every, Never, SkiRental, Threshold
from placement.dynamics.series import Policy, Prices, run
from placement.dynamics.study import break_even, saving, study
from placement.migrate import fitter
from placement.problem import solve

RANKS, EXPERTS, SLOTS, LAYERS = 4, 16, 20, 3


def request() -> PlacementRequest:
    return PlacementRequest(
        loads=np.full((1, LAYERS, EXPERTS), 1.0 / EXPERTS),
        weights=np.ones(1),
        layer_ids=np.arange(LAYERS),
        absolute_layers=LAYERS,
        slots=SLOTS,
        ranks=RANKS,
    )


def start() -> np.ndarray:
    return solve(request(), "contiguous").placement.physical_to_logical


def prices(move_s: float, **more: float) -> Prices:
    return Prices(1e-3, move_s, move_s, np.zeros(RANKS, dtype=np.int64), **more)


def steady(steps: int, tokens: int = 4000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(EXPERTS, 0.5), LAYERS)
    return np.stack([[rng.multinomial(tokens, row) for row in share] for _ in range(steps)]).astype(float)


def policies(at: Prices) -> list[Policy]:
    fit = fitter(request(), RANKS)
    return [
        Never(),
        Every(5, fit),
        Every(5, fit, once=True),
        Threshold(fit, RANKS),
        SkiRental(at, RANKS),
        Adaptive(at, fit, RANKS),
        Adaptive(at, fit, RANKS, steps=40),
    ]


def test_a_run_adds_up_by_hand() -> None:
    at = Prices(2.0, 7.0, 7.0, np.zeros(2, dtype=np.int64), solve_s=0.25, other_s=10.0)
    asked = PlacementRequest(np.full((1, 1, 4), 0.25), np.ones(1), np.arange(1), 1, 4, 2)
    counts = np.asarray([[[5.0, 3.0, 1.0, 1.0]]] * 3)
    found = run(Every(1, fitter(asked, 2)), counts, np.asarray([[0, 1, 2, 3]]), at)
    # 8 tokens on the hottest rank, then one expert goes each way (7 s, side by side) and 6 remain.
    assert found.step_s.tolist() == [26.0, 22.0, 22.0]
    assert found.move_s.tolist() == [0.0, 7.0, 0.0]
    assert found.moved.tolist() == [0, 2, 0]
    assert found.solve_s.tolist() == [0.0, 0.25, 0.25]
    assert found.relayouts == 1


@pytest.mark.parametrize("index", range(7))
def test_no_policy_looks_at_the_step_it_chooses_for_or_later(index: int) -> None:
    counts, at = steady(40), prices(0.05)
    other = counts.copy()
    other[20:] = other[20:, :, ::-1]
    first, second = (run(policies(at)[index], one, start(), at) for one in (counts, other))
    assert np.array_equal(first.moved[:21], second.moved[:21])
    assert first.by_step_s[:20] == pytest.approx(second.by_step_s[:20])


def test_never_pays_nothing_and_once_moves_once() -> None:
    counts, at = steady(40), prices(0.05)
    never, every, once = (run(policy, counts, start(), at) for policy in policies(at)[:3])
    assert never.moved.sum() == 0
    assert (once.relayouts, every.relayouts) == (1, 7)
    assert np.flatnonzero(once.moved).tolist() == [5]


def test_the_threshold_acts_on_a_change_and_rests_after_it() -> None:
    counts = np.concatenate([steady(60, 100_000, seed=1), steady(60, 100_000, seed=2)])
    at = prices(0.0)
    acted = np.flatnonzero(run(policies(at)[3], counts, start(), at).moved)
    assert (np.diff(acted) > 10).all()
    assert len(acted) <= 4
    assert ((acted > 60) & (acted <= 75)).any()


def test_gains_of_steady_loads_hold_for_half_the_time_seen() -> None:
    counts, at = steady(41, 1_000_000), prices(1e9)
    policy = Adaptive(at, fitter(request(), RANKS), RANKS, steps=41)
    run(policy, counts, start(), at)
    assert policy.held()[0] == pytest.approx(20.5, rel=0.1)
    assert policy.peak()[0] == pytest.approx(40.0, rel=0.1)


def test_gains_that_are_noise_are_not_believed() -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(200, np.full(EXPERTS, 1 / EXPERTS), (100, LAYERS)).astype(float)
    at = prices(0.02)
    runs = {policy.name: run(policy, counts, start(), at) for policy in policies(at)}
    assert runs["adaptive"].moved[30:].sum() < 0.1 * runs["ski rental"].moved[30:].sum()
    assert runs["adaptive"].total_s <= 1.02 * runs["never"].total_s


@pytest.mark.parametrize("move_s", [0.0, 0.01, 0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("solve_s", [0.0, 0.05])
def test_where_the_end_is_unknown_never_is_lost_by_two_hundredths_at_most(move_s: float, solve_s: float) -> None:
    counts, at = steady(80), prices(move_s, solve_s=solve_s)
    never, mine = run(Never(), counts, start(), at), run(policies(at)[5], counts, start(), at)
    assert (
        mine.by_step_s.cumsum() <= (1.0 + MOST_LOST) * never.by_step_s.cumsum() + never.by_step_s.max() * 0.05
    ).all()


def test_the_forecast_takes_long_windows_for_noise_and_short_ones_for_drift() -> None:
    noise = steady(64, 300)
    found = _forecast(noise)
    assert np.allclose(found, noise[-32:].mean(axis=0))
    walk = np.arange(64.0)[:, None, None] * np.ones((1, LAYERS, EXPERTS)) + 1.0
    assert np.allclose(_forecast(walk), walk[-1])


def _forecast(counts: np.ndarray) -> np.ndarray:
    forecast = Forecast()
    for step in range(1, len(counts) + 1):
        found = forecast.next_steps(counts[:step], 1.0)
    return found


def test_break_even_is_the_step_after_which_nothing_is_owed() -> None:
    base = np.ones(6)
    assert break_even(base, np.asarray([1.0, 3.0, 0.5, 0.5, 0.5, 0.5])) == 6
    assert break_even(base, base) == 1
    assert break_even(base, base + 0.1) is None
    figure = saving(base, 0.75 * base, np.random.default_rng(0))
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.25, 0.25, 0.25))


def test_verdicts() -> None:
    def told(counts: np.ndarray, move_s: float):
        return study(counts, request(), start(), prices(move_s), length_known=True)

    even = np.random.default_rng(0).multinomial(100_000, np.full(EXPERTS, 1 / EXPERTS), (60, LAYERS)).astype(float)
    balanced = solve(request(), "contiguous").placement.physical_to_logical
    free_of_gain = study(even[:, :, :], _without_replicas(), balanced[:, :EXPERTS], prices(0.01), length_known=True)
    assert free_of_gain.verdict.code in ("dont", "tie")
    dear = told(steady(60), 1e6)
    assert dear.verdict.code == "dont"
    assert "moving costs more" in dear.verdict.text
    cheap = told(steady(60, 1_000_000), 0.1)
    assert cheap.verdict.code == "gain"
    assert cheap.hindsight_s <= cheap.runs["adaptive"].total_s * (1 + 1e-9)
    assert cheap.break_even is not None


def _without_replicas() -> PlacementRequest:
    return PlacementRequest(
        np.full((1, LAYERS, EXPERTS), 1 / EXPERTS), np.ones(1), np.arange(LAYERS), LAYERS, EXPERTS, RANKS
    )


def test_a_current_placement_must_fit() -> None:
    current = solve(request(), "contiguous").placement
    with pytest.raises(BadInput, match="as many slots"):
        PlacementRequest(
            np.full((1, LAYERS, EXPERTS), 1 / EXPERTS), np.ones(1), np.arange(LAYERS), LAYERS, 24, RANKS,
            current=current,
        )  # fmt: skip


@pytest.fixture
def series(tmp_path: Path) -> list[str]:
    path = tmp_path / "series.npz"
    np.savez(path, counts=steady(40, 100_000))
    return ["place", "--loads", str(path), "--gpus", "4", "--slots", "20"]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


PRICED = ["--drift", "--token-s", "1e-7", "--move-s", "1e-4"]


def test_drift_prints_one_object_or_a_table(series: list[str], capsys) -> None:
    code, said, _ = call(capsys, *series, *PRICED, "--json")
    report = json.loads(said)
    assert code == 0
    assert set(report["policies"]) >= {"never", "every 1", "every 25", "threshold", "ski rental", "adaptive"}
    assert report["verdict"]["code"] == "gain"
    never, mine = report["policies"]["never"], report["policies"]["adaptive"]
    assert report["saved"]["value"] == pytest.approx(1 - mine["total_s"] / never["total_s"])
    assert mine["total_s"] == pytest.approx(mine["steps_s"] + mine["moves_s"] + mine["solves_s"])
    code, said, _ = call(capsys, *series, *PRICED, "--length-known")
    assert code == 0
    assert "Re-layout pays" in said


def test_incremental_keeps_what_stands(series: list[str], capsys, tmp_path: Path) -> None:
    out = tmp_path / "map.json"
    call(capsys, *series, "--out", str(out))
    again = tmp_path / "again.json"
    arguments = ["--solver", "incremental", "--current", str(out), "--out", str(again), "--json"]
    code, said, _ = call(capsys, *series, *arguments)
    assert code == 0
    assert json.loads(said)["solver"] == "incremental"
    maps = [json.loads(path.read_text())["physical_to_logical"] for path in (out, again)]
    assert maps[0] == maps[1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--drift"], "--token-s and --move-s"),
        (["--drift", "--token-s", "1e-7"], "--token-s and --move-s"),
        (["--drift", "--token-s", "-1", "--move-s", "1"], "0 or more"),
        (["--drift", "--token-s", "1", "--move-s", "nan"], "0 or more"),
        ([*PRICED, "--out", "map.json"], "writes no map"),
        ([*PRICED, "--current", "nowhere.json"], "nowhere.json"),
        ([*PRICED, "--groups", "4", "--nodes", "2"], "--current"),
    ],
)
def test_bad_input_is_one_line(series: list[str], capsys, arguments: list[str], text: str) -> None:
    code, said, error = call(capsys, *series, *arguments, "--json")
    assert (code, said) == (2, "")
    assert error.count("\n") == 1
    assert text in error


def test_one_snapshot_is_no_series(tmp_path: Path, capsys) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"logical_count": np.ones((2, 16)).tolist()}))
    code, _, error = call(capsys, "place", "--loads", str(path), "--gpus", "4", "--slots", "16", *PRICED)
    assert code == 2
    assert "no series" in error


def test_a_scenario_prices_steps_and_both_kinds_of_links() -> None:
    scenario = Scenario.model_validate(
        {
            "model": "deepseek-ai/DeepSeek-V3",
            "cluster": {"system": "h200_sxm", "nodes": 4, "gpus_per_node": 8},
            "cost": {"source": "roofline"},
            "routing": {"synthetic": {"kind": "deepseek_like"}},
            "parallel": {"attention_dp": 32, "ep": 32},
            "placement": {"redundant_experts": 32},
            "serving": {"workload": {"isl": 2000, "osl": 256, "requests": 10, "arrivals": {"concurrency": 4}}},
        }
    )
    share = np.random.default_rng(0).dirichlet(np.full(256, 2.0), 58)
    counts = np.repeat(share[None] * 32 * 512 * 8, 20, axis=0)
    asked = PlacementRequest(share[None], np.ones(1), np.arange(3, 61), 61, 288, 32)
    table = solve(asked, "contiguous").placement.physical_to_logical
    found = prices_of(scenario, asked, counts, table)
    assert found.domain.tolist() == [rank // 8 for rank in range(32)]
    expert_bytes = 3 * 7168 * 2048  # fp8
    assert expert_bytes / 900e9 < found.near_s < found.far_s < expert_bytes / 25e9
    assert found.token_s > 0.0
    assert found.other_s > 0.0
    with pytest.raises(BadInput, match="training"):
        prices_of(scenario.model_copy(update={"serving": None}), asked, counts, table)
