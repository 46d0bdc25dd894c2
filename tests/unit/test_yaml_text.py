"""One loader for the YAML of users: a key that stands twice is refused, by key and line, wherever a file is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moesim.cli import run
from moesim.errors import BadInput
from moesim.spec.maps.trtllm import parse
from moesim.spec.overheads import read_calibration
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import load_scenario
from moesim.spec.yaml_text import parse_yaml, read_yaml
from placement.export.plan_file import read_plan
from tests.scenarios import DEMO
from validate.fabric.spec import read_lab
from validate.published.manifest import read_manifest

REPO = DEMO.parents[2]
CLUSTER = REPO / "moesim" / "spec" / "clusters" / "h200_sxm.yaml"
TWICE = "a: 1\nb:\n  c: {d: 1}\n  'c': 2\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TWICE, "the key c stands twice (line 4)"),
        ("{a: 1, a: 1}", "the key a stands twice (line 1)"),
        ("- x: 1\n  x: 2\n", "the key x stands twice (line 2)"),
        ("1: a\n0x1: b\n", "the key 0x1 stands twice (line 2)"),
        ("a: &m {x: 1}\nb:\n  <<: *m\n  <<: *m\n", "the key << stands twice (line 4)"),
    ],
)
@pytest.mark.parametrize("loader", [parse_yaml, parse])
def test_a_key_that_stands_twice_is_named(loader: Callable[[str], object], text: str, said: str) -> None:
    from moesim.spec.yaml_text import yaml_fault

    with pytest.raises(yaml.YAMLError) as caught:
        loader(text)
    assert yaml_fault(caught.value) == said


@pytest.mark.parametrize("loader", [parse_yaml, parse])
@pytest.mark.parametrize(
    "text",
    [
        CLUSTER.read_text(),
        DEMO.read_text(),
        "base: &a {x: 1, y: 2}\nmid: &b {<<: *a, x: 3}\nuse: {<<: *b, x: 4, z: {<<: [*a, *b], y: 9}}\n",
        "use: &u {<<: {x: 1}, x: 2}\nagain: {<<: *u, x: 3}\n",
        "? [1, 2]\n: a\n? [3]\n: b\n",
        "1: a\n'1': b\n",
        "=: 1\n",
    ],
)
def test_all_else_reads_as_by_pyyaml(loader: Callable[[str], object], text: str) -> None:
    try:
        expected = yaml.safe_load(text)
    except yaml.YAMLError:
        with pytest.raises(yaml.YAMLError):
            loader(text)
        return
    assert loader(text) == expected


@pytest.mark.parametrize("read", [load_scenario, load_cluster, read_calibration, read_plan, read_lab, read_manifest])
def test_every_reader_refuses_it(tmp_path: Path, read: Callable[..., object]) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(TWICE)
    with pytest.raises(BadInput, match=r"twice\.yaml: not valid YAML: the key c stands twice \(line 4\)"):
        read(str(path) if read is read_lab else path)


def test_a_scenario_with_two_seeds_ends_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(DEMO.read_text() + "seed: 1\n")
    assert run(["simulate", str(path)]) == 2
    assert re.search(r"the key seed stands twice \(line \d+\)", capsys.readouterr().err)


def test_no_command_reads_yaml_by_another_loader() -> None:
    """Besides a package's own description of its systems, which nobody here writes."""
    found = {
        path.relative_to(REPO).as_posix()
        for folder in ("moesim", "placement", "profiles", "validate")
        for path in (REPO / folder).rglob("*.py")
        if re.search(r"yaml\.(safe_)?load\(", path.read_text(encoding="utf-8"))
    }
    assert found == {
        "moesim/spec/yaml_text.py", "moesim/spec/maps/trtllm.py", "profiles/importers/aiconfigurator.py"
    }  # fmt: skip


def test_what_is_no_yaml_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nb: [1\n")
    with pytest.raises(BadInput, match=r"a\.yaml: not valid YAML: .*\(line 3\)"):
        read_yaml(path, what="plan")
