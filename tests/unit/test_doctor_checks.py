"""`moesim doctor`: what it finds in an installation and in a scenario, and the exit code it leaves with."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from moesim.cli import run
from moesim.commands.doctor import installation as checks
from moesim.commands.doctor.installation import (
    PACKAGES,
    extras,
    installation,
    nvml_package,
    origin,
    packages,
    python_version,
    shadows,
)

SCENARIO = """
model: deepseek-ai/DeepSeek-V3
cluster: {system: h200_sxm, nodes: 4}
cost: {source: roofline}
placement: {solver: contiguous, redundant_experts: 32}
serving: {workload: {isl: 2000, osl: 256, requests: 10, arrivals: {concurrency: 4}}}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "scenario.yaml"
    path.write_text(text)
    return path


def test_this_installation_is_sound() -> None:
    findings = {finding.check: finding for finding in installation()}
    assert [name for name, finding in findings.items() if finding.state == "fault"] == []
    assert {f"package {name}" for name in PACKAGES} <= set(findings)
    assert {"extra dev", "extra hardware", "extra ray", "extra silicon"} <= set(findings)


def test_an_old_python_is_a_fault() -> None:
    assert python_version((3, 10, 4)).state == "fault"
    assert python_version((3, 13, 0)).state == "ok"


def test_a_package_of_another_distribution_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "not_moesim").mkdir()
    (tmp_path / "not_moesim" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = packages(("not_moesim",))
    assert found.state == "fault"
    assert "environment of its own" in found.mend
    (gone,) = packages(("surely_not_there",))
    assert gone.state == "fault"


def test_a_missing_extra_is_absent_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    found = {finding.check: finding for finding in extras()}
    assert found["extra hardware"].state == "absent"
    assert found["extra hardware"].detail == "lacks torch"
    assert found["extra hardware"].mend == "pip install '.[hardware]'"
    assert found["extra silicon"].state == "ok"


class FakeDistribution:
    """As much of an installed distribution as the check reads."""

    def __init__(self, version: str, direct_url: str | None = None) -> None:
        self.version, self.direct_url = version, direct_url

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self.direct_url


@pytest.mark.parametrize(
    ("found", "states", "words"),
    [
        ([FakeDistribution("1.0")], [], ""),
        ([FakeDistribution("1.0", '{"url": "file:///home/me/moesim", "dir_info": {"editable": true}}')], [], ""),
        (
            [FakeDistribution("1.0", '{"url": "file:///else/moesim", "dir_info": {"editable": true}}')],
            ["warn"],
            "/else",
        ),
        ([FakeDistribution("1.0", '{"url": "file:///else/moesim", "dir_info": {}}')], [], ""),
        ([FakeDistribution("1.0", "no json")], [], ""),
        ([FakeDistribution("1.0", "[]")], [], ""),
        ([FakeDistribution("1.0"), FakeDistribution("0.9")], ["warn"], "1.0, 0.9"),
        ([], [], ""),
    ],
)
def test_an_editable_install_of_another_folder_is_told(
    found: list[FakeDistribution], states: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "distributions", lambda name: found)
    findings = origin(Path("/home/me/moesim"))
    assert [finding.state for finding in findings] == states
    assert all(words in finding.detail for finding in findings)


def test_a_distribution_with_a_package_of_our_name_is_told() -> None:
    owners = {"validate": ["configobj", "moesim"], "moesim": ["moesim"], "placement": ["moesim", "moesim"]}
    (found,) = shadows(owners=owners)
    assert found.check == "package validate"
    assert found.state == "warn"
    assert "configobj" in found.detail
    assert "configobj" in found.mend


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, None), ("11.5.3", "--force-reinstall nvidia-ml-py"), ("13.0.1", "pip uninstall pynvml"), ("odd", "pynvml")],
)
def test_the_pynvml_distribution_is_told(
    version: str | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "version_of", lambda name: version if name == "pynvml" else "1")
    findings = nvml_package()
    assert [finding.state for finding in findings] == ([] if words is None else ["warn"])
    assert all(words is not None and words in finding.mend for finding in findings)


def test_the_command_prints_its_findings_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    assert "package validate" in capsys.readouterr().out


def test_the_command_prints_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, SCENARIO.replace("experts: 32", "experts: 3"))
    assert run(["doctor", str(path), "--json"]) == 1
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert printed["ok"] is False
    assert "do not divide" in printed["error"]
    assert printed["coverage"] == []
    assert captured.err.count("\n") == 1


def test_a_fault_of_the_installation_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "installation", lambda: [python_version((3, 9, 0))])
    assert run(["doctor"]) == 1
    assert "use Python 3.11" in capsys.readouterr().err
