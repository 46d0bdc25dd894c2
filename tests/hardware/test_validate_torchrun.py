"""Validations on ranks that torchrun started: two agents as two nodes, and ranks that are lost under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moesim.errors import CheckFailed
from profiles.groups import PRETEND
from tests.hardware.test_validate_hardware import free_port
from tests.harm import LOST_RANK, STALL_S, processes_with
from validate.records import store

pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")

import torch.distributed

from validate.hardware import join
from validate.hardware.group import Beat

pytestmark = pytest.mark.hardware
WHOLE = bool(os.environ.get("MOESIM_WHOLE"))
ENVIRONMENT = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run"]


def test_two_agents_are_two_nodes(tmp_path: Path) -> None:
    """Steps of training on two nodes (pretended: it is one machine) of a rank each; only rank 0 writes and prints."""
    line = ["-m", "moesim", "validate", "training", "--quick", "--sequence-length", "8", "--global-batch", "2",
            "--layout", "PP2", "--layout", "DP2 EP2", "--json", "--out", str(tmp_path / "run")]  # fmt: skip
    port = str(free_port())
    started = [
        subprocess.Popen(
            [*TORCHRUN, "--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
             "--master-port", port, *line],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | {PRETEND: "2"},
        )
        for node in ("0", "1")
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert outputs[1][0] == ""
    record = json.loads(outputs[0][0])
    assert (record["nodes"], record["pretended_hosts"]) == ({"2": 2}, 2)
    assert record["gradient_error"] < 1e-5
    assert record == json.loads((tmp_path / "run" / "record.json").read_text())
    assert {"points-2.json", "points-2-over-2.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    between = json.loads((tmp_path / "run" / "points-2-over-2.json").read_text())
    assert between["nodes"] == 2 and {one["family"] for one in between["points"]} == {"collective"}
    assert all("nodes" not in one.traits for one in store.compact(record).covers)


def lost(command: str, harm: str, phase: str, stall_s: float, folder: Path, *, agent: bool) -> tuple[list[str], float]:
    """What ranks say of which the second comes to harm, and how long it took; an agent starts them, or nobody."""
    small = {
        "hardware": ["--hidden", "32", "--intermediate", "32", "--experts", "8", "--top-k", "2", "--tokens", "8",
                     "--repeats", "5"],
        "training": ["--quick", "--sequence-length", "8", "--global-batch", "2", "--layout", "DP2 EP2"],
    }  # fmt: skip
    line = [sys.executable, "-P", str(LOST_RANK), "moesim.cli", harm, phase, "validate", command, *small[command]]
    line += ["--stall-limit", f"{stall_s:g}", "--out", str(folder)]
    begun = time.monotonic()
    if agent:
        done = subprocess.run(
            [*TORCHRUN, "--nproc-per-node", "2", "--no-python", *line], capture_output=True, text=True, check=False,
            timeout=240, env=ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 1
        return done.stderr.splitlines(), time.monotonic() - begun
    alike = ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=alike | {"RANK": rank})
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1]
    return "\n".join(outputs).splitlines(), time.monotonic() - begun


# In the usual run a rank without memory, whom the other has to hear of; in the whole run the others, too.
PHASES = {"hardware": "repeat 3 of 5", "training": "measuring, repeat 2"}
REASONS = {
    "torch": "rank 1 ran out of memory while",
    "killed": "Signal 9 (SIGKILL)",  # torchrun's own word, under its `rank : 1`
    "stopped": "rank 1 hangs: no sign of life for",
    "sleeping": f"rank 1 hangs: {STALL_S:g} s without progress, while measuring",
}


def test_a_rank_without_memory_is_named_by_both(tmp_path: Path) -> None:
    said, _ = lost("hardware", "torch", "making the weights", 60.0, tmp_path, agent=False)
    told = [one for one in said if one.startswith("error: ")]
    assert len(told) == 2 and all("rank 1 ran out of memory while making the weights" in one for one in told)
    assert processes_with(str(tmp_path)) == []


@pytest.mark.skipif(not WHOLE, reason="a quarter of a minute each: MOESIM_WHOLE=1")
@pytest.mark.parametrize("command", ["hardware", "training"])
@pytest.mark.parametrize("harm", REASONS)
def test_a_rank_that_torchrun_lost_is_named(command: str, harm: str, tmp_path: Path) -> None:
    said, took = lost(command, harm, PHASES[command], STALL_S, tmp_path, agent=True)
    assert any(REASONS[harm] in one for one in said), said
    assert took < 60.0 + STALL_S
    assert processes_with(str(tmp_path)) == []
    if command == "hardware" and harm in ("sleeping", "stopped"):
        assert "2 of 5 repeats are in unfinished.json" in "\n".join(said)


class Ended(Exception):
    """In place of the end of the process."""


@pytest.fixture
def rolls(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Callable[..., tuple[Any, Beat]], list[str]]]:
    """Makes a rank's roll and its beat, over a store in this process; what ends a rank is noted instead."""
    shared, made, ended = torch.distributed.HashStore(), [], []

    def end(roll: join.Roll, error: CheckFailed) -> None:
        ended.append(f"{roll._rank}: {error.line()}")
        roll._stop.set()

    monkeypatch.setattr(join.Roll, "_end", end)
    monkeypatch.setattr(join, "LOOK_S", 0.02)

    def make(rank: int, stall_s: float = 60.0, silence_s: float = 60.0) -> tuple[join.Roll, Beat]:
        beat = Beat(None)
        roll = join.Roll(
            shared, rank, 2, beat, stall_s=stall_s, told=join.HARDWARE, ending=lambda reason: None, silence_s=silence_s
        )  # fmt: skip
        made.append(roll)
        return roll, beat

    yield make, ended
    for one in made:
        one.stop()


def until(found: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_rank_that_all_wait_for_ends_the_run(rolls: Any) -> None:
    make, ended = rolls
    _, first = make(0, 0.6)
    first.at("dispatching")
    first.waiting = True
    _, second = make(1, 0.6)
    second.at("counting sheep")
    until(lambda: ended)
    assert ended[0].startswith("0: validate hardware: rank 1 hangs: 0.6 s without progress, while counting sheep; the")


def test_a_rank_0_that_shows_no_life_is_noticed_by_the_others(rolls: Any) -> None:
    make, ended = rolls
    roll, beat = make(0)
    make(1, silence_s=0.2)
    beat.at("predicting")
    until(lambda: roll._seen.get(0, (b"", None))[1] is not None)
    roll._stop.set()
    until(lambda: ended)
    assert ended[0].startswith("1: validate hardware: rank 0 hangs: no sign of life for")


def test_a_rank_that_is_done_is_missed_by_nobody(rolls: Any) -> None:
    make, ended = rolls
    _, beat = make(0, silence_s=0.3)
    other, _ = make(1)
    other.stop()
    until(lambda: beat.at("comparing") or beat.count > 40)
    assert ended == []


@pytest.mark.parametrize("waiting", [0, 1])
def test_a_rank_that_waits_without_end_is_ended_when_another_failed(
    waiting: int, rolls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that waits in CUDA: no error ever comes to it."""
    make, ended = rolls
    monkeypatch.setattr(join, "GRACE_S", 0.1)
    make(waiting)
    other, beat = make(1 - waiting)
    beat.at("dispatching")
    other._stop.set()
    join._told_by(RuntimeError("NCCL error: unhandled cuda error"), 1 - waiting, beat, other, join.HARDWARE)
    until(lambda: ended)
    assert ended[0].startswith(f"{waiting}: validate hardware: rank {1 - waiting} failed while dispatching: NCCL error")


def test_who_waited_repeats_what_the_failing_rank_left(rolls: Any) -> None:
    make, _ = rolls
    first, waited = make(0)
    second, failed = make(1)
    waited.at("combining")
    waited.waiting = True
    failed.at("making the weights of expert 3")
    first._stop.set()  # its thread would end the run before its main thread does
    own = join._told_by(MemoryError("no room"), 1, failed, second, join.HARDWARE)
    other = join._told_by(RuntimeError("Connection closed by peer"), 0, waited, first, join.HARDWARE)
    assert own.line() == other.line()
    assert "rank 1 ran out of memory while making the weights of expert 3: no room" in own.line()


def test_who_was_left_alone_without_a_word_says_so(rolls: Any) -> None:
    make, _ = rolls
    roll, beat = make(0)
    beat.at("combining")
    beat.waiting = True
    told = join._told_by(RuntimeError("Connection closed by peer\nand more"), 0, beat, roll, join.HARDWARE)
    assert told.what == "rank 0 lost the others while combining: Connection closed by peer"
