"""Published rows: reading the manifest, ratios and their signs, one step of a fixed batch, the command's refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.cli import run
from moesim.errors import BadInput, CheckFailed
from moesim.spec.scenario import load_scenario
from validate.published.manifest import (
    Manifest,
    PublishedRatio,
    PublishedRow,
    RatioKind,
    bundled_manifest,
    chosen,
    read_manifest,
)
from validate.published.predict import Predicted, SetBeside, set_beside, summary
from validate.published.step import StepSpec, time_step
from validate.published.table import PART, markdown, named, quotient, text, unstated

ROW: dict[str, Any] = {
    "id": "A", "what": "a run", "source": "a post", "gpu": "H100", "metric": "tflops_per_s_per_gpu", "reported": 100.0,
    "file": "a.yaml",
}  # fmt: skip


def row(**changes: Any) -> PublishedRow:
    data = {key: value for key, value in {**ROW, **changes}.items() if value is not None}
    return PublishedRow.model_validate(data)


def served(name: str, metric: str, reported: float) -> PublishedRow:
    return row(id=name, metric=metric, reported=reported, step={"seqs": 1, "kv": 10})


def manifest(tmp_path: Path, *rows: dict[str, Any], ratios: tuple[dict[str, Any], ...] = ()) -> Path:
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump({"rows": list(rows), "ratios": list(ratios)}))
    return path


def test_scenarios_lie_beside_the_manifest(tmp_path: Path) -> None:
    (found,) = read_manifest(manifest(tmp_path, ROW)).rows
    assert found.file == tmp_path / "a.yaml"
    assert found.unit == "TFLOP/s/GPU"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"file": None}, "exactly one of file and refused"),
        ({"refused": "not priced"}, "exactly one of file and refused"),
        ({"metric": "tokens_per_s_per_gpu"}, "a serving row needs step"),
        ({"step": {"seqs": 1, "kv": 10}}, "a serving row needs step"),
        ({"step": {"seqs": 1, "kv": 10, "new": 5}}, "new for a step that reads prompts"),
        ({"reported": 0}, "reported: .*greater than 0"),
        ({"units": "x"}, "units: unknown key"),
        ({"metric": "speed"}, "metric"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    data = {key: value for key, value in {**ROW, **changes}.items() if value is not None}
    with pytest.raises(BadInput, match=said) as caught:
        read_manifest(manifest(tmp_path, data))
    assert "manifest.yaml" in caught.value.line()


def test_wrong_manifests_are_named(tmp_path: Path) -> None:
    ratio = {"over": "A", "under": "B", "kind": "router", "what": "w"}
    with pytest.raises(BadInput, match="row 'B', which is not there"):
        read_manifest(manifest(tmp_path, ROW, ratios=(ratio,)))
    other = {**ROW, "id": "B", "metric": "dispatch_us", "step": {"seqs": 1, "kv": 9}}
    with pytest.raises(BadInput, match="A and B report different things"):
        read_manifest(manifest(tmp_path, ROW, other, ratios=(ratio,)))
    with pytest.raises(BadInput, match="two rows have the same id"):
        read_manifest(manifest(tmp_path, ROW, ROW))
    path = tmp_path / "bad.yaml"
    for content, said in (
        ("rows: [", "not valid YAML"),
        ("- 1", "mapping of keys"),
        ("{}", "rows: this key is missing"),
    ):
        path.write_text(content)
        with pytest.raises(BadInput, match=said):
            read_manifest(path)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(cut=st.integers(0, 9000), put=st.sampled_from(["", ":", "[", "-", "\0", "é", "nan", "1e999", "\t", "{}"]))
def test_a_mutated_manifest_is_read_or_named(tmp_path: Path, cut: int, put: str) -> None:
    good = bundled_manifest().read_text(encoding="utf-8")
    path = tmp_path / "mutated.yaml"
    path.write_text(good[:cut] + put + good[cut + len(put) :], encoding="utf-8")
    try:
        read_manifest(path)
    except BadInput as error:
        assert "mutated.yaml" in error.line() and "\n" not in error.line()


def beside(reported: float, predicted: float | None, **changes: Any) -> SetBeside:
    ratio = PublishedRatio(over="A", under="B", kind="dispatcher", what="w", why=changes.pop("why", ""))
    return SetBeside(ratio, reported, predicted, changes.get("scatter", 0.0), changes.get("calibrated", False))


def test_signs() -> None:
    assert beside(1.2, 1.01).sign == beside(0.8, 0.99).sign == "right"
    assert beside(1.2, 0.99).sign == beside(0.8, 1.01).sign == beside(1.2, 1.0).sign == "wrong"
    assert beside(1.03, 0.9, scatter=0.04).sign == beside(0.97, 1.1, scatter=0.04).sign == "open"
    assert beside(1.05, 0.9, scatter=0.04).sign == "wrong"
    assert beside(1.2, None).sign == "not priced"
    assert beside(1.2, 0.9).unexplained and not beside(1.2, 0.9, why="checked").unexplained
    assert not beside(1.2, None).unexplained


def test_ratios_are_of_one_gpu_each() -> None:
    """A node has eight: 8,000 tokens/s of a node against 500 of a GPU is 2."""
    over, under = served("A", "tokens_per_s_per_node", 8000.0), served("B", "tokens_per_s_per_gpu", 500.0)
    ratio = PublishedRatio(over="A", under="B", kind="deployment", what="w")
    asked = Manifest(rows=(over, under), ratios=(ratio,))
    (found,) = set_beside(asked, [Predicted(over, 4000.0), Predicted(under, 1000.0)])
    assert (found.reported, found.predicted, found.sign) == (2.0, 0.5, "wrong")
    (found,) = set_beside(asked, [Predicted(over, None, reason="r"), Predicted(under, 1000.0)])
    assert found.predicted is None


def test_rows_that_gave_a_figure_are_shown_and_not_counted() -> None:
    known, blind, left = row(calibrated=True), row(id="B"), row(id="C", file=None, refused="cannot be said")
    found = [Predicted(known, 100.0), Predicted(blind, 150.0), Predicted(left, None, reason=left.refused)]
    total = summary(found, [beside(1.2, 0.9), beside(1.2, 1.1, calibrated=True), beside(1.2, 1.1)])
    assert (total["signs"]["right"], total["signs_calibrated"]) == (2, 1)
    assert (total["rows"], total["priced"], total["calibrated"], total["unexplained"]) == (3, 2, 1, 1)
    assert total["errors"]["training"]["n"] == 1 and total["errors"]["training"]["mape"] == pytest.approx(0.5)
    for shown in (text(found, [beside(1.2, 0.9)], total), markdown(found, [beside(1.2, 0.9)], total)):
        assert "calibrated on it" in shown and "cannot be said" in shown and "+50 %" in shown
        assert "wrong sign, A/B: not explained" in shown
    json.dumps(total, allow_nan=False)


def test_rows_are_chosen_with_the_ratios_among_them() -> None:
    every = read_manifest(bundled_manifest())
    assert chosen(every, ()) is every
    some = chosen(every, ("T02", "T03", "S01"))
    assert [one.id for one in some.rows] == ["S01", "T02", "T03"]
    assert [(one.over, one.under) for one in some.ratios] == [("T03", "T02")]
    with pytest.raises(BadInput, match="no row 'T99'"):
        chosen(every, ("T99",))


def test_a_step_counts_the_drafts_that_hold() -> None:
    """A step of the DeepSeek profile: 128 ranks of 128 sequences, 1.6 tokens each."""
    asked = {one.id: one for one in read_manifest(bundled_manifest()).rows}["S05"]
    assert asked.file is not None and asked.step is not None
    timed = time_step(load_scenario(asked.file), asked.step)
    assert timed.tokens == pytest.approx(128 * 128 * 1.6)
    assert timed.gpus == 128
    assert timed.tokens_per_s_per_gpu == pytest.approx(timed.tokens / timed.step_s / 128)
    assert 0 < timed.exchange_s["dispatch"] < timed.exchange_s["combine"] < timed.step_s
    assert timed.drawn == ()
    drawn = time_step(load_scenario(asked.file), asked.step, draws=4)
    assert drawn.step_s == timed.step_s and drawn.exchange_s == timed.exchange_s
    assert len({one.step_s for one in drawn.drawn}) == 4
    assert min(one.step_s for one in drawn.drawn) < 1.2 * timed.step_s
    longer = time_step(load_scenario(asked.file), StepSpec(seqs=128, kv=8192))
    assert longer.step_s > timed.step_s


def test_rows_are_named_as_people_list_them() -> None:
    assert named(["S01", "S02", "S03", "T04", "T06", "T07"]) == "S01 to S03, T04, T06, T07"
    assert named(["mine", "other", "A1"]) == "mine, other, A1"
    assert named([]) == ""


def test_what_rows_do_not_state_is_said_once() -> None:
    one, other = row(assumed=["a guess"]), row(id="B", assumed=["a guess"], left_out=["a part"])
    found = [Predicted(one, 1.0), Predicted(other, 1.0)]
    assert unstated(found) == ["A, B, assumed: a guess.", "B, left out: a part."]
    assert "- A, B, assumed: a guess." in markdown(found, [], summary(found, []))


def test_ratios_beside_1_show_their_side() -> None:
    assert [quotient(value) for value in (0.998, 1.002, 0.94, 1.01, 2.5)] == ["0.998", "1.002", "0.94", "1.01", "2.50"]
    assert beside(0.8, 1.0).error == pytest.approx(0.25) and beside(0.8, None).error is None


def test_sizes_leave_out_ratios_that_rest_on_a_calibrated_row() -> None:
    total = summary([], [beside(1.0, 1.1), beside(1.0, 3.0, calibrated=True), beside(1.0, None)])
    assert total["sizes"]["n"] == 1 and total["sizes"]["mape"] == pytest.approx(0.1)


def test_all_that_a_row_needs_lies_in_the_package() -> None:
    """An installed copy has the manifest, the scenarios and the models that they name; no path leads out of it."""
    folder = bundled_manifest().parent
    for one in read_manifest(bundled_manifest()).rows:
        if one.file is not None:
            assert one.file.parent == folder and one.file.is_file()
            scenario = load_scenario(one.file)
            if str(scenario.model).endswith(".json"):
                assert Path(str(scenario.model)).resolve().parent == folder.resolve()
            assert not isinstance(scenario.cluster, Path)


def test_the_manifest_of_the_how_to_is_read(tmp_path: Path, repo: Path) -> None:
    page = (repo / "docs" / "how-to" / "validate.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(schema_version: 1\nrows:.*?)^```", page, re.MULTILINE | re.DOTALL)
    path = tmp_path / "manifest.yaml"
    path.write_text(example)
    found = read_manifest(path)
    assert [one.id for one in found.rows] == ["A", "B"] and len(found.ratios) == 1
    for kind in get_args(RatioKind):
        assert f"`{kind}`" in page


def test_tables_are_written_into_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, rows = tmp_path / "page.md", manifest(tmp_path, {**ROW, "file": None, "refused": "no figure"})
    asked = ["validate", "published", "--manifest", str(rows), "--update", "--docs", str(page)]
    assert run(asked) == 2
    assert "cannot read the accuracy page" in capsys.readouterr().err
    page.write_text(f"before\n{PART.begin}\nold\n{PART.end}\nafter\n")
    with pytest.raises(CheckFailed, match="not the record's"):
        PART.check(page, "new")
    assert run(asked) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| A | a run |" in text and "old" not in text
    assert run([*asked, "--row", "A"]) == 2
    assert "--row" in capsys.readouterr().err


def test_as_a_user_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["validate", "published", "--row", "T02", "--row", "T03", "--row", "S07"]
    assert run(asked) == 0
    shown = capsys.readouterr().out
    assert "real router against forced balance" in shown and "right" in shown
    assert run([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["id"] for one in found["rows"]] == ["S07", "T02", "T03"]
    assert found["rows"][0]["predicted"] is None and found["rows"][0]["reason"]
    (ratio,) = found["ratios"]
    assert ratio["sign"] == "right" and ratio["reported"] == pytest.approx(237 / 295)
    assert run([*asked, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| row | what ran |")


def test_exit_codes_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "published", "--row", "T99"]) == 2
    assert "no row 'T99'" in capsys.readouterr().err
    assert run(["validate", "published", "--manifest", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read the manifest" in capsys.readouterr().err
    # A scenario that cannot run keeps its row, with the reason; a wrong sign that nobody explains fails the check.
    folder = bundled_manifest().parent
    fast, slow = ({**ROW, "id": name, "reported": rate, "file": str(folder / "t02.yaml")} for name, rate in
                  (("A", 300.0), ("B", 200.0)))  # fmt: skip
    gone = {**ROW, "id": "C", "file": "c.yaml"}
    ratio = {"over": "A", "under": "B", "kind": "router", "what": "w"}
    path = manifest(tmp_path, fast, slow, gone, ratios=(ratio,))
    assert run(["validate", "published", "--manifest", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ratios"][0]["sign"] == "wrong"
    assert "cannot read the scenario" in found["rows"][2]["reason"] and found["rows"][2]["predicted"] is None
    path = manifest(tmp_path, fast, slow, ratios=({**ratio, "why": "both are one run"},))
    assert run(["validate", "published", "--manifest", str(path)]) == 0
