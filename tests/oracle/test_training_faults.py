"""Faults in a training step: worked by hand on two stages and two micro-batches, and against the executor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.engine import maxplus
from moesim.engine.faults import FaultState, jitter_factors
from moesim.engine.training import TrainingRun, simulate_training
from moesim.engine.training_faults import GROUPS, slowed_pass_s
from moesim.graph.pipeline import Pass
from moesim.graph.task import Link
from moesim.graph.training_passes import chunk_graph, passes_of
from tests.scenarios import write
from tests.training_scenarios import asked, training

SLOW = {"kind": "slow_gpu", "gpu": 5, "factor": 1.7}  # 4 ranks a stage: rank 1 of stage 1


def trained(*faults: dict[str, Any], draws: int = 0, **changes: Any) -> TrainingRun:
    return simulate_training(asked(faults=list(faults), **changes), draws=draws)


def even(*faults: dict[str, Any]) -> TrainingRun:
    """One instance of 2 stages of 4 GPUs, 2 micro-batches, all ranks alike."""
    return trained(
        *faults,
        cluster={"system": "h200_sxm", "nodes": 1, "gpus_per_node": 8},
        training={"global_batch": 4, "router": "balanced"},
    )


def by_hand(a: float, b: float, c: float, d: float, t: float) -> float:
    """1F1B of two micro-batches: forward and backward of stage 0 (a, b) and of stage 1 (c, d), sends of t."""
    first = a + t + c + d  # stage 1 has the first micro-batch back
    second = max(first, 2 * a + t) + c + d
    back = max(2 * a, first + t) + b
    return max(max(back, second + t) + b, second)


def parts(done: TrainingRun, stage: int, kind: Pass) -> tuple[float, float]:
    """Seconds of a pass in computing and in collectives, where all ranks are alike."""
    graph = chunk_graph(done.model.layers, done.model.chunks[stage], kind, split=False)
    inside = [0.0, 0.0]
    for task in graph.tasks:
        assert np.ptp(task.duration_s) <= 1e-12 * task.duration_s.max()
        inside[int(task.collective)] += float(task.duration_s.max())
    return inside[0], inside[1]


def test_a_slow_gpu_stretches_the_steps_of_its_stage() -> None:
    done = even(SLOW)
    a, b = (sum(parts(done, 0, kind)) for kind in (Pass.FORWARD, Pass.BACKWARD))
    (work, talk), (work_back, talk_back) = (parts(done, 1, kind) for kind in (Pass.FORWARD, Pass.BACKWARD))
    t = float(done.model.transfer.seconds().max())
    healthy = by_hand(a, b, work + talk, work_back + talk_back, t)
    slow = by_hand(a, b, 1.7 * work + talk, 1.7 * work_back + talk_back, t)
    assert done.faulted is not None
    assert done.step.pipeline.end_s.max() == pytest.approx(healthy, rel=1e-9)
    assert done.faulted.pipeline.end_s.max() == pytest.approx(slow, rel=1e-9)
    assert slow > healthy
    assert done.faulted.optimizer_s.tolist() == pytest.approx((done.step.optimizer_s * [1.0, 1.7]).tolist())


def test_a_slow_link_stretches_collectives_sends_and_the_end_of_step() -> None:
    done = even({"kind": "slow_link", "gpu": 2, "link": "nvlink", "factor": 3.0})  # of stage 0
    (work, talk), (work_back, talk_back) = (parts(done, 0, kind) for kind in (Pass.FORWARD, Pass.BACKWARD))
    c, d = (sum(parts(done, 1, kind)) for kind in (Pass.FORWARD, Pass.BACKWARD))
    t = 3.0 * float(done.model.transfer.seconds().max())
    assert done.faulted is not None
    expected = by_hand(work + 3 * talk, work_back + 3 * talk_back, c, d, t)
    assert done.faulted.pipeline.end_s.max() == pytest.approx(expected, rel=1e-9)
    assert done.faulted.reduce_s.tolist() == pytest.approx((done.step.reduce_s * [3.0, 1.0]).tolist())
    assert done.faulted.gather_s.tolist() == pytest.approx((done.step.gather_s * [3.0, 1.0]).tolist())


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "slow_gpu", "gpu": 5, "factor": 1.0},
        {"kind": "slow_link", "gpu": 2, "link": "nvlink", "factor": 1.0},
        {"kind": "jitter", "sigma": 0.0},
        {"kind": "dead_rank", "gpu": 0, "from_s": 1e6, "recovery_s": 1.0},
    ],
    ids=str,
)
def test_a_fault_of_nothing_changes_nothing(fault: dict[str, Any]) -> None:
    done = trained(fault, draws=2)
    plain = trained(draws=2)
    assert done.faulted is not None
    assert done.faulted.step_s == done.step.step_s == plain.step.step_s
    assert [one.step_s for one in done.drawn] == [one.step_s for one in plain.drawn]


def test_the_instance_without_a_fault_runs_as_before() -> None:
    done = trained(SLOW | {"instance": 1})
    assert done.faulted is not None
    np.testing.assert_array_equal(done.faulted.pipeline.end_s[0], done.step.pipeline.end_s[0])
    assert (done.faulted.pipeline.end_s[1] > done.step.pipeline.end_s[1]).all()


@pytest.mark.parametrize(
    "pipeline", [{}, {"schedule": "zero_bubble"}, {"schedule": "interleaved", "virtual_stages": 2}]
)
def test_passes_take_what_the_executor_finds_on_the_slowed_graph(pipeline: dict[str, Any]) -> None:
    model = trained(training={"pipeline": pipeline}).model
    rng = np.random.default_rng(7)
    state = FaultState(slow_gpus=((1, 1.5), (3, 1.2)), slow_links=((0, Link.NVLINK, 2.0),))
    for kind in passes_of(model.program.split):
        graph = chunk_graph(model.layers, model.chunks[1], kind, split=model.program.split)
        jitter = jitter_factors(0.2, (graph.steps, graph.ranks), rng)
        found = slowed_pass_s(
            graph, np.arange(graph.steps), state.gpu_factors(4)[None, :] * jitter,
            dict.fromkeys((*GROUPS, "dispatch", "combine"), 2.0),
        )  # fmt: skip
        np.testing.assert_allclose(found, maxplus.run(state.slowed(graph, jitter)).step_s, rtol=1e-9)


def test_slower_is_never_faster() -> None:
    steps = [trained(SLOW | {"factor": factor}).faulted for factor in (1.0, 1.2, 1.5, 2.0, 4.0)]
    seconds = [one.step_s for one in steps if one is not None]
    assert seconds == sorted(seconds)
    assert seconds[-1] > seconds[0]
    for sigma, least in ((0.05, 1.0), (0.2, 1.05)):
        jittered = trained({"kind": "jitter", "sigma": sigma}).faulted
        assert jittered is not None
        assert jittered.step_s > least * seconds[0]


def test_a_stop_costs_what_was_done_and_its_recovery() -> None:
    half = trained().step.step_s / 2
    dead = {"kind": "dead_rank", "gpu": 3, "from_s": half, "recovery_s": 60.0}
    one = trained(dead).faulted
    assert one is not None
    assert one.step_s == pytest.approx(half + 60.0 + 2 * half, rel=1e-12)
    # A second stop during the restart delays it until that one is over; one after the step does not count.
    again = {"kind": "dead_link", "gpu": 1, "link": "nvlink", "from_s": 30.0, "recovery_s": 50.0}
    both = trained(again, dead, {"kind": "dead_rank", "gpu": 0, "from_s": 90.0, "recovery_s": 9.0}).faulted
    assert both is not None
    assert both.step_s == pytest.approx(80.0 + 2 * half, rel=1e-12)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"kind": "dead_rank", "gpu": 1}, "a training job stops when a rank dies"),
        ({"kind": "slow_gpu", "gpu": 8, "factor": 2}, "GPU 8 of an instance of 8"),
        ({"kind": "slow_gpu", "gpu": 1, "factor": 2, "instance": 2}, "instance 2 of 2"),
        ({"kind": "slow_gpu", "gpu": 1, "factor": 2, "from_s": 1}, "this fault lasts all of it"),
        ({"kind": "jitter", "sigma": 0.1, "to_s": 1}, "this fault lasts all of it"),
        ({"kind": "dead_link", "gpu": 1, "link": "nic"}, "recovery_s"),
    ],
)
def test_what_a_step_cannot_have_is_refused_in_one_line(
    fault: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["simulate", str(write(tmp_path, training(faults=[fault]))), "--draws", "0"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert says in line
    assert "faults.0" in line


def test_a_link_that_no_group_meets_over_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = training(
        cluster={"system": "h200_sxm", "nodes": 1, "gpus_per_node": 8},
        faults=[{"kind": "slow_link", "gpu": 1, "link": "nic", "factor": 2}],
    )
    assert run(["simulate", str(write(tmp_path, data)), "--draws", "0"]) == 2
    assert "no group of this plan meets over a GPU's nic" in capsys.readouterr().err


def test_a_person_and_a_script_see_both_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, training(faults=[SLOW]))
    assert run(["simulate", str(path), "--json", "--draws", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    faults, step_s = told["faults"], told["metrics"]["step_s"]
    assert faults["without"]["step_s"] == told["step"]["step_s"] < step_s
    assert faults["change"]["step_s"] == pytest.approx(step_s / faults["without"]["step_s"] - 1)
    assert told["intervals"]["step_s"]["low"] > 0
    assert run(["simulate", str(path), "--draws", "0"]) == 0
    assert "With and without the faults (1)" in capsys.readouterr().out
