"""Measured serving runs: how rows are read, what they become, and how predictions are scored."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.cli import run
from moesim.errors import BadInput, Infeasible, MoesimError
from profiles.store import DATA
from validate.accuracy import choices, coverage, errors, regret, spearman
from validate.silicon.price import OK, UNSUPPORTED, predict_all, predictions_csv
from validate.silicon.rows import COLUMNS, MEASURED, Layout, SiliconRow, choice_groups, clean, read_rows
from validate.silicon.scenario import scenario_of
from validate.silicon.score import score, score_table
from validate.silicon.settings import layout_of, settings_of

ROLES = [f"{role}_{name}" for role in ("prefill", "decode") for name in ("batch_size", "num_workers", "tp_size")]
ROW = {
    "id": "one", "silicon_data_source": "db-dump/2026-04-27; silicon_concurrency=8; measured=2026-03-25T00:00:00.000Z",
    "backend": "sglang", "backend_version": "0.5.9", "model_path": "deepseek-ai/DeepSeek-R1", "system": "h200_sxm",
    "precision": "fp8", "mode": "agg", "isl": "1024", "osl": "128", "gemm_quant_mode": "fp8",
    "moe_quant_mode": "fp8_block", "batch_size": "8", "tp_size": "8", "pp_size": "1", "attention_dp_size": "1",
    "moe_tp_size": "8", "moe_ep_size": "1", "silicon_ttft_ms": "245.5", "silicon_tpot_ms": "12.5",
}  # fmt: skip


def table(folder: Path, *changes: dict[str, str]) -> Path:
    out = io.StringIO()
    writer = csv.DictWriter(out, [*COLUMNS, *ROLES, *MEASURED], restval="")
    writer.writeheader()
    for number, change in enumerate(changes):
        writer.writerow({**ROW, "id": str(number), **change})
    path = folder / "rows.csv"
    path.write_text(out.getvalue())
    return path


def rows(folder: Path, *changes: dict[str, str]) -> list[SiliconRow]:
    return read_rows(table(folder, *changes))


def test_a_row_is_read_with_its_concurrency_and_its_cell(tmp_path: Path) -> None:
    one, two = rows(tmp_path, {}, {"silicon_data_source": "", "batch_size": "4", "attention_dp_size": "2"})
    assert one.concurrency == 8
    assert two.concurrency == 8  # batch of a rank x attention DP
    assert one.layout == Layout(8, 1, 1, 8, 1)
    assert one.gpus == 8
    # int(sha256("deepseek-ai/DeepSeek-R1|h200_sxm|sglang"), 16) is odd.
    assert one.cell == "odd"
    assert one.moe
    assert not replace(one, model="meta-llama/Llama-3.1-8B-Instruct").moe
    assert not replace(one, model="Qwen/Qwen3-32B").moe
    assert one.throughput(0.2455, 0.0125) == pytest.approx(8 * 128 / (0.2455 + 0.0125 * 127) / 8)


def test_what_a_score_counts(tmp_path: Path) -> None:
    found = rows(
        tmp_path,
        {},
        {},  # the same measurement again
        {"silicon_tpot_ms": "12.6"},
        {"moe_tp_size": "4", "moe_ep_size": "2", "silicon_tpot_ms": "12.7"},
        {"model_path": "meta-llama/Llama-3.1-70B", "silicon_tpot_ms": "12.8"},
        {"mode": "disagg", "silicon_tpot_ms": "12.9"},
    )
    assert [row.id for row in clean(found)] == ["0", "2"]
    three = rows(tmp_path, *({"tp_size": str(tp), "moe_tp_size": str(tp)} for tp in (2, 4, 8)), {"isl": "8192"})
    assert list(choice_groups(three).values()) == [[0, 1, 2]]


def test_layouts_that_ran_are_not_always_those_that_stand_there(tmp_path: Path) -> None:
    squared = {"tp_size": "4", "attention_dp_size": "4", "moe_tp_size": "1", "moe_ep_size": "16", "backend": "vllm"}
    kimi, minimax, fp4, plain = rows(
        tmp_path,
        {**squared, "model_path": "moonshotai/Kimi-K2.5", "system": "b200_sxm", "backend_version": "0.17.0"},
        {**squared, "model_path": "MiniMaxAI/MiniMax-M2.5", "system": "b200_sxm", "backend_version": "0.19.0"},
        {"precision": "fp4", "system": "b200_sxm", "tp_size": "4", "moe_tp_size": "4"},
        {},
    )
    assert layout_of(kimi) == Layout(4, 1, 1, 1, 4)
    assert layout_of(minimax) == Layout(1, 1, 4, 1, 4)
    assert layout_of(fp4) == Layout(4, 1, 1, 1, 4)
    assert layout_of(plain) == plain.layout


def test_settings_follow_the_scripts(tmp_path: Path) -> None:
    h200, b200, trt, oss = rows(
        tmp_path,
        {},
        {"system": "b200_sxm", "silicon_data_source": "silicon_concurrency=32", "batch_size": "32"},
        {
            "backend": "trtllm", "silicon_data_source": "silicon_concurrency=16; measured=2025-11-02T00:00:00Z",
            "batch_size": "16",
        },
        {"backend": "vllm", "model_path": "openai/gpt-oss-120b", "system": "b200_sxm", "precision": "fp4"},
    )  # fmt: skip
    told = settings_of(h200, layout_of(h200))
    assert (told.batch_tokens, told.kv, told.poll_steps, told.range_ratio) == (32768, "bf16", 1, 0.8)
    told = settings_of(b200, layout_of(b200))
    assert (told.kv, told.poll_steps) == ("fp8", 30)
    told = settings_of(trt, layout_of(trt))
    assert (told.batch_tokens, told.chunked) == (1152, False)  # 16 + 1024 + 64, up to a multiple of 64
    told = settings_of(oss, layout_of(oss))
    assert (told.dense, told.experts, told.experts_from) == ("bf16", "w4a8_mxfp4_mxfp8", "sglang")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mode": "disagg"}, "disaggregated"),
        ({"moe_tp_size": "2"}, "contradict each other"),
        ({"system": "unheard_of"}, "no profile of unheard_of"),
        ({"silicon_data_source": "", "batch_size": ""}, "does not say how many requests"),
    ],
)
def test_rows_that_cannot_be_described_say_why(change: dict[str, str], reason: str, tmp_path: Path) -> None:
    (row,) = rows(tmp_path, change)
    with pytest.raises(Infeasible, match=reason):
        scenario_of(row, DATA)


def test_a_row_is_priced_with_the_shipped_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user would: the same rows without their measurements, in order, the unsupported one with its reason."""
    path = table(
        tmp_path, {"silicon_ttft_ms": "", "silicon_tpot_ms": ""}, {"moe_tp_size": "2"}, {"silicon_tpot_ms": "13.0"}
    )
    out = tmp_path / "pred.csv"
    assert run(["validate", "silicon", "--rows", str(path), "--out", str(out), "--profiles", str(DATA), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rows"], told["priced"]) == (3, 2)
    lines = list(csv.DictReader(out.read_text().splitlines()))
    assert [line["status"] for line in lines] == [OK, UNSUPPORTED, OK]
    assert lines[1]["reason"]
    assert lines[1]["tpot_ms"] == ""
    assert 4.0 < float(lines[0]["tpot_ms"]) < 40.0
    assert 40.0 < float(lines[0]["ttft_ms"]) < 1000.0
    assert told["score"]["odd"]["rows"] == 2  # the repeat's TPOT differs; the row without a measurement is no score
    assert run(["validate", "silicon", "--rows", str(path), "--profiles", str(DATA)]) == 0
    assert "| TPOT: MAPE" in capsys.readouterr().out


def test_a_row_in_stages_is_priced(tmp_path: Path) -> None:
    """Twice the GPUs in two stages: a token takes as many layers as before and a send, so it comes hardly sooner."""
    one, two = predict_all(rows(tmp_path, {}, {"pp_size": "2"}), DATA)
    assert (one.status, two.status) == (OK, OK)
    assert one.tpot_s is not None
    assert two.tpot_s is not None
    assert 0.6 * one.tpot_s < two.tpot_s < 1.3 * one.tpot_s
    assert scenario_of(two.row, DATA).cluster.nodes == 2  # type: ignore[union-attr]


def test_wrong_costs_show_in_the_score(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, {})
    (right,) = predict_all([row], DATA)
    assert right.tpot_s is not None
    measured = replace(row, tpot_ms=right.tpot_s * 1e3, ttft_ms=(right.ttft_s or 0) * 1e3)
    exact = score([replace(right, row=measured)])["odd"]
    assert exact["tpot"]["mape"] == pytest.approx(0, abs=1e-12)
    wrong = score([replace(right, row=measured, tpot_s=right.tpot_s * 1.5)])["odd"]
    assert wrong["tpot"]["mape"] == pytest.approx(0.5)
    assert "50.0%" in score_table(score([replace(right, row=measured, tpot_s=right.tpot_s * 1.5)]))


def test_predictions_keep_the_order_and_ids(tmp_path: Path) -> None:
    found = predict_all(rows(tmp_path, {"moe_tp_size": "2"}, {"mode": "disagg"}), DATA)
    assert predictions_csv(found).splitlines()[1].startswith("0,unsupported,,,")
    assert predictions_csv(found).splitlines()[2].startswith("1,unsupported,,,")


def test_damaged_tables_are_refused_in_one_line(tmp_path: Path) -> None:
    path = table(tmp_path, {}, {"precision": "fp4"})
    text = path.read_text()
    rng = random.Random(0)
    for _ in range(300):
        at = rng.randrange(len(text))
        path.write_text(
            text[:at] + rng.choice(["", "x", ",", '"', "-1", "\n", "1e400", "nan"]) + text[at + rng.randrange(9) :]
        )
        try:
            read = read_rows(path)
        except BadInput as error:
            assert "\n" not in error.line()
            assert str(path) in error.line()
            continue
        for row in read:
            try:
                scenario_of(row, DATA)
            except MoesimError as error:
                assert "\n" not in error.line()


def test_figures_by_hand() -> None:
    found = errors(np.array([1.1, 0.8, 1.0]), np.ones(3))
    assert (found.n, found.median) == (3, pytest.approx(0.1))
    assert found.mape == pytest.approx(0.1)
    assert found.bias == pytest.approx(0.0)
    assert errors(np.zeros(0), np.zeros(0)).as_dict()["mape"] is None
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert regret(np.array([1.0, 5.0, 2.0]), np.array([9.0, 8.0, 10.0])) == pytest.approx(0.2)
    told = choices([[0, 1, 2], [3, 4]], np.array([1.0, 2, 3, 4, 5]), np.array([1.0, 2, 3, 5, 4]))
    assert (told.groups, told.spearman, told.regret) == (1, pytest.approx(1), 0)
    assert choices([[0, 1, 2]], np.ones(3), np.array([1.0, 2, 3])).spearman == 0
    assert coverage(np.zeros(2), np.ones(2), np.array([0.5, 2.0]))["share"] == 0.5
