"""Published rows: the stored figures are the sources', the documented tables are what the code says."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from moesim.graph.training_flops import training_flops_per_token
from moesim.spec.hf import load_model
from moesim.spec.scenario import load_scenario
from validate.published_manifest import Manifest, bundled_manifest, read_manifest
from validate.published_predict import Predicted, predict_rows, set_beside, summary
from validate.published_table import markdown


@pytest.fixture(scope="module")
def rows() -> Manifest:
    return read_manifest(bundled_manifest())


@pytest.fixture(scope="module")
def found(rows: Manifest) -> list[Predicted]:
    return predict_rows(rows.rows, draws=20)


def test_the_documented_tables_are_what_the_code_says(rows: Manifest, found: list[Predicted], repo: Path) -> None:
    ratios = set_beside(rows, found)
    shown = markdown(found, ratios, summary(found, ratios))
    page = (repo / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert "## Published results" in page
    missing = [line for line in shown.splitlines() if line not in page]
    assert not missing, "paste the output of `moesim validate published --markdown`"


def test_every_row_is_there_and_every_wrong_sign_is_explained(rows: Manifest, found: list[Predicted]) -> None:
    assert len(found) == 27
    assert [one.row.id for one in found if one.value is None] == ["S07"]
    assert not [one for one in set_beside(rows, found) if one.unexplained]
    # Recorded in November 2026; a change of the model that makes them worse should be seen.
    total = summary(found, set_beside(rows, found))
    assert total["errors"]["serving"]["median"] <= 0.25
    assert total["errors"]["training"]["median"] <= 0.17
    assert total["signs"]["right"] >= 20


def test_calibrated_rows_give_back_their_figure(found: list[Predicted]) -> None:
    known = [one for one in found if one.row.calibrated]
    assert [one.row.id for one in known] == ["T07", "T15"]
    assert all(abs(one.error or 0.0) < 5e-3 for one in known)


def test_rows_of_one_machine_share_the_host_s_time(rows: Manifest) -> None:
    """No figure is a row's own: one layer_s for a machine, one set of posting times for a library on it."""
    by_machine: dict[str, set[float]] = {}
    by_library: dict[tuple[str, str], set[tuple[float, ...]]] = {}
    for row in rows.rows:
        scenario = None if row.file is None else load_scenario(row.file)
        if scenario is None or scenario.training is None:
            continue
        host = scenario.training.host
        by_machine.setdefault(row.gpu, set()).add(host.layer_s)
        library = next((name for name in ("UCCL", "NVSHMEM") if name in row.what), "none")
        by_library.setdefault((row.gpu, library), set()).add((host.exchange_s, host.dispatch_row_s, host.combine_row_s))
    assert all(len(values) == 1 for values in (*by_machine.values(), *by_library.values()))
    assert len(by_machine) == 3


def test_flop_are_counted_as_the_runs_counted_them(rows: Manifest) -> None:
    """Where step time and TFLOP/s were both reported, the model's FLOP bring one from the other within 2 %."""
    timed = [row for row in rows.rows if row.step_s is not None]
    assert len(timed) == 15
    for row in timed:
        assert row.file is not None and row.gpus is not None and row.step_s is not None
        scenario = load_scenario(row.file)
        assert scenario.training is not None
        tokens = scenario.training.global_batch * scenario.training.sequence_length
        flops = training_flops_per_token(load_model(scenario.model), scenario.training.sequence_length) * tokens
        assert flops / row.step_s / row.gpus / 1e12 == pytest.approx(row.reported, rel=0.02), row.id


@pytest.mark.data
def test_stored_figures_are_those_of_the_calibration_data(rows: Manifest, shared_data: Path) -> None:
    """Row by row and in order: serving, then training."""

    def table(name: str) -> list[dict[str, str]]:
        with (shared_data / "published" / name).open(newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))

    serving, training = table("serving_results.csv"), table("training_results.csv")
    by_id = {row.id: row for row in rows.rows}
    assert len(by_id) == len(serving) + len(training)
    for number, source in enumerate(serving, 1):
        assert by_id[f"S{number:02}"].reported == float(source["value"])
    for number, source in enumerate(training, 1):
        row = by_id[f"T{number:02}"]
        assert row.reported == float(source["tflops_per_gpu"])
        assert (row.step_s or 0.0) == float(source["step_s"] or 0.0)
        assert row.gpus == int(source["n_gpus"])
        assert row.file is not None
        scenario = load_scenario(row.file)
        assert scenario.training is not None and scenario.parallel is not None
        plan, own = scenario.parallel, scenario.training
        assert (plan.tp, plan.pp, plan.ep) == tuple(int(source[name]) for name in ("tp", "pp", "ep"))
        assert (own.sequence_length, own.global_batch) == (int(source["seq"]), int(source["gbs"]))
        assert own.micro_batch == int(source["mbs"] or 1)
        assert (scenario.policies.schedule == "forward_backward") == (source["overlap"] == "on")
        assert (own.router == "trace") == ("real router" in source["balance"])
