"""What is told of predictions of measured runs: splits, causes, intervals, goals, the Markdown and the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moesim.cli import run
from moesim.errors import BadInput
from profiles.store import DATA
from tests.silicon_rows import predictions, row, table
from validate.silicon.attribution import attributed
from validate.silicon.intervals import LEVEL, Width, calibrate, judged, sigma_of, with_intervals
from validate.silicon.page import silicon_page
from validate.silicon.price import Prediction
from validate.silicon.record import DESCRIPTION, read_record, recorded_widths, write_record
from validate.silicon.rows import read_rows
from validate.silicon.score import score, split_tables
from validate.silicon.scored import OTHERS, SPLITS, halves, parts
from validate.silicon.summary import markdown, summarized


def test_parts_of_every_split_are_all_rows_of_a_half() -> None:
    sides = halves(predictions())
    for split in SPLITS:
        for half, side in sides.items():
            indices = np.concatenate([of[half] for of in parts(sides, split).values()])
            assert sorted(indices.tolist()) == list(range(len(side.rows)))
    assert list(parts(sides, "layout")) == ["TP", "EP", "attention DP"]
    assert list(parts(sides, "concurrency")) == ["1 to 4", "5 to 16", "17 to 64", "65 to 256"]


def test_a_split_tells_the_errors_of_its_part_alone() -> None:
    off = [
        one if one.row.layout.attention_dp == 1 else replace(one, tpot_s=2.0 * (one.tpot_s or 0.0))
        for one in predictions(noise=0.0)
    ]
    told = score(off)
    for half in ("odd", "even"):
        by = {name: one["mape"] for name, one in told[half]["tpot_by"]["layout"].items()}
        assert by == {"TP": pytest.approx(0.0), "EP": pytest.approx(0.0), "attention DP": pytest.approx(1.0)}
        assert told[half]["ttft_by"]["layout"]["attention DP"]["mape"] == pytest.approx(0.0)
    text = split_tables(told)
    assert text.count("| --- |") >= len(SPLITS)
    assert "100.0%, 100.0%, 100.0%" in text


def test_small_parts_stand_together_and_single_rows_are_not_told() -> None:
    found = predictions(200)
    odd = next(one for one in found if one.row.cell == "odd")
    rare = replace(odd, row=replace(odd.row, isl=77, tpot_ms=99.0))
    told = score([*found, rare])["odd"]["tpot_by"]["lengths"]
    assert told[OTHERS] == {"n": 1, "mape": None, "median": None, "p90": None, "bias": None}
    assert not any("77/" in name for name in told)


def test_a_family_made_dearer_on_purpose_is_found_in_both_halves() -> None:
    sides = halves(predictions(dearer={"experts": 1.5, "network": 0.8}))
    for side in sides.values():
        for one in attributed(side).values():
            for part, factor in {"experts": 1.5, "network": 0.8, "attention": 1.0}.items():
                more, error = one.more[part]
                assert more == pytest.approx(factor - 1.0, abs=max(4.0 * error, 0.02)), part
                assert error < 0.1
            assert one.before is not None
            assert one.after is not None
            assert one.after < one.before
            assert sum(share for name, share in one.shares.items() if name not in ("waiting", "beside prompts")) == (
                pytest.approx(1.0)
            )
    exact = attributed(halves(predictions(dearer={"dense GEMM": 1.3}, noise=0.0))["odd"])["tpot"]
    assert exact.more["dense GEMM"][0] == pytest.approx(0.3, abs=1e-4)
    assert exact.as_dict()["more"]["experts"]["dearer"] == pytest.approx(0.0, abs=1e-4)


def test_outliers_do_not_carry_the_attribution_away() -> None:
    found = [
        replace(one, tpot_s=5.0 * (one.tpot_s or 0.0)) if number % 25 == 0 else one
        for number, one in enumerate(predictions(dearer={"experts": 1.5}, noise=0.02))
    ]
    assert attributed(halves(found)["odd"])["tpot"].more["experts"][0] == pytest.approx(0.5, abs=0.1)


def test_no_shares_or_few_rows_tell_no_causes() -> None:
    bare = [replace(one, causes=None) for one in predictions(100)]
    assert attributed(halves(bare)["odd"])["tpot"].rows == 0
    few = attributed(halves(predictions(24))["odd"])["ttft"]
    assert 0 < few.rows < 30
    assert (few.more, few.after) == ({}, None)
    assert "By cause" not in markdown(summarized(bare))


def test_intervals_cover_what_they_say_and_follow_sigma_where_it_tells_something() -> None:
    sides = halves(predictions(3000))  # noise goes with sigma
    widths = calibrate(sides["even"])
    told = judged(widths, sides)
    for figure in ("tpot", "ttft"):
        assert widths[figure].normalised
        for half in ("odd", "even"):
            assert told[figure][half]["share"] == pytest.approx(LEVEL, abs=0.03)
        assert told[figure]["odd"]["factor"] < np.exp(widths[figure].plain)  # narrower than one width for all
    alike = halves([replace(one, causes=None) for one in predictions(3000)])
    plain = calibrate(alike["even"])
    assert not any(width.normalised for width in plain.values())
    for one in judged(plain, alike).values():
        assert one["odd"]["share"] == pytest.approx(LEVEL, abs=0.03)


def test_a_sigma_that_tells_nothing_is_left_alone() -> None:
    rng = np.random.default_rng(5)
    found = []
    for one in predictions(1500):
        assert one.causes is not None
        sigma = float(np.exp(rng.normal(-2, 1.5)))
        found.append(replace(one, causes=replace(one.causes, ttft_sigma=sigma, tpot_sigma=sigma)))
    assert not any(width.normalised for width in calibrate(halves(found)["even"]).values())


def test_odd_cells_have_no_say_in_intervals_or_their_kind() -> None:
    found = predictions(800)
    worse = [replace(one, tpot_s=7.0 * (one.tpot_s or 0)) if one.row.cell == "odd" else one for one in found]
    right, wrong = halves(found), halves(worse)
    assert calibrate(right["even"]) == calibrate(wrong["even"])
    told = judged(calibrate(wrong["even"]), wrong)["tpot"]
    assert told["odd"]["share"] < 0.05
    assert told["even"] == judged(calibrate(right["even"]), right)["tpot"]["even"]


def test_a_row_has_the_interval_of_its_width() -> None:
    (one,) = predictions(1)
    widths = {name: Width(np.log(1.5), 2.0, name == "tpot") for name in ("ttft", "tpot", "tokens_per_s_per_gpu")}
    told = with_intervals(one, widths)
    assert told["intervals"]["ttft_ms"]["high"] == pytest.approx(1.5 * told["ttft_ms"])
    sigma = sigma_of(one, "tpot")
    assert sigma is not None
    assert told["intervals"]["tpot_ms"]["low"] == pytest.approx(told["tpot_ms"] * np.exp(-2.0 * sigma))
    bare = with_intervals(replace(one, causes=None), widths)  # without shares: one width for all
    assert bare["intervals"]["tpot_ms"]["low"] == pytest.approx(told["tpot_ms"] / 1.5)
    assert with_intervals(replace(one, row=replace(one.row, mode="disagg")), widths)["intervals"] == {}
    assert with_intervals(Prediction(one.row, None, None, "why"), widths)["reason"] == "why"
    json.dumps(told, allow_nan=False)


def test_few_even_rows_make_no_intervals() -> None:
    assert calibrate(halves([Prediction(row(number), 0.2, 0.01) for number in range(50)])["even"]) == {}
    assert calibrate(halves(predictions(12))["even"]) == {}


def test_widths_are_on_record_and_damaged_ones_refused(tmp_path: Path) -> None:
    assert recorded_widths(tmp_path) == {}
    rows = table(tmp_path)
    found = predictions(400)
    write_record(tmp_path, found, rows)
    widths = recorded_widths(tmp_path)
    for name, width in calibrate(halves(found)["even"]).items():
        assert widths[name].plain == pytest.approx(width.plain, rel=1e-3)
    told = json.loads((tmp_path / DESCRIPTION).read_text())
    for damaged in (
        [1],
        {"tpot": 3},
        {"tpot": {"plain": 1.0}},
        {"tpot": {"plain": "x", "scaled": None, "normalised": 0}},
    ):
        (tmp_path / DESCRIPTION).write_text(json.dumps({**told, "intervals": damaged}))
        with pytest.raises(BadInput, match="intervals are damaged"):
            recorded_widths(tmp_path)


def test_goals_say_what_is_met() -> None:
    told = {goal.name: goal for goal in summarized(predictions(noise=0.02)).goals}
    assert told["TPOT, mean absolute error"].met
    assert told["rows with prefill and decode pools priced"].met is None
    assert told["published results"].met is None
    off = [replace(one, tpot_s=1.2 * (one.tpot_s or 0)) for one in predictions(noise=0.02)]
    missed = {goal.name for goal in summarized(off).goals if goal.met is False}
    assert {"TPOT, mean absolute error", "TPOT, median absolute error"} <= missed
    assert "rows priced, odd cells" not in missed
    pools = [Prediction(replace(row(n), mode="disagg"), None, None, "disaggregated") for n in range(3)]
    assert {goal.name: goal.figure for goal in summarized(pools).goals}[
        "rows with prefill and decode pools priced"
    ] == "0.0%"


class _Text(HTMLParser):
    """Cells of tables, and whatever would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.bad: list[str] = []
        self._in = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("td", "th"):
            self._in = True
            self.cells.append("")
        if tag in ("script", "img", "iframe", "x") or any(name.startswith("on") or name == "src" for name, _ in attrs):
            self.bad.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._in = self._in and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in:
            self.cells[-1] += data


def test_the_page_holds_the_figures_and_escapes_what_it_is_given() -> None:
    found = predictions(dearer={"experts": 1.5})
    hostile = "<x onload=alert(1)>&"
    found[0] = Prediction(replace(found[0].row, model=hostile), None, None, f"no {hostile}")
    found[1:41] = [replace(one, row=replace(one.row, model=hostile)) for one in found[1:41]]
    told = summarized(found)
    text = silicon_page(told, hostile, "2025-01-02")
    read = _Text()
    read.feed(text)
    assert read.bad == []
    assert "<x" not in text
    assert hostile in read.cells
    odd = told.score["odd"]
    assert f"{odd['tpot']['mape']:.1%}" in read.cells
    assert f"{told.intervals['ttft']['odd']['share']:.1%}" in read.cells
    more, error = told.causes["odd"]["tpot"].more["experts"]
    assert f"{more:+.0%} ± {error:.0%}" in read.cells
    assert len(re.findall(r"M[\d.]+ [\d.]+h0", text)) == 3 * sum(len(side.rows) for side in told.sides.values())
    for one in told.sides["odd"].priced[:50]:  # no blind row's own figure
        assert f"{one.row.tpot_ms:.4f}"[:6] not in re.sub(r'd="[^"]*"', "", text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("found", [[], [Prediction(row(0), None, None, "why")], [Prediction(row(0), 0.2, 0.01)]])
def test_little_makes_a_page_too(found: list[Prediction]) -> None:
    told = summarized(found)
    assert silicon_page(told, "rows.csv", "now").endswith("</html>\n")
    json.dumps(told.as_dict(), allow_nan=False)
    assert markdown(told).startswith("| check |")


def test_the_text_of_a_record_is_that_of_the_record_read_again(tmp_path: Path) -> None:
    rows = table(tmp_path)
    read = read_rows(rows)
    found = [replace(one, row=row) for one, row in zip(predictions(len(read)), read, strict=True)]
    write_record(tmp_path, found, rows)
    one, two = (
        markdown(summarized(list(read_record(read_rows(rows), rows, tmp_path).predictions.values()))) for _ in range(2)
    )
    assert one == two


def test_a_page_of_rows_that_are_priced_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, html = table(tmp_path, 3), tmp_path / "report.html"
    base = ["validate", "silicon", "--rows", str(rows), "--profiles", str(DATA), "--record", str(tmp_path / "none")]
    assert run([*base, "--report", str(html)]) == 0
    assert f"report: {html}" in capsys.readouterr().out
    assert 'id="causes"' in html.read_text()
    assert run([*base, "--recorded"]) == 2
    assert "no record of predictions" in capsys.readouterr().err
