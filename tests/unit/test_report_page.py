"""The report of a run: every figure is the stored one, the page is whole, and damaged runs are refused in one line."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import run
from moesim.errors import BadInput
from moesim.output.page import number
from moesim.output.report import write_run_report, write_simulation_report
from moesim.output.tables import COLUMNS
from moesim.spec.scenario import Scenario, load_scenario
from tests.report_run import LAYERS, RANKS, plan_row, told, write_run_folder
from tests.scenarios import small, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run_folder(tmp_path / "run")


def page_of(folder: Path) -> ET.Element:
    """The written page, parsed as XML: not well-formed is an error."""
    write_run_report(folder)
    return parsed((folder / "report.html").read_text())


def parsed(text: str) -> ET.Element:
    assert text.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def section(page: ET.Element, name: str) -> ET.Element:
    (found,) = (one for one in page.iter("section") if one.get("id") == name)
    return found


def words(element: ET.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def change(folder: Path, name: str, **updates: Any) -> None:
    """Replace dotted keys of a JSON file of the run; None removes the key."""
    data = json.loads((folder / name).read_text())
    for dotted, value in updates.items():
        *parents, last = dotted.split("__")
        node = data
        for parent in parents:
            node = node[parent]
        node.pop(last) if value is None else node.update({last: value})
    (folder / name).write_text(json.dumps(data))


def test_every_figure_of_the_ranked_table_is_the_stored_one(folder: Path) -> None:
    stored = json.loads((folder / "result.json").read_text())
    rows = list(section(page_of(folder), "plans").iter("tr"))[1:]
    assert len(rows) == 3
    for row, plan in zip(rows, [stored["best"], *stored["alternatives"], stored["baseline"]], strict=True):
        cells = list(row.iter("td"))
        assert plan["label"] in words(cells[0])
        for cell, (metric, _, scale, digits) in zip(cells[1:-1], COLUMNS, strict=True):
            (data,) = cell.iter("data")
            assert float(data.get("value", "nan")) == plan["metrics"][metric]
            assert data.text == number(plan["metrics"][metric] * scale, digits)
            low, high = (number(plan["intervals"][metric][end] * scale, digits) for end in ("low", "high"))
            assert f"{low} – {high}" in words(cell)
        assert words(cells[-1]) == ("met" if plan["meets_slo"] else "missed")


def test_the_page_says_the_verdict_the_reasons_and_what_it_rests_on(folder: Path) -> None:
    page = page_of(folder)
    stored = json.loads((folder / "result.json").read_text())
    assert stored["verdict"]["text"] in words(section(page, "verdict"))
    tiles = [words(one) for one in page.iter("dl")]
    assert "output tokens/s/GPU gained +25.0 % +19.0 % to +31.0 %, against the baseline" in tiles
    assert (
        "TPOT saved by placing experts +4.3 % +2.1 % to +6.2 %, against contiguous experts in the same layout" in tiles
    )
    reasons = words(section(page, "not-run"))
    assert "out_of_memory 7" in reasons
    assert "outside_profile 1" in reasons
    assert "1 of 4 simulated plans missed" in reasons
    caveats = words(section(page, "caveats"))
    for told_so in ("generated (lognormal)", "is assumed", "All requests are alike", stored["notes"][0]):
        assert told_so in caveats
    assert "The baseline's run has no steady state" in caveats
    assert "This plan's run has no steady state" not in caveats
    assert "75 % rests on measured tables" in words(section(page, "provenance"))
    assert "under 1 % assumed" in words(section(page, "provenance"))
    assert "--tp-size 8" in words(section(page, "launch"))


def test_the_page_has_its_pictures(folder: Path) -> None:
    page = page_of(folder)
    drawings = {name: list(svgs(section(page, name))) for name in ("loads", "step", "latency", "search", "memory")}
    assert {name: len(found) for name, found in drawings.items()} == {
        "loads": 3,
        "step": 1,
        "latency": 4,
        "search": 2,
        "memory": 1,
    }
    for found in drawings.values():
        assert all(one.get("aria-label") for one in found)
    for heat in drawings["loads"][:2]:
        cells = sum(path.get("d", "").count("M") for path in heat.iter("{http://www.w3.org/2000/svg}path"))
        assert cells == LAYERS * RANKS


def svgs(element: ET.Element) -> list[ET.Element]:
    return [one for one in element.iter("{http://www.w3.org/2000/svg}svg") if one.get("role") == "img"]


def test_the_page_loads_nothing_and_runs_nothing(folder: Path) -> None:
    write_run_report(folder)
    text = (folder / "report.html").read_text()
    assert len(text) < 400_000
    assert "<script" not in text
    assert not re.search(r"""(src=|url\(|@import|href="(?!data:,))""", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}


def test_the_page_is_a_pure_function_of_the_runs_files(folder: Path, tmp_path: Path) -> None:
    write_run_report(folder)
    first = (folder / "report.html").read_bytes()
    shutil.copytree(folder, tmp_path / "elsewhere")
    for place in (folder, tmp_path / "elsewhere"):
        write_run_report(place)
        assert (place / "report.html").read_bytes() == first


def test_a_run_without_a_baseline_that_could_run_still_has_its_page(folder: Path) -> None:
    nothing = {"value": None, "low": None, "high": None}
    base = plan_row("DP8 EP8 deepep, contiguous +0", status="out_of_memory", metrics={}, intervals={}, meets_slo=False)
    change(folder, "result.json", baseline=base, gain={"metric": "output_tokens_per_s_per_gpu", **nothing})
    data = json.loads((folder / "simulation.json").read_text())
    (folder / "simulation.json").write_text(json.dumps(data | {"baseline": None}))
    page = page_of(folder)
    assert "out_of_memory" in words(section(page, "plans"))
    assert len(svgs(section(page, "loads"))) == 2


def test_a_plan_whose_ranks_hold_slices_of_all_experts_has_no_map(folder: Path) -> None:
    data = json.loads((folder / "simulation.json").read_text())
    data["best"]["series"]["rank_loads"] = [[1.0]] * LAYERS
    (folder / "simulation.json").write_text(json.dumps(data))
    loads = section(page_of(folder), "loads")
    assert "even by construction" in words(loads)
    assert len(svgs(loads)) == 2


@pytest.mark.parametrize("name", ["result.json", "simulation.json", "plan.yaml"])
def test_a_missing_file_is_named_in_one_line(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).unlink()
    assert run(["report", str(folder)]) == 2
    told_so = capsys.readouterr().err
    assert name in told_so
    assert told_so.count("\n") == 1
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("result.json", '{"best": ', "not valid JSON (line 1)"),
        ("result.json", "[" * 100_000, "not valid JSON"),
        ("result.json", "[]", "result.json"),
        ("simulation.json", '{"best": {"figures": {}}, "baseline": null}', "best.figures.metrics"),
        ("plan.yaml", "a: [", "not valid YAML"),
        ("plan.yaml", "verdict: x", "no `scenario`"),
        ("plan.yaml", "scenario: {model: x}", "plan.yaml: scenario"),
    ],
)
def test_a_damaged_file_is_named_and_the_old_page_stays(folder: Path, name: str, text: str, place: str) -> None:
    write_run_report(folder)
    before = (folder / "report.html").read_bytes()
    (folder / name).write_text(text)
    with pytest.raises(BadInput, match=re.escape(place)):
        write_run_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob(".report*"))


@pytest.mark.parametrize(
    ("name", "updates", "place"),
    [
        ("result.json", {"verdict": None}, "result.json: verdict"),
        ("result.json", {"best__metrics__tpot_s.p99": None}, "best.metrics.tpot_s.p99"),
        ("result.json", {"best__status": "out_of_memory"}, "best.status"),
        ("simulation.json", {"best__figures__memory__limit_bytes": 0}, "best.figures.memory.limit_bytes"),
        ("simulation.json", {"best__series__layer_ids": [1]}, "rank_loads"),
        ("simulation.json", {"best__series__rank_loads": [[-1.0]] * LAYERS}, "negative load"),
        ("simulation.json", {"baseline__series__latency": {"ttft_s": [2.0, 1.0]}}, "latency.ttft_s"),
        ("simulation.json", {"best__series__steps__start_s": []}, "differ in length"),
    ],
)
def test_a_figure_that_does_not_fit_is_named(folder: Path, name: str, updates: dict[str, Any], place: str) -> None:
    change(folder, name, **updates)
    with pytest.raises(BadInput, match=re.escape(place)):
        write_run_report(folder)


def test_figures_that_are_no_numbers_are_refused(folder: Path) -> None:
    text = (folder / "result.json").read_text()
    (folder / "result.json").write_text(text.replace("179.55311993338307", "NaN", 1))
    with pytest.raises(BadInput, match=r"best\.metrics"):
        write_run_report(folder)


def test_report_says_where_it_wrote(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    assert run(["report", str(folder / "nowhere")]) == 2
    assert "no such run folder" in capsys.readouterr().err


def test_the_page_of_one_simulation_has_all_its_metrics(tmp_path: Path) -> None:
    one = told(0, 0.3)
    scenario = Scenario.read(small(), where="test")
    write_simulation_report(tmp_path / "a.html", scenario, one["figures"], one["series"])
    page = parsed((tmp_path / "a.html").read_text())
    shown = {words(row[0]): row[1].find("data") for row in section(page, "figures").iter("tr") if row[0].tag == "td"}
    flat = {"requests_completed": 120, "duration_s": 9.1, "output_tokens_per_s_per_gpu": 179.5}
    flat |= {
        f"{name}.{key}": value
        for name in ("ttft_s", "tpot_s")
        for key, value in one["figures"]["metrics"][name].items()
    }
    assert {name: float(data.get("value")) for name, data in shown.items() if data is not None} == flat
    assert len(svgs(section(page, "latency"))) == 4
    write_simulation_report(tmp_path / "b.html", scenario, one["figures"])
    assert "latency" not in {one.get("id") for one in parsed((tmp_path / "b.html").read_text()).iter("section")}


def test_simulate_writes_a_page_that_holds_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, small())
    out = tmp_path / "page.html"
    assert run(["simulate", str(path), "--draws", "2", "--json", "--report", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    page = parsed(out.read_text())
    shown = {words(row[0]): row[1].find("data") for row in section(page, "figures").iter("tr") if row[0].tag == "td"}
    data = shown["tpot_s.p99"]
    assert data is not None
    assert float(data.get("value", "nan")) == printed["metrics"]["tpot_s"]["p99"]
    assert len(svgs(section(page, "loads"))) == 2


def test_a_real_run_has_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small(search={"solvers": ["greedy", "contiguous"], "redundant_experts": [0, 8]})
    data["serving"]["workload"]["requests"] = 40
    path = write(tmp_path, data)
    assert run(["tune", str(path), "--trials", "8", "--out", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    page = parsed((tmp_path / "run" / "report.html").read_text())
    assert result["verdict"]["text"] in words(section(page, "verdict"))
    shown = {float(data.get("value", "nan")) for data in section(page, "plans").iter("data")}
    for plan in (result["best"], *result["alternatives"]):
        assert {plan["metrics"][metric] for metric, *_ in COLUMNS} <= shown
    assert load_scenario(path).model in words(page)
