"""The record of predictions of measured runs: written, held to, and what is said when costs move."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.cli import run
from moesim.errors import BadInput, CheckFailed, MoesimError
from profiles.store import DATA
from tests.silicon_rows import row, table
from validate.silicon import table as silicon_table
from validate.silicon.causes import FRONT_END, PARTS, SCALED, Causes, by_family
from validate.silicon.check import Drift, drift, words
from validate.silicon.price import Asked, Prediction, predict, predict_all
from validate.silicon.record import read_record, sampled
from validate.silicon.rows import read_rows
from validate.silicon.workers import in_workers


def recorded(count: int = 40) -> list[Prediction]:
    """Predictions with shares that differ from row to row."""
    rng = np.random.default_rng(3)
    names = (*PARTS, FRONT_END)
    found = []
    for number in range(count):
        ttft, tpot = (dict(zip(names, rng.dirichlet(np.ones(len(names))), strict=True)) for _ in range(2))
        found.append(Prediction(row(number), 0.2, 0.01, causes=Causes(ttft, tpot, 0.5, 0.1, 0.1, 0.1)))
    return found


def moved(found: list[Prediction], scale: dict[str, float]) -> list[Prediction]:
    """The same with costs scaled, as shares tell it."""

    def by(shares: dict[str, float]) -> float:
        return 1.0 + sum(shares[name] * (factor - 1.0) for name, factor in scale.items())

    return [
        replace(one, ttft_s=0.2 * by(dict(one.causes.ttft)), tpot_s=0.01 * by(dict(one.causes.tpot)))
        for one in found
        if one.causes is not None
    ]


@pytest.mark.parametrize("part", SCALED)
def test_the_family_whose_costs_moved_is_named(part: str) -> None:
    found = drift(moved(recorded(), {part: 1.5}), recorded())
    assert not found.holds
    assert list(found.factors) == [part]
    assert found.factors[part][0] == pytest.approx(1.5, abs=0.01)
    assert f"{part} x 1.50" in words(found)


def test_two_families_and_all_of_them_are_told_apart() -> None:
    two = drift(moved(recorded(), {"experts": 1.5, "network": 0.8}), recorded())
    assert set(two.factors) == {"experts", "network"}
    everything = drift(moved(recorded(), dict.fromkeys(SCALED, 1.5)), recorded())
    assert "all costs are 1.50 to 1.50 times" in words(everything)


def test_a_drift_that_no_costs_explain_is_a_rule_or_a_setting() -> None:
    rng = np.random.default_rng(1)
    fresh = [replace(one, tpot_s=0.01 * math.exp(rng.normal(0, 0.3))) for one in recorded()]
    found = drift(fresh, recorded())
    assert found.explained < 0.8
    assert "a rule or a setting changed" in words(found)


def test_no_drift_a_rounding_and_a_changed_status() -> None:
    same = drift(recorded(), recorded())
    assert same.holds
    assert "as on record" in words(same)
    assert drift(moved(recorded(), {"experts": 1.0001}), recorded()).holds
    first, *rest = recorded()
    gone = drift([Prediction(first.row, None, None, "no profile"), *rest], recorded())
    assert (gone.holds, gone.status, gone.moved) == (False, 1, 1)
    assert "became priced or unsupported" in words(gone)
    assert Drift(3, 1, 1, 0.0, {}, 0.0).as_dict()["holds"] is False


def test_scales_are_of_known_parts() -> None:
    assert by_family({"network": 2.0}) == {"collective": 2.0, "dispatch": 2.0}
    assert set(by_family({"all": 1.5})) == {"experts", "attention", "gemm", "collective", "dispatch", "memory_bound"}
    for scale in ({"engine overhead": 2.0}, {"x": 2.0}, {"experts": 0.0}, {"experts": math.inf}):
        with pytest.raises(BadInput, match="scales nothing"):
            by_family(scale)


def test_the_page_keeps_all_but_its_generated_part(tmp_path: Path) -> None:
    page = tmp_path / "accuracy.md"
    page.write_text(f"# Accuracy\n\n{silicon_table.BEGIN}\nold\n{silicon_table.END}\n\nafter\n")
    with pytest.raises(CheckFailed, match="make accuracy"):
        silicon_table.check(page, "| a |")
    silicon_table.put(page, "| a |")
    silicon_table.check(page, "| a |")
    assert page.read_text() == f"# Accuracy\n\n{silicon_table.BEGIN}\n\n| a |\n\n{silicon_table.END}\n\nafter\n"
    page.write_text("# Accuracy\n")
    with pytest.raises(BadInput, match="no place for the table"):
        silicon_table.put(page, "| a |")


def test_shares_sum_to_one_and_tell_what_a_dearer_family_does(tmp_path: Path) -> None:
    (one,) = read_rows(table(tmp_path, 2))[:1]
    told = predict(one, DATA, asked=Asked(causes=True))
    plain = predict(one, DATA)
    assert (told.ttft_s, told.tpot_s) == (plain.ttft_s, plain.tpot_s)
    assert told.causes is not None
    for shares in (told.causes.ttft, told.causes.tpot):
        assert sum(shares.values()) == pytest.approx(1.0)
        assert min(shares.values()) > -0.01
    assert 0.0 <= told.causes.waiting <= 1.0
    assert 0.0 < told.causes.tpot_sigma < 0.5
    for part in SCALED:
        dearer = predict(one, DATA, asked=Asked(scale={part: 1.5}))
        assert dearer.tpot_s is not None
        assert plain.tpot_s is not None
        assert dearer.tpot_s / plain.tpot_s - 1.0 == pytest.approx(0.5 * told.causes.tpot[part], abs=0.003)


def test_rows_on_two_processes_as_on_one(tmp_path: Path) -> None:
    rows = read_rows(table(tmp_path, 3))
    assert predict_all(rows, DATA, workers=2) == predict_all(rows, DATA)


def _doubled(task: int) -> int:
    if task < 0:
        raise CheckFailed("negative")
    return 2 * task


def test_workers_keep_the_order_and_hand_errors_back() -> None:
    told: list[float] = []
    assert in_workers(_doubled, [3, 1, 2], 1, told.append) == [6, 2, 4]
    assert told[-1] == 1.0
    assert in_workers(_doubled, [], 2) == []
    with pytest.raises(MoesimError, match="negative"):
        in_workers(_doubled, [1, -1, 2], 2)


def test_a_record_is_made_held_to_and_refused_as_a_user_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, page, record = table(tmp_path), tmp_path / "accuracy.md", tmp_path / "record"
    page.write_text(f"{silicon_table.BEGIN}\n{silicon_table.END}\n")
    base = ["validate", "silicon", "--rows", str(rows), "--profiles", str(DATA), "--record", str(record)]
    assert run([*base, "--check", "--docs", str(page)]) == 2  # there is none yet
    assert "make accuracy" in capsys.readouterr().err
    assert run([*base, "--update", "--docs", str(page), "--scale", "experts=2"]) == 2
    capsys.readouterr()
    assert run([*base, "--update", "--docs", str(page)]) == 0
    assert "| TPOT: MAPE" in page.read_text()
    read = read_record(read_rows(rows), rows, record)
    assert [one.reason != "" for one in read.predictions.values()] == [False] * 8 + [True]
    assert len(sampled(read, 5)) == 5
    capsys.readouterr()

    assert run([*base, "--check", "--docs", str(page), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["holds"], told["drift"]["rows"], told["drift"]["moved"]) == (True, 8, 0)

    assert run([*base, "--check", "--docs", str(page), "--scale", "experts=1.5"]) == 1
    assert "the costs that moved: experts x 1.5" in capsys.readouterr().out

    html, again = tmp_path / "report.html", tmp_path / "pred.csv"
    assert run([*base, "--recorded", "--report", str(html), "--out", str(again), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["priced"], told["out"], told["report"]) == (8, str(again), str(html))
    assert told["score"]["odd"]["priced"] == 8
    assert {goal["name"]: goal["met"] for goal in told["goals"]}["rows priced, odd cells"] is True
    assert told["predictions"][0]["id"] == "row0"
    assert told["intervals"] == {}  # no even cell to make them from
    assert again.read_text().splitlines()[0] == "id,status,ttft_ms,tpot_ms,reason"
    assert "How far predictions" in html.read_text()
    for more in (["--update"], ["--check"], ["--scale", "experts=2"]):
        assert run([*base, "--recorded", *more]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

    page.write_text(page.read_text().replace("| TPOT: MAPE", "| TPOT: mape"))
    assert run([*base, "--check", "--docs", str(page)]) == 1
    assert "the table is not the record's" in capsys.readouterr().out

    rows.write_text(rows.read_text().replace("row0", "row_0"))
    assert run([*base, "--check", "--docs", str(page)]) == 1
    assert "make accuracy" in capsys.readouterr().err
