"""Pipeline schedules against the bubbles of their papers, and against a plain event simulation."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
import simpy

from moesim.engine.training_pipeline import run
from moesim.errors import BadInput
from moesim.graph.pipeline import SCHEDULES, Pass, PipelineProgram, layers_of_chunks, program

SHAPES = [(1, 1), (1, 4), (2, 2), (2, 7), (4, 4), (4, 8), (8, 8), (8, 33), (16, 64)]


def equal(chunks: int, micro: int, forward: float, backward: float, weight: float) -> np.ndarray:
    return np.broadcast_to(np.asarray([forward, backward, weight])[None, :, None, None], (1, 3, micro, chunks)).copy()


@pytest.mark.parametrize(("stages", "micro"), [*SHAPES, (8, 3)])
def test_1f1b_bubble_is_exact(stages: int, micro: int) -> None:
    """(p - 1) / (m + p - 1) of the step, whatever a forward and a backward pass take (arXiv:2104.04473)."""
    for forward, backward, weight in ((1.0, 1.0, 1.0), (0.3, 0.7, 0.2), (2.0, 0.5, 0.25)):
        times = run(program("1f1b", stages, micro), equal(stages, micro, forward, backward, weight))
        step = times.end_s.max()
        assert step == pytest.approx((micro + stages - 1) * (forward + backward + weight), rel=1e-12)
        assert times.bubble_s / step == pytest.approx((stages - 1) / (micro + stages - 1), rel=1e-12)


@pytest.mark.parametrize("virtual", [1, 2, 3, 5])
@pytest.mark.parametrize(("stages", "micro"), [(2, 2), (2, 8), (4, 4), (4, 12), (8, 16)])
def test_interleaved_bubble_is_exact(stages: int, micro: int, virtual: int) -> None:
    """Bubble over the time of the work: (p - 1) / (m v) (arXiv:2104.04473, section 2.2)."""
    chunks = stages * virtual
    for forward, backward in ((1.0, 2.0), (0.5, 0.5)):
        times = run(program("interleaved", stages, micro, virtual), equal(chunks, micro, forward, backward, 0.0))
        ideal = micro * virtual * (forward + backward)
        assert times.end_s.max() / ideal - 1 == pytest.approx((stages - 1) / (micro * virtual), rel=1e-12)


@pytest.mark.parametrize(("stages", "micro"), [(1, 3), (2, 4), (3, 6), (4, 8), (8, 16), (8, 40), (16, 64)])
def test_zero_bubble_h1_is_exact(stages: int, micro: int) -> None:
    """(p - 1)(F + B - W) instead of (p - 1)(F + B + W), for equal F, B and W and for W below B (arXiv:2401.10241)."""
    for f, b, w in ((1.0, 1.0, 1.0), (0.37, 0.37, 0.37), (1.0, 1.2, 0.8), (1.0, 1.3, 0.7)):
        times = run(program("zero_bubble", stages, micro), equal(stages, micro, f, b, w))
        assert times.end_s.max() == pytest.approx(micro * (f + b + w) + (stages - 1) * (f + b - w), rel=1e-12)


def test_zero_bubble_holds_no_more_than_1f1b_does() -> None:
    for stages, micro in ((2, 8), (4, 8), (8, 32)):
        split, plain = program("zero_bubble", stages, micro), program("1f1b", stages, micro)
        assert max(split.held(s).sum() for s in range(stages)) <= max(plain.held(s).sum() for s in range(stages))


def test_what_a_stage_holds() -> None:
    """1F1B: stages - stage micro-batches; interleaved: Megatron's warm-up and one more."""
    plain = program("1f1b", 4, 16)
    assert [plain.held(stage).sum() for stage in range(4)] == [4, 3, 2, 1]
    assert [program("1f1b", 4, 2).held(stage).sum() for stage in range(4)] == [2, 2, 2, 1]
    virtual = program("interleaved", 4, 8, 2)
    assert [virtual.held(stage).sum() for stage in range(4)] == [2 * (3 - stage) + 4 + 1 for stage in range(4)]


@pytest.mark.parametrize(
    ("schedule", "stages", "micro", "virtual"),
    [("1f1b", 4, 9, 1), ("interleaved", 3, 6, 2), ("zero_bubble", 5, 11, 1), ("interleaved", 4, 4, 3)],
)
def test_unequal_passes_as_an_event_simulation_has_them(schedule: str, stages: int, micro: int, virtual: int) -> None:
    """Random durations and transfers: SimPy, one process a stage, finds the same ends."""
    made = program(schedule, stages, micro, virtual)
    seconds = np.random.default_rng(3).lognormal(size=(2, 3, micro, stages * virtual))
    found = run(made, seconds, transfer_s=0.25)
    for instance in range(2):
        assert found.end_s[instance] == pytest.approx(simulated(made, seconds[instance], 0.25), rel=1e-12)


def simulated(made: PipelineProgram, seconds: np.ndarray, transfer_s: float) -> np.ndarray:
    """Ends of the stages by SimPy: a process for each stage, an event for each pass."""
    environment = simpy.Environment()
    arrived = [environment.event() for _ in made.kind]
    done_at, ends = np.zeros(len(made.kind)), np.zeros(made.stages)

    def work(stage: int) -> Generator[simpy.Event, None, None]:
        for one in np.flatnonzero(made.stage == stage):
            source = made.after[one]
            if source >= 0:
                yield arrived[source]
                until = done_at[source] + (transfer_s if made.crosses[one] else 0.0)
                yield environment.timeout(max(0.0, until - environment.now))
            length = seconds[made.kind[one], made.micro[one], made.chunk[one]]
            if made.kind[one] == Pass.BACKWARD and not made.split:
                length += seconds[Pass.WEIGHT, made.micro[one], made.chunk[one]]
            yield environment.timeout(length)
            done_at[one] = ends[stage] = environment.now
            arrived[one].succeed()

    for stage in range(made.stages):
        environment.process(work(stage))
    environment.run()
    return ends


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_pass_runs_once(schedule: str) -> None:
    virtual = 2 if schedule == "interleaved" else 1
    made = program(schedule, 4, 8, virtual)
    passes = {tuple(row) for row in np.stack([made.kind, made.micro, made.chunk], axis=1).tolist()}
    kinds = 3 if made.split else 2
    assert len(passes) == len(made.kind) == kinds * 8 * 4 * virtual
    assert (made.before < np.arange(len(made.kind))).all()
    assert (made.after < np.arange(len(made.kind))).all()


def test_schedules_that_cannot_be() -> None:
    with pytest.raises(BadInput, match="no virtual stages"):
        program("1f1b", 4, 8, 2)
    with pytest.raises(BadInput, match="do not divide"):
        program("interleaved", 4, 6, 2)
    with pytest.raises(BadInput, match="needs pipeline stages"):
        program("interleaved", 1, 4, 2)
    with pytest.raises(BadInput, match="unknown schedule"):
        program("gpipe", 4, 8)


def test_layers_over_chunks() -> None:
    assert [len(x) for x in layers_of_chunks(94, 4)] == [23, 24, 24, 23]
    assert [len(x) for x in layers_of_chunks(94, 32)] == [2, *[3] * 30, 2]
    assert [len(x) for x in layers_of_chunks(48, 4)] == [12] * 4
    assert [len(x) for x in layers_of_chunks(7, 3, (1, 4, 2))] == [1, 4, 2]
    assert [layer for chunk in layers_of_chunks(61, 16) for layer in chunk] == list(range(61))
    with pytest.raises(BadInput, match="cannot fill"):
        layers_of_chunks(3, 4)
    with pytest.raises(BadInput, match="not 3 of 7"):
        layers_of_chunks(7, 3, (1, 4, 3))
