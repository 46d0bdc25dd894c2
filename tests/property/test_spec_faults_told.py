"""Whatever is wrong with a scenario or a cluster file: one line, at a place that the file has, in words of the file."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from moesim.errors import BadInput
from moesim.spec.base import Spec
from moesim.spec.cluster import ClusterSpec
from moesim.spec.scenario import Scenario
from tests.scenarios import DEMO

CASES = 600
JUNK = [
    None, True, 3, -1, 1.5, "x", "1,000", [], {}, [1], ["a"], {"a": 1}, {1: 2}, {None: 3}, [[]], [{}], float("inf"),
]  # fmt: skip
STREAM = {"kind": "stream", "gpus": [0], "to": [1], "bytes_per_s": 1e9}


def sources() -> list[tuple[dict[str, Any], type[Spec]]]:
    serving = yaml.safe_load(DEMO.read_text())
    serving["faults"] = [{"kind": "slow_gpu"}]
    serving["policies"]["gate"] = {"name": "hash"}
    serving["cost"]["overheads"] = {"step_s": 1e-3}
    serving["cluster"]["background"] = [STREAM]
    serving["routing"] = {"loads": [{"file": "a.json"}], "drift": {"points": [{"at_s": 0, "weights": [1]}]}}
    training = {**serving, "training": {"sequence_length": 4096, "micro_batch": 1, "global_batch": 64}}
    del training["serving"]
    path = DEMO.parents[2] / "moesim" / "spec" / "clusters" / "h200_sxm.yaml"
    cluster = yaml.safe_load(path.read_text()) | {"node": {"gpu_nic": [0]}, "background": [STREAM]}
    cluster["measured"] = {"nic_bytes_per_s": {"rel_sigma": 0.1, "points": 3}}
    return [(serving, Scenario), (training, Scenario), (cluster, ClusterSpec)]


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def damaged(data: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    data = copy.deepcopy(data)
    *parents, last = rng.choice(list(places(data)))
    inside: Any = data
    for parent in parents:
        inside = inside[parent]
    how = rng.random()
    if how < 0.6 or not isinstance(inside, dict):
        inside[last] = copy.deepcopy(rng.choice(JUNK))
    elif how < 0.85:
        inside[f"{last}{rng.choice('sx')}"] = inside.pop(last)
    else:
        inside[rng.choice([3, None, True, "zz"])] = 1
    return data


@pytest.mark.parametrize("source", range(3))
def test_faults_are_told_in_words_of_the_file(source: int) -> None:
    rng = random.Random(source)
    data, model = sources()[source]
    told = 0
    for _ in range(CASES):
        given = damaged(data, rng)
        try:
            model.read(given, where="file")
        except BadInput as error:
            told += 1
            assert "\n" not in error.line()
            assert not re.search(r"Spec\b|Choice\b|lax-or|instance of|tuple|\[key\]", error.what.split(", got ")[0])
            names = error.where.removeprefix("file").removeprefix(": ").split(".") if error.where != "file" else []
            known = {str(key) for place in places(given) for key in place} | set(_fields(model))
            assert set(names) <= known, error.line()
    assert told > CASES / 3


def _fields(model: Any) -> Iterator[str]:
    """Every key of a spec and of those in it: what may be named as missing."""
    for name, field in getattr(model, "model_fields", {}).items():
        yield name
        yield from _of(field.annotation)


def _of(annotation: Any) -> Iterator[str]:
    yield from _fields(annotation)
    for part in getattr(annotation, "__args__", ()):
        yield from _of(part)
