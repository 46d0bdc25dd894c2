"""The documentation holds: links lead somewhere, commands exist, and every whole scenario in it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from moesim import plugins
from moesim.cli import run
from tests.conftest import REPO

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def scenarios() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for kind, text in FENCE.findall(page.read_text()):
            data = yaml.safe_load(text) if kind == "yaml" else None
            if isinstance(data, dict) and {"model", "cluster", "serving"} <= data.keys():
                found.append((f"{page.relative_to(REPO)}", text))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_commands_exist(page: Path) -> None:
    commands = plugins.available(plugins.COMMANDS)
    for _, text in FENCE.findall(page.read_text()):
        for command in re.findall(r"^\$ (?:\.venv/bin/)?moesim (\w+)", text, re.MULTILINE):
            assert command in commands, f"{page.name} calls moesim {command}"


def test_there_are_whole_scenarios_in_the_docs() -> None:
    assert scenarios()


@pytest.mark.parametrize(("page", "text"), scenarios(), ids=[page for page, _ in scenarios()])
def test_scenarios_run(page: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scenario.yaml"
    path.write_text(text)
    for seed, load in enumerate(yaml.safe_load(text).get("routing", {}).get("loads", [])):
        counts = np.random.default_rng(seed).integers(1, 2000, (61, 256))
        counts[:3] = 0  # DeepSeek's dense layers
        (tmp_path / load["file"]).write_text(json.dumps({"logical_count": counts.tolist()}))
    asked = ["simulate", str(path), "--json", "--draws", "0", "--set", "serving.workload.requests=20"]
    code = run(asked)
    printed = capsys.readouterr()
    assert code == 0, f"{page}: {printed.err}"
    assert json.loads(printed.out)["metrics"]["requests_completed"] == 20


def test_readme_names_only_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"\$ make (\w+)", (REPO / "README.md").read_text()):
        assert target in targets


def test_the_readme_tells_the_errors_of_the_accuracy_page() -> None:
    """The page's table is generated and held to the record; the README repeats five figures of its blind column."""
    blind = {
        cells[1].strip(): cells[2].strip()
        for line in (REPO / "docs/accuracy.md").read_text().splitlines()
        if len(cells := line.split("|")) == 5
    }
    told = (REPO / "README.md").read_text().partition("## How right it is")[2].partition("\n## ")[0]
    rows = blind["rows, priced"].split(", ")[1].split(" ")[0]
    errors = [blind[f"{name}: MAPE, median, p90, bias"].split(",")[0] for name in ("TPOT", "TTFT", "tokens/s/GPU")]
    regret = blind["choice groups: number, Spearman, regret"].split(", ")[2]
    assert f"On {int(rows):,} measured runs" in told
    assert re.findall(r"[0-9.]+%", told) == [*errors, regret]
