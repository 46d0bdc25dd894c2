"""Logs of nccl-tests and rccl-tests: what their builds print, what is refused, and prices across nodes from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moesim.cost.estimate import Tag
from moesim.cost.ops import Collective
from moesim.cost.roofline import Roofline
from moesim.errors import BadInput
from profiles.cli import app
from profiles.costs import StoreCosts
from profiles.importers.nccl_rows import Given, collectives_of
from profiles.importers.nccl_tests import NcclRun, read_nccl_text
from profiles.store import open_profile
from profiles.whose import System
from tests.costs_cluster import h200
from tests.printed_samples import GPU, nccl_line, nccl_log

TWO_NODES = nccl_log()
OLD = """# nThread 1 nGpus 2 minBytes 1024 maxBytes 4096 step: 2(factor) warmup iters: 5 iters: 20 validation: 1
#
# Using devices
#   Rank  0 Pid   1320 on   box-1 device  0 [0x1b] Tesla V100-SXM2-16GB
#   Rank  1 Pid   1320 on   box-1 device  1 [0x1c] Tesla V100-SXM2-16GB
#
#                                             out-of-place                       in-place
#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error
#        (B)    (elements)                     (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
        4096           512   float            20.00    0.20    0.10  0e+00    21.00    0.20    0.10    N/A
"""


def only(text: str) -> NcclRun:
    (run,) = read_nccl_text(text, "run.log")
    return run


def imported(folder: Path, *logs: str, options: tuple[str, ...] = (), system: str = "h100_sxm") -> Path:
    paths = []
    for number, text in enumerate(logs):
        paths.append(folder / f"{number}.log")
        paths[-1].write_text(text)
    out = folder / "profile"
    arguments = ["import", "nccl-tests", *map(str, paths), "--system", system, "--out", str(out), *options]
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    return out


def test_the_header_tells_what_ran() -> None:
    run = only(TWO_NODES)
    assert (run.kind, run.ranks, run.hosts, run.engine) == ("all_to_all", 16, 2, "nccl")
    assert (run.version, run.suite_version, run.device, run.empty_sizes) == ("2.27.4", "2.17.6", GPU, 1)
    assert [size for size, _ in run.points] == [1024, 65536, 1048576, 16777216, 268435456]
    assert run.points[2][1] == pytest.approx((30.0 + 1048576 / 40e3) * 1e-6, rel=1e-3)  # out of place, as printed


@pytest.mark.parametrize("prefix", ["", "0: ", "[1,0]<stdout>:", "[0] ", "\x1b[0m"])
def test_launchers_put_words_before_each_line(prefix: str) -> None:
    text = "\r\n".join(prefix + line for line in TWO_NODES.splitlines())
    assert only(text) == only(TWO_NODES)


def test_an_old_build_prints_neither_redop_nor_root_nor_its_name() -> None:
    run = only(OLD)
    assert (run.kind, run.program, run.ranks, run.hosts, run.version) == (None, "", 2, 1, "")
    assert run.points == ((4096.0, pytest.approx(20e-6)),)
    named = only("+ mpirun -np 1 ./build/alltoall_perf -b 1k -e 4k -g 2\n" + OLD)
    assert named.kind == "all_to_all"


def test_the_columns_of_single_iterations_and_time_stamps_are_passed_over() -> None:
    more = "    20.1     20.2     20.3     1.00"
    line = nccl_line(1048576, 20.0, 0.5, half=more) + "  2026-11-02 14:03:22"
    head = "# Collective test starting: all_gather_perf\n#  size count type redop root time algbw busbw #wrong i_min\n"
    run = only(head + line + "\n")
    assert (run.date, run.kind) == ("2026-11-02", "all_gather")
    assert run.points == ((1048576.0, pytest.approx(20e-6)),)


def test_a_log_of_rccl_is_rccls() -> None:
    text = TWO_NODES.replace(GPU, "AMD Instinct MI300X").replace(
        "# nccl-tests version 2.17.6 nccl-headers=22704 nccl-library=22704",
        "rccl-tests: Version develop:6405c76\nRCCL version : 2.27.7-develop:29e1567",
    )
    run = only(text)
    assert (run.engine, run.version, run.device) == ("rccl", "2.27.7", "AMD Instinct MI300X")


def test_one_file_may_hold_several_runs_and_kinds_that_have_no_table(tmp_path: Path) -> None:
    text = "".join(nccl_log(program, ("one",)) for program in ("all_reduce", "broadcast", "reduce_scatter"))
    runs = read_nccl_text(text, "run.log")
    assert [run.program for run in runs] == ["all_reduce", "broadcast", "reduce_scatter"]
    out = imported(tmp_path, text, TWO_NODES)
    told = json.loads((out / "profile.json").read_text())
    assert told["rows"] == {"collective": 15}
    assert told["left_out"] == {"broadcast has no table": 5, "sizes of 0 bytes": 1}
    assert [one["times"] for one in told["measured"]] == ["out of place"] * 3
    with pytest.raises(BadInput, match=r"nothing to import \(5 lines: broadcast has no table\)"):
        imported(tmp_path, nccl_log("broadcast"))


WRONG: dict[str, tuple[str, str, str, int]] = {
    # what is changed, into what, what is said, in which line from the end (0: the first line of points)
    "nan": (" 6740.89 ", " nan ", "finite figures", 4),
    "negative": (" 6740.89 ", " -6740.89 ", "finite figures", 4),
    "milliseconds": (" 6740.89 ", " 6.74089 ", "times must be in us", 4),
    "Gbit/s": ("  39.82 ", "  318.58 ", "rates in GB/s", 4),
    "no time": (" 6740.89 ", " 0.0 ", "above zero", 4),
    "columns less": (" 6740.89   39.82   37.33       0", " 6740.89", "10 columns are not", 4),
    "wrong values": ("   39.82   37.33       0", "   39.82   37.33      12", "12 values were wrong", 4),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_named(name: str) -> None:
    old, new, said, from_end = WRONG[name]
    assert TWO_NODES.count(old) == 1
    with pytest.raises(BadInput, match=said) as error:
        read_nccl_text(TWO_NODES.replace(old, new), "run.log")
    assert error.value.where == f"run.log:{len(TWO_NODES.splitlines()) - from_end}"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("#  Rank  3 ", "#  Rank  2 ", "rank 2 stands twice"),
        ("#  Rank  3 Group  0", "#  Rank  3 Group  1", "2 groups of ranks"),
        ("device  3 [", "device  2 [", "share device 2"),
        ("on     node-a device  7", "on     node-b device  9", "9 ranks on one host and 7 on another"),
        (
            f"device  7 [0000:17:00] {GPU}",
            "device  7 [0000:17:00] NVIDIA A100",
            "ran on NVIDIA A100 and on NVIDIA H100",
        ),
        ("# nThread 1 nGpus 1", "# nThread 1 nGpus 3", "a process runs 3"),
        ("  time   algbw", "cputime   algbw", "CPU's calls"),
        ("#  Rank  3 Group  0 Pid   4003", "#  Rank  3 Group  0 Pad   4003", "not nccl-tests'"),
    ],
)
def test_ranks_that_cannot_be_one_communicator_are_refused(old: str, new: str, said: str) -> None:
    assert old in TWO_NODES
    with pytest.raises(BadInput, match=said) as error:
        read_nccl_text(TWO_NODES.replace(old, new, 1), "run.log")
    assert error.value.where.startswith("run.log:")


def test_a_rank_whose_line_is_missing_is_named() -> None:
    text = "\n".join(line for line in TWO_NODES.splitlines() if "Rank  5" not in line)
    with pytest.raises(BadInput, match="the line of rank 5 is missing"):
        read_nccl_text(text, "run.log")


def rows(text: str, **given: object) -> list[dict[str, object]]:
    found = collectives_of([("run.log", read_nccl_text(text, "run.log"))], System("s"), Given(**given))  # type: ignore[arg-type]
    return [row for _, row in found.rows]


def test_options_fill_what_a_log_does_not_tell() -> None:
    bare = "".join(f"{line}\n" for line in TWO_NODES.splitlines() if not line.startswith("#"))
    with pytest.raises(BadInput, match="does not tell its kind; give --kind"):
        rows(bare)
    with pytest.raises(BadInput, match="does not tell its gpus; give --gpus"):
        rows(bare, kind="all_to_all")
    found = rows(bare, kind="all_to_all", gpus=16, nodes=2)
    assert {(row["gpus"], row["nodes"], row["version"], row["device"]) for row in found} == {
        (16, 2, "unknown", "unknown")
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "all_reduce"}, "the log says kind all_to_all, not all_reduce; leave --kind out"),
        ({"gpus": 8}, "the log says gpus 16, not 8"),
        ({"nodes": 4}, "the log says nodes 2, not 4"),
    ],
)
def test_an_option_that_the_log_contradicts_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        rows(TWO_NODES, **given)


def test_the_bus_rate_tells_wrong_ranks_and_a_wrong_kind() -> None:
    bare = "".join(f"{line}\n" for line in TWO_NODES.splitlines() if not line.startswith("#"))
    with pytest.raises(BadInput, match="busbw is not that of all_to_all over 4 GPUs"):
        rows(bare, kind="all_to_all", gpus=4, nodes=1)
    with pytest.raises(BadInput, match="busbw is not that of all_reduce over 16 GPUs"):
        rows(bare, kind="all_reduce", gpus=16, nodes=2)
    with pytest.raises(BadInput, match="unknown kind 'broadcast'"):
        rows(bare, kind="broadcast", gpus=16, nodes=2)
    with pytest.raises(BadInput, match="not equal parts on 3 nodes"):
        rows(bare, kind="all_to_all", gpus=16, nodes=3)


def test_collectives_across_nodes_are_priced_from_a_log(tmp_path: Path) -> None:
    out = imported(tmp_path, TWO_NODES, nccl_log(hosts=("one",), latency_us=12.0))
    costs = StoreCosts((open_profile(str(out), "h100_sxm"),), "sglang", False, Roofline(h200(2)))
    run = only(TWO_NODES)
    priced = costs.estimate(Collective("all_to_all", np.array([size for size, _ in run.points]), 16, 2))
    np.testing.assert_allclose(priced.seconds, [seconds for _, seconds in run.points], rtol=1e-9)
    assert set(priced.tags) == {Tag.MEASURED}
    assert priced.source == "nccl 2.27.4 NCCL (nccl-tests 2.17.6)"
    between = costs.estimate(Collective("all_to_all", np.array([4e6]), 16, 2))
    assert between.tags[0] == Tag.INTERPOLATED
    assert between.seconds[0] == pytest.approx((30 + 4e6 / 40e3) * 1e-6, rel=0.02)
    assert costs.estimate(Collective("all_to_all", np.array([1024.0]), 8, 1)).seconds[0] < 20e-6


def test_rccls_rows_are_priced_too(tmp_path: Path) -> None:
    out = imported(tmp_path, TWO_NODES.replace(GPU, "AMD Instinct MI300X"), system="mi300x")
    costs = StoreCosts((open_profile(str(out), "mi300x"),), "vllm", False, Roofline(h200(2)))
    assert costs.estimate(Collective("all_to_all", np.array([1048576.0]), 16, 2)).source.startswith("rccl 2.27.4 RCCL")


def test_logs_of_two_kinds_of_gpu_are_refused_and_the_store_stays(tmp_path: Path) -> None:
    out = imported(tmp_path, TWO_NODES)
    before = (out / "profile.json").read_bytes()
    with pytest.raises(BadInput, match="the logs are of NVIDIA A100 and of NVIDIA H100") as error:
        imported(tmp_path, TWO_NODES, TWO_NODES.replace(GPU, "NVIDIA A100"))
    assert error.value.where.startswith(str(tmp_path / "1.log:"))
    assert (out / "profile.json").read_bytes() == before
    with pytest.raises(BadInput, match="no line with a size and a time"):
        imported(tmp_path, "# nothing ran\n")
    with pytest.raises(BadInput, match="cannot read the log"):
        CliRunner().invoke(
            app, ["import", "nccl-tests", str(tmp_path / "none.log"), "--system", "s", "--out", str(out)],
            catch_exceptions=False,
        )  # fmt: skip


def test_the_command_tells_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    path.write_text(TWO_NODES)
    arguments = ["import", "nccl-tests", str(path), "--system", "h100_sxm", "--out", str(tmp_path / "p"), "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert json.loads(done.stdout) == {
        "out": str(tmp_path / "p"), "rows": {"collective": 5}, "left_out": {"sizes of 0 bytes": 1},
    }  # fmt: skip


@pytest.mark.parametrize("word", ["alltoall", "alltoall_perf", "all-to-all", "All_To_All", "all_to_all_perf_mpi"])
def test_a_kind_may_be_called_as_its_program_is(word: str) -> None:
    bare = "".join(f"{line}\n" for line in TWO_NODES.splitlines() if not line.startswith("#"))
    assert rows(bare, kind=word, gpus=16, nodes=2) == rows(bare, kind="all_to_all", gpus=16, nodes=2)
    assert rows(TWO_NODES, kind=word) == rows(TWO_NODES)


def test_another_word_names_the_known_kinds() -> None:
    bare = "".join(f"{line}\n" for line in TWO_NODES.splitlines() if not line.startswith("#"))
    with pytest.raises(BadInput, match="unknown kind 'gather_perf'; use one of: all_reduce, all_gather"):
        rows(bare, kind="gather_perf", gpus=16, nodes=2)
