"""`simulate --explain` of training runs: parts that sum to the step, by schedule and plan, and what a person reads."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.cost.estimate import Tag, estimate
from moesim.engine import critical, maxplus
from moesim.engine.training import simulate_training
from moesim.engine.training_explain import ExplainedTraining, explain_training
from moesim.engine.training_pass import pass_parts
from moesim.graph.priced_step import Part
from moesim.graph.task import Stream, Task, TaskGraph
from moesim.graph.training_passes import chunk_graph, passes_of
from tests.scenarios import write
from tests.training_scenarios import asked, training

PLANS: list[dict[str, Any]] = [
    {},
    {"training": {"pipeline": {"schedule": "zero_bubble"}}},
    {"training": {"pipeline": {"schedule": "interleaved", "virtual_stages": 2}, "recompute": "full"}},
    {"parallel": {"attention_dp": 8, "ep": 8}, "policies": {"dispatch": {"backend": "deepep"}}},
    {"parallel": {"tp": 2, "pp": 2, "cp": 2, "attention_dp": 2, "ep": 4, "expert_tp": 2}},
    {"training": {"optimizer": {"overlap_gradients": True, "overlap_parameters": True}}},
    {"training": {"router": "balanced"}, "policies": {"dispatch": {"backend": "allgather_reducescatter"}}},
]


def flat(found: ExplainedTraining) -> dict[str, float]:
    sums: dict[str, float] = {}
    for inside in found.critical_path_s.values():
        for name, seconds in inside.items():
            sums[name] = sums.get(name, 0.0) + seconds
    return sums


@pytest.mark.parametrize("changes", PLANS, ids=str)
def test_every_explained_step_adds_up(changes: dict[str, Any]) -> None:
    done = simulate_training(asked(**changes), draws=0)
    found = explain_training(done)
    path = flat(found)
    assert sum(path.values()) == pytest.approx(done.step.step_s, rel=1e-9)
    assert found.not_priced == {}
    for name, seconds in found.free_operation_s.items():
        saved = done.step.step_s - seconds
        assert -1e-9 <= saved / done.step.step_s <= path.get(name, 0.0) / done.step.step_s + 1e-9
    assert set(path) <= set(found.free_operation_s)
    for seconds in found.what_if_s.values():
        assert 0 < seconds <= done.step.step_s * (1 + 1e-9)
    stages = done.model.setup.parallel.pp
    assert found.waited_s.shape[0] == stages == len(found.bubble_s)
    assert (found.waited_s >= 0).all()
    # What ranks waited is what they were waited for.
    ranks = found.waited_s.shape[1]
    np.testing.assert_allclose(found.waited_for_rank_s.sum(axis=1), found.waited_s.mean(axis=1), rtol=1e-9)
    assert ranks == done.model.setup.parallel.ep * done.model.setup.parallel.expert_tp
    assert [layer.layer for _, layer in found.layers] == list(done.model.setup.model.moe.layer_ids)
    assert {stage for stage, _ in found.layers} == set(range(stages))
    for name, exposed in found.exposed_s.items():
        assert exposed >= 0
        assert found.whole_s[name] > 0


def test_a_balanced_run_gains_nothing_from_balance() -> None:
    found = explain_training(simulate_training(asked(training={"router": "balanced"}), draws=0))
    assert found.what_if_s["perfect_balance"] == pytest.approx(found.step_s, rel=1e-12)
    uneven = explain_training(simulate_training(asked(), draws=0))
    assert uneven.what_if_s["perfect_balance"] < uneven.step_s
    assert found.step_s == pytest.approx(uneven.what_if_s["perfect_balance"], rel=1e-12)


def test_one_stage_has_no_bubble_to_lose() -> None:
    one = explain_training(simulate_training(asked(parallel={"attention_dp": 8, "ep": 8}), draws=0))
    assert one.what_if_s["no_pipeline_bubble"] == pytest.approx(one.step_s, rel=1e-12)
    assert "between_stages" not in one.critical_path_s
    two = explain_training(simulate_training(asked(), draws=0))
    assert two.what_if_s["no_pipeline_bubble"] < two.step_s


def test_sends_between_stages_show_where_they_are_slow() -> None:
    """A send of 1 s: two stages' 1F1B waits for one there and one back at least, and an infinite network takes none."""
    done = simulate_training(asked(), draws=0)
    second = Part((estimate(np.ones((1, 1)), Tag.ASSUMED, "collective", 0.0, "test"),))
    from moesim.engine.training import _step, pass_table

    model = replace(done.model, transfer=second)
    slow = replace(done, model=model, step=_step(model, pass_table(model, None), None, done.seed))
    found = explain_training(slow)
    sends = found.critical_path_s["between_stages"]["pipeline_transfer"]
    assert sends == pytest.approx(round(sends), abs=1e-9)
    assert sends >= 2
    assert sum(flat(found).values()) == pytest.approx(found.step_s, rel=1e-9)
    assert found.what_if_s["infinite_network"] < found.step_s - sends + 1e-9


def test_a_pass_is_taken_apart_as_the_critical_path_of_its_graph() -> None:
    model = simulate_training(asked(), draws=0).model
    chunk, split = model.chunks[0], model.program.split
    for kind in passes_of(split):
        whole = chunk_graph(model.layers, chunk, kind, split=split)
        few = tuple(
            replace(task, duration_s=task.duration_s[:2] if task.duration_s.shape[0] > 1 else task.duration_s)
            for task in whole.tasks
        )
        graph = TaskGraph(2, whole.ranks, few)
        times, parts = maxplus.run(graph, timeline=True), pass_parts(graph)
        waits = critical.waits(graph, times)
        for step in range(2):
            by_operation = critical.critical_path(graph, times, step=step).by_operation_s(graph)
            mine: dict[str, float] = {}
            for (_, name), seconds in parts.path_s.items():
                mine[name] = mine.get(name, 0.0) + float(seconds[step])
            assert mine == pytest.approx(by_operation, rel=1e-9)
        before_meetings = times.wait_s + times.step_s[:, None] - times.rank_end_s
        np.testing.assert_allclose(sum(parts.waited_s.values()), before_meetings, atol=1e-12)
        assert (parts.for_rank_s.sum(axis=1) + 1e-12 >= waits.for_rank_s.sum(axis=1)).all()


def test_who_waits_for_what_by_hand() -> None:
    """Rank 1 takes 3 s for its experts, rank 0 takes 1 s; both 1 s before; then they meet for 2 s, and end apart."""

    def task(name: str, operation: str, seconds: list[float], meets: bool = False) -> Task:
        stream = Stream.COMMUNICATION if meets else Stream.COMPUTE
        groups = np.zeros(2, dtype=np.int64) if meets else None
        return Task(f"{name}, forward", operation, stream, np.asarray([seconds]), groups=groups)

    graph = TaskGraph(1, 2, (
        task("gate", "gate", [1.0, 1.0]), task("experts", "experts", [1.0, 3.0]),
        task("combine", "combine", [2.0, 2.0], True), task("norm", "norms", [0.5, 0.0]),
    ))  # fmt: skip
    found = pass_parts(graph)
    assert {name: float(s[0]) for (_, name), s in found.path_s.items()} == {
        "gate": 1.0, "experts": 3.0, "combine": 2.0, "norms": 0.5,
    }  # fmt: skip
    assert found.waited_s["experts"].tolist() == [[2.0, 0.0]]
    assert found.waited_s["norms"].tolist() == [[0.0, 0.5]]
    assert found.for_rank_s.tolist() == [[0.5, 2.0]]
    assert found.collective_s["combine"].tolist() == [2.0]


def test_json_console_and_page_tell_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = write(tmp_path, training()), tmp_path / "r.html"
    assert run(["simulate", str(path), "--json", "--draws", "0", "--explain"]) == 0
    with_it = json.loads(capsys.readouterr().out)
    assert run(["simulate", str(path), "--json", "--draws", "0"]) == 0
    without = json.loads(capsys.readouterr().out)
    found = with_it.pop("explain")
    assert {**with_it, "run": 0} == {**without, "run": 0}  # explaining changes nothing else
    assert found["step_s"] == with_it["metrics"]["step_s"]
    assert sum(sum(inside.values()) for inside in found["critical_path_s"].values()) == pytest.approx(found["step_s"])
    assert set(found["critical_path_s"]) >= {"forward", "backward", "weight_gradient", "recompute", "end_of_step"}
    assert run(["simulate", str(path), "--draws", "0", "--explain", "--report", str(page)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for wanted in ("Critical path of the step", "without pipeline bubble", "Exposed on the critical path", "Hottest:"):
        assert wanted in printed
    tree = ET.fromstring(page.read_text().removeprefix("<!DOCTYPE html>\n"))
    (section,) = (one for one in tree.iter("section") if one.get("id") == "why")
    told = {float(data.get("value", "nan")) for data in section.iter("data")}
    assert {one["step_s"] for one in found["what_if"].values()} <= told
