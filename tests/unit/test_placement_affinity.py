"""Affinity: what is counted from tokens, how it is read, what the solver keeps, and what `place` says of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from moesim import cli
from moesim.errors import BadInput
from moesim.routing.holdout import split
from moesim.routing.picks import TokenPicks
from moesim.routing.planted import planted_trace
from moesim.routing.readers import read_loads, write_parquet
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import PlacementRequest, max_over_mean
from moesim.spec.scenario import HoldoutSpec
from placement.copies import MODES, count_copies
from placement.problem import request_from_loads, solve
from placement.solvers.affinity import align, presence
from tests.damaged import damaged
from tests.scenarios import small, write

IDS = np.asarray([[[0, 1], [2, 3]], [[1, 0], [2, -1]], [[2, 3], [0, 1]]], dtype=np.int16)


def picks(request: np.ndarray | None = None) -> TokenPicks:
    return TokenPicks(IDS, np.arange(len(IDS)), follows=True, request=request)


def test_coactivation_and_transitions_by_hand() -> None:
    together, onward = picks().coactivation(4), picks().transitions(4)
    assert onward is not None
    expected = np.zeros((2, 4, 4))
    expected[0, 0, 1] = expected[0, 1, 0] = 2 / 3
    expected[0, 2, 3] = expected[0, 3, 2] = expected[1, 2, 3] = expected[1, 3, 2] = 1 / 3
    expected[1, 0, 1] = expected[1, 1, 0] = 1 / 3
    assert together == pytest.approx(expected)
    assert onward[0] * 3 == pytest.approx(np.asarray([[0, 0, 2, 1], [0, 0, 2, 1], [1, 1, 0, 0], [1, 1, 0, 0]]))
    assert TokenPicks(IDS, np.arange(3), follows=False).transitions(4) is None


def test_tokens_of_some_steps() -> None:
    kept = picks(request=np.asarray([7, 8, 9])).of_steps(np.asarray([0, 2]))
    assert np.array_equal(kept.ids, IDS[[0, 2]])
    assert kept.step.tolist() == [0, 1]
    assert kept.request is not None and kept.request.tolist() == [7, 9]


def test_a_trace_is_read_by_lists_or_by_picks_with_and_without_token_ids(tmp_path: Path) -> None:
    rows = [
        {
            "step": 5 + token // 2,
            "layer_id": 3 + layer,
            "token_id": token % 2,
            "experts": [int(e) for e in row if e >= 0],
        }
        for layer in (1, 0)
        for token, by_layer in enumerate(IDS)
        for row in (by_layer[layer],)
    ]
    frame = pl.DataFrame(rows)
    frame.write_parquet(tmp_path / "lists.parquet")
    frame.explode("experts").rename({"experts": "expert_id"}).write_parquet(tmp_path / "picks.parquet")
    frame.drop("token_id").write_parquet(tmp_path / "loose.parquet")
    for name, follows in (("lists", True), ("picks", True), ("loose", False)):
        loads = read_loads(tmp_path / f"{name}.parquet", tokens=True)
        assert loads.tokens is not None
        assert loads.tokens.follows is follows
        assert np.array_equal(loads.tokens.ids, IDS)
        assert loads.tokens.step.tolist() == [0, 0, 1]
    frame.explode("experts").rename({"experts": "expert_id"}).drop("token_id").write_parquet(tmp_path / "c.parquet")
    assert read_loads(tmp_path / "c.parquet", tokens=True).tokens is None
    write_parquet(tmp_path / "counts.parquet", loads)
    assert read_loads(tmp_path / "counts.parquet", tokens=True).tokens is None
    assert read_loads(tmp_path / "lists.parquet").tokens is None
    pl.concat([frame, frame[:1]]).write_parquet(tmp_path / "twice.parquet")
    with pytest.raises(BadInput, match="twice in one layer"):
        read_loads(tmp_path / "twice.parquet", tokens=True)


def test_per_token_dumps_of_sglang_name_slots_by_their_experts(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    table = np.asarray([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]])  # layer 0 is dense
    slots = np.full((3, 3, 8), -1)
    for row, layer in ((0, 1), (1, 2)):
        back = np.argsort(table[layer])
        for token in range(3):
            for place, expert in enumerate(IDS[token, row]):
                slots[layer, token, place] = back[expert] if expert >= 0 else -1
    for rank, tokens in ((0, [0, 1]), (1, [2])):
        counts = np.zeros((3, 4), dtype=np.int64)
        for layer in (1, 2):
            chosen = slots[layer, tokens]
            np.add.at(counts[layer], chosen[chosen >= 0], 1)
        record = {
            "forward_pass_id": 4,
            "rank": rank,
            "global_physical_count": torch.from_numpy(counts),
            "topk_ids_of_layer": torch.from_numpy(slots[:, tokens].astype(np.int32)),
        }
        empty = {**record, "forward_pass_id": 3, "global_physical_count": torch.zeros(3, 4, dtype=torch.int64)}
        empty["topk_ids_of_layer"] = torch.full((3, 1, 8), -1, dtype=torch.int32)
        torch.save(
            {"records": [empty, record], "last_physical_to_logical_map": torch.from_numpy(table)},
            tmp_path / f"{rank}.pt",
        )
    loads = read_loads(tmp_path, tokens=True)
    assert loads.tokens is not None and loads.tokens.follows
    assert np.array_equal(loads.tokens.ids, IDS)
    assert loads.tokens.step.tolist() == [0, 0, 0]
    for layer in range(2):
        chosen = IDS[:, layer][IDS[:, layer] >= 0]
        assert loads.counts[0, layer].tolist() == np.bincount(chosen, minlength=4).tolist()


def planted(nodes: int) -> tuple[RoutingCounts, PlacementRequest]:
    load, _ = planted_trace(
        tokens=4000, layers=3, experts=64, top_k=4, communities=4, inside=0.9, follow=0.8, rng=np.random.default_rng(1)
    )
    return load, request_from_loads([load], slots=64, ranks=16, nodes=nodes)


def test_the_solver_keeps_the_balance_of_greedy_and_cuts_copies() -> None:
    load, asked = planted(4)
    affinity, greedy = solve(asked, "affinity").placement, solve(asked, "greedy").placement
    bound = np.maximum(max_over_mean(greedy.rank_loads(asked.mix())), 1.001)
    assert (max_over_mean(affinity.rank_loads(asked.mix())) <= bound + 1e-6).all()
    assert load.tokens is not None
    mean = [
        count_copies(placement, load.tokens, nodes=4, replica="equal", blocks=4).mean()
        for placement in (affinity, greedy)
    ]
    assert mean[0]["normal"] < 0.7 * mean[1]["normal"]
    assert mean[0]["low_latency"] == pytest.approx(mean[1]["low_latency"]) == pytest.approx(3.0)
    assert mean[0]["stay"] < mean[0]["normal"]
    assert affinity.notes["affinity"] == "co-activation by node"


def test_on_one_node_ranks_take_the_place_of_nodes_and_without_tokens_it_is_greedy() -> None:
    _, asked = planted(1)
    assert solve(asked, "affinity").placement.notes["affinity"] == "co-activation by rank"
    bare = PlacementRequest(asked.loads, asked.weights, asked.layer_ids, 3, slots=64, ranks=16, nodes=4)
    found = solve(bare, "affinity").placement
    assert np.array_equal(found.physical_to_logical, solve(bare, "greedy").placement.physical_to_logical)
    assert "placed by greedy" in found.notes["affinity"]


def test_tokens_of_one_pick_are_grouped_by_transitions() -> None:
    load, _ = planted_trace(
        tokens=4000, layers=4, experts=32, top_k=1, communities=4, inside=1.0, follow=0.9, rng=np.random.default_rng(2)
    )
    asked = request_from_loads([load], slots=32, ranks=8, nodes=4)
    found, greedy = solve(asked, "affinity").placement, solve(asked, "greedy").placement
    assert found.notes["affinity"] == "transitions by node"
    assert load.tokens is not None
    ours, theirs = (count_copies(p, load.tokens, nodes=4, replica="equal", blocks=1).mean() for p in (found, greedy))
    assert ours["normal"] == pytest.approx(theirs["normal"]) == pytest.approx(0.75)
    assert ours["stay"] < 0.8 * theirs["stay"]


def test_aligning_names_nodes_after_the_layer_before() -> None:
    onward = np.zeros((1, 4, 4))
    onward[0, [0, 1, 2, 3], [2, 3, 0, 1]] = 1.0
    table = np.asarray([[0, 1, 2, 3], [0, 1, 2, 3]])
    align(table, onward, 2)
    assert table.tolist() == [[0, 1, 2, 3], [2, 3, 0, 1]]
    assert presence(np.asarray([0, 0, 0, 1]), 2, 2).tolist() == [[2 / 3, 0.0], [1 / 3, 1.0]]


def test_wrong_tables_are_named() -> None:
    _, asked = planted(4)
    with pytest.raises(BadInput, match="coactivation of shape"):
        PlacementRequest(
            asked.loads, asked.weights, asked.layer_ids, 3, slots=64, ranks=16, coactivation=np.zeros((3, 4, 4))
        )
    load, _ = planted(4)
    assert load.tokens is not None
    with pytest.raises(BadInput, match="do not fill"):
        count_copies(solve(asked, "greedy").placement, load.tokens, nodes=3, replica="equal", blocks=1)
    with pytest.raises(BadInput, match="communities"):
        planted_trace(
            tokens=4, layers=1, experts=6, top_k=4, communities=2, inside=1.0, follow=0.0, rng=np.random.default_rng(0)
        )


def test_halves_of_a_trace_share_no_token() -> None:
    load, _ = planted(4)
    (fit,), (judge,) = split([load], HoldoutSpec(by="step", fraction=0.5), np.random.default_rng(0))
    for part in (fit, judge):
        assert part.tokens is not None
        for layer in range(3):
            counted = np.bincount(part.tokens.ids[:, layer].ravel(), minlength=64)
            assert np.array_equal(part.counts[:, layer].sum(axis=0), counted)
    assert fit.tokens is not None and judge.tokens is not None
    assert len(fit.tokens.step) + len(judge.tokens.step) == 4000


TRACE = Path(__file__).parents[1] / "data" / "router_trace.parquet"


def test_place_tells_copies_between_nodes_where_there_are_tokens_and_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    plain = ["place", "--loads", str(TRACE), "--gpus", "8", "--slots", "64"]
    arguments = [*plain, "--solver", "affinity"]
    assert cli.run([*arguments, "--nodes", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    told = report["cross_node"]
    assert set(told["copies"]) == {"contiguous", "greedy", "eplb", "planned"}
    assert set(told["copies"]["planned"]) == set(MODES)
    assert told["gain"]["greedy"]["low"] > 0.1
    assert "cross between 2 nodes" in report["verdict"]["text"]
    assert cli.run([*arguments, "--nodes", "2"]) == 0
    assert "fewer than greedy" in " ".join(capsys.readouterr().out.split())
    assert cli.run([*plain, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cross_node"] is None


@pytest.mark.slow
def test_a_scenario_with_a_trace_tells_bytes_and_that_step_times_do_not_see_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model_type": "olmoe", "hidden_size": 512, "num_hidden_layers": 5, "num_attention_heads": 8,
        "num_key_value_heads": 8, "num_experts": 64, "num_experts_per_tok": 4, "intermediate_size": 256,
        "vocab_size": 1000, "max_position_embeddings": 4096, "architectures": ["OlmoeForCausalLM"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = small(
        model=str(tmp_path / "config.json"),
        cluster={"system": "h200_sxm", "nodes": 2, "gpus_per_node": 4},
        routing={"trace": str(TRACE), "holdout": {"by": "time", "fraction": 0.5}},
        placement={"solver": "affinity", "redundant_experts": 8},
        policies={"dispatch": {"backend": "deepep", "replica": "local_first"}},
    )
    code = cli.run(["place", str(write(tmp_path, data)), "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    report = json.loads(said.out)
    told = report["cross_node"]
    assert told["replica"] == "local_first"
    copies = told["copies"]["planned"]["normal"]
    # bf16 both ways: 1,024 bytes and its metadata, aligned to 16
    assert told["normal_bytes"]["planned"] == pytest.approx(copies * (1072 + 1056), rel=0.02)
    assert told["gain"]["greedy"]["low"] > 0.0
    assert "do not see the difference" in report["verdict"]["text"]


@pytest.mark.slow
def test_mutated_traces_end_in_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {"layer_id": [0, 0, 1, 1], "token_id": [0, 1, 0, 1], "experts": [[0, 1], [1, 2], [2, 0], [0, 2]]}
    )
    frame.write_parquet(tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for _ in range(12):  # each is read in a process of its own
        (tmp_path / "t.parquet").write_bytes(damaged(whole, rng))
        try:
            loads = read_loads(tmp_path / "t.parquet", tokens=True)
        except BadInput as error:
            assert "\n" not in error.line()
        else:
            assert loads.tokens is None or loads.tokens.ids.shape[1] == loads.counts.shape[1]
