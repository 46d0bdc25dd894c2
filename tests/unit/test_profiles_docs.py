"""The logs and commands that the how-to page shows give what the page says they give."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from moesim.cli import run
from profiles.import_commands import how_to_price
from profiles.whose import asked_system
from tests import printed_samples as samples

PAGE = "docs/how-to/profile.md"
FILE = re.compile(r"`([\w.-]+\.log)`[^`]*(?:`[^`]*`[^`]*)?holds\n\n```text\n(.*?)```", re.DOTALL)
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_page_shows_what_its_commands_print(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (repo / PAGE).read_text(encoding="utf-8").split("## From logs you have")[1]
    monkeypatch.chdir(tmp_path)
    files = FILE.findall(page)
    assert [name for name, _ in files] == ["alltoall.log", "low-latency.log"]
    for name, text in files:
        Path(name).write_text(text)
    Path("comm_ep_kernels.csv").write_text(samples.EXCHANGES)
    Path("deepgemm_h800.csv").write_text(samples.DEEPGEMM)
    Path("topo.txt").write_text(samples.topo())
    ran = 0
    for block in CONSOLE.findall(page):
        commands, shown = [], []
        for line in block.splitlines():
            (commands if line.startswith("$ ") else shown).append(line)
        for command in commands:
            words = command.split()[1:]
            if words[0] != "moesim":
                continue
            assert run(words[1:]) == 0, command
            ran += 1
        printed = capsys.readouterr()
        if shown:
            assert Counter(shown) == Counter((printed.out + printed.err).splitlines())
    assert ran == 4
    assert Path("our-cluster.yaml").is_file()


def test_an_import_says_how_to_price_with_it() -> None:
    assert how_to_price(Path("mine"), asked_system("h200_sxm")) == "price with it: cost: {profiles: [mine, default]}"
    other = how_to_price(Path("mine"), asked_system("h100_sxm"))  # `default` would be refused there
    assert other.startswith("price with it: cost: {profiles: [mine]} (none ships for h100_sxm;")
