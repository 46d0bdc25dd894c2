"""The one line that a faulty scenario gets: unknown keys first, places as the file has them, mends to type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesim.errors import BadInput
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import load_scenario
from tests.scenarios import DEMO, small, write

WORKLOAD = {"isl": 256, "osl": 24, "requests": 120, "arrivals": {"concurrency": 4}}


def renamed(data: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {new if key == old else key: value for key, value in data.items()}


def line(path: Path, *overrides: str) -> str:
    with pytest.raises(BadInput) as caught:
        load_scenario(path, overrides)
    return caught.value.line()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (renamed(small(), "model", "modle"), "yaml: modle: unknown key; did you mean model? known keys here: schema"),
        (renamed(small(), "cluster", "clutser"), "yaml: clutser: unknown key; did you mean cluster?"),
        (small(serving={"worklod": WORKLOAD}), "yaml: serving.worklod: unknown key; did you mean workload?"),
        (small(cluster={"sytem": "h200_sxm"}), "yaml: cluster.sytem: unknown key; did you mean system?"),
        (small(cluster={"system": "h200_sxm", "node": 4}), "yaml: cluster.node: unknown key; did you mean nodes?"),
        (small(cost={"overheads": {"step": 1}}), "yaml: cost.overheads.step: unknown key; did you mean step_s?"),
        # What is missing beside a key that nothing is near to is still counted.
        (small(policies={"gate": {"kind": "hash"}}), "policies.gate.kind: unknown key (and 1 more); known keys"),
        (small(cluster={"nodes": 2}), "yaml: cluster.system: this key is missing; add it"),
    ],
)
def test_a_mistyped_key_comes_before_the_one_it_leaves_missing(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    assert said in line(write(tmp_path, data))


def test_a_mistyped_key_of_a_cluster_file(tmp_path: Path) -> None:
    text = (DEMO.parents[2] / "moesim" / "spec" / "clusters" / "h200_sxm.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("\nnic_bytes_per_s: 5.00e+10", "\nnic_gbytes_per_s: 50"))
    with pytest.raises(BadInput, match=r"yaml: nic_gbytes_per_s: unknown key; did you mean nic_bytes_per_s\?"):
        load_cluster(path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "routing={synthetic: zipf}",
            "routing.synthetic: this takes a mapping of keys, got 'zipf'; write {kind: zipf}",
        ),
        ("serving=x", "serving: this takes a mapping of keys, got 'x'; give some of its keys: workload, batching"),
        ("cluster=3", "cluster: this takes a mapping of keys, got 3; give some of its keys: system, nodes"),
        ("faults={kind: jitter}", "faults: this takes a list, got {'kind': 'jitter'}; write [...]"),
        ("faults=[jitter]", "faults.0: this takes a mapping of keys, got 'jitter'; write {kind: jitter}"),
        (
            "serving.workload={isl: 2, osl: 2, requests: 1,000, arrivals: {concurrency: 3}}",
            "serving.workload: the key 0 is no name; write numbers without commas (requests: 1000, not 1,000)",
        ),
        ("serving.workload.requests=1,000", "got '1,000'; write it without commas: 1000"),
        ("serving.workload.requests=1,5", "got '1,5'; correct this value"),
        ("cost.profiles.1=b", "--set cost.profiles.1=b: '1' is no entry of a list of 1; count its entries from 0 to 0"),
        ("cost.profiles.x=b", "'x' is no entry of a list of 1"),
    ],
)
def test_no_class_of_the_program_is_named(tmp_path: Path, override: str, said: str) -> None:
    told = line(write(tmp_path, small(cost={"source": "roofline", "profiles": ["default"]})), override)
    assert said in told
    assert not any(word in told for word in ("Spec", "Choice", "tuple", "dictionary", "lax-or-strict"))


def test_an_override_sets_an_entry_of_a_list(tmp_path: Path) -> None:
    loads = [{"file": "a.json"}, {"file": "b.json"}]
    path = write(tmp_path, small(routing={"loads": loads}))
    found = load_scenario(path, ("routing.loads.1.file=c.json", "routing.loads.0={file: d.json, weight: 2}")).routing
    assert found.loads is not None
    assert [(one.file.name, one.weight) for one in found.loads] == [("d.json", 2), ("c.json", 1)]
