"""What a refusal tells the user to do: the command exists with these flags, and what it measures is then priced."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from moesim.cost.ops import Attention, Collective, ExpertGemm, Gemm, MlaAbsorb, MlaAttention, MoeExchange, Operation
from moesim.cost.roofline import Roofline
from moesim.errors import BadInput, OutsideProfile
from profiles.asked import asked
from profiles.cli import app
from profiles.collective_points import KINDS, bytes_from, sizes_between
from profiles.costs import StoreCosts
from profiles.shares import destination_shares
from profiles.store import open_profile
from profiles.sweep import CPU, GPU, QUICK, histogram, plan, real_loads
from tests.costs_cluster import h200


def at(*values: float) -> Any:
    return np.array(values)


def mla(phase: str) -> MlaAttention:
    return MlaAttention(phase, at(2.5), at(1), at(300.5), 3, 512, 128, 64, 128, "bf16", "bf16")  # type: ignore[arg-type]


REFUSED: dict[str, Operation] = {
    "gemm": Gemm(at(1, 1e6), 256, 7168, "bf16"),
    "gemm of a new shape": Gemm(at(5), 33, 77, "bf16"),
    "gemm in fp8 blocks": Gemm(at(5), 33, 77, "fp8_block"),
    "experts": ExpertGemm(np.array([[3.0, 4.5, 0.0]]), 48, 32, 12, 2, "bf16", "fused"),
    "experts under DeepEP": ExpertGemm(np.ones((1, 3)), 48, 32, 12, 2, "bf16", "deepep_normal"),
    "prefill": Attention("prefill", at(1), at(9), at(3), 3, 1, 24, "bf16", "bf16"),
    "decode": Attention("decode", at(1.5), at(1), at(9.5), 3, 1, 24, "bf16", "bf16"),
    "decode in a window": Attention("decode", at(1), at(1), at(9), 3, 1, 24, "bf16", "bf16", 4096),
    "latent prefill": mla("prefill"),
    "latent decode": mla("decode"),
    "absorb": MlaAbsorb("pre", at(7), 3, 96, 24, "bf16"),
    "all-to-all over nodes": Collective("all_to_all", at(1e6), 32, 4),
    "all-reduce in a node": Collective("all_reduce", at(1e12 + 1), 8, 1),
    "exchange": MoeExchange("dispatch", "normal", at(8), 999, 8, 256, 32, 4, "fp8"),
}


def refusal(op: Operation, *profiles: str) -> str:
    costs = StoreCosts(
        tuple(open_profile(name, "h200_sxm") for name in profiles or ("default",)), "moesim", False, Roofline(h200(1))
    )
    with pytest.raises(OutsideProfile) as error:
        costs.estimate(op)
    return error.value.line()


def parsed(command: str) -> Any:
    """Parse a command line of `moesim profile …` as the shell and the program would, without running it."""
    words = shlex.split(command)
    words = words[words.index("profile") + 1 :]
    group = get_command(app)
    while words[0] in getattr(group, "commands", {}):
        group = group.commands[words[0]]  # type: ignore[attr-defined]
        words = words[1:]
    return group.make_context("profile", words)


@pytest.mark.parametrize("name", REFUSED)
def test_every_command_that_a_refusal_names_exists_with_its_flags(name: str) -> None:
    line = refusal(REFUSED[name])
    assert "extrapolate: allow" in line
    commands = re.findall(r"`([^`]*)`", line)
    assert commands
    for command in commands:
        assert command.startswith("moesim profile ") or (
            command.startswith("torchrun ") and " --no-python moesim profile collectives " in command
        )
        given = parsed(command).params
        for text in given.get("point") or ():
            assert asked(text)
        if "kinds" in given:
            assert given["kinds"] in KINDS
            assert bytes_from(given["high"], "--to") >= bytes_from(given["low"], "--from")


@pytest.mark.parametrize(
    "name", ["gemm of a new shape", "experts", "prefill", "decode", "latent prefill", "latent decode", "absorb"]
)
def test_following_a_refusal_makes_it_go_away(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")
    op = REFUSED[name]
    measure = re.findall(r"`([^`]*)`", refusal(op))[0].replace("--device cuda", "--device cpu --repeats 5")
    # Where a whole shape is not measured the command goes far; for this check the sizes asked for are enough.
    measure = re.sub(r"=1:\d+", lambda found: "=1:512" if "kv_tokens" in measure else "=1:16", measure)
    measure = measure.replace("batch=1:512", "batch=1:4").replace("new_tokens=1:16", "new_tokens=1:32")
    out = tmp_path / "measured.jsonl"
    words = shlex.split(measure)[2:]
    words[words.index("--out") + 1] = str(out)
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    profile = tmp_path / "profile"
    CliRunner().invoke(
        app, ["import", "measured", str(out), "--system", "h200_sxm", "--out", str(profile)], catch_exceptions=False
    )
    costs = StoreCosts((open_profile(str(profile), "h200_sxm"),), "moesim", False, Roofline(h200(1)))
    assert (costs.estimate(op).seconds > 0).all()


WRONG_POINTS = {
    "": "unknown family",
    "gemmm n=1": "unknown family",
    "gemm n=1 k=1": "lacks dtype",
    "gemm n=1 k=1 dtype=bf16 z=1": "has no 'z'",
    "gemm n=x k=1 dtype=bf16": "no whole number",
    "gemm n=0 k=1 dtype=bf16": "no whole number",
    "gemm n k=1 dtype=bf16": "not name=value",
    "gemm n=1 k=1 dtype=int4": "int4 gemm is not in torch",
    "gemm n=1 k=1 dtype=bf16 m=8:4": "runs backwards",
    "gemm n=1 k=1 dtype=bf16 m=1:99999999999999": "no whole number",
    "experts dtype=bf16 hidden=8 intermediate=8 experts=4 top_k=2 local_experts=8": "more local experts",
    "experts dtype=bf16 hidden=8 intermediate=8 experts=4 top_k=2 local_experts=2 distribution=odd": "unknown distri",
    "attention_decode dtype=bf16 kv_dtype=fp8 heads=1 kv_heads=1 head_dim=8": "a cache of fp8",
}


@pytest.mark.parametrize("text", WRONG_POINTS)
def test_a_wrong_point_is_one_line(text: str) -> None:
    with pytest.raises(BadInput, match=WRONG_POINTS[text]):
        asked(text or "nothing")


def test_sweeps_hold_every_table_and_no_point_twice() -> None:
    for reach in (GPU, CPU, QUICK):
        points = plan(reach)
        names = [(p.family, str(p.key), str(p.size), p.kernel) for p in points]
        assert len(set(names)) == len(names)
        assert {"gemm", "experts", "grouped_gemm", "gate", "ceiling", "norm"} <= {p.family for p in points}
        for point in points:
            if "histogram" in point.extra:
                assert sum(point.extra["histogram"]) == point.size["routed"]
                assert len(point.extra["histogram"]) == point.key["local_experts"]
    assert {"mla_prefill", "mla_decode", "mla_absorb"} <= {point.family for point in plan(GPU)}


def test_histograms_hold_their_pairs_in_their_shape() -> None:
    assert histogram("uniform", 10, 4).tolist() == [3, 3, 2, 2]
    assert histogram("uniform", 2, 4).tolist() == [1, 1, 0, 0]
    assert histogram("one_hot", 60, 4).tolist() == [30, 10, 10, 10]
    assert histogram("zipf_1", 600, 3).tolist() == [327, 164, 109]


def test_real_ranks_come_from_loads_and_placement(tmp_path: Path) -> None:
    loads, placement = tmp_path / "loads.json", tmp_path / "map.json"
    loads.write_text('{"logical_count": [[0, 0, 0, 0], [8, 4, 2, 2]]}')
    contiguous = {name: counts.tolist() for name, _, counts in real_loads(loads, None, ranks=2)[-3:]}
    assert contiguous["real_hottest_1"] == [4096, 2048]
    assert contiguous["real_coldest_1"] == [1024, 1024]
    placement.write_text('{"physical_to_logical": [[0, 2, 0, 1, 3, 2]], "layer_ids": [1], "ranks": 2}')
    placed = {name: counts.tolist() for name, _, counts in real_loads(loads, placement, ranks=9)[-3:]}
    assert placed["real_hottest_1"] == [2048, 512, 2048]
    for text in ("{}", "[]", '{"logical_count": 3}', '{"logical_count": [[-1]]}', "nonsense"):
        loads.write_text(text)
        with pytest.raises(BadInput):
            real_loads(loads, None, ranks=1)


def test_sizes_and_shares_of_collectives(tmp_path: Path) -> None:
    assert sizes_between(1024, 5000) == (1024, 2048, 4096, 5000)
    assert [bytes_from(text, "") for text in ("12", "12B", "1KB", "3MB", "1gb")] == [12, 12, 1024, 3 * 2**20, 2**30]
    for text in ("", "KB", "-1KB", "1.5KB", "0", "9" * 30):
        with pytest.raises(BadInput):
            bytes_from(text, "--from")
    none: dict[str, Any] = {"skew": None, "loads": None, "placement": None, "layer": None}
    assert destination_shares(4, **none) == ((), "")
    shares, name = destination_shares(2, **{**none, "skew": 1.0})
    assert shares == pytest.approx((2 / 3, 1 / 3))
    assert name == "zipf_1"
    loads = tmp_path / "loads.csv"
    loads.write_text("layer_id,expert_id,count\n" + "".join(f"1,{expert},{expert + 1}\n" for expert in range(4)))
    shares, _ = destination_shares(2, **{**none, "loads": loads})
    assert shares == pytest.approx((0.3, 0.7))
    for wrong in ({"placement": loads}, {"loads": loads, "skew": 1.0}, {"loads": loads, "layer": 7}):
        with pytest.raises(BadInput):
            destination_shares(2, **{**none, **wrong})
