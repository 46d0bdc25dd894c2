"""CSVs of published figures: each conversion by hand, every row accounted for, and the real tables where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moesim.errors import BadInput
from profiles.cli import app
from profiles.importers.deepep_bytes import visited
from profiles.importers.published import Published, context_of, published_of, read_published
from profiles.store import open_profile
from tests import printed_samples as samples


def of(text: str, system: str = "h800", experts: int | None = 256, node: int | None = None) -> Published:
    found = published_of(text, "figures.csv", context_of(system, experts, node))
    assert len(found.rows) + sum(found.left_out.values()) == found.total
    return found


def row(text: str, at: int = 0, **options: Any) -> dict[str, Any]:
    return of(text, **options).rows[at][1]


def test_every_row_of_the_exchanges_is_imported_or_left_out() -> None:
    found = of(samples.EXCHANGES)
    assert (found.total, len(found.rows)) == (8, 4)
    assert found.left_out == {
        "of another GPU": 1, "backend pplx": 1, "neither a dispatch nor a combine": 1,
        "the source does not name the GPU": 1,
    }  # fmt: skip
    silent = of(samples.EXCHANGES, experts=None)
    assert silent.left_out["the number of experts is not stated (give --experts)"] == 3
    assert [one["mode"] for _, one in silent.rows] == ["hybrid_ep_kernel"]


def test_a_latency_comes_first_and_a_bandwidth_by_its_kind() -> None:
    intranode, internode, low, hybrid = (one for _, one in of(samples.EXCHANGES).rows)
    token = 4096 * 7168
    assert intranode["latency_s"] == pytest.approx(token * 1.03125 * visited(8, 256, 8) / 153e9)
    assert (intranode["nodes"], intranode["sms"], intranode["version"]) == (1, 0, "2025.02")
    assert internode["latency_s"] == pytest.approx(token * 2 * visited(2, 256, 8) / 43e9)
    assert (internode["step"], internode["nodes"], internode["dtype"]) == ("combine", 2, "bf16")
    assert (low["latency_s"], low["mode"], low["tokens"]) == (pytest.approx(163e-6), "low_latency", 128.0)
    assert hybrid["latency_s"] == pytest.approx(token * 1.03125 * visited(2, 128, 8) / 68.48e9)
    assert (hybrid["experts"], hybrid["sms"], hybrid["engine"]) == (128, 16, "hybridep")


def test_collectives_count_the_whole_buffer() -> None:
    found = of(samples.ALL_TO_ALL)
    assert found.left_out == {
        "the source does not name the GPU": 1, "a bus bandwidth only: whether its size is a rank's is not stated": 1,
        "a peak, at no stated size": 1, "of another GPU": 1,
    }  # fmt: skip
    assert (found.rows[0][1]["bytes"], found.rows[0][1]["version"]) == (1048576.0, "2.28.7")
    gather, scatter = (one for _, one in of(samples.GATHERS).rows)
    assert (gather["kind"], gather["bytes"], gather["gpus"], gather["nodes"]) == ("all_gather", 16e6, 2, 1)
    assert (scatter["bytes"], scatter["latency_s"]) == (256e6, pytest.approx(380e-6))


def test_products_from_their_rate() -> None:
    found = of(samples.DEEPGEMM)
    assert found.left_out == {"grouped products alone have no table": 1}
    dense = found.rows[0][1]
    assert dense["latency_s"] == pytest.approx(2 * 64 * 2112 * 7168 / 206e12)
    assert (dense["dtype"], dense["m"], dense["device"]) == ("fp8_block", 64.0, "H800 SXM5")
    assert row(samples.CUBLASLT)["latency_s"] == pytest.approx(2 * 4096**3 / 1216.9e12)
    assert row(samples.CUBLASLT)["dtype"] == "fp8"


def test_a_system_that_is_no_preset_needs_the_gpus_of_its_node() -> None:
    text = samples.GATHERS.replace("H800", "MI355X")
    assert of(text, "mi355x").left_out == {"the GPUs of a node are not known (give --gpus-per-node)": 2}
    assert row(text, 1, system="mi355x", node=2)["nodes"] == 2
    with pytest.raises(BadInput, match="a node of h800 carries 8 GPUs, not 4"):
        context_of("h800", None, 4)


@pytest.mark.parametrize(
    ("text", "old", "new", "said", "line"),
    [
        (samples.EXCHANGES, ",163.0,", ",0.163,", "46 GB/s make 16", 4),
        (samples.EXCHANGES, ",153.0,", ",nan,", "bw_GBps is 'nan', no finite figure", 2),
        (samples.EXCHANGES, ",43.0,", ",-43.0,", "bw_GBps is '-43.0'", 3),
        (samples.EXCHANGES, ",43.0,", ",,", "neither a latency nor a bandwidth", 3),
        (samples.EXCHANGES, "8 (top-4 groups),fp8", "many,fp8", "topk is 'many'", 2),
        (
            samples.EXCHANGES,
            ",low-latency,dispatch,8,",
            ",low-latency,dispatch,1,",
            "are not equal parts on 1 ranks",
            4,
        ),
        (samples.ALL_TO_ALL, ",40.00,26.21,", ",0.04,26.21,", "algbw_GBps is 26.21, but time_us_oop make 2.621e+04", 2),
        (samples.ALL_TO_ALL, ",26.21,19.66", ",26.21,None", "busbw_GBps is 'None'", 2),
        (samples.DEEPGEMM, ",206,", ",206000,", "derived_time_us is 9.4, but the rate makes 0.009", 2),
        (samples.DEEPGEMM, "1,64,2112", "1,inf,2112", "m_per_group is 'inf'", 2),
        (samples.GATHERS, "all_gather,2", "all_gather,1", "one GPU alone", 2),
        (samples.CUBLASLT, ",1216.9", "", "6 fields, the header has 7", 2),
        (samples.CUBLASLT, "a guide", '"a guide', "not CSV", 2),
        (samples.CUBLASLT, "tflops", "gflops", "not those of a known table", 1),
    ],
)
def test_a_wrong_row_is_named(text: str, old: str, new: str, said: str, line: int) -> None:
    assert old in text
    with pytest.raises(BadInput) as error:
        of(text.replace(old, new, 1))
    assert said in error.value.line()
    assert error.value.where == f"figures.csv:{line}"


def test_the_command_says_what_became_of_each_row(tmp_path: Path) -> None:
    paths = []
    for name, text in samples.PUBLISHED.items():
        paths.append(str(tmp_path / name))
        (tmp_path / name).write_text(text)
    out = tmp_path / "profile"
    arguments = ["import", "published", *paths, "--system", "h800", "--out", str(out), "--json"]
    done = json.loads(CliRunner().invoke(app, [*arguments, "--experts", "256"], catch_exceptions=False).stdout)
    assert done["rows"] == {"gemm": 2, "collective": 3, "exchange": 4}
    for counts in done["source_rows"].values():
        assert counts["rows"] == counts["imported"] + sum(counts["left_out"].values())
    assert open_profile(str(out), "h800").table("exchange").height == 4
    before = (out / "profile.json").read_bytes()
    arguments[arguments.index("h800")] = "a100_sxm"
    with pytest.raises(BadInput, match="no row is of A100"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert (out / "profile.json").read_bytes() == before


REAL = ("comm_ep_kernels", "nccl_alltoall", "nccl_ag_rs_gb200", "deepgemm_h800", "cublaslt_fp8_azure")
# Rows imported of each table, by system, with 256 experts where a source is silent.
IMPORTED = {
    "h800": (34, 0, 0, 18, 0), "h100_sxm": (36, 1, 0, 0, 9), "h20": (0, 3, 0, 0, 0), "b200_sxm": (30, 0, 0, 0, 0),
    "gb200_nvl72": (102, 0, 36, 0, 0),
}  # fmt: skip


@pytest.mark.data
@pytest.mark.parametrize("system", IMPORTED)
def test_the_real_tables_are_accounted_for(system: str, shared_data: Path) -> None:
    context = context_of(system, 256)
    found = [read_published(shared_data / "published" / f"{name}.csv", context) for name in REAL]
    assert tuple(len(one.rows) for one in found) == IMPORTED[system]
    assert [one.total for one in found] == [234, 53, 36, 28, 9]
    for one in found:
        assert len(one.rows) + sum(one.left_out.values()) == one.total
