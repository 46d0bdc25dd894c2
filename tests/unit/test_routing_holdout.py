"""Splitting loads, and routing specs resolved against a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.routing.holdout import split
from moesim.routing.resolve import resolve_routing
from moesim.routing.trace import RoutingCounts
from moesim.spec.model import AttentionSpec, ModelSpec, MoeSpec
from moesim.spec.scenario import HoldoutSpec, LoadFile, RoutingSpec, SyntheticSpec


def load(name: str, phase: str = "any", steps: int = 1) -> RoutingCounts:
    counts = np.random.default_rng(len(name)).random((steps, 2, 4)) + 1.0
    return RoutingCounts(counts, np.arange(2), 2, name=name, phase=phase, per_step=steps > 1)


def model(layers: int = 4, dense: int = 2, experts: int = 4, top_k: int = 2) -> ModelSpec:
    attention = AttentionSpec(kind="gqa", heads=4, kv_heads=4, head_dim=8, value_head_dim=8)
    moe = MoeSpec(experts=experts, top_k=top_k, intermediate=8, layer_ids=tuple(range(dense, layers)))
    return ModelSpec(
        id="toy",
        source="test",
        layers=layers,
        hidden=32,
        vocabulary=64,
        dense_intermediate=64,
        attention=attention,
        moe=moe,
    )


def test_files_are_split_within_each_phase() -> None:
    loads = [load(f"p{i}", "prefill") for i in range(4)] + [load(f"d{i}", "decode") for i in range(2)]
    for seed in range(20):
        fit, judge = split(loads, HoldoutSpec(by="file", fraction=0.5), np.random.default_rng(seed))
        assert sorted(one.name for one in (*fit, *judge)) == sorted(one.name for one in loads)
        assert [sum(one.phase == phase for one in judge) for phase in ("prefill", "decode")] == [2, 1]


def test_one_file_of_each_phase_still_leaves_one_to_judge() -> None:
    fit, judge = split([load("p", "prefill"), load("d", "decode")], HoldoutSpec(), np.random.default_rng(0))
    assert len(fit) == len(judge) == 1


@pytest.mark.parametrize("by", ["file", "step", "time"])
def test_one_snapshot_has_nothing_to_hold_out(by: str) -> None:
    one = load("only")
    assert split([one], HoldoutSpec.model_validate({"by": by}), np.random.default_rng(0)) == ((one,), ())
    assert split([one, one], HoldoutSpec(by="none"), np.random.default_rng(0)) == ((one, one), ())


def test_steps_and_time_blocks() -> None:
    trace = load("trace", steps=10)
    for by in ("step", "time"):
        (fit,), (judge,) = split(
            [trace], HoldoutSpec.model_validate({"by": by, "fraction": 0.3}), np.random.default_rng(1)
        )
        assert (len(fit.counts), len(judge.counts)) == (7, 3)
        assert np.isclose(fit.counts.sum() + judge.counts.sum(), trace.counts.sum())
        if by == "time":
            assert np.array_equal(judge.counts, trace.counts[7:])


def spec_of(path: Path) -> RoutingSpec:
    return RoutingSpec(loads=(LoadFile(file=path, phase="decode", weight=3.0),))


def test_files_are_checked_against_the_model(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"logical_count": [[0] * 4, [0] * 4, [1, 2, 3, 4], [4, 3, 2, 1]]}))
    (found,) = resolve_routing(spec_of(path), model(), np.random.default_rng(0))
    assert found.layer_ids.tolist() == [2, 3]
    assert (found.phase, found.weight, found.absolute_layers) == ("decode", 3.0, 4)
    for wrong, part in (
        (model(experts=8), "4 experts, toy has 8"),
        (model(dense=1), "layer 1 of toy has no counts"),
        (model(layers=5, dense=3), "layer 2 has counts"),
        (model(top_k=4), "at most 25"),
    ):
        with pytest.raises(BadInput, match=part) as caught:
            resolve_routing(spec_of(path), wrong, np.random.default_rng(0))
        assert str(path) in str(caught.value)


def test_moe_relative_rows_get_their_absolute_layers(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, counts=np.ones((2, 4)))
    (found,) = resolve_routing(spec_of(path), model(), np.random.default_rng(0))
    assert found.layer_ids.tolist() == [2, 3]


def test_its_own_seed_fixes_synthetic_loads() -> None:
    routing = RoutingSpec(synthetic=SyntheticSpec(seed=5))
    first = resolve_routing(routing, model(), np.random.default_rng(0))
    second = resolve_routing(routing, model(), np.random.default_rng(1))
    assert all(np.array_equal(a.counts, b.counts) for a, b in zip(first, second, strict=True))


def test_a_scenario_that_lists_a_file_twice_is_refused(tmp_path: Path) -> None:
    counts = {"logical_count": [[1, 2, 3, 4], [4, 3, 2, 1]]}
    (tmp_path / "a.json").write_text(json.dumps(counts))
    files = [LoadFile(file=tmp_path / "a.json", phase=phase) for phase in ("prefill", "decode")]
    with pytest.raises(BadInput, match="a is given twice; give each workload once"):
        resolve_routing(RoutingSpec(loads=files), model(), np.random.default_rng(0))
