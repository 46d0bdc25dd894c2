"""Published exchanges: what each bandwidth counts, series, damaged files, and the leave-out over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cli import run
from moesim.errors import BadInput
from moesim.network.uniform import Routed, uniform_copies
from profiles.ep_out import leave_out, report, summary
from profiles.published_exchanges import read_series, scheme_of

HEAD = "src,backend,gpu,nic,mode,op,ep,tokens_per_rank,hidden,topk,dtype,sms,latency_us,bw_GBps,bw_kind,note"


def table(tmp_path: Path, *rows: str) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("\n".join([HEAD, *rows]) + "\n")
    return path


def normal(ep: int, figure: str, kind: str, *, gpu: str = "H800", note: str = "", latency: str = "") -> str:
    return f"s,DeepEP,{gpu},n,normal,combine,{ep},4096,7168,8 (top-4 groups),bf16,,{latency},{figure},{kind},{note}"


def test_what_each_bandwidth_counts(tmp_path: Path) -> None:
    low = "s,DeepEP,H800,n,low-latency,{op},16,128,7168,8,{dtype},,,{figure},RDMA (logical),"
    rows = [
        normal(8, "153.0", "bottleneck NVLink"),
        normal(16, "43.0", "bottleneck RDMA"),
        normal(64, "43.0", "bottleneck RDMA"),
        low.format(op="dispatch", dtype="fp8", figure="43.0"),
        low.format(op="combine", dtype="bf16", figure="44.0"),
        normal(16, "500.0", "algorithm bw", gpu="GB200", note='"uniform router, 8 local experts"'),
    ]
    published = read_series(table(tmp_path, *rows))
    seconds = [point.seconds for series in published.series for point in series.points]
    eight = uniform_copies("node", Routed(top_k=8, experts=256), ranks=8, domain=8)
    inside = uniform_copies("node", Routed(top_k=8, local_experts=8), ranks=16, domain=72)
    assert seconds == pytest.approx([
        4096 * eight.ranks * 14336 / 153e9,
        4096 * 1.993020 * 14336 / 43e9,  # two nodes, seldom one alone
        4096 * 4 * 14336 / 43e9,  # as many groups as a token may visit
        128 * 8 * (7168 * (1 + 4 / 128) + 16) / 43e9,
        128 * 8 * 14336 / 44e9,
        4096 * inside.ranks * 14336 / 500e9,
    ], rel=1e-6)  # fmt: skip
    assert published.series[-1].points[0].within_s == pytest.approx(seconds[-1] * 0.5 / 500)


def test_a_latency_wins_and_spreads_are_read(tmp_path: Path) -> None:
    rows = [
        "s,IBGDA,,,pplx,dispatch,16,1,,,,,102.7,,,+-8.7",
        "s,IBGDA,,,pplx,dispatch,32,1,,,,,115.7,99.0,whatever,+-1.4",
        "s,IBGDA,,,pplx,dispatch,64,1,,,,,120.0,,,",
    ]
    (series,) = read_series(table(tmp_path, *rows)).series
    assert [point.ep for point in series.points] == [16, 32, 64]
    assert [point.seconds for point in series.points] == pytest.approx([102.7e-6, 115.7e-6, 120e-6])
    assert [point.within_s for point in series.points] == pytest.approx([8.7e-6, 1.4e-6, 0.5e-6])
    assert series.assumed == ("hidden", "topk", "dtype")


def test_rows_that_cannot_be_told_are_counted(tmp_path: Path) -> None:
    rows = [normal(16, "43.0", "wire"), normal(32, "", ""), normal(64, "50.0", "bottleneck RDMA")]
    published = read_series(table(tmp_path, *rows))
    assert published.left_out == {
        "a bandwidth of unknown kind 'wire' and no latency": 1,
        "neither latency nor bandwidth": 1,
    }
    assert [len(series.points) for series in published.series] == [1]


@pytest.mark.parametrize(
    ("backend", "mode", "op", "scheme"),
    [
        ("DeepEP", "normal internode", "dispatch", "node"),
        ("NVLinkOneSided", "one-sided", "combine", "node"),
        ("DeepEP v1 initial (pure-RDMA LL)", "low-latency", "dispatch", "expert_network"),
        ("DeepEP v1 initial (pure-RDMA LL)", "normal", "dispatch", "node"),
        ("UCCL-EP", "low-latency", "combine", "expert"),
        ("Torch", "pplx", "all_to_all (raw)", "peer"),
    ],
)
def test_schemes(backend: str, mode: str, op: str, scheme: str) -> None:
    assert scheme_of(backend, mode, op) == scheme


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (normal(16, "nan", "bottleneck RDMA"), "rows.csv:2: bw_GBps is 'nan'"),
        (normal(16, "-3", "bottleneck RDMA"), "bw_GBps is '-3'"),
        (normal(16, "", "", latency="1,2,3,4,5,6"), "not as many values as columns"),
        (normal(16, "", "", latency="x"), "latency_us is 'x'"),
        ("s,D,g,n,normal,combine,2.5,4096,7168,8,bf16,,5,,,", "EP size 2.5"),
        ("s,D,g,n,normal,combine,8,0,7168,8,bf16,,5,,,", "tokens_per_rank is '0'"),
        ("s,D,g,n,normal,combine,8,1,7168,many,bf16,,5,,,", "topk 'many'"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_series(table(tmp_path, row))
    assert said in caught.value.line() and "rows.csv:2" in caught.value.line()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_files_are_read_or_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    text = "\n".join([HEAD, normal(16, "43.0", "bottleneck RDMA"), normal(32, "44.0", "bottleneck RDMA")])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 5))
        text = (
            text[:at]
            + data.draw(st.sampled_from(["", ",", '"', "\n", "nan", "-", "9e999", "\0", "é"]))
            + text[at + cut :]
        )
    path = tmp_path_factory.getbasetemp() / "mutated.csv"
    path.write_bytes(text.encode())
    try:
        published = read_series(path)
    except BadInput as error:
        assert "mutated.csv" in error.line() and "\n" not in error.line()
    else:
        assert all(point.seconds > 0.0 for series in published.series for point in series.points)


def rows_of_physics(tmp_path: Path) -> Path:
    """Latencies that rise by 10 us a doubling, and one series that falls in its middle."""
    up = [f"s,A,H800,n,low-latency,dispatch,{8 * 2**i},128,7168,8,fp8,,{50 + 30 * i},,," for i in range(4)]
    bent = [
        f"s,B,H800,n,low-latency,dispatch,{ep},128,7168,8,fp8,,{value},,,"
        for ep, value in ((8, "50"), (16, "120"), (32, "100"))
    ]
    pair = [f"s,C,H800,n,low-latency,dispatch,{ep},128,7168,8,fp8,,50,,," for ep in (8, 16)]
    return table(tmp_path, *up, *bent, *pair)


def test_every_size_is_left_out_and_edges_are_extrapolated(tmp_path: Path) -> None:
    published = read_series(rows_of_physics(tmp_path))
    found = summary(leave_out(published), published.left_out)
    up, bent = found["series"]  # two sizes are no series
    assert [point["tag"] for point in up["points"]] == ["extrapolated", *["interpolated"] * 2, "extrapolated"]
    assert up["order"] == {"right": 5, "wrong": 0, "undecided": 0} and up["monotone"]
    assert not bent["monotone"] and bent["order"]["wrong"] == 1
    assert found["inner"]["points"] == 3 and found["edges"]["points"] == 4
    assert found["order"]["right"] == 1 and found["order"]["not_monotone"] == 1
    assert not found["holds"]
    text = "\n".join(report(found))
    assert "order wrong in 1 of 2 pairs, not monotone" in text and text.endswith("missed")


def test_a_prediction_does_not_see_its_own_row(tmp_path: Path) -> None:
    path = rows_of_physics(tmp_path)
    before = leave_out(read_series(path))[0].predicted[16]
    path.write_text(path.read_text().replace("dispatch,16,128,7168,8,fp8,,80", "dispatch,16,128,7168,8,fp8,,800"))
    after = leave_out(read_series(path))[0]
    assert after.predicted[16] == before
    assert after.series.points[1].seconds == pytest.approx(800e-6)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rows_of_physics(tmp_path)
    assert run(["profile", "check", "--leave-out", "ep-size", "--rows", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["inner"]["points"] == 3 and len(found["series"]) == 2
    few = table(tmp_path, "s,A,H800,n,low-latency,dispatch,8,128,7168,8,fp8,,50,,,")
    assert run(["profile", "check", "--leave-out", "ep-size", "--rows", str(few)]) == 2
    assert "no series of 3 EP sizes" in capsys.readouterr().err


def test_the_command_on_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    """Low-latency EP sizes of the shipped profile: recorded medians are 2.6 % of dispatches and 2.2 % of combines."""
    assert run(["profile", "check", "--leave-out", "ep-size", "--json"]) == 0
    lines = {(one["mode"], one["step"], one["tag"]): one for one in json.loads(capsys.readouterr().out)["ep_sizes"]}
    for step in ("dispatch", "combine"):
        inner, edges = lines["low_latency", step, "interpolated"], lines["low_latency", step, "extrapolated"]
        assert inner["series"] == 2 and inner["median"] < 0.026 * 1.2 < edges["median"]
    assert run(["profile", "check", "--leave-out", "ep-size"]) == 0
    assert "low_latency dispatch, inner" in capsys.readouterr().out
