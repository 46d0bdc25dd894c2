"""Loads whose model nobody names: what files cannot tell is said, and no map is written that no engine loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesim.cli import run
from moesim.errors import BadInput
from moesim.routing.readers import read_loads
from moesim.routing.trace import stack_profiles
from placement.given_loads import doubts, read_given


def counts(layers: int = 6, dense: int = 1, experts: int = 16) -> np.ndarray:
    table = np.random.default_rng(3).integers(50, 90, (layers, experts))
    table[:dense] = 0
    return table


def as_json(folder: Path, table: np.ndarray, name: str = "a.json") -> Path:
    (folder / name).write_text(json.dumps({"logical_count": table.tolist()}))
    return folder / name


def as_csv(folder: Path, table: np.ndarray, name: str = "a.csv", *, zeros: bool = False) -> Path:
    lines = [f"{i},{j},{n}" for i, row in enumerate(table) for j, n in enumerate(row) if n or (zeros and row.any())]
    (folder / name).write_text("layer_id,expert_id,count\n" + "\n".join(lines) + "\n")
    return folder / name


def test_layers_numbered_differently_are_told_apart(tmp_path: Path) -> None:
    table = counts(7, 3)
    loads = [read_loads(as_json(tmp_path, table)), read_loads(as_json(tmp_path, table[3:], "b.json"))]
    with pytest.raises(BadInput) as caught:
        stack_profiles(loads)
    assert "b: its layers are 0 to 3, those of a 3 to 6; number layers alike (absolute" in caught.value.line()
    odd = counts(12, 1)
    odd[3:12:2] = 0
    with pytest.raises(BadInput, match=r"those of a 1, 2, 4, 6, \.\.\. 10"):
        stack_profiles([read_loads(as_json(tmp_path, odd)), read_loads(as_json(tmp_path, counts(6, 0), "b.json"))])


def last_left_out(experts: int = 16) -> np.ndarray:
    table = counts(experts=experts)
    table[:, -1] = 0
    return table


def test_a_table_without_its_last_expert_is_doubted(tmp_path: Path) -> None:
    path = as_csv(tmp_path, last_left_out())
    (found,) = read_given([path], None)
    assert found.experts == 15
    (told,) = doubts([path], [found], None)
    assert told.startswith(f"{path}: its highest expert is 14, and 15 is an unusual number of experts")
    assert "--experts 16" in told
    (found,) = read_given([path], 16)
    assert found.experts == 16
    assert doubts([path], [found], 16) == []
    # A matrix has as many columns as the model has experts.
    other = as_json(tmp_path, counts(experts=15))
    assert doubts([other], read_given([other], None), None) == []


def test_the_widest_of_several_files_decides(tmp_path: Path) -> None:
    paths = [as_csv(tmp_path, last_left_out()), as_csv(tmp_path, counts(), "b.csv"), as_json(tmp_path, counts())]
    found = read_given(paths, None)
    assert [one.experts for one in found] == [16, 16, 16]
    assert doubts(paths, found, None) == []


def test_other_experts_than_asked_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"a\.json: the counts are of 16 experts, --experts says 32"):
        read_given([as_json(tmp_path, counts())], 32)
    with pytest.raises(BadInput, match="expert_id 15 is more than the model has; it has 8"):
        read_given([as_csv(tmp_path, counts())], 8)
    with pytest.raises(BadInput, match="0 experts"):
        read_given([as_csv(tmp_path, counts())], 0)


@pytest.mark.parametrize(
    ("live", "lacking"),
    [
        (range(3, 12), []),
        (range(1, 12, 2), []),  # every second layer
        (range(0, 11, 2), []),
        ([11], []),
        ([3, 4, 6, 7, 8, 9, 10, 11], [5]),
        ([3, 4, 5, 6, 7, 8, 9, 10], [11]),
        ([1, 3, 7, 9, 11], [5]),
        ([3, 4, 7, 8, 9, 10, 11], [5, 6]),
    ],
)
def test_a_layer_that_counts_nothing_among_others_is_named(tmp_path: Path, live: list[int], lacking: list[int]) -> None:
    table = counts(12, 12)
    table[list(live)] = counts(len(live), 0)
    path = as_json(tmp_path, table)
    told = doubts([path], read_given([path], None), None)
    assert len(told) == bool(lacking)
    if lacking:
        names = " and ".join(map(str, lacking))
        assert told[0].startswith(f"{path}: no token in layer{'s' if len(lacking) > 1 else ''} {names},")


def test_place_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = last_left_out()
    table[3] = 0
    given = ["place", "--loads", str(as_csv(tmp_path, table)), "--gpus", "2", "--holdout", "0", "--json"]
    assert run([*given, "--slots", "16"]) == 0
    told = capsys.readouterr()
    assert "note: " in told.err
    assert "highest expert is 14" in told.err
    assert "no token in layer 3," in told.err
    assert json.loads(told.out)["doubts"][0] in told.err
    assert run([*given, "--slots", "16", "--experts", "16"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == 16


@pytest.mark.parametrize("form", ["sglang", "vllm-ascend"])
def test_a_name_that_the_engine_would_not_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    loads = as_json(tmp_path, counts())
    given = ["place", "--loads", str(loads), "--gpus", "2", "--slots", "16", "--format", form]
    assert run([*given, "--out", str(tmp_path / "x.map")]) == 2
    assert f"{form} reads a map only from a name that ends in .json; use " in capsys.readouterr().err
    assert not (tmp_path / "x.map").exists()
