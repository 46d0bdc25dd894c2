"""The page of `moesim place --report`: what it says is what the command says, and it stands alone."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moesim import cli
from moesim.output.page import section
from moesim.routing.trace import RoutingCounts
from moesim.spec.scenario import HoldoutSpec, Scenario
from placement import planning
from placement.page import place_page
from placement.planning import Asked, Placed
from placement.verdict import Verdict
from tests.scenarios import small

SECTIONS = ("verdict", "workloads", "time", "loads", "replicas", "caveats", "run")


def loads(names: str = "abcd") -> list[RoutingCounts]:
    rng = np.random.default_rng(0)
    shared = rng.lognormal(0.0, 1.0, (3, 16))
    ids = np.asarray([1, 2, 3])
    return [RoutingCounts(1e5 * shared * rng.lognormal(0.0, 0.3, (1, 3, 16)), ids, 4, name) for name in names]


def placed(names: str = "abcd", slots: int = 20) -> Placed:
    given = tuple(loads(names))
    spec = HoldoutSpec(by="file" if len(given) > 1 else "none")
    return planning.place(Asked(given, ranks=4, nodes=1, slots=slots, groups=1, solver="greedy", holdout=spec, seed=0))


class Balanced(HTMLParser):
    """Whether every element that is opened is closed, in order; and the anchors and figures met."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.anchors: list[str] = []
        self.figures: list[float] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        if tag == "section":
            self.anchors.append(str(found["id"]))
        if tag == "data":
            self.figures.append(float(str(found["value"])))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str) -> Balanced:
    found = Balanced()
    found.feed(text)
    assert found.open == []
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", text)
    assert "<script" not in text
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", text)
    return found


def test_the_page_is_whole_and_says_the_verdict_first() -> None:
    found = placed()
    text = place_page(found)
    told = read(text)
    assert tuple(told.anchors) == SECTIONS
    assert found.verdict.text.replace("'", "&#x27;") in text
    assert text.index(found.verdict.text[:30].replace("'", "&#x27;")) < text.index('id="workloads"')
    assert place_page(found) == text  # a pure function


def test_its_figures_are_those_of_the_json() -> None:
    found = placed()
    report = found.to_json()
    figures = read(place_page(found)).figures
    wanted = [report["holdout"]["gain_from_replicas"]["value"], report["gain"]["value"]]
    wanted += [report["max_over_mean"]["mean"], *report["max_over_mean"]["by_workload"].values()]
    wanted += [value for one in report["holdout"]["by_workload"].values() for value in one.values()]
    for value in wanted:
        assert any(value == pytest.approx(figure, rel=1e-12) for figure in figures), value


def test_held_out_figures_by_workload_make_the_means_of_the_verdict() -> None:
    held = placed().held
    assert held is not None
    for contender, figures in held.by_workload.items():
        assert np.mean(list(figures.values())) == pytest.approx(held.each[contender])
    worst = held.worst
    for loads_ in worst.loads.values():
        assert loads_.mean(axis=1) == pytest.approx(np.ones(3))
    highest = max(held.by_workload["planned"].values())
    assert worst.loads["planned"].max(axis=1).mean() >= highest - 1e-12


def test_one_snapshot_shows_no_held_out_picture_and_says_so() -> None:
    found = placed("a")
    text = place_page(found)
    assert "verdict withheld" in text
    assert "Nothing was held out" in text
    assert "held out</h3>" not in text
    read(text)


def test_without_replicas_there_is_no_map_of_them() -> None:
    text = place_page(placed(slots=16))
    assert "The plan has no replicas" in text
    read(text)


def test_the_replica_map_names_experts_and_ranks() -> None:
    found = placed(slots=32)
    text = place_page(found)
    counts = found.placement.replica_counts()
    row, expert = (int(at) for at in np.unravel_index(int(counts[:1].argmax()), counts.shape))
    ranks = np.nonzero(found.placement.physical_to_logical[row] == expert)[0] // found.placement.slots_per_rank
    said = f"most: expert {expert} on ranks {', '.join(map(str, ranks.tolist()))}"
    assert f"layer 1: {int((counts[0] > 1).sum())} of 16 experts have replicas; {said}" in text


def test_a_further_section_has_its_place() -> None:
    text = place_page(placed(), more=[section("budget", "Step time against replica budget", "<p>x</p>")])
    assert text.index('id="replicas"') < text.index('id="budget"') < text.index('id="caveats"')
    read(text)


@pytest.mark.parametrize("code", ["gain", "tie", "dont", "mixed", "withheld"])
def test_every_verdict_has_its_badge(code: str) -> None:
    found = dataclasses.replace(placed(), verdict=Verdict(code, "A <sentence> & more."))
    text = place_page(found)
    assert "A &lt;sentence&gt; &amp; more." in text
    read(text)


def files(folder: Path) -> list[str]:
    arguments = []
    for load in loads():
        path = folder / f"<b>{load.name}&.json"
        path.write_text(json.dumps({"logical_count": np.vstack([np.zeros((1, 16)), load.counts[0]]).tolist()}))
        arguments += ["--loads", str(path)]
    return arguments


def test_the_command_writes_it_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new" / "page.html"
    arguments = ["place", *files(tmp_path), "--gpus", "4", "--slots", "20", "--json", "--report", str(page)]
    assert cli.run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(page)
    text = page.read_text()
    assert "&lt;b&gt;a&amp;" in text
    assert "<b>a" not in text
    read(text)
    assert [one.name for one in page.parent.iterdir()] == ["page.html"]
    (tmp_path / "file").write_text("x")
    assert cli.run([*arguments[:-1], str(tmp_path / "file" / "page.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (
        cli.run(["place", *files(tmp_path), "--gpus", "3", "--slots", "20", "--report", str(tmp_path / "no.html")]) == 1
    )
    assert not (tmp_path / "no.html").exists()


def test_with_a_scenario_the_page_tells_step_time(tmp_path: Path) -> None:
    data = small()
    data["routing"]["synthetic"]["workloads"] = 3
    asked = planning.ask(
        scenario=Scenario.read(data, where="test"), load_files=[], gpus=None, nodes=None, slots=None, groups=None,
        solver=None, holdout=None, seed=0,
    )  # fmt: skip
    found = planning.place(asked, draws=20)
    assert found.step_time is not None
    text = place_page(found)
    told = read(text)
    assert "Time of a decode step" in text
    for row in found.step_time.step_s.values():
        for time in row.values():
            assert time.value in told.figures
    assert sorted(found.step_time.refused) == [128, 512]  # the scenario's ranks run 64 requests
    for tokens, gain in found.step_time.gains.items():
        assert (gain.value in told.figures) == (tokens not in found.step_time.refused)
    assert text.count("<td>does not run") + text.count(">does not run<") >= 4
