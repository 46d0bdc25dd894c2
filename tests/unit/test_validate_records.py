"""Validations on record: compact, dated, predictions first; the table on the accuracy page is theirs."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import run
from moesim.errors import BadInput
from profiles.bundle import add_records, read_bundle, read_records
from tests.mutations import of_bytes
from tests.unit.test_profiles_bundle import bundle, rewritten
from validate.goals import goals
from validate.hardware import bundled, unfinished
from validate.hardware.job import Job, LayerShape, PlacedCase
from validate.hardware.record import comparison_json, measured_json
from validate.hardware.tables import holds, table, verdict
from validate.records import store as records
from validate.records.table import PART, markdown

RNG = np.random.default_rng(0)


def job() -> Job:
    cases = [PlacedCase(name=name, slots=(0, 1, 2, 3), replicas=0) for name in ("a", "b", "c", "d", "e")]
    return Job(
        backend="gloo", ranks=2, shape=LayerShape(hidden=8, intermediate=8, experts=4, top_k=1), tokens=(8, 32),
        profile=(0.25,) * 4, profile_source="test", placements=tuple(cases), repeats=12, out=".",
    )  # fmt: skip


def moments_of(one: Job, layer_s: list[float]) -> np.ndarray:
    """Moments whose operations take equal parts of the layer, scattering by 1 %: [ranks, cases, repeats, 7]."""
    scatter = RNG.normal(1.0, 0.01, size=(1, len(layer_s), one.repeats, 1))
    return np.asarray(layer_s)[None, :, None, None] * scatter * np.linspace(0, 1, 7) * np.ones((one.ranks, 1, 1, 1))


def record_of(predicted: list[float], measured: list[float]) -> dict[str, Any]:
    """A record whose layers were predicted and measured like this, case by case."""
    one = job()
    foretold = [
        {
            "placement": placement.name, "tokens_per_rank": tokens, "layer_s": value, "layer_p10_s": 0.9 * value,
            "layer_p90_s": 1.1 * value, "layer_of_medians_s": 0.9 * value,
            "operation_s": {
                name: [value / 6] * 2 for name in ("gate", "permute", "dispatch", "experts", "combine", "unpermute")
            },
        }
        for value, (placement, tokens) in zip(predicted, one.cases(), strict=True)
    ]  # fmt: skip
    found = measured_json(one, moments_of(one, measured))
    return {
        "schema_version": 1, "kind": "validate-hardware", "date": "2026-11-26T04:00:00+00:00",
        "hardware": {"cpu": "a processor", "cpus": 2, "memory_bytes": 2**34, "threads_per_rank": 1},
        "versions": {"torch": "2.13.0"}, "job": one.model_dump(mode="json", exclude={"out"}), "dtype": "float32",
        "clock": "shared", "core_share": {"profile": 1.0, "measured": 0.9},
        "pace_s": {"profile": 4e-3, "measured": 4.1e-3},
        "predictions": {"file": "predictions.json", "written": "2026-11-26T04:00:00.1+00:00", "sha256": "ab"},
        "measured_from": "2026-11-26T04:00:00.2+00:00", "output_error": 1e-7, "predicted": foretold, "measured": found,
        "comparison": comparison_json(one, foretold, found, np.random.default_rng(0)),
    }  # fmt: skip


MEASURED = [1.0, 1.5, 2.0, 2.5, 3.0, 2.0, 3.0, 4.0, 5.0, 6.0]
GOOD = [1.1 * value for value in MEASURED]


def test_goals_hold_where_predictions_are_near_and_in_order() -> None:
    record = record_of(GOOD, MEASURED)
    compared = record["comparison"]
    assert compared["layer"]["mape"] == pytest.approx(0.1, abs=0.01)
    assert compared["beyond_twice_the_spread"] == {"pairs": 20, "decided": 20, "agreed": 20, "undecided": 0}
    assert compared["span"]["measured"]["8"] == pytest.approx(3.0, rel=0.02)
    assert compared["regret_of_any"]["8"] == pytest.approx(1.0, rel=0.03)  # the mean of 1 to 3 is twice the best
    assert holds(record) and "FAILS" not in verdict(record)


@pytest.mark.parametrize(
    ("predicted", "measured", "words"),
    [
        ([1.2 * value for value in MEASURED], MEASURED, "FAILS  layer error, mean absolute: 2"),
        ([1.0] * 10, [1.0] * 10, "FAILS  slowest over quickest placement: 1.0"),
        ([1.5, 1.0, *MEASURED[2:]], MEASURED, "FAILS  pairs beyond twice the spread ordered right: 19 of 20"),
        ([1.5, 1.0, *MEASURED[2:]], MEASURED, "FAILS  regret of the predicted best: "),
    ],
)
def test_a_goal_that_is_missed_is_told(predicted: list[float], measured: list[float], words: str) -> None:
    record = record_of(predicted, measured)
    assert not holds(record)
    assert words in verdict(record)


def test_no_decided_pair_is_no_proof_of_order() -> None:
    compared = copy.deepcopy(record_of(GOOD, MEASURED)["comparison"])
    compared["beyond_twice_the_spread"] |= {"decided": 0, "agreed": 0}
    assert [goal["holds"] for goal in goals(compared)] == [True, True, False, True]


def test_many_placements_stand_below_each_other_the_quickest_first() -> None:
    record = record_of(GOOD, MEASURED)
    lines = table(record).splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("8 tokens"))
    assert [line.split()[0] for line in lines[first + 1 : first + 6]] == ["a", "b", "c", "d", "e"]
    assert "1100 / " in lines[first + 1] and lines[first + 1].split()[7].endswith("%")
    assert "split-half reliability" in table(record) and "other work disturbed the run" in table(record)
    assert (
        lines[-1].startswith("the machine's pace: ")
        and "4 ms while profiled, 4.1 ms while measured (+2.5%)" in lines[-1]
    )


def test_a_record_is_kept_compact_and_read_back(tmp_path: Path) -> None:
    whole = tmp_path / "record.json"
    whole.write_text(json.dumps(record_of(GOOD, MEASURED)))
    added = records.add([whole], tmp_path / "kept")
    assert [one.path.name[:17] for one in added] == ["2026-11-26-040000"]
    assert added[0].path.stat().st_size < whole.stat().st_size
    (found,) = records.read_all(tmp_path / "kept")
    assert found == added[0].record
    assert [case.predicted_s for case in found.cases] == pytest.approx(GOOD)
    assert found.errors[0] == pytest.approx(0.1, abs=0.01)
    text = markdown([found])
    assert "gloo, 2 ranks" in text and "| 10, 12 |" in text and "- pairs beyond twice the spread" in text


def test_predictions_that_did_not_come_first_do_not_count(tmp_path: Path) -> None:
    record = record_of(GOOD, MEASURED)
    record["predictions"]["written"] = record["measured_from"]
    (tmp_path / "record.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match="not older than measurements"):
        records.add([tmp_path / "record.json"], tmp_path / "kept")
    with pytest.raises(BadInput, match="not older than measurements"):
        records.read_any(tmp_path / "record.json")
    assert not (tmp_path / "kept").exists()
    # One that was put there by other means is refused when it is read.
    record["predictions"]["written"] = "2026-11-26T03:59:00.1+00:00"
    (tmp_path / "record.json").write_text(json.dumps(record))
    (added,) = records.add([tmp_path / "record.json"], tmp_path / "kept")
    late = json.loads(added.path.read_text()) | {"written": record["measured_from"]}
    added.path.write_text(json.dumps(late))
    with pytest.raises(BadInput, match="not older than measurements"):
        records.read(added.path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"kind": "validate-silicon"}', "validate-silicon"),
        ('{"kind": ["validate-hardware"]}', "a record of"),
        ('{"kind": "validate-exchange"}', "not a whole record of `validate exchange`"),
        ('{"kind": "validate-fabric", "labs": []}', "not a whole record of `validate fabric`"),
        ('{"kind": "validate-replay", "job": 3}', "not a whole record of `validate replay`"),
        ('{"kind": "validate-capacity", "outcomes": [{"name": "x"}]}', "not a whole record of `validate capacity`"),
        ('{"kind": "validate-hardware"}', "not a whole record"),
    ],
)
def test_what_is_no_record_is_one_line(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(BadInput, match=words):
        records.add([path], tmp_path / "kept")
    with pytest.raises(BadInput):
        records.read(path)


def test_a_damaged_record_is_refused_or_still_one(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps(record_of(GOOD, MEASURED)))
    content = records.add([tmp_path / "record.json"], tmp_path / "kept")[0].path.read_bytes()
    rng, path, refused = random.Random(0), tmp_path / "damaged.json", 0
    for _ in range(300):
        path.write_bytes(of_bytes(content, rng))
        try:
            assert "| date |" in markdown([records.read(path)])
        except BadInput as error:
            assert "\n" not in error.line()
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"moments": 3}', '{"moments": [[1]]}', '{"moments": [[[[1]]]]}'])
def test_moments_that_are_not_whole_keep_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / unfinished.MOMENTS_FILE).write_text(content)
    assert unfinished.tell(tmp_path, job(), "lost") is None


def test_finished_repeats_of_a_lost_run_are_told(tmp_path: Path) -> None:
    moments = moments_of(job(), MEASURED)[:, :, :3]
    unfinished.keep(tmp_path, moments, repeats=12, started="2026-11-26T04:00:00")
    assert unfinished.tell(tmp_path, job(), "rank 1 was lost") == "3 of 12 repeats are in unfinished.json"
    told = json.loads((tmp_path / "unfinished.json").read_text())
    assert (told["ended"], told["repeats"]) == ("rank 1 was lost", 3)
    medians = [entry["layer_s"]["median_s"] for entry in told["measured"]]
    assert medians == pytest.approx(MEASURED, rel=0.05)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unfinished.json"]
    unfinished.forget(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_carries_the_validation_and_the_lines_stay(tmp_path: Path) -> None:
    path = bundle(tmp_path / "node.zip")
    before = read_bundle(path)[0]
    record = record_of(GOOD, MEASURED)
    for _ in range(2):  # the second one takes the place of the first
        files = {"validation/record.json": json.dumps(record).encode(), "validation/predictions.json": b"{}"}
        add_records(path, files, bundled.summary(record))
    lines, manifest = read_bundle(path)
    assert lines == before and manifest["device"] == "a box"
    assert manifest["validation"]["layer_mape"] == record["comparison"]["layer"]["mape"]
    assert read_records(path)["validation/record.json"] == record
    assert [one.record.date for one in records.add([path], tmp_path / "kept")] == [record["date"]]
    rewritten(path, {"validation/record.json": b"{}"})
    with pytest.raises(BadInput, match="not as it was written"):
        read_records(path)
    plain = bundle(tmp_path / "plain.zip")
    assert read_records(plain) == {}
    with pytest.raises(BadInput, match="holds no validation"):
        records.add([plain], tmp_path / "kept")


def test_the_accuracy_page_holds_the_records_that_ship(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "records", "--check", "--docs", str(repo / "docs" / "accuracy.md")]) == 0
    assert "| date | what ran |" in capsys.readouterr().out
    for record in records.read_all():
        assert record.covers
        if record.cases:
            assert record.written is not None and record.measured_from is not None
            assert record.written < record.measured_from


def test_the_page_is_written_and_held_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "kept"
    page.write_text(f"before\n{PART.begin}\n{PART.end}\nafter\n")
    (tmp_path / "record.json").write_text(json.dumps(record_of(GOOD, MEASURED)))
    common = ["validate", "records", "--folder", str(folder), "--docs", str(page)]
    assert run([*common, "--add", str(tmp_path / "record.json"), "--update"]) == 0
    assert page.read_text().startswith("before\n") and "| 10, 12 |" in page.read_text()
    assert run([*common, "--check"]) == 0
    page.write_text(page.read_text().replace("| 10, 12 |", "| 10, 99 |"))
    assert run([*common, "--check"]) == 1
    assert "the table is not the record's" in capsys.readouterr().err
