"""Maps go out to every engine and come back: same placement, by that engine's own rules, on models of three shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim import cli
from moesim.engine.deployment import groundwork, resolve
from moesim.errors import BadInput, Infeasible
from moesim.spec.hf import load_model
from moesim.spec.maps.frame import MapFrame
from moesim.spec.model import ModelSpec
from moesim.spec.placement_file import read_placement
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from moesim.spec.scenario import Scenario
from placement.export import vllm
from placement.export.engines import export_placement, write_map
from placement.problem import solve
from tests import engine_maps
from tests.engine_maps import Refused, held_by
from tests.scenarios import small

COMMON = {
    "model_type": "deepseek_v3",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 1000,
}
# Absolute MoE layers: 3 to 6; 1, 3, 5; all.
SHAPES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "first_k_dense_replace": ({"first_k_dense_replace": 3, "num_nextn_predict_layers": 1}, [3, 4, 5, 6]),
    "moe_layer_freq list": ({"moe_layer_freq": [0, 1, 0, 1, 0, 1, 0]}, [1, 3, 5]),
    "all sparse": ({}, [0, 1, 2, 3, 4, 5, 6]),
}
MAPS = {"moesim": "map.json", "sglang": "map.json", "trtllm": "map.yaml", "vllm-ascend": "map.json"}
RANKS, SLOTS = 4, 24


@pytest.fixture(params=SHAPES)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    extra, layers = SHAPES[request.param]
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**COMMON, **extra}))
    assert list(load_model(str(path)).moe.layer_ids) == layers
    return path


def placed(model: ModelSpec, solver: str = "greedy", slots: int = SLOTS) -> ExpertPlacement:
    loads = np.random.default_rng(0).lognormal(0.0, 1.0, (1, model.moe_layers, model.moe.experts))
    loads /= loads.sum(axis=-1, keepdims=True)
    ids = np.asarray(model.moe.layer_ids)
    return solve(PlacementRequest(loads, np.ones(1), ids, model.layers, slots=slots, ranks=RANKS), solver).placement


def same(first: ExpertPlacement, second: ExpertPlacement) -> bool:
    return held_by(first) == held_by(second) and (first.ranks, first.experts, first.absolute_layers) == (
        second.ranks,
        second.experts,
        second.absolute_layers,
    )


@pytest.mark.parametrize("form", MAPS)
@pytest.mark.parametrize("slots", [16, SLOTS])
def test_a_map_comes_back_as_it_went_out(form: str, slots: int, config: Path, tmp_path: Path) -> None:
    model = load_model(str(config))
    placement = placed(model, slots=slots)
    path = tmp_path / "out" / MAPS[form]
    write_map(placement, form, path)
    found = read_placement(path, MapFrame.of(model, RANKS))
    assert same(found, placement)
    again = tmp_path / "again" / MAPS[form]
    write_map(found, form, again)
    if form != "moesim":  # moesim's own names the solver, which is now the file
        assert again.read_bytes() == path.read_bytes()


def second_opinion(engine: str, files: list[Path], model: ModelSpec) -> engine_maps.Held:
    layers, experts = list(model.moe.layer_ids), model.moe.experts
    return engine_maps.loaded(engine, files, ep=RANKS, hidden_layers=model.layers, moe_layers=layers, experts=experts)


@pytest.mark.parametrize("engine", ["sglang", "trtllm", "vllm-ascend"])
@pytest.mark.parametrize("solver", ["contiguous", "round_robin", "greedy", "robust"])
def test_the_engine_takes_the_map_by_its_own_rules(engine: str, solver: str, config: Path, tmp_path: Path) -> None:
    model = load_model(str(config))
    placement = placed(model, solver)
    files = export_placement(placement, engine, tmp_path / engine)
    assert second_opinion(engine, files, model) == held_by(placement)


@pytest.mark.parametrize("source", ["sglang", "trtllm", "vllm-ascend"])
@pytest.mark.parametrize("engine", ["sglang", "trtllm", "vllm-ascend"])
def test_export_takes_the_map_of_one_engine_to_another(
    source: str, engine: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(str(config))
    placement = placed(model)
    path = tmp_path / MAPS[source]
    write_map(placement, source, path)
    arguments = ["export", str(path), "--engine", engine, "--model", str(config), "--gpus", str(RANKS)]
    assert cli.run([*arguments, "--out", str(tmp_path / "out")]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert second_opinion(engine, files, model) == held_by(placement)


@pytest.mark.parametrize(
    ("source", "arguments", "said"),
    [
        ("sglang", [], "does not name its model"),
        ("trtllm", [], "--model"),
        ("sglang", ["--model", "CONFIG"], "--gpus"),
        ("trtllm", ["--model", "CONFIG"], "--gpus"),
        ("sglang", ["--model", "CONFIG", "--gpus", "5"], "do not divide by 5"),
        ("vllm-ascend", ["--model", "CONFIG", "--gpus", "2"], "4 devices for 2 ranks"),
        ("moesim", ["--gpus", "2"], "the map is for 4 ranks"),
        ("moesim", ["--model", "deepseek-ai/DeepSeek-V3"], "has 58 of 256"),
        ("trtllm", ["--model", "deepseek-ai/DeepSeek-V3", "--gpus", "4"], "24 slots cannot hold 256 experts"),
    ],
)
def test_export_says_what_a_map_leaves_out(
    source: str, arguments: list[str], said: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / MAPS[source]
    write_map(placed(load_model(str(config))), source, path)
    given = [str(config) if argument == "CONFIG" else argument for argument in arguments]
    assert cli.run(["export", str(path), "--engine", "sglang", *given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", MAPS)
def test_a_scenario_takes_the_map_of_every_engine(form: str, tmp_path: Path) -> None:
    """The deployment that is simulated holds the placement of the file, whoever wrote it."""
    data = small()
    model = load_model(data["model"])
    placement = placed(model, slots=model.moe.experts + RANKS)
    path = tmp_path / MAPS[form]
    write_map(placement, form, path)
    data |= {"placement": {"file": str(path)}, "parallel": {"attention_dp": RANKS, "ep": RANKS}}
    scenario = Scenario.read(data, where="test")
    assert same(resolve(groundwork(scenario)).setup.placement, placement)


def test_a_map_for_other_ranks_or_layers_is_refused_by_the_scenario(tmp_path: Path) -> None:
    data = small()
    model = load_model(data["model"])
    placement = placed(model, slots=model.moe.experts)
    data["parallel"] = {"attention_dp": RANKS, "ep": RANKS}
    for form, name, cut in (("sglang", "physical_to_logical_map", "rows for"), ("vllm-ascend", "layer_list", "hold")):
        path = tmp_path / f"{form}.json"
        write_map(placement, form, path)
        content = json.loads(path.read_text())
        content[name] = content[name][:-1]
        path.write_text(json.dumps(content))
        scenario = Scenario.read({**data, "placement": {"file": str(path)}}, where="test")
        with pytest.raises(BadInput, match=cut):
            resolve(groundwork(scenario))


def with_mtp(config: Path, tmp_path: Path) -> Scenario:
    data = small()
    data |= {"model": str(config), "parallel": {"attention_dp": RANKS, "ep": RANKS}, "policies": {}}
    data["serving"]["speculative"] = {"method": "mtp", "draft_tokens": 1, "acceptance": 0.6}
    return Scenario.read(data, where="test")


@pytest.mark.parametrize("config", ["first_k_dense_replace"], indirect=True)
def test_trtllm_gets_the_draft_layer_that_it_asks_for(config: Path, tmp_path: Path) -> None:
    """With multi-token prediction the engine looks layer 7 of 7 up, and fails where it is not there (#13974)."""
    model = load_model(str(config))
    placement = placed(model)
    files = export_placement(placement, "trtllm", tmp_path / "out", with_mtp(config, tmp_path))
    text, options = files[0].read_text(), files[1].read_text()
    asked = [*model.moe.layer_ids, model.layers]
    held = engine_maps.trtllm(text, options, moe_layers=asked, experts=model.moe.experts)
    assert {layer: held[layer] for layer in model.moe.layer_ids} == held_by(placement)
    assert same(read_placement(files[0], MapFrame.of(model, RANKS)), placement)
    plain = export_placement(placement, "trtllm", tmp_path / "plain")[0].read_text()
    with pytest.raises(Refused, match="not found"):
        engine_maps.trtllm(plain, options, moe_layers=asked, experts=model.moe.experts)


def test_vllm_is_told_the_two_layouts_that_it_can_start_with(tmp_path: Path) -> None:
    """Round-robin needs expert groups and no replicas; anything else is laid out by vLLM itself, and that is said."""
    model = load_model("deepseek-ai/DeepSeek-V3")
    data = small()
    data |= {"model": model.id, "cluster": {"system": "h200_sxm", "nodes": 1}, "policies": {}}
    grouped = Scenario.read({**data, "parallel": {"attention_dp": 4, "ep": 4}}, where="test")
    dealt = placed(model, "round_robin", slots=256)
    assert vllm.starts_with(dealt, grouped) == "round_robin"
    assert "--expert-placement-strategy round_robin" in vllm.launch(dealt, grouped)
    # Rank r of vLLM's strategy holds the experts r, r + ep, r + 2 ep ...
    assert held_by(dealt)[3] == [list(range(rank, 256, RANKS)) for rank in range(RANKS)]
    assert vllm.starts_with(dealt, None) is None  # whether the model has groups is not known
    assert vllm.starts_with(placed(model, "round_robin", slots=260), grouped) is None
    even = placed(model, "contiguous", slots=260)
    assert vllm.starts_with(even, None) == "linear"
    planned = placed(model, slots=260)
    assert vllm.starts_with(planned, grouped) is None
    assert "starts contiguous" in export_placement(planned, "vllm", tmp_path)[-1].read_text()


def test_the_content_says_the_format_not_the_name(tmp_path: Path) -> None:
    frame = MapFrame(experts=2, layer_ids=(0,), absolute_layers=1, ranks=2)
    for content, said in (
        ({"physical_to_logical_map": [[0, 1]], "layer_list": []}, "takes no key"),
        ({"layer_list": 1}, "moe_layer_count"),
        ({"num_slots": 2}, "initial_global_assignments"),
        ({"a": 1}, "nor one of an engine"),
        ([[0, 1]], "nor one of an engine"),
    ):
        path = tmp_path / "map.json"
        path.write_text(json.dumps(content))
        with pytest.raises(BadInput, match=said):
            read_placement(path, frame)
    path = tmp_path / "map.yaml"
    path.write_text(yaml.safe_dump({"placement": "x"}))
    with pytest.raises(BadInput, match="not a load balancer file"):
        read_placement(path, frame)
    path = tmp_path / "twice.json"
    path.write_text('{"physical_to_logical_map": [[0, 1]], "physical_to_logical_map": [[1, 0]]}')
    with pytest.raises(BadInput, match="stands twice"):
        read_placement(path, frame)


def test_trtllm_takes_a_map_under_attention_dp_only(tmp_path: Path) -> None:
    """Its load balancer asserts attention DP and EP over 1: a contiguous plan goes without a map, others do not go."""
    data = small()
    model = load_model(data["model"])
    data["parallel"] = {"tp": 4, "attention_dp": 1, "ep": 4}
    tensor = Scenario.read(data, where="test")
    plain = placed(model, "contiguous", slots=model.moe.experts)
    files = export_placement(plain, "trtllm", tmp_path / "plain", tensor)
    assert [file.name for file in files] == ["extra_llm_api_options.yaml", "launch.txt"]
    assert "moe_config" not in yaml.safe_load(files[0].read_text())
    for other in (placed(model, slots=model.moe.experts), placed(model, "contiguous", slots=model.moe.experts + RANKS)):
        with pytest.raises(Infeasible, match="not at DP 1, EP 4"):
            export_placement(other, "trtllm", tmp_path / "other", tensor)
    assert not (tmp_path / "other").exists()


def test_vllm_ascend_takes_no_map_on_one_rank(tmp_path: Path) -> None:
    alone = ExpertPlacement(np.arange(4)[None, :], np.arange(1), experts=4, ranks=1, absolute_layers=1)
    with pytest.raises(Infeasible, match="one rank"):
        export_placement(alone, "vllm-ascend", tmp_path / "x")
    assert not (tmp_path / "x").exists()
