"""Published rows: reading the manifest, ratios and their signs, one step of a fixed batch, the command's refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.cli import run
from moesim.errors import BadInput
from validate.published_manifest import (
    Manifest,
    PublishedRatio,
    PublishedRow,
    bundled_manifest,
    chosen,
    read_manifest,
)
from validate.published_predict import Predicted, SetBeside, set_beside, summary
from validate.published_step import StepSpec, time_step
from validate.published_table import markdown, text

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
    total = summary(found, [beside(1.2, 0.9)])
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
    from moesim.spec.scenario import load_scenario

    asked = {one.id: one for one in read_manifest(bundled_manifest()).rows}["S05"]
    assert asked.file is not None and asked.step is not None
    timed = time_step(load_scenario(asked.file), asked.step)
    assert timed.tokens == pytest.approx(128 * 128 * 1.6)
    assert timed.gpus == 128
    assert timed.tokens_per_s_per_gpu == pytest.approx(timed.tokens / timed.step_s / 128)
    assert 0 < timed.exchange_s["dispatch"] < timed.exchange_s["combine"] < timed.step_s
    longer = time_step(load_scenario(asked.file), StepSpec(seqs=128, kv=8192))
    assert longer.step_s > timed.step_s


def test_as_a_user_would(capsys: pytest.CaptureFixture[str]) -> None:
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
