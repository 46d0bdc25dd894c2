"""`profile check` by system and as a page: the figures, the text, the JSON and the HTML."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from moesim.cli import run
from profiles import every_second
from profiles.check_page import Check, profile_page, tables_page
from profiles.check_tables import (
    LeftOut,
    by_family,
    by_system,
    by_table,
    every_second_left_out,
    families,
    figures,
    report_by_family,
    report_by_system,
    worst,
)
from profiles.raw_tables import read_points

SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
CHECK = Check("every-second", "aiconfigurator-core 0.0", ("h200_sxm",), "2025-01-02", "moesim profile check <x>")


def left_out(
    ours: list[float], *, family: str = "NCCL", system: str = "h200_sxm", table: str = "t", sigma: float = 0.1
) -> LeftOut:
    """What was left out of a table, with errors of `ours` (relative) where log-log has twice as much."""
    errors = np.log1p(np.asarray(ours, dtype=np.float64))
    size = np.geomspace(1.0, 1024.0, len(ours))
    return LeftOut(family, system, f"{system}/{table}", errors, 2.0 * errors, np.full(len(ours), sigma), size)


def write(root: Path, system: str, noise: float = 0.0) -> None:
    key = {"nccl_dtype": "half", "num_gpus": 8, "op_name": "all_gather"}
    rows = [
        {**key, "message_size": size, "latency": (0.01 + 1e-3 * size) * (1.0 + noise * (place % 2))}
        for place, size in enumerate(SIZES)
    ]
    target = root / system / "comm" / "nccl" / "2" / "nccl_perf.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows).write_parquet(target)


def test_figures_are_quantiles_of_the_priced_points() -> None:
    found = figures("NCCL", "all", [left_out([0.01, -0.02, 0.03, math.nan], sigma=0.015)])
    assert (found.points, found.unpriced) == (4, 1)
    assert found.median == pytest.approx(0.02)
    assert found.log_log_median == pytest.approx(1.0 - 0.98**2)
    assert found.covered_90 == pytest.approx(2 / 3)  # ln 1.03 lies beyond 1.645 x 0.015, the others do not
    assert found.mean_half_width == pytest.approx(math.expm1(1.645 * 0.015))
    assert found.holds


@pytest.mark.parametrize(
    ("ours", "holds"), [([0.029] * 5, True), ([0.031] * 5, False), ([0.01] * 8 + [0.2] * 2, False)]
)
def test_a_family_holds_within_both_limits(ours: list[float], holds: bool) -> None:
    assert figures("NCCL", "all", [left_out(ours)]).holds is holds


def test_no_better_than_log_log_is_a_miss() -> None:
    part = left_out([0.01, 0.02])
    rival = LeftOut(
        part.family, part.system, part.table, part.predicted_over_measured, part.predicted_over_measured / 2,
        part.sigma, part.size,
    )  # fmt: skip
    assert not figures("NCCL", "all", [rival]).holds


def test_what_was_left_out_of_a_table_keeps_its_sizes_and_figures(tmp_path: Path) -> None:
    for system, noise in (("h100_sxm", 0.05), ("h200_sxm", 0.0)):
        write(tmp_path, system, noise)
    found = [
        every_second_left_out(one, every_second.leave_out(one))
        for one in read_points(tmp_path, ["h100_sxm", "h200_sxm"])
    ]
    assert [one.size.tolist() for one in found] == [[2.0, 8.0, 32.0]] * 2
    (line,) = by_family(found)
    assert (line.family, line.system, line.tables, line.points, line.unpriced) == ("NCCL", "all", 2, 6, 0)
    assert line.median == pytest.approx(0.5 * 0.05 / 1.05)  # of three points 5 % too dear, and three hit exactly
    assert report_by_family([line])[1].startswith("NCCL                      2        6    2.38%    4.8%")


def test_families_that_are_judged_together_come_as_one_and_apart() -> None:
    found = [left_out([0.01], family="attention prefill"), left_out([0.03], family="attention decode")]
    assert {name: len(parts) for name, parts in families(found).items()} == {
        "attention": 2, "attention prefill": 1, "attention decode": 1,
    }  # fmt: skip


def test_by_system_and_by_table() -> None:
    found = [
        left_out([0.01] * 20, system="h100_sxm", table="a"),
        left_out([0.02] * 20, system="h100_sxm", table="b"),
        left_out([0.05] * 3, system="b200_sxm", table="c"),
        left_out([], system="b200_sxm", table="empty"),
    ]
    lines = by_system(found)
    assert [(line.system, line.tables, line.points) for line in lines] == [("h100_sxm", 2, 40), ("b200_sxm", 2, 3)]
    assert [line.table for line in by_table(found)] == ["b200_sxm/c", "h100_sxm/b", "h100_sxm/a"]
    assert [line.table for line in worst(by_table(found))] == ["h100_sxm/b", "h100_sxm/a"]  # three points name none
    told = report_by_system(lines)
    assert re.search(r"h100_sxm +NCCL .*holds$", told[1])
    assert re.search(r"b200_sxm +NCCL .*missed$", told[2])


class Page(HTMLParser):
    """Anchors, figures and text of a page; raises where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.values: list[float] = []
        self.said = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if "id" in found:
            self.ids.append(str(found["id"]))
        if tag == "data":
            self.values.append(float(str(found["value"])))
        assert tag != "script"
        assert not str(found.get("href", "") or found.get("src", "")).startswith("http")
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data


def test_the_page_says_what_held_what_missed_and_what_was_done() -> None:
    found = [
        left_out(list(np.linspace(-0.02, 0.02, 60)), table="good"),
        left_out(list(np.linspace(-0.3, 0.3, 60)), family="GEMM", table="bad"),
        left_out([math.nan] * 3, family="DeepEP", table="none"),
    ]
    page = Page(tables_page(found, CHECK))
    assert [name for name in page.ids if not name.endswith("-title") and name != "verdict"] == [
        "families",
        "errors",
        "sizes",
        "systems",
        "worst",
        "tables",
        "check",
    ]
    assert "Missed: GEMM (median 15.3\u00a0%, limit 3\u00a0% and" in page.said
    assert "DeepEP (none of its points could be priced)" in page.said
    assert "Largest median error: h200_sxm/bad" in page.said
    for words in ("2025-01-02", "aiconfigurator-core 0.0", "moesim profile check <x>", "the last is kept"):
        assert words in page.said
    pooled = figures("GEMM", "all", [found[1]])
    assert pooled.median in page.values
    assert pooled.p90 in page.values
    assert "3 unpriced" in page.said


def test_a_miss_by_a_hair_is_not_rounded_away() -> None:
    page = Page(tables_page([left_out([0.03001] * 5)], CHECK))
    assert "Missed: NCCL (median 3.001\u00a0%, limit 3\u00a0%)" in page.said


def test_the_same_check_gives_the_same_bytes() -> None:
    found = [left_out([0.01, 0.02, 0.03])]
    assert tables_page(found, CHECK) == tables_page(found, CHECK)


def test_the_page_of_a_profile_has_its_figures_and_a_picture() -> None:
    errors = {"gemm": {"median": 0.05, "p68": 0.1, "p90": 0.2, "points": 7.0}}
    page = Page(profile_page(errors, Check("inner", "profile x", ("h200_sxm",), "2025-01-02", "c")))
    assert page.values == [0.05, 0.1, 0.2, 7.0]
    assert "gemm: median 5.00\u00a0%" in page.said


def test_the_command_writes_a_page_and_prints_by_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "h100_sxm", 0.9)
    write(tmp_path, "h200_sxm")
    page = tmp_path / "out" / "check.html"
    arguments = ["profile", "check", "--leave-out", "every-second", "--tables", str(tmp_path)]
    arguments += ["--systems", "h100_sxm,h200_sxm"]
    assert run([*arguments, "--by", "system", "--report", str(page)]) == 1  # pooled over both, the noise misses
    out = capsys.readouterr().out
    assert re.search(r"^h100_sxm +NCCL .*missed$", out, re.MULTILINE)
    assert re.search(r"^h200_sxm +NCCL .*holds$", out, re.MULTILINE)
    said = Page(page.read_text()).said
    assert "--systems h100_sxm,h200_sxm --report" in said
    assert run([*arguments, "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert [(line["system"], line["holds"]) for line in shown["by_system"]] == [("h100_sxm", False), ("h200_sxm", True)]
    assert [line["table"] for line in shown["by_table"]] == [
        "h100_sxm/comm/nccl/2/nccl_perf", "h200_sxm/comm/nccl/2/nccl_perf",
    ]  # fmt: skip


def test_the_page_of_left_out_distributions(tmp_path: Path) -> None:
    row = {
        "moe_dtype": "fp8", "hidden_size": 4096, "inter_size": 1024, "topk": 8, "num_experts": 64, "moe_tp_size": 1,
        "moe_ep_size": 4, "latency": 1.0,
    }  # fmt: skip
    names = ("balanced", "power_law_1.01", "power_law_1.2")
    rows = [{**row, "distribution": name, "num_tokens": size} for name in names for size in SIZES]
    target = tmp_path / "h200_sxm" / "moe" / "sglang" / "1" / "moe_perf.parquet"
    target.parent.mkdir(parents=True)
    pl.DataFrame(rows).write_parquet(target)
    page = tmp_path / "skew.html"
    arguments = ["profile", "check", "--leave-out", "distribution", "--tables", str(tmp_path)]
    assert run([*arguments, "--systems", "h200_sxm", "--report", str(page)]) == 0
    said = Page(page.read_text()).said
    assert "moe_perf: power_law_1.2 from power_law_1.01" in said
    for words in ("log-log", "covered", "Where along the size"):  # there is none of these here
        assert words not in said


def test_the_page_of_the_shipped_profile(tmp_path: Path) -> None:
    page = tmp_path / "profile.html"
    assert run(["profile", "check", "--stored", "--report", str(page)]) == 0
    assert "mla decode" in Page(page.read_text()).said


def test_wrong_groupings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", "check", "--by", "colour"]) == 2
    assert "use family or system" in capsys.readouterr().err
    assert run(["profile", "check", "--stored", "--by", "system"]) == 2
    assert "--leave-out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["--rows", "a.csv"], "--rows"),
        (["--rows", "a.csv", "--leave-out", "every-second"], "--rows"),
        (["--leave-out", "ep-size", "--report", "a.html"], "--report"),
        (["--leave-out", "distribution", "--stored"], "--stored"),
    ],
)
def test_no_option_is_passed_over(options: list[str], where: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", "check", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {where}: ") and said.count("\n") == 1
