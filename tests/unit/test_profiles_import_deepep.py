"""Logs of DeepEP's own tests: each version's lines, bytes behind a bandwidth, what is refused, and prices from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moesim.cost.estimate import Tag
from moesim.cost.ops import MoeExchange
from moesim.cost.roofline import Roofline
from moesim.errors import BadInput
from profiles.cli import app
from profiles.costs import StoreCosts
from profiles.importers.deepep import Setup, read_deepep_text
from profiles.importers.deepep_bytes import low_latency_bytes, visited
from profiles.importers.deepep_rows import exchanges_of
from profiles.store import open_profile
from tests.costs_cluster import h200
from tests.printed_samples import deepep_internode, deepep_intranode, deepep_low_latency

INTERNODE = Setup(experts=256, ep=16, nodes=2)
INTRANODE = Setup(experts=256, ep=8)
LOW_LATENCY = Setup(tokens=128, hidden=7168, top_k=8, experts=256, ep=8, nodes=1)


def rows(text: str, setup: Setup) -> list[dict[str, Any]]:
    log = read_deepep_text(text, "run.log")
    found = exchanges_of([("run.log", log)], [setup], system="h800", device="d", version="v")
    return [row for _, row in found.rows]


@pytest.mark.parametrize(("form", "extra"), [("rate", 0.0), ("named", 80e-6), ("sum", 80e-6)])
def test_each_versions_internode_lines(form: str, extra: float) -> None:
    found = rows(deepep_internode(form), INTERNODE)
    assert [(row["step"], row["dtype"], row["sms"]) for row in found] == [
        ("dispatch", "fp8", 24), ("dispatch", "bf16", 24), ("combine", "bf16", 24)
    ]  # fmt: skip
    seconds = [row["latency_s"] for row in found]
    np.testing.assert_allclose(seconds, [1600e-6 + extra, 2880e-6 + extra, 3200e-6 + extra], rtol=1e-3)
    row = found[0]
    key = (row["mode"], row["nodes"], row["ep"], row["hidden"], row["top_k"], row["experts"], row["tokens"])
    assert key == ("normal", 2, 16, 7168, 8, 256, 4096.0)
    assert (row["engine"], row["device"], row["version"], row["tag"]) == ("deepep", "d", "v", "measured")


@pytest.mark.parametrize("timed", [True, False])
def test_intranode_lines_with_and_without_a_time(timed: bool) -> None:
    found = rows(deepep_intranode(timed=timed), INTRANODE)
    np.testing.assert_allclose([row["latency_s"] for row in found], [500e-6, 950e-6, 1000e-6], rtol=1e-4)
    assert {(row["nodes"], row["ep"]) for row in found} == {(1, 8)}


# Pairs that DeepEP's tests printed together, on 4,096 tokens of 7,168, top-8 of 256 experts: so the bytes behind a rate
# are known, and the definitions can be checked. deepseek-ai/DeepEP, issue 138 and pull request 456.
def test_the_bytes_are_those_that_public_logs_imply() -> None:
    token = 4096 * 7168 * (1 + 4 / 128)
    intranode = token * visited(8, 256, 8)
    assert intranode == pytest.approx(320.68e9 * 499.58e-6, rel=0.01)  # an H20 node
    assert 2 * intranode / (1 + 4 / 128) == pytest.approx(331.77e9 * 936.50e-6, rel=0.01)
    rdma, nvl = token * visited(8, 256, 8, 4, 8), token * visited(64, 256, 8, 4, 8)
    assert rdma == pytest.approx(51.12e9 * 2357e-6, rel=0.01)  # 64 ranks, 4 of 8 nodes
    assert nvl == pytest.approx(95.21e9 * 2357e-6, rel=0.015)
    # Issue 75, 16 ranks, 128 tokens: the low-latency kernels, less what the mask takes away.
    for rate, time, bytes_each in (
        (11.44e9, 656.57e-6, low_latency_bytes("fp8", 7168, "dispatch")),
        (35.01e9, 415.20e-6, low_latency_bytes("bf16", 7168, "combine")),
    ):
        assert 1014 <= round(rate * time / bytes_each) <= 1024


def test_parts_visited_are_those_of_drawn_routing() -> None:
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((4000, 64)), axis=-1)[:, :6]
    for parts in (4, 8, 32):
        drawn = np.mean([len(set(row // (64 // parts))) for row in chosen])
        assert visited(parts, 64, 6) == pytest.approx(drawn, rel=0.01)
    assert visited(4, 64, 6, 4, 4) == visited(4, 64, 6)  # all nodes allowed: no limit
    assert visited(8, 64, 6, 1, 8) == 1.0
    assert 1.9 < visited(8, 64, 6, 2, 8) <= 2.0
    assert visited(2, 8, 8) == 2.0


def test_low_latency_is_the_median_of_the_ranks() -> None:
    log = read_deepep_text(deepep_low_latency(), "run.log")
    found = exchanges_of([("run.log", log)], [LOW_LATENCY], system="h800", device="d", version="v")
    dispatch, combine = (row for _, row in found.rows)
    assert (dispatch["latency_s"], combine["latency_s"]) == pytest.approx((80.5e-6, 119e-6))
    assert (dispatch["dtype"], combine["dtype"], dispatch["sms"], dispatch["mode"]) == ("fp8", "bf16", 0, "low_latency")
    assert [(one["ranks"], one["spread"]) for one in found.measured] == [
        ("8 of 8", pytest.approx(7 / 80.5, abs=1e-3)), ("8 of 8", pytest.approx(7 / 119, abs=1e-3))
    ]  # fmt: skip
    assert found.left_out == {"sums of dispatch and combine": 8, "times with a receive hook": 8}


def test_the_element_type_of_a_combine_follows_from_its_bytes() -> None:
    pairs = 128 * 8
    rate = pairs * low_latency_bytes("logfmt10", 7168, "combine") / 100.0 / 1e3
    sent = pairs * low_latency_bytes("bf16", 7168, "dispatch") / 100.0 / 1e3
    text = (
        f"[rank 0] Dispatch bandwidth: {sent:.2f} GB/s, avg_t=100.00 us | "
        f"Combine bandwidth: {rate:.2f} GB/s, avg_t=100.00 us\n"
    )
    assert [row["dtype"] for row in rows(text, LOW_LATENCY)] == ["bf16", "logfmt10"]


@pytest.mark.parametrize(
    ("text", "setup", "said", "line"),
    [
        (deepep_internode(), replace(INTERNODE, ep=32), "the RDMA rate makes", 6),
        (deepep_internode("sum"), replace(INTERNODE, experts=None), "give --experts", 6),
        (deepep_internode(), Setup(), "give --experts --ep --nodes", 6),
        (deepep_internode(), replace(INTERNODE, tokens=128), "log says tokens 4096, not 128; leave --tokens out", 1),
        (deepep_internode(), replace(INTERNODE, experts=250), "250 experts are not equal parts on 16 ranks", 6),
        (deepep_internode("named").replace("1600.00", "1.60"), INTERNODE, "the time makes 1.6 us, but the rate", 6),
        (deepep_internode("named").replace("1600.00 us", "1.60 ms"), INTERNODE, "not DeepEP's", 6),
        (deepep_internode().replace("GB/s (NVL)", "Gb/s (NVL)"), INTERNODE, "not DeepEP's", 6),
        (deepep_internode().replace("num_topk=8", "num_topk=-8"), INTERNODE, "no whole number above zero", 1),
        (deepep_intranode(), replace(INTRANODE, ep=4), "the time makes", 5),
        (deepep_intranode(), replace(INTRANODE, nodes=2), "an intranode test on 2 nodes", 5),
        (deepep_low_latency(), replace(LOW_LATENCY, ep=4), "rank 4 of 4; correct --ep", 14),
        (deepep_low_latency(), replace(LOW_LATENCY, tokens=64), "but 64 tokens x top-8 x hidden 7168", 3),
        (deepep_low_latency(), replace(LOW_LATENCY, hidden=4096), "correct --tokens, --top-k or --hidden", 3),
        (deepep_low_latency().replace("avg_t=77.00 us |", "avg_t=nan us |"), LOW_LATENCY, "no figures above zero", 3),
        (deepep_low_latency().replace("avg_t=77.00 us |", "avg_t=0.08 ms |"), LOW_LATENCY, "not DeepEP's", 3),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused_at_its_line(text: str, setup: Setup, said: str, line: int) -> None:
    with pytest.raises(BadInput) as error:
        rows(text, setup)
    assert said in error.value.line()
    assert error.value.where == f"run.log:{line}"


def test_groups_are_asked_for_where_they_limit() -> None:
    text = deepep_internode(ep=64, nodes=8, groups=4)
    setup = Setup(experts=256, ep=64, nodes=8)
    assert len(rows(text, setup)) == 3
    older = text.replace("num_topk_groups=4, ", "")
    with pytest.raises(BadInput, match="give --topk-groups"):
        rows(older, setup)
    assert len(rows(older, replace(setup, topk_groups=4))) == 3


def test_two_setups_in_one_log_are_refused() -> None:
    with pytest.raises(BadInput, match="tokens is 128, but 4096 in line 1; cut the log"):
        read_deepep_text(deepep_internode() + deepep_internode(tokens=128), "run.log")
    with pytest.raises(BadInput, match=r"no best time and no rank's time here \(1 \[tuning\] lines"):
        read_deepep_text("[tuning] SMs 24, NVL chunk 4: 317.45 GB/s (NVL) \n", "run.log")


def imported(folder: Path, logs: list[str], *options: str) -> Path:
    paths = []
    for number, text in enumerate(logs):
        paths.append(folder / f"{number}.log")
        paths[-1].write_text(text)
    out = folder / "profile"
    arguments = ["import", "deepep", *map(str, paths), "--system", "h800", "--out", str(out), *options]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    return out


SHAPE = ("--hidden", "7168", "--top-k", "8", "--experts", "256", "--ep", "8", "--nodes", "1")


def test_low_latency_is_priced_over_several_logs(tmp_path: Path) -> None:
    logs = [deepep_low_latency(tokens=tokens, us=50.0 + tokens / 4) for tokens in (32, 64, 128)]
    tokens = [word for count in (32, 64, 128) for word in ("--tokens", str(count))]
    out = imported(tmp_path, logs, *SHAPE, *tokens)
    costs = StoreCosts((open_profile(str(out), "h800"),), "sglang", False, Roofline(h200(1)))
    op = MoeExchange("dispatch", "low_latency", np.array([32.0, 64.0, 96.0, 128.0]), 7168, 8, 256, 8, 1, "fp8")
    priced = costs.estimate(op)
    np.testing.assert_allclose(priced.seconds, np.array([61.5, 69.5, 77.5, 85.5]) * 1e-6, rtol=1e-6)
    assert list(priced.tags) == [Tag.MEASURED, Tag.MEASURED, Tag.INTERPOLATED, Tag.MEASURED]
    told = json.loads((out / "profile.json").read_text())
    assert [one["ranks"] for one in told["measured"]] == ["8 of 8"] * 6
    with pytest.raises(BadInput, match="2 values for 3 logs"):
        imported(tmp_path, logs, *SHAPE, "--tokens", "1", "--tokens", "2")


def test_the_normal_kernels_answer_at_their_own_multiprocessors_and_say_so(tmp_path: Path) -> None:
    out = imported(tmp_path, [deepep_internode()], "--experts", "256", "--ep", "16", "--nodes", "2")
    costs = StoreCosts((open_profile(str(out), "h800"),), "sglang", False, Roofline(h200(2)))
    op = MoeExchange("dispatch", "normal", np.array([4096.0]), 7168, 8, 256, 16, 2, "fp8")
    priced = costs.estimate(op)
    assert priced.seconds[0] == pytest.approx(1600e-6, rel=1e-3)
    assert "at 24 SMs, not 20" in priced.source
    # The shipped table, measured at 20, is asked at 20 alone.
    shipped = StoreCosts((open_profile("default", "h200_sxm"),), "sglang", False, Roofline(h200(2)))
    assert "SMs" not in shipped.estimate(op).source
