"""Calibration on synthetic benchmark files with planted host times: found again, judged, kept, used, refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim.cli import run
from moesim.engine.deployment import groundwork, resolve
from moesim.engine.host_times import with_host_times
from moesim.engine.serving import Served, serve
from moesim.engine.simulate import make_load
from moesim.engine.stepmodel import StepModel
from moesim.spec.scenario import load_scenario
from tests import bench_writers as written
from tests.scenarios import small
from tests.scenarios import write as write_scenario
from validate.calibrate.bench_files import read_runs
from validate.calibrate.bench_run import BenchRun, closed_loop_starts
from validate.calibrate.command import told
from validate.calibrate.fit import fit
from validate.calibrate.path import own_path
from validate.calibrate.run import (
    DONT,
    USE,
    calibrate,
    errors_of,
    load_note,
    parts,
    under_way,
    verdict_text,
    worse_note,
)
from validate.calibrate.sim import Simulated, deployment_for

PLANTED = {"request_s": 0.03, "step_s": 1.2e-3, "layer_s": 80e-6}
WHOLE = bool(os.environ.get("MOESIM_WHOLE"))
LENGTHS = {"isl": 1500, "osl": 64, "range_ratio": 0.3}


def scenario(
    folder: Path, engine: str = "sglang", overheads: Any = None, workload: Any = None, system: str = "h200_sxm"
) -> Path:
    data = small(engine={"name": engine, "version": "0.5.14"})
    data["cluster"]["system"] = system
    if overheads is not None:
        data["cost"]["overheads"] = overheads
    if workload is not None:
        data["serving"]["workload"] = workload
    return write_scenario(folder, data, f"{engine}{'-planted' if overheads else ''}.yaml")


def planted(
    folder: Path, engine: str, workload: Any, seed: int, overheads: Any = None, system: str = "h200_sxm"
) -> Served:
    """A run of the product's own serving loop with host times that the calibration is not told; seed: of requests."""
    spec = load_scenario(scenario(folder, engine, overheads or PLANTED, workload, system))
    deployment = resolve(groundwork(spec))
    model = StepModel(deployment, seed=spec.seed)
    load = replace(make_load(deployment, seed), front_end_s=deployment.rules.request.seconds)
    return serve(
        load, model.limits, ranks=deployment.setup.parallel.attention_dp, instances=deployment.instances,
        step_time=model.under(None),
    )  # fmt: skip


def files(
    folder: Path, form: str, requests: int, loads: tuple[int, ...] = (4, 32, 8, 64), *, first: int = 0, **more: Any
) -> list[Path]:
    """Benchmark results at several loads; AIPerf's of an open loop, the others' of closed ones."""
    rng, found = np.random.default_rng(5), []
    for seed, load in enumerate(loads, first):
        arrivals: Any = {"poisson": {"requests_per_s": 4 * load}} if form == "aiperf" else {"concurrency": load}
        served = planted(folder, engine_of(form), {**LENGTHS, "requests": requests, "arrivals": arrivals}, seed, **more)
        client = written.client_of(served, rng, end_s=0.0 if form == "sglang" else 0.5e-3)
        content: Any = written.aiperf(client)
        if form != "aiperf":
            content = {"vllm": written.vllm, "sglang": written.sglang}[form](client, concurrency=load)
        found.append(written.write(folder / f"{form}{load}.json", content))
    return found


def engine_of(form: str) -> str:
    return "vllm" if form == "vllm" else "sglang"


def recovered(
    folder: Path,
    form: str,
    requests: int,
    loads: tuple[int, ...],
    overheads: dict[str, float],
) -> None:
    """Host times are found again from all files, and help on the runs that were held out."""
    paths = files(folder, form, requests, loads, overheads=overheads)
    found = calibrate(load_scenario(scenario(folder, engine_of(form))), paths, seed=0)
    for name, value in overheads.items():
        error, low, high = (
            one / value - 1 for one in (found.whole.values[name], found.whole.low[name], found.whole.high[name])
        )
        print(f"{form} {name}: planted {value:.4g}, found {error:+.2%} ({low:+.2%} to {high:+.2%})")
        assert abs(error) < 0.02
        assert low - (high - low) < 0 < high + (high - low)  # a 90 % interval, three times as wide
    assert found.verdict == USE
    assert not found.whole.kept
    assert found.whole.on_path
    for metric in ("ttft_s", "tpot_s"):
        assert found.after[metric]["mape"] < 0.25 * found.before[metric]["mape"]


def test_planted_host_times_are_found_again(tmp_path: Path) -> None:
    """Within 2 %."""
    planted_s = {"request_s": 0.03, "step_s": 3e-3, "layer_s": 4e-4}
    recovered(tmp_path, "aiperf", 120, (4, 12, 20), planted_s)


def test_a_server_with_other_kernels_is_off_the_path(tmp_path: Path) -> None:
    """Another GPU's server: no host times make the simulation form its batches, and the fit by means stays."""
    paths = files(tmp_path, "aiperf", 60, (4, 12), system="h100_sxm")
    runs = [one for path in paths for one in read_runs(path)]
    simulated = Simulated(deployment_for(load_scenario(scenario(tmp_path)), runs), 0)
    use = [np.ones(one.requests, dtype=bool) for one in runs]
    found = fit(simulated, runs, use, names=("request_s", "step_s"), start=simulated.now, seed=0)
    assert not found.on_path
    # Its steps take longer than those of the scenario's GPU, which ends up in what is between them.
    assert found.values["step_s"] > PLANTED["step_s"]
    assert found.low["step_s"] < found.values["step_s"] < found.high["step_s"]


def test_means_leave_a_place_where_single_simulations_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these runs single simulations find nothing better 59 % below the planted time of a layer."""
    monkeypatch.setattr("validate.calibrate.fit.own_path", lambda *given: None)
    runs = [one for path in files(tmp_path, "aiperf", 160, first=10) for one in read_runs(path)]
    simulated = Simulated(deployment_for(load_scenario(scenario(tmp_path)), runs), 0)
    found = fit(simulated, runs, [np.ones(160, dtype=bool)] * 4, start=simulated.now, seed=0)
    assert found.values["layer_s"] == pytest.approx(PLANTED["layer_s"], rel=0.25)
    assert found.values["step_s"] == pytest.approx(PLANTED["step_s"], rel=0.02)


def test_a_path_is_looked_for_in_runs_that_tell_their_times(tmp_path: Path) -> None:
    workload = {**LENGTHS, "requests": 60, "arrivals": {"poisson": {"requests_per_s": 20}}}
    client = written.client_of(planted(tmp_path, "sglang", workload, 3), np.random.default_rng(1))
    runs = read_runs(written.write(tmp_path / "open.jsonl", written.sglang(client, concurrency=None, rate=20.0)))
    simulated = Simulated(deployment_for(load_scenario(scenario(tmp_path)), runs), 0)
    ends = {"request_s": 0.02}, {"request_s": 0.04}
    assert own_path(simulated, runs, [np.ones(60, dtype=bool)], {"request_s": 0.03}, *ends, [], 0) is None
    assert simulated.count == 0


@pytest.mark.skipif(not WHOLE, reason="eight minutes: MOESIM_WHOLE=1")
@pytest.mark.parametrize("form", ["vllm", "sglang", "aiperf"])
@pytest.mark.parametrize("larger", [1.0, 2.5])
def test_small_ones_are_found_again_in_each_format(form: str, larger: float, tmp_path: Path) -> None:
    """All within 2 %: a millisecond of a prompt's step, hidden by batches that form by chance."""
    planted_s = {name: larger * value for name, value in PLANTED.items()}
    recovered(tmp_path, form, 500, (4, 32, 8, 64), planted_s)


def test_the_three_formats_tell_the_same_run(tmp_path: Path) -> None:
    """One client's view, written three ways, reads as the same requests at the same times."""
    workload = {**LENGTHS, "requests": 60, "arrivals": {"concurrency": 7}}
    client = written.client_of(planted(tmp_path, "sglang", workload, 0), np.random.default_rng(0), end_s=0.0)
    runs: dict[str, Any] = {
        "vllm": written.vllm(client, concurrency=7),
        "sglang": written.sglang(client, concurrency=7),
        "aiperf": written.aiperf(client),
    }
    one, other, third = (read_runs(written.write(tmp_path / f"{name}.json", data))[0] for name, data in runs.items())
    assert [each.format for each in (one, other, third)] == list(runs)
    assert one.start_s is not None
    for read in (other, third):
        assert read.start_s is not None
        # SGLang's file tells no times: they follow from the loop. AIPerf's are whole nanoseconds.
        np.testing.assert_allclose(read.start_s, one.start_s, atol=2e-9)
        order = np.lexsort((read.isl, read.start_s.round(6))), np.lexsort((one.isl, one.start_s.round(6)))
        for field in ("isl", "osl", "ttft_s", "decode_s"):
            np.testing.assert_allclose(getattr(read, field)[order[0]], getattr(one, field)[order[1]], rtol=1e-6)
    assert other.told["engine_version"] == "0.5.14"
    assert other.sent == "7 at a time"


def test_starts_of_a_closed_loop_by_hand() -> None:
    starts = closed_loop_starts(np.asarray([5.0, 2.0, 1.0, 4.0, 1.0]), 2)
    assert starts.tolist() == [0.0, 0.0, 2.0, 3.0, 5.0]
    assert closed_loop_starts(np.asarray([1.0, 1.0]), 9).tolist() == [0.0, 0.0]


def test_a_rate_without_times_is_fitted_by_quantiles(tmp_path: Path) -> None:
    workload = {**LENGTHS, "requests": 60, "arrivals": {"poisson": {"requests_per_s": 20}}}
    client = written.client_of(planted(tmp_path, "sglang", workload, 3), np.random.default_rng(1))
    path = written.write(tmp_path / "open.jsonl", written.sglang(client, concurrency=None, rate=20.0))
    found = calibrate(load_scenario(scenario(tmp_path)), [path], names=("request_s",), seed=0)
    assert "times drawn" in found.runs[0].sent
    assert found.verdict == USE
    # What steps and layers take stays where it was: their share of a prompt's step goes to the request.
    assert 0.03 < found.whole.values["request_s"] < 0.04
    assert any("quantiles" in note for note in found.notes)


def test_what_cannot_be_told_apart_is_not_fitted(tmp_path: Path, capsys: Any) -> None:
    """Prompts of one length that never meet: a layer's time and a request's move every TTFT alike."""
    workload = {"isl": 800, "osl": 12, "requests": 60, "arrivals": {"poisson": {"requests_per_s": 2}}}
    client = written.client_of(planted(tmp_path, "sglang", workload, 0), np.random.default_rng(0))
    path = written.write(tmp_path / "alone.json", written.vllm(client, concurrency=None, rate=2.0, backend="x"))
    found = calibrate(load_scenario(scenario(tmp_path)), [path], seed=0)
    assert list(found.whole.kept) == ["layer_s"]
    assert "do not tell it from request_s" in found.whole.kept["layer_s"]
    assert set(found.whole.low) == {"request_s", "step_s"}
    asked = ["--fit", "request_s", "--fit", "layer_s", "--out", str(tmp_path / "x.yaml")]
    code = run(["validate", "calibrate", str(scenario(tmp_path)), "--bench", str(path), *asked])
    printed = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert printed[-1].startswith("error: --fit: layer_s cannot be fitted")
    assert not (tmp_path / "x.yaml").exists()


def test_nothing_planted_is_told_to_leave_be(tmp_path: Path, capsys: Any) -> None:
    """Runs that the scenario foretells as it is: the verdict is don't, nothing is written, and the exit code is 0."""
    as_it_is = {"request_s": 0.0, "step_s": 0.5e-3, "layer_s": 20e-6}
    given = [
        part for path in files(tmp_path, "vllm", 60, (8, 24), overheads=as_it_is) for part in ("--bench", str(path))
    ]
    out = tmp_path / "out.yaml"
    plain = str(scenario(tmp_path, "vllm"))
    step = ["--set", "cost.overheads.step_s=0.0005"]
    code = run(["validate", "calibrate", plain, *given, *step, "--fit", "step_s", "--out", str(out), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == 0
    assert told["verdict"]["code"] == DONT
    assert told["verdict"]["text"].startswith("don't")
    assert told["out"] is None
    assert not out.exists()


def test_the_file_is_kept_and_used(tmp_path: Path, capsys: Any) -> None:
    paths = files(tmp_path, "vllm", 60, (8, 24))
    out, plain = tmp_path / "kept" / "overheads.yaml", scenario(tmp_path, "vllm")
    given = [part for path in paths for part in ("--bench", str(path))]
    assert run(["validate", "calibrate", str(plain), *given, "--fit", "request_s", "--fit", "step_s",
                "--out", str(out)]) == 0  # fmt: skip
    assert "use them" in capsys.readouterr().out
    kept = yaml.safe_load(out.read_text())
    assert kept["engine"] == {"name": "vllm", "version": "0.5.14"}
    assert [len(one["sha256"]) for one in kept["sources"]] == [64, 64]
    assert kept["sources"][0]["where"] == paths[0].name
    assert set(kept["overheads"]) == {"request_s", "step_s"}
    assert kept["held_out"]["by"] == "run"
    told = simulated(plain, capsys, "--set", f"cost.overheads={out}")
    before = simulated(plain, capsys)
    assert told["overheads"]["step_s"]["tag"] == "measured"
    assert told["overheads"]["layer_s"] == before["overheads"]["layer_s"]
    assert told["overheads"]["step_s"]["rel_sigma"] < 0.1 < before["overheads"]["step_s"]["rel_sigma"]
    later_s = told["metrics"]["ttft_s"]["mean"] - before["metrics"]["ttft_s"]["mean"]
    assert later_s > 0.9 * kept["overheads"]["request_s"]["value"]
    assert "measured" in told["provenance"]

    def width(one: dict[str, Any]) -> float:
        """Of the interval, in proportion: steps are longer with the host's time in them."""
        interval = one["intervals"]["tpot_s"]
        return float((interval["high"] - interval["low"]) / one["metrics"]["tpot_s"]["mean"])

    assert width(told) < width(before)
    # On another version they are no measurement any more; of another engine they are refused.
    other = simulated(plain, capsys, "--set", f"cost.overheads={out}", "--set", "engine.version=9.0.1")
    assert other["overheads"]["step_s"]["tag"] == "extrapolated"
    code = run(["simulate", str(plain), "--set", f"cost.overheads={out}", "--set", "engine.name=sglang"])
    assert code == 2
    assert "these overheads are of vllm" in capsys.readouterr().err


def simulated(path: Path, capsys: Any, *more: str) -> dict[str, Any]:
    assert run(["simulate", str(path), "--json", "--draws", "8", "--set", "serving.workload.requests=40", *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_given_overheads_count_as_assumed(tmp_path: Path, capsys: Any) -> None:
    told = simulated(scenario(tmp_path), capsys, "--set", "cost.overheads.request_s=0.25")
    assert told["overheads"]["request_s"] == {
        "value_s": 0.25, "rel_sigma": 0.5, "tag": "assumed", "source": "scenario",
    }  # fmt: skip
    assert told["metrics"]["ttft_s"]["mean"] > 0.25


def test_other_host_times_share_the_prices(tmp_path: Path) -> None:
    """A model with other host times times steps as one built with them does."""
    spec = load_scenario(scenario(tmp_path, "vllm"))
    model = StepModel(resolve(groundwork(spec)), seed=0)
    other = resolve(groundwork(load_scenario(scenario(tmp_path, "vllm", PLANTED))))
    built, shared = StepModel(other, seed=0).under(None), with_host_times(model, other.rules).under(None)
    for kind in ("decode", "prefill"):
        np.testing.assert_array_equal(built.table(kind).seconds, shared.table(kind).seconds)
        assert (built.table(kind).seconds > model.under(None).table(kind).seconds).all()
    assert shared.graphs_taken().eager_layer_s == PLANTED["layer_s"]


def test_one_load_and_errors_that_rise_are_said(tmp_path: Path) -> None:
    """Of one load a note says that it tells little; of another engine's prices, that an error rose."""
    one = calibrate(load_scenario(scenario(tmp_path, "vllm")), files(tmp_path, "vllm", 40, (8,)), seed=0)
    assert any("at one load" in note for note in one.notes)
    alone = calibrate(
        load_scenario(scenario(tmp_path, "vllm")), files(tmp_path, "vllm", 40, (8,)), names=("step_s",), seed=0
    )
    assert not any("at one load" in note for note in alone.notes)
    two = calibrate(load_scenario(scenario(tmp_path, "vllm")), files(tmp_path, "vllm", 40, (4, 16)), seed=0)
    assert not any("at one load" in note for note in two.notes)
    rates = [
        BenchRun("x", "x", *[np.full(20, 9)] * 2, np.full(20, 0.1), np.full(20, 0.9), None, "x", requests_per_s=rate)
        for rate in (2.0, 2.5, 8.0)
    ]
    assert [under_way(one) for one in rates] == pytest.approx([2.0, 2.5, 8.0])  # a second each
    assert load_note(rates[:2], one.whole) and not load_note(rates, one.whole)
    assert worse_note(two.after, {name: {"mape": error["mape"] + 0.009} for name, error in two.after.items()}) == []
    risen = [two.before | {"ttft_s": {"mape": 0.1, "bias": 0.0}}, two.after | {"ttft_s": {"mape": 0.2, "bias": 0.0}}]
    assert worse_note(*risen) == [
        "TTFT errors on what was held out rise from 10.0% to 20.0%: something else is off, such as the engine or the "
        "prices of its kernels"
    ]
    assert verdict_text(replace(two, gain=(-0.078, -0.09, -0.02))).startswith(
        "don't: the error on what was held out rises by 7.8 points (2.0 to 9.0)"
    )
    told_of = told(replace(two, whole=replace(two.whole, values={**two.whole.values, "step_s": 1e-14})), tmp_path)
    assert "e-" not in told_of


def test_held_out_parts_and_errors_by_hand(tmp_path: Path) -> None:
    path = files(tmp_path, "vllm", 40, (8,))[0]
    one = read_runs(path)[0]
    fitted, held, by = parts([one])
    assert by == "time block"
    assert np.array_equal(fitted[0], ~held[0])
    assert held[0].tolist() == [at * 8 // 40 % 2 == 1 for at in range(40)]
    _, apart, by = parts([one, one, one])
    assert by == "run"
    assert [bool(flags.all()) for flags in apart] == [False, True, False]
    simulated = Simulated(deployment_for(load_scenario(scenario(tmp_path, "vllm")), [one]), 0)
    seen = simulated.see([one], simulated.now)
    told = errors_of([one], seen, held)
    wanted = seen[0].ttft_s[0][held[0]] / one.ttft_s[held[0]] - 1
    assert told["ttft_s"]["mape"] == pytest.approx(np.abs(wanted).mean())
    bias = seen[0].ttft_s[0][held[0]].mean() / one.ttft_s[held[0]].mean() - 1
    assert told["ttft_s"]["bias"] == pytest.approx(bias)


def test_a_front_end_delays_the_queue_and_counts_as_waiting(tmp_path: Path) -> None:
    """One request at a time: TTFT grows by exactly the front end's time, and so does the time to the next request."""
    found = {}
    for request_s in (0.0, 0.5):
        workload = {"isl": 64, "osl": 4, "requests": 5, "arrivals": {"concurrency": 1}}
        found[request_s] = planted(tmp_path, "sglang", workload, 0, {"request_s": request_s or 1e-12})
    plain, late = found[0.0], found[0.5]
    np.testing.assert_allclose(late.first_token_s - late.arrival_s, plain.first_token_s - plain.arrival_s + 0.5)
    np.testing.assert_allclose(np.diff(late.arrival_s), np.diff(plain.arrival_s) + 0.5)


def test_a_run_tells_its_token_times_and_how_many_are_under_way() -> None:
    lengths = np.asarray([1, 2, 3, 4])
    ttft_s, decode_s, start_s = np.ones(4), np.asarray([0.0, 1.0, 1.0, 1.5]), np.asarray([0.0, 0.0, 1.0, 2.0])
    one = BenchRun("vllm", "x", lengths, lengths, ttft_s, decode_s, start_s, "x")
    assert np.isnan(one.tpot_s[0])
    assert one.tpot_s[1:].tolist() == [1.0, 0.5, 0.5]
    assert one.in_flight == round(7.5 / 4.5)
    drawn = BenchRun("vllm", "x", lengths, lengths, ttft_s, decode_s, None, "x", requests_per_s=2.0)
    assert not drawn.paired
    load = drawn.load(np.random.default_rng(0))
    assert load.arrival_s is not None
    assert load.arrival_s[-1] == pytest.approx(2.0)
