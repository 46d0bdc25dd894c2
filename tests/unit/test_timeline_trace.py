"""The timeline file: valid JSON, every slice where it was, the same bytes each time, whole or not at all."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from moesim.engine import maxplus
from moesim.engine.critical import critical_path
from moesim.engine.serving import Load, serve
from moesim.errors import BadInput
from moesim.graph.task import Stream, Task, TaskGraph
from moesim.output.steptrace import held_tokens, like, request_spans, running, step_slices, waiting
from moesim.output.timeline import write_timeline, write_tracks
from tests.unit.test_serving import limits


@pytest.fixture
def graph():
    rng = np.random.default_rng(0)
    everyone = np.zeros(3, dtype=np.int64)
    return TaskGraph(
        2,
        3,
        tuple(
            Task(
                f'50% "{index}" é',
                f"operation {index % 3}",
                Stream(index % 2),
                rng.exponential(1e-4, (2, 3)),
                (index - 1,) if index else (),
                everyone if index % 2 else None,
                layer=index // 4,
            )
            for index in range(12)
        ),
    )


def events(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def test_every_task_of_every_rank_is_a_slice(graph, tmp_path):
    times = maxplus.run(graph, timeline=True)
    path = tmp_path / "timeline.json.gz"
    assert write_timeline(path, graph, times, step=1) == 36
    slices = [event for event in events(path) if event["ph"] == "X"]
    assert len(slices) == 36
    assert times.start_s is not None and times.end_s is not None
    for number, event in enumerate(slices):
        task, rank = divmod(number, 3)
        assert (event["pid"], event["tid"]) == (rank, task % 2)
        assert event["name"] == graph.tasks[task].name
        assert event["args"] == {"layer": task // 4, "operation": f"operation {task % 3}"}
        assert event["ts"] == pytest.approx(times.start_s[task, 1, rank] * 1e6, abs=1e-3)
        assert event["ts"] + event["dur"] == pytest.approx(times.end_s[task, 1, rank] * 1e6, abs=1e-3)
    named = {(e["pid"], e["args"]["name"]) for e in events(path) if e["name"] == "process_name"}
    assert named == {(0, "rank 0"), (1, "rank 1"), (2, "rank 2")}
    threads = {e["args"]["name"] for e in events(path) if e["name"] == "thread_name"}
    assert threads == {"compute", "communication"}


def test_slices_of_one_thread_never_overlap(tmp_path):
    rng = np.random.default_rng(1)
    tasks = tuple(Task("t", "t", Stream.COMPUTE, rng.exponential(3e-9, (1, 1))) for _ in range(500))
    graph = TaskGraph(1, 1, tasks)
    path = tmp_path / "timeline.json.gz"
    write_timeline(path, graph, maxplus.run(graph, timeline=True))
    ends = 0
    for event in events(path):
        if event["ph"] == "X":
            assert round(event["ts"] * 1000) >= ends
            ends = round(event["ts"] * 1000) + round(event["dur"] * 1000)


def test_the_same_input_gives_the_same_bytes(graph, tmp_path):
    times = maxplus.run(graph, timeline=True)
    for name in ("a.json.gz", "other name.json.gz"):
        write_timeline(tmp_path / name, graph, times, counters=[("queue", "waiting", 1.0, np.float64(3.0))])
    assert (tmp_path / "a.json.gz").read_bytes() == (tmp_path / "other name.json.gz").read_bytes()


def test_extra_tracks_get_processes_after_the_ranks(graph, tmp_path):
    path = tmp_path / "timeline.json.gz"
    slices = [("requests", "slot 0", "prefill", 0.5, 0.25), ("requests", "slot 1", "decode", 1.0, 2.0)]
    counters = [("requests", "running", 0.5, 1.0), ("memory", "KV bytes", 0.0, 1e9)]
    times = maxplus.run(graph, timeline=True)
    assert write_timeline(path, graph, times, slices=slices, counters=counters) == 38
    found = events(path)
    tracks = [event for event in found if event["ph"] == "X"][-2:]
    assert [(t["pid"], t["tid"], t["name"], t["ts"], t["dur"]) for t in tracks] == [
        (3, 0, "prefill", 500000, 250000),
        (3, 1, "decode", 1000000, 2000000),
    ]
    assert [(c["pid"], c["name"], c["args"]["value"]) for c in found if c["ph"] == "C"] == [
        (3, "running", 1.0),
        (4, "KV bytes", 1e9),
    ]
    names = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    assert names[3] == "requests" and names[4] == "memory"


def test_tracks_alone_may_come_from_a_generator(tmp_path):
    path = tmp_path / "requests.json.gz"
    assert write_tracks(path, (("requests", "all", f"{i}", float(i), 1.0) for i in range(5000))) == 5000
    assert sum(event["ph"] == "X" for event in events(path)) == 5000


@pytest.mark.parametrize("wrong", [("p", "t", "n", float("nan"), 1.0), ("p", "t", "n", 0.0, -1.0)])
def test_a_time_that_is_none_leaves_no_file_behind(tmp_path, wrong):
    path = tmp_path / "requests.json.gz"
    with pytest.raises(BadInput, match="no finite time or value"):
        write_tracks(path, [("p", "t", "fine", 0.0, 1.0), wrong])
    with pytest.raises(BadInput, match="no finite time or value"):
        write_tracks(path, [], [("p", "counter", 0.0, float("inf"))])
    assert list(tmp_path.iterdir()) == []


def test_times_that_do_not_fit_are_refused(graph, tmp_path):
    path = tmp_path / "timeline.json.gz"
    with pytest.raises(BadInput, match="hold no timeline"):
        write_timeline(path, graph, maxplus.run(graph))
    times = maxplus.run(graph, timeline=True)
    with pytest.raises(BadInput, match="step 2 of a timeline of 2 steps"):
        write_timeline(path, graph, times, step=2)
    with pytest.raises(BadInput, match="12 tasks on 3 ranks for a graph of 1 tasks"):
        write_timeline(path, TaskGraph(2, 3, graph.tasks[:1]), times)
    assert not path.exists()


def test_the_critical_path_is_marked_on_its_ranks_and_repeated_as_a_track(graph, tmp_path):
    times = maxplus.run(graph, timeline=True)
    path = critical_path(graph, times, step=1)
    write_timeline(tmp_path / "t.json.gz", graph, times, step=1, critical=path, offset_s=2.0)
    found = events(tmp_path / "t.json.gz")
    slices = [event for event in found if event["ph"] == "X"]
    marked = {(event["name"], event["pid"]) for event in slices if event.get("args", {}).get("critical")}
    assert marked == {(graph.tasks[task].name, rank) for task, rank in zip(path.task, path.rank, strict=True)}
    (number,) = (event["pid"] for event in found if event.get("args", {}).get("name") == "critical path")
    chain = [event for event in slices if event["pid"] == number]
    assert len(chain) == len(path.task)
    assert chain[0]["ts"] == 2_000_000
    assert sum(event["dur"] for event in chain) == pytest.approx(times.step_s[1] * 1e6, abs=1)
    assert len(slices) == 36 + len(chain)


def test_arrows_lead_from_slice_to_slice(graph, tmp_path):
    times = maxplus.run(graph, timeline=True)
    path = critical_path(graph, times)
    write_timeline(tmp_path / "t.json.gz", graph, times, critical=path, arrows=True)
    found = events(tmp_path / "t.json.gz")
    tails = {event["id"]: event for event in found if event["ph"] == "s"}
    heads = {event["id"]: event for event in found if event["ph"] == "f"}
    # The graph is a chain that changes its stream at every task: 11 dependencies on each of 3 ranks.
    dependencies = [tail for tail in tails.values() if tail["name"] == "dependency"]
    assert len(dependencies) == 33
    moves = int((np.diff(path.rank) != 0).sum())
    assert len(tails) == len(heads) == 33 + moves
    assert moves > 0
    slices = [event for event in found if event["ph"] == "X"]

    def inside(event):
        return [
            one["name"] for one in slices
            if (one["pid"], one["tid"]) == (event["pid"], event["tid"])
            and one["ts"] <= event["ts"] <= one["ts"] + one["dur"]
        ]  # fmt: skip

    for number, tail in tails.items():
        assert tail["ts"] <= heads[number]["ts"]
        assert len(inside(tail)) == 1
        assert len(inside(heads[number])) == 1


@pytest.fixture
def served():
    rng = np.random.default_rng(5)
    load = Load(rng.integers(1, 90, 40), rng.integers(1, 9, 40), arrival_s=np.sort(rng.uniform(0, 20, 40)))
    return serve(load, limits(max_running=2), ranks=2, instances=2, step_time=lambda plan: 0.7)


def test_counters_are_the_requests_counted_one_by_one(served):
    at = np.linspace(0.0, served.duration_s, 57)
    for index, time_s in enumerate(at):
        alive = (served.first_token_s <= time_s) & (time_s < served.finish_s)
        held = 0.0
        for request in np.flatnonzero(alive):
            grown = (time_s - served.first_token_s[request]) / (served.finish_s - served.first_token_s)[request]
            held += served.isl[request] + 1 + grown * (served.osl[request] - 1)
        assert waiting(served, at)[index] == ((served.arrival_s <= time_s) & (time_s < served.first_token_s)).sum()
        assert running(served, at)[index] == alive.sum()
        assert held_tokens(served, at)[index] == pytest.approx(held, abs=1e-6)


def test_steps_and_requests_have_tracks(served, tmp_path):
    slices = list(step_slices(served))
    assert len(slices) == served.steps
    assert {thread for _, thread, *_ in slices} == {"instance 0", "instance 1"}
    assert {name for *_, name, _, _ in slices} <= {"decode", "prefill", "prefill and decode"}
    spans = list(request_spans(served))
    assert len(spans) == 3 * 40
    write_tracks(tmp_path / "t.json.gz", slices, spans=spans)
    found = events(tmp_path / "t.json.gz")
    begun = [event for event in found if event["ph"] == "b"]
    assert len(begun) == sum(event["ph"] == "e" for event in found) == 120
    assert {event["id"] for event in begun} == set(range(40))
    decoding = served.step_decode_seqs[served.step_prefill_tokens == 0]
    assert like(served, float(decoding.max())) in served.step_start_s.tolist()
