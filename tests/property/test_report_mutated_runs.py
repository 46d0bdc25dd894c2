"""Damaged run folders: the page is written whole, or the command says one line; nothing in between."""

from __future__ import annotations

import json
import random
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from moesim.errors import BadInput
from moesim.output.report import write_run_report
from tests.report_run import write_run_folder

MUTATIONS = 250
STRANGE: list[Any] = [None, -1, 0, 1e308, -1e308, 5e-324, "", "x", "<b>", [], {}, True, [[]], float("nan"), 2**70]


def mutate(data: Any, rng: random.Random) -> None:
    """Replace, remove or repeat one value somewhere inside."""
    node, trail = data, []
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        trail.append((node, key))
        node = node[key]
        if rng.random() < 0.15:
            break
    if not trail:
        return
    holder, key = trail[-1]
    if rng.random() < 0.25:
        del holder[key]
    else:
        holder[key] = rng.choice(STRANGE)


@pytest.mark.parametrize("name", ["result.json", "simulation.json"])
def test_a_mutated_run_is_written_whole_or_refused(tmp_path: Path, name: str) -> None:
    folder = write_run_folder(tmp_path / "run")
    text = (folder / name).read_text()
    refused = 0
    for seed in range(MUTATIONS):
        rng = random.Random(seed)
        data = json.loads(text)
        for _ in range(rng.randint(1, 3)):
            mutate(data, rng)
        (folder / name).write_text(json.dumps(data))
        (folder / "report.html").unlink(missing_ok=True)
        try:
            write_run_report(folder)
        except BadInput as error:
            refused += 1
            assert "\n" not in error.line()
            assert name in error.line()
            assert not (folder / "report.html").exists()
        else:
            ET.fromstring((folder / "report.html").read_text().removeprefix("<!DOCTYPE html>\n"))
    assert 0 < refused < MUTATIONS


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run")
    for name in ("result.json", "simulation.json"):
        whole = (folder / name).read_bytes()
        for share in (0.0, 0.3, 0.99):
            (folder / name).write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(BadInput, match=name):
                write_run_report(folder)
        (folder / name).write_bytes(whole)
    shutil.rmtree(folder / "sglang")
    write_run_report(folder)
