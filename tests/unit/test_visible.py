"""When clients see tokens, when ranks look at new requests, and lengths that are drawn: by hand on small runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.engine.batcher import Limits
from moesim.engine.serving import Load, Served, serve
from moesim.engine.visible import as_seen, with_pause
from moesim.engine.workload import lengths, make_load
from moesim.errors import BadInput
from moesim.spec.scenario import load_scenario
from moesim.spec.workload import WorkloadSpec
from tests.scenarios import small, write


def served(load: Load, *, poll_steps: int = 1, mixes: bool = False, instances: int = 1) -> Served:
    """Steps of one second each."""
    limits = Limits(max_tokens=64, max_running=8, kv_tokens=10_000, chunked=True, mixes=mixes, poll_steps=poll_steps)
    return serve(load, limits, ranks=1, instances=instances, step_time=lambda plan: 1.0)


def test_results_come_a_step_late_and_requests_wait_one() -> None:
    """Two requests of 3 tokens, one place: the second comes when the first ends, at 3 s."""
    run = served(Load(np.array([4, 4]), np.array([3, 3]), concurrency=1))
    assert run.first_token_s.tolist() == [1.0, 4.0]
    seen = as_seen(run, lag=True, front_end_s=0.25)
    # The first finds the engine idle; its token is sent when the next step ends. The second waits for one more step.
    assert (seen.first_token_s - run.first_token_s).tolist() == [1.25, 2.25]
    assert (seen.finish_s - seen.first_token_s).tolist() == (run.finish_s - run.first_token_s).tolist()
    plain = as_seen(run, lag=False, front_end_s=0.25)
    np.testing.assert_allclose(plain.first_token_s - run.first_token_s, 0.25)
    two = served(Load(np.array([4, 4]), np.array([3, 3]), arrival_s=np.zeros(2)), instances=2)
    with pytest.raises(BadInput, match="one instance"):
        as_seen(two, lag=True, front_end_s=0.0)


def test_ranks_look_at_new_requests_every_so_many_decode_steps() -> None:
    """One long request decodes; another comes at 2.5 s and is read at the next look, or at once."""
    load = Load(np.array([4, 4]), np.array([40, 2]), arrival_s=np.array([0.0, 2.5]))
    at_once, polled = served(load), served(load, poll_steps=10)
    assert at_once.first_token_s[1] == 4.0
    # Read at 0 s; the first look after that read is immediate (at 1 s), the next one ten decode steps later, at 11 s.
    assert polled.first_token_s[1] == 12.0
    idle = served(Load(np.array([4]), np.array([2]), arrival_s=np.array([2.5])), poll_steps=10)
    assert idle.first_token_s[0] == 3.5


def test_lengths_are_drawn_over_their_range(tmp_path: Path) -> None:
    asked = WorkloadSpec.model_validate(
        {"isl": 1000, "osl": 100, "requests": 4000, "range_ratio": 0.8, "arrivals": {"concurrency": 4}}
    )
    load = make_load(asked, seed=0)
    assert (load.isl.min(), load.isl.max()) == (800, 1000)
    assert (load.osl.min(), load.osl.max()) == (80, 100)
    assert load.isl.mean() == pytest.approx(lengths(asked).mean_isl, rel=0.01) == pytest.approx(900, rel=0.01)
    fixed = make_load(asked.model_copy(update={"range_ratio": 1.0}), seed=0)
    assert set(fixed.isl.tolist()) == {1000}
    with pytest.raises(BadInput, match="range_ratio"):
        data = small()
        data["serving"]["workload"] = {"file": "t.csv", "range_ratio": 0.5}
        load_scenario(write(tmp_path, data))


def test_a_pause_ends_the_first_full_step_later_and_moves_what_follows() -> None:
    """Prompts of 4, 64, 64 tokens one after the other, two tokens each, a second a step: the second prompt is full."""
    run = served(Load(np.array([4, 64, 64]), np.array([2, 2, 2]), concurrency=1))
    assert run.step_prefill_tokens.tolist() == [4, 0, 64, 0, 64, 0]
    paused = with_pause(run, 64, 10.0)
    assert paused.step_start_s.tolist() == [0, 1, 2, 13, 14, 15]  # the full step itself began when it did
    assert paused.arrival_s.tolist() == [0, 2, 14]
    assert paused.first_token_s.tolist() == [1, 13, 15]  # the second full step pauses nobody
    assert paused.finish_s.tolist() == [2, 14, 16]
    assert paused.duration_s == run.duration_s + 10.0 == 16.0
    assert paused.step_s.tolist() == run.step_s.tolist()
    assert paused.gaps_s.tolist() == run.gaps_s.tolist()
    first = with_pause(run, 4, 10.0)
    assert first.first_token_s.tolist() == [11, 13, 15]
    assert first.finish_s.tolist() == [12, 14, 16]
    assert with_pause(run, 65, 10.0) is run


def test_a_pause_leaves_requests_that_faults_lost_without_an_end() -> None:
    run = served(Load(np.array([64, 4]), np.array([2, 2]), concurrency=2))
    lost = replace(run, finish_s=np.array([run.finish_s[0], np.nan]))
    assert np.isnan(with_pause(lost, 64, 10.0).finish_s[1])


def test_a_pause_before_the_lag_of_results() -> None:
    """What clients see of a paused run: the pause, and the lag of the steps that follow it."""
    run = served(Load(np.array([64, 4]), np.array([3, 3]), concurrency=1))
    seen, plain = (as_seen(one, lag=True, front_end_s=0.0) for one in (with_pause(run, 64, 10.0), run))
    assert (seen.first_token_s - plain.first_token_s).tolist() == [10.0, 10.0]
    waits = seen.first_token_s - seen.arrival_s, plain.first_token_s - plain.arrival_s
    assert (waits[0] - waits[1]).tolist() == [10.0, 0.0]  # the second request came when all was compiled
