"""Damaged map files: every reader says what is wrong in one line, and never anything else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import MoesimError
from moesim.spec.placement_file import read_placement
from moesim.spec.plan import ExpertPlacement, PlacementRequest
from placement.export import sglang, trtllm, vllm_ascend
from placement.export.plan_file import read_plan
from placement.problem import solve

MUTANTS = 250
JUNK = [
    b"",
    b"null",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"-1",
    b"1e999",
    b"NaN",
    b"\x00",
    b"\xff\xfe",
    b"9" * 40,
]
JUNK += [
    b"9" * 40,
    b"true",
    b"[]",
    b"{}",
    b"&a",
    b"*a",
    b"!!python/object:os.system x",
    b"\n",
    b"\t",
    b"- ",
    b"[" * 5000,
]


@pytest.fixture(scope="module")
def placement() -> ExpertPlacement:
    loads = np.random.default_rng(0).lognormal(0.0, 1.0, (1, 2, 6))
    loads /= loads.sum(axis=-1, keepdims=True)
    return solve(PlacementRequest(loads, np.ones(1), np.arange(1, 3), 3, slots=8, ranks=4), "greedy").placement


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Damage the content in one to three places: cut, repeat, swap bytes, or put junk in."""
    for _ in range(rng.randint(1, 3)):
        first, last = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
        kind = rng.randrange(5)
        if kind == 0:
            content = content[:first] + content[last:]
        elif kind == 1:
            content = content[:first]
        elif kind == 2:
            content = content[:last] + content[first:]
        elif kind == 3:
            content = content[:first] + rng.choice(JUNK) + content[first:]
        else:
            end = min(first + rng.randint(1, 4), len(content))
            content = content[:first] + rng.choice(JUNK) + content[end:]
    return content


def deeper(value: object, rng: random.Random) -> object:
    """Replace one value somewhere inside by something of another kind."""
    strange = [None, True, -1, 3.5, 10**30, "", "x", [], {}, [[]], float(rng.randint(0, 5)), rng.randint(0, 9)]
    if rng.random() < 0.3 or not value or not isinstance(value, (dict, list)):
        return rng.choice(strange)
    if isinstance(value, dict):
        key = rng.choice(list(value))
        changed = dict(value)
        if rng.random() < 0.2:
            del changed[key]
        else:
            changed[key] = deeper(value[key], rng)
        return changed
    index = rng.randrange(len(value))
    return [*value[:index], deeper(value[index], rng), *value[index + 1 :]]


READERS: dict[str, Callable[[Path], object]] = {
    "moesim": read_placement,
    "sglang": lambda path: sglang.read(path, experts=6, ranks=4, layer_ids=[1, 2]),
    "trtllm": lambda path: trtllm.read(path, experts=6, ranks=4, absolute_layers=3),
    "vllm-ascend": lambda path: vllm_ascend.read(path, experts=6, layer_ids=[1, 2], absolute_layers=3),
    "plan": read_plan,
}


def content_of(form: str, placement: ExpertPlacement) -> str:
    renders = {"sglang": sglang.render, "trtllm": trtllm.render, "vllm-ascend": vllm_ascend.render}
    if form == "plan":
        return "placement: map.json\nscenario:\n  model: x\n  cluster: {system: h200_sxm}\n"
    return renders[form](placement) if form in renders else json.dumps(placement.to_json())


@pytest.mark.parametrize("form", sorted(READERS))
def test_a_damaged_file_is_one_line_or_still_a_legal_map(form: str, placement: ExpertPlacement, tmp_path: Path) -> None:
    content = content_of(form, placement)
    rng = random.Random(form)
    path = tmp_path / "map.yaml"
    refused = 0
    for number in range(MUTANTS):
        if form in ("trtllm", "plan") or number % 2:
            path.write_bytes(mutate(content.encode(), rng))
        else:
            path.write_text(json.dumps(deeper(json.loads(content), rng)))
        try:
            found = READERS[form](path)
        except MoesimError as error:
            refused += 1
            assert "\n" not in error.line()
            assert error.where
        else:
            if isinstance(found, ExpertPlacement):
                assert (found.replica_counts() >= 1).all()
    assert refused >= MUTANTS // 2


@pytest.mark.parametrize("form", ["moesim", "sglang", "trtllm", "vllm-ascend", "plan"])
def test_a_folder_and_nothing_are_bad_input(form: str, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(MoesimError):
            READERS[form](path)
