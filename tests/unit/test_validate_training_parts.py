"""The parts of `validate training` that need no ranks: layouts, shares of parameters, sizes to measure, comparison."""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cost.ops import Gemm
from moesim.errors import BadInput, Infeasible
from moesim.graph.pipeline import Pass, layers_of_chunks, program
from moesim.routing.readers import write_npz
from moesim.routing.trace import RoutingCounts
from validate.training import machine, memory, predict, probe
from validate.training import run as runner
from validate.training.job import LAYOUTS, ONE, SHAPES, Layout, Shape, TrainingJob, batch_of, fitting, layouts_of
from validate.training.model import slices
from validate.training.step import messages

SHAPE = Shape(layers=3, hidden=16, heads=4, kv_heads=2, head_dim=4, dense_intermediate=24, experts=4, intermediate=8,
              vocabulary=32)  # fmt: skip


def test_the_layouts_cover_each_way_to_share_the_work() -> None:
    job = TrainingJob(layouts=LAYOUTS)
    assert {layout.ranks for layout in LAYOUTS} == {2, 3, 4}
    assert {(layout.tp > 1, layout.dp > 1, layout.pp > 1) for layout in LAYOUTS} >= {
        (True, False, False), (False, True, False), (False, False, True), (True, False, True), (False, True, True),
        (True, True, False),
    }  # fmt: skip
    assert any(layout.instances > 1 for layout in LAYOUTS)
    for layout in LAYOUTS:
        assert job.micro_batches(layout) * layout.dp * layout.instances == job.global_batch


def test_a_batch_that_does_not_divide_is_refused() -> None:
    job = TrainingJob(layouts=(Layout(name="three", dp=3),), global_batch=4)
    with pytest.raises(BadInput, match="multiple of 3"):
        job.micro_batches(job.layouts[0])
    with pytest.raises(ValueError, match="names of their own"):
        TrainingJob(layouts=(Layout(name="a"), Layout(name="a", dp=2)))


@pytest.mark.parametrize(("tp", "ep", "pp"), [(1, 1, 1), (2, 2, 1), (2, 4, 1), (1, 2, 3), (2, 2, 3)])
def test_the_shares_of_all_ranks_make_the_whole_model(tp: int, ep: int, pp: int) -> None:
    """Every element of every parameter lies on as many ranks as hold it by the rules, on none twice."""
    held: dict[str, np.ndarray[Any, Any]] = {}
    per_rank = SHAPE.experts // ep
    for chunk in layers_of_chunks(SHAPE.layers, pp):
        for rank in range(ep):
            experts = [list(range(rank * per_rank, (rank + 1) * per_rank))] * (SHAPE.layers - 1)
            for one in slices(SHAPE, chunk, tp, rank % tp, experts):
                seen = held.setdefault(one.name, np.zeros(one.shape, dtype=int))
                rows = slice(None) if one.rows is None else list(one.rows)
                index: list[Any] = [slice(None)] * len(one.shape)
                index[one.axis] = rows
                seen[tuple(index)] += 1
    names = {"embedding", "head", "last_norm", "0.up", "0.down"}
    names |= {f"{layer}.{part}" for layer in range(3) for part in ("attention_norm", "qkv", "out", "norm")}
    names |= {f"{layer}.gate" for layer in (1, 2)}
    experts = {f"{layer}.{expert}.{part}" for layer in (1, 2) for expert in range(4) for part in ("up", "down")}
    assert set(held) == names | experts
    for name, seen in held.items():
        whole = name.endswith(("norm", "gate"))
        copies = 1 if name in experts else ep if whole else ep // tp
        assert (seen == copies).all(), name


def test_sizes_are_all_measured_where_few_and_spanned_where_many() -> None:
    assert predict._chosen("gemm", [3.0, 5.0, 7.0]) == [3.0, 5.0, 7.0]
    many = predict._chosen("collective", [float(size) for size in range(10, 1000)])
    assert (many[0], many[-1]) == (10.0, 999.0)
    assert len(many) <= 8
    tokens = predict._chosen("experts", [1.5 + size / 10 for size in range(1000)])
    assert (tokens[0], tokens[-1]) == (1.0, 102.0)
    assert all(one == round(one) for one in tokens)


def test_listening_hears_what_it_prices() -> None:
    class Free:
        def estimate(self, operation: Any) -> Any:
            return "price"

    asked = Gemm(m=np.ones((1, 1)), n=1, k=1, dtype="fp32")
    one = predict.Listening(Free(), [])
    assert one.estimate(asked) == "price"
    assert one.heard == [asked]


def test_measured_sends_become_latency_and_rate() -> None:
    def took(family: str, size: float, seconds: float, key: tuple[int, ...] = ()) -> predict.Measured:
        return predict.Measured(predict.Asked(family, key, size), np.asarray([seconds] * 3))

    here = predict.Machine("AMD EPYC", 1e9, (0, 0))
    found = predict.measured_cluster(
        2, here, [took("send", 5000.0, 0.002), took("send", 1000.0, 0.001), took("gemm", 10.0, 0.5, (20, 30))]
    )
    assert found["nvlink_latency_s"] == pytest.approx(0.001)
    assert found["nvlink_bytes_per_s"] == pytest.approx(4e6)
    assert found["gpu"]["flops_per_s"]["fp32"] == pytest.approx(2 * 10 * 20 * 30 / 0.5)
    assert set(found["measured"]) == {"nvlink_bytes_per_s", "nvlink_latency_s"}
    assert found["gpu"]["name"] == "AMD EPYC"
    assert "measured" not in predict.measured_cluster(2, here, [took("gemm", 10.0, 0.5, (20, 30))])


def test_the_comparison_tells_a_wrong_order_and_its_regret() -> None:
    job = TrainingJob(layouts=LAYOUTS[:3], repeats=10)
    rng = np.random.default_rng(0)
    samples = [middle * (1 + 0.01 * rng.standard_normal(10)) for middle in (1.0, 2.0, 4.0)]

    def foretold(*steps: float) -> list[dict[str, Any]]:
        return [{"step_s": one, "low_s": 0.9 * one, "high_s": 1.1 * one} for one in steps]

    right = runner.compare(job, foretold(1.0, 2.0, 4.0), samples)
    assert right["pairs"]["agreed"] == right["pairs"]["decided"] == 3
    assert right["regret"]["2"] == 0.0
    assert right["step"]["within_interval"] == 3
    assert right["step"]["mape"] < 0.02
    wrong = runner.compare(job, foretold(5.0, 2.0, 4.0), samples)
    assert wrong["pairs"]["agreed"] == 1
    assert wrong["regret"]["2"] == pytest.approx(1.0, rel=0.05)
    assert wrong["step"]["within_interval"] == 2


def test_moments_become_parts_by_stage(tmp_path: Path) -> None:
    layout = Layout(name="PP2", pp=2)
    first = {"passes": [(0.0, 1.0), (4.0, 6.0)], "piped_s": 6.0, "reduced_s": 6.5, "done_s": 7.0}
    last = {"passes": [(1.0, 4.0), (4.0, 4.5)], "piped_s": 5.0, "reduced_s": 6.5, "done_s": 7.5}
    found = predict.measured_parts(layout, [[first, last]], [[0, 1], [0, 1]])
    assert found == {
        "forward": [1.0, 3.0], "backward": [2.0, 0.5], "pipeline": 6.0, "reduce": 0.5, "optimizer": 1.0,
    }  # fmt: skip
    assert runner.samples_of([[first, last], [first, first]]).tolist() == [7.5, 7.0]


def test_the_config_is_read_as_the_shape_says(tmp_path: Path) -> None:
    from moesim.spec.hf import load_model

    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE.config()))
    model = load_model(str(path))
    assert (model.layers, model.moe.layer_ids, model.moe.experts, model.dense_intermediate) == (3, (1, 2), 4, 24)
    assert (model.attention.heads, model.attention.kv_heads, model.attention.head_dim) == (4, 2, 4)


def test_a_pair_that_never_overlaps_is_decided_though_repeats_scatter_widely() -> None:
    """As measured once: 829 (811 to 867) against 1006 (967 to 1070) ms, foretold the wrong way round."""
    job = TrainingJob(layouts=LAYOUTS[:2], repeats=9)
    rng = np.random.default_rng(1)
    samples = [rng.uniform(0.967, 1.070, 9), rng.uniform(0.811, 0.867, 9)]
    foretold = [{"step_s": step, "low_s": step, "high_s": step} for step in (0.733, 0.758)]
    found = runner.compare(job, foretold, samples)["pairs"]
    assert (found["decided"], found["agreed"]) == (1, 0)


def test_what_other_processes_use_is_what_the_kernel_counts_beyond_the_own(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    tick = os.sysconf("SC_CLK_TCK")
    stat.write_text(f"cpu  {3 * tick} 0 {tick} 500 600 {tick} {tick} 70 0 0\ncpu0 1 2 3\n")
    assert machine.busy_s(stat) == pytest.approx(6.0)
    stat.write_text("intr 1 2\n")
    assert machine.busy_s(stat) is None
    assert machine.busy_s(tmp_path / "no such file") is None
    assert machine.others_cores(10.0, 30.0, 15.0, 10.0) == pytest.approx(0.5)
    assert machine.others_cores(10.0, 30.0, 21.0, 10.0) == 0.0
    assert machine.others_cores(None, 30.0, 1.0, 10.0) is None


def test_what_an_earlier_run_left_is_taken_away_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "predictions.json").write_text(json.dumps({"layouts": [{"scenario": "pp2.yaml"}]}))
    for name in ("record.json", "pp2.yaml", "mine.yaml"):
        (tmp_path / name).write_text("x")
    runner.forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    runner.forget(tmp_path)


@pytest.mark.parametrize(("schedule", "stages", "virtual"), [("1f1b", 2, 1), ("1f1b", 4, 1), ("interleaved", 2, 3),
                                                             ("interleaved", 4, 2)])  # fmt: skip
@pytest.mark.parametrize("micro_batches", [4, 12])
def test_stages_get_all_that_they_wait_for_by_channels_that_keep_order(
    schedule: str, stages: int, virtual: int, micro_batches: int
) -> None:
    """NCCL has no tags: stages that take from each channel what comes next, and keep it, never wait for each other."""
    made = program(schedule, stages, micro_batches, virtual)
    sent: dict[tuple[int, int, Pass], list[Any]] = {}
    mine = [np.flatnonzero(made.stage == stage).tolist() for stage in range(stages)]
    taken = dict.fromkeys(product(range(stages), range(stages), Pass), 0)
    kept: list[set[Any]] = [set() for _ in range(stages)]
    done = [0] * stages
    while any(done[stage] < len(mine[stage]) for stage in range(stages)):
        before = list(done)
        for stage in range(stages):
            while done[stage] < len(mine[stage]):
                index = mine[stage][done[stage]]
                if made.crosses[index]:
                    source = int(made.after[index])
                    wanted = (Pass(made.kind[source]), int(made.micro[source]), int(made.chunk[source]))
                    channel = (int(made.stage[source]), stage, wanted[0])
                    while wanted not in kept[stage] and taken[channel] < len(sent.get(channel, ())):
                        kept[stage].add(messages(made, *channel)[taken[channel]])
                        taken[channel] += 1
                    if wanted not in kept[stage]:
                        break
                kind, chunk = Pass(made.kind[index]), int(made.chunk[index])
                onto = chunk + (1 if kind == Pass.FORWARD else -1)
                if 0 <= onto < made.chunks:
                    sent.setdefault((stage, onto % stages, kind), []).append((kind, int(made.micro[index]), chunk))
                done[stage] += 1
        assert done != before, "every stage waits"
    assert all(listed == messages(made, *channel) for channel, listed in sent.items())
    assert all(taken[channel] == len(listed) for channel, listed in sent.items())


@pytest.mark.parametrize("ranks", [6, 8, 16])
def test_layouts_of_a_node_use_its_ranks_and_say_so(ranks: int) -> None:
    found = layouts_of(ranks)
    assert {one.ranks for one in found} == {ranks}
    assert len({one.name for one in found}) == len(found) >= 8
    assert layouts_of(4) == tuple(one for one in LAYOUTS if one.ranks == 4)
    assert layouts_of(1) == ()


def test_layouts_that_do_not_divide_are_named_with_the_reason() -> None:
    for ranks in (8, 16, 64):
        node = TrainingJob(
            shape=SHAPES["nccl"], layouts=layouts_of(ranks), sequence_length=2048,
            global_batch=batch_of("nccl", ranks), backend="nccl",
        )  # fmt: skip
        assert fitting(node) == (node, {})
    small = TrainingJob(layouts=layouts_of(8))
    kept, wrong = fitting(small)
    assert {one.name for one in kept.layouts} | set(wrong) == {one.name for one in small.layouts}
    assert wrong["DP8 EP8"] == "12 experts do not divide by EP8"
    assert wrong["TP8 EP8"] == "4 key-value heads do not divide by TP8"
    assert wrong["PP8"] == "6 layers are too few for its stages"


def test_ranks_that_meet_lie_inside_nodes_or_across_them() -> None:
    node, two = [0] * 4, [0, 0, 0, 0, 1, 1, 1, 1]
    assert probe.members_of(2, 1, node) == [(0, 1), (2, 3)]
    assert probe.members_of(3, 1, node) == [(0, 1, 2)]
    assert probe.members_of(2, 1, two) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert probe.members_of(4, 2, two) == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert probe.members_of(8, 2, two) == [tuple(range(8))]
    assert probe.pairs_of(2, two) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert probe.pairs_of(1, [0, 0, 0]) == [(0, 1)]
    for size, nodes, hosts in ((3, 2, two), (8, 1, two), (4, 2, node)):
        with pytest.raises(Infeasible, match="does not lie evenly"):
            probe.members_of(size, nodes, hosts)


def test_nodes_are_told_from_the_hosts_of_the_ranks() -> None:
    machine = predict.Machine("H100", 8e10, (0, 0, 1, 1, 2, 2))
    assert [machine.nodes(ranks) for ranks in (1, 2, 4, 6)] == [(1, 1), (1, 2), (2, 2), (3, 2)]
    for hosts in ((0, 0, 1), (0, 1, 0, 1), (0, 1, 1)):
        with pytest.raises(Infeasible, match="do not fill nodes"):
            predict.Machine("H100", 8e10, hosts).nodes(len(hosts))


def test_what_layouts_over_two_nodes_need_is_asked_for_inside_and_between(tmp_path: Path) -> None:
    job = TrainingJob(layouts=(Layout(name="wide", tp=2, dp=2), Layout(name="deep", tp=2, pp=2)), global_batch=4)
    machine = predict.Machine("H100", 8e10, (0, 0, 1, 1))
    (tmp_path / predict.CONFIG_FILE).write_text(json.dumps(job.shape.config()))
    (tmp_path / predict.cluster_file(4)).write_text(json.dumps(predict.cluster(4, machine)))
    counts = RoutingCounts(np.ones((4, 5, 12)), np.arange(1, 6), 6, "even", per_step=True)
    write_npz(tmp_path / predict.ROUTING_FILE, counts)
    asked, slots = predict.asked_of(job, job.layouts, tmp_path)
    over = {(one.family, one.key, one.nodes) for one in asked if one.family in probe.MEETING}
    assert {("collective", ("all_gather", 2), 1), ("collective", ("all_to_all", 4), 2), ("send", (), 2)} <= over
    assert ("send", (), 1) not in over and slots["wide"].shape == (5, 12)
    measured = [predict.Measured(one, np.asarray([1e-3 + 1e-9 * one.size] * 3)) for one in asked]
    points = predict.points_of(measured)
    assert set(points) == {1, 2} and {one.family for one in points[2]} == {"collective"}
    found = predict.measured_cluster(4, machine, measured)
    assert (found["nodes"], found["gpus_per_node"]) == (2, 2)
    assert found["nic_bytes_per_s"] == pytest.approx(1e9) and set(found["measured"]) == {
        "nic_bytes_per_s", "nic_latency_s",
    }  # fmt: skip
    files = []
    for nodes, some in points.items():
        files.append(predict.points_file(4, nodes))
        (tmp_path / files[-1]).write_text(json.dumps(predict.content(some, nodes, "now", {}, {})))
    (tmp_path / predict.cluster_file(4)).write_text(json.dumps(found))
    told = predict.predict(job, job.layouts[0], tmp_path, points=files, host_s=0.0)
    assert told["low_s"] < told["step_s"] < told["high_s"]


def test_weights_that_do_not_fit_are_refused_before_anything_starts() -> None:
    """16 bytes a weight: by hand for a model of which TP2 halves all but norms and gates, and EP2 the experts."""
    torch = pytest.importorskip("torch")
    shape = Shape(layers=2, hidden=4, heads=2, kv_heads=2, head_dim=2, dense_intermediate=6, experts=4, intermediate=2,
                  vocabulary=10)  # fmt: skip
    norms, gate = 5 * 4, 4 * 4
    dense, experts = 2 * 10 * 4 + 2 * (12 * 4 + 4 * 4) + 3 * 6 * 4, 4 * 3 * 2 * 4
    job = TrainingJob(shape=shape, layouts=(Layout(name="TP2", tp=2), Layout(name="DP2", instances=2)))
    whole = norms + gate + dense + experts
    assert memory.weights_of(job, ONE) == whole
    assert memory.weights_of(job, job.layouts[0]) == norms + gate + dense / 2 + experts / 2
    needed = 4 * whole + 16 * (whole + norms + gate + dense / 2 + experts / 2)
    assert memory.needed_bytes(job, job.layouts) == needed
    gpu = torch.device("cuda", 0)
    memory.check_memory(job, predict.Machine("H100", needed, (0, 0)), gpu)
    with pytest.raises(Infeasible, match=r"2 layouts of 2 ranks need .* memory are there"):
        memory.check_memory(job, predict.Machine("H100", needed - 1, (0, 0)), gpu)


@pytest.mark.parametrize("last_s", [3e-3, 1e-3, 0.8e-3])
def test_a_large_send_that_took_no_longer_has_a_rate_that_a_cluster_file_takes(last_s: float) -> None:
    """On 3 and 4 ranks of two cores a send of 260 kB came as fast as one of 1 kB: its rate was 2.6e14 bytes/s."""
    sizes, seconds = (1e3, 2.6e5), (1e-3, last_s)
    sends = [
        predict.Measured(predict.Asked("send", (), size), np.asarray([each] * 3))
        for size, each in zip(sizes, seconds, strict=True)
    ]
    found = predict._link(sends)
    assert found.latency_s + (sizes[1] - sizes[0]) / found.bytes_per_s == pytest.approx(last_s)
    assert found.latency_s == pytest.approx(min(1e-3, 0.99 * last_s)) and found.bytes_per_s < 1e11
