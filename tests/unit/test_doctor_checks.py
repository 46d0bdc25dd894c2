"""`moesim doctor`: what it finds in an installation and in a scenario, and the exit code it leaves with."""

from __future__ import annotations

import json
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import run
from moesim.commands import doctor
from moesim.commands.doctor import check_scenario, extras, gpus, installation, packages, python_version

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
    assert {f"package {name}" for name in doctor.PACKAGES} <= set(findings)
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


class FakeNvml(types.ModuleType):
    """As much of pynvml as the check uses."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, devices: int, driver: bool = True, answers: bool = True) -> None:
        super().__init__("pynvml")
        self.devices, self.driver, self.answers, self.closed = devices, driver, answers, False

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.closed = True

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.devices

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if not self.answers:
            raise self.NVMLError("Unknown Error")
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return "NVIDIA H200"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return types.SimpleNamespace(total=150_754_820_096)


@pytest.mark.parametrize(
    ("fake", "states", "text"),
    [
        (FakeNvml(devices=2), ["ok", "ok"], "NVIDIA H200, 151 GB"),
        (FakeNvml(devices=0), ["absent"], "lists no GPU"),
        (FakeNvml(devices=1, driver=False), ["absent"], "Driver Not Loaded"),
        (FakeNvml(devices=1, answers=False), ["fault"], "Unknown Error"),
    ],
)
def test_gpus(fake: FakeNvml, states: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(doctor, "_installed", lambda name: True)
    found = gpus()
    assert [finding.state for finding in found] == states
    assert text in found[0].detail
    assert fake.closed == fake.driver


def test_without_the_nvml_package_gpus_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: False)
    assert [finding.state for finding in gpus()] == ["absent"]


def test_a_sound_scenario(tmp_path: Path) -> None:
    findings, error = check_scenario(write(tmp_path, SCENARIO))
    assert error is None
    found = {finding.check: finding.detail for finding in findings}
    assert found["parallel"] == "DP32 EP32, 1 instance"
    assert found["placement"] == "9 slots of each layer on each of 32 ranks"
    assert "tokens of an attention-DP rank" in found["memory"]


@pytest.mark.parametrize(
    ("text", "code", "message", "last"),
    [
        (SCENARIO.replace("DeepSeek-V3", "DeepSeek-V9"), 2, "unknown model", "scenario"),
        (SCENARIO.replace("h200_sxm", "h999"), 2, "unknown cluster preset", "model"),
        (SCENARIO.replace("roofline", "crystal_ball"), 2, "cost.source: unknown cost", "cluster"),
        (SCENARIO.replace("contiguous", "oracle"), 2, "placement.solver: unknown solver", "cost model"),
        (
            SCENARIO.replace("experts: 32", "experts: 3"),
            1,
            "259 slots do not divide by ep 32; use 32 redundant",
            "parallel",
        ),
        (SCENARIO.replace("nodes: 4", "nodes: 1").replace("h200", "h100"), 1, "weights and buffers need", "placement"),
        (SCENARIO + "parallel: {tp: 3, ep: 3}\n", 1, "do not divide the cluster's 32", "solver"),
        (SCENARIO + "routing: {loads: [{file: none.json}]}\n", 2, "none.json", "solver"),
        (SCENARIO + "sytem: x\n", 2, "sytem: unknown key", None),
        (SCENARIO + "system: nothing\n", 2, "unknown system", None),
    ],
)
def test_the_first_error_of_a_scenario(tmp_path: Path, text: str, code: int, message: str, last: str | None) -> None:
    findings, error = check_scenario(write(tmp_path, text))
    assert error is not None
    assert error.exit_code == code
    assert message in error.line()
    assert (findings[-1].check if findings else None) == last


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
    assert captured.err.count("\n") == 1


def test_a_fault_of_the_installation_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "installation", lambda: [python_version((3, 9, 0))])
    assert run(["doctor"]) == 1
    assert "use Python 3.11" in capsys.readouterr().err
