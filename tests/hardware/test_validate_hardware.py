"""The real thing on two gloo ranks: outputs, records, the command as a user runs it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput, CheckFailed, Infeasible, MissingPart, MoesimError
from moesim.spec.plan import ExpertPlacement
from validate.hardware import run as hardware
from validate.hardware.job import Job, LayerShape, PlacedCase
from validate.records.store import compact

pytest.importorskip("torch", reason="torch is not installed: pip install '.[hardware]'")
pytestmark = pytest.mark.hardware

SMALL = ("--hidden", "64", "--intermediate", "64", "--top-k", "3", "--repeats", "5")


def random_placements(experts: int, count: int, rng: np.random.Generator) -> tuple[PlacedCase, ...]:
    """Placements on two ranks with 0 to 4 spare slots, two replicas on one rank among them."""
    cases = []
    for index in range(count):
        spare = 2 * int(rng.integers(0, 3))
        table = rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, size=spare)]))
        cases.append(PlacedCase(name=f"random{index}", slots=tuple(table.tolist()), replicas=spare))
    return tuple(cases)


def job_of(out: Path, *, world: int = 2, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "backend": "gloo",
        "ranks": world,
        "shape": LayerShape(hidden=16, intermediate=24, experts=6, top_k=3),
        "tokens": (1, 13),
        "profile": (0.4, 0.3, 0.15, 0.1, 0.05, 0.0),
        "profile_source": "test",
        "placements": random_placements(6, 6, np.random.default_rng(5)),
        "repeats": 4,
        "out": str(out),
        "stall_limit_s": 30.0,
    }
    return Job(**(given | changes))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Callable[[Job], Any]]:
    """A process group of one rank inside this process: call it with a job to get its group."""
    import torch
    import torch.distributed

    from validate.hardware.group import Beat
    from validate.hardware.join import joined

    threads = torch.get_num_threads()
    open_groups = []

    def join(job: Job) -> Any:
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        context = joined("gloo", store, rank=0, ranks=1, local_rank=0, beat=Beat(None), stall_s=30.0)
        open_groups.append(context)
        return context.__enter__()

    yield join
    for context in open_groups:
        context.__exit__(None, None, None)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[("local_first", "loop"), ("equal", "grouped")], ids="-".join)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, dict[str, Any]]:
    """A whole run of two gloo ranks over six random placements, and its record."""
    replica, kernel = request.param
    job = job_of(tmp_path_factory.mktemp("run"), replica=replica, kernel=kernel)
    return job, hardware.run(job)


def test_outputs_match_the_reference_for_random_placements(finished: tuple[Job, dict[str, Any]]) -> None:
    job, record = finished
    assert record["output_error"] < 1e-5
    assert len(record["measured"]) == len(job.cases())
    for entry, (placement, tokens) in zip(record["predicted"], job.cases(), strict=True):
        assert (entry["placement"], entry["tokens_per_rank"]) == (placement.name, tokens)
        assert sum(entry["rows_by_rank"]) == job.ranks * tokens * job.shape.top_k
    for entry in record["measured"]:
        spread = entry["layer_s"]
        assert 0 < spread["p10_s"] <= spread["median_s"] <= spread["p90_s"]
        assert len(entry["layer_samples_s"]) == job.repeats


def test_predictions_are_on_disk_before_anything_is_measured(finished: tuple[Job, dict[str, Any]]) -> None:
    job, record = finished
    folder = Path(job.out)
    content = (folder / "predictions.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == record["predictions"]["sha256"]
    written = json.loads(content)
    assert written["written"] == record["predictions"]["written"] < record["measured_from"]
    assert written["cases"] == record["predicted"]
    probed = {point["tokens"] for point in written["profile"]["points"] if "tokens" in point}
    assert probed and not probed & {1, 13}
    assert json.loads((folder / "record.json").read_text()) == record
    (shown,) = compact(record).evidence("it")
    assert (shown.traits["gpu"], shown.traits["nodes"]) == ("CPU", 1)


@pytest.mark.parametrize("kernel", ["loop", "grouped"])
def test_one_rank_alone_does_the_whole_session(tmp_path: Path, alone: Callable[[Job], Any], kernel: str) -> None:
    from validate.hardware.tables import table
    from validate.hardware.worker import session

    job = job_of(tmp_path, world=1, kernel=kernel)
    record = session(job, alone(job))
    assert record is not None and record["output_error"] < 1e-5
    text = table(record)
    assert all(word in text for word in ("random0", "13 tokens", "layer error: mean", "halves of the repeats"))


def test_a_wrong_expert_is_noticed_before_anything_is_timed(
    tmp_path: Path, alone: Callable[[Job], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from validate.hardware import layer
    from validate.hardware.worker import session

    right = layer.swiglu
    monkeypatch.setattr(layer, "swiglu", lambda rows, weights: right(rows, weights) * 1.0001)
    job = job_of(tmp_path, world=1)
    with pytest.raises(CheckFailed, match="differs from the float32 reference"):
        session(job, alone(job))
    assert not (tmp_path / "record.json").exists()


def test_a_lost_row_is_noticed(tmp_path: Path, alone: Callable[[Job], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from validate.hardware import rig, worker

    right = rig.routed_counts
    monkeypatch.setattr(worker, "routed_counts", lambda built: [counts + 1 for counts in right(built)])
    job = job_of(tmp_path, world=1)
    with pytest.raises(CheckFailed, match="rows were sent"):
        worker.session(job, alone(job))


def test_tokens_follow_the_load_profile(tmp_path: Path, alone: Callable[[Job], Any]) -> None:
    from validate.hardware.rig import build, routed_counts

    job = job_of(tmp_path, world=1, tokens=(4000,), shape=LayerShape(hidden=16, intermediate=8, experts=6, top_k=1))
    counts = routed_counts(build(job, alone(job)))[0][0]
    experts = np.bincount(np.asarray(job.placements[0].slots), weights=counts, minlength=6)
    # Top-1 draws are multinomial: five standard deviations of each share.
    shares = np.asarray(job.profile)
    assert (np.abs(experts / 4000 - shares) <= 5 * np.sqrt(shares * (1 - shares) / 4000) + 1e-12).all()


def command(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "moesim", "validate", "hardware", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | (environment or {}),
    )


def test_the_command_as_a_user_runs_it(tmp_path: Path) -> None:
    rows = ["layer_id,expert_id,count"]
    rows += [f"{layer},{expert},{1 + expert * layer}" for layer in (3, 4) for expert in range(8)]
    (tmp_path / "loads.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "run"
    done = command(*SMALL, "--loads", str(tmp_path / "loads.csv"), "--layer", "4", "--tokens", "8", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("contiguous", "planned", "hot_first", "experts", "layer error: mean", "regret of the predicted best"):
        assert word in done.stdout
    assert "routing: layer 4 of loads.csv" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["job.json", "predictions.json", "record.json"]


def test_torchrun_ranks_are_joined_instead_of_started(tmp_path: Path) -> None:
    table = np.array([[0, 1, 2, 3, 4, 7, 5, 6, 7, 1]])
    ExpertPlacement(table, np.array([0]), experts=8, ranks=2, absolute_layers=1).write(tmp_path / "mine.json")
    with_store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    line = [sys.executable, "-P", "-m", "moesim", "validate", "hardware", *SMALL, "--experts", "8", "--tokens", "8"]
    line += ["--placement", str(tmp_path / "mine.json"), "--json", "--out", str(tmp_path / "run")]
    environment = os.environ | with_store | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment | {"RANK": rank})
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    record = json.loads(outputs[0])
    assert record["job"]["ranks"] == 2
    assert [entry["placement"] for entry in record["measured"]] == ["contiguous", "hot_first", "mine"]
    assert outputs[1] == ""


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_nccl_without_a_gpu_is_a_missing_part(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    from moesim.cli import run

    assert run(["validate", "hardware", "--backend", "nccl"]) == 3
    said = capsys.readouterr()
    assert "nccl needs a GPU" in said.err and len(said.err.strip().splitlines()) == 1
    assert said.out == ""


def test_without_torch_the_command_names_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPart, match=r"\.\[hardware\]"):
        hardware.check_parts("gloo", 2)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"ranks": 0}, BadInput, "--ranks"),
        ({"ranks": 5}, Infeasible, "use a divisor of 8"),
        ({"seed": -1}, BadInput, "--seed"),
        ({"experts": 0}, BadInput, "--experts"),
        ({"top_k": 9}, BadInput, "pass at most 8"),
        ({"hidden": 4}, BadInput, "pass at least 8"),
        ({"tokens": (0,)}, BadInput, "tokens"),
        ({"repeats": 1}, BadInput, "repeats"),
        ({"slots": 9}, Infeasible, "use 10 slots"),
        ({"loads": Path("absent.json")}, BadInput, "absent.json"),
        ({"placements": (Path("absent.json"),)}, BadInput, "absent.json"),
    ],
)
def test_bad_arguments_name_the_place_and_the_mend(
    changes: dict[str, Any], kind: type[MoesimError], words: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        "backend": "gloo", "ranks": 2, "hidden": 64, "intermediate": 64, "experts": 8, "top_k": 2, "tokens": (8,),
        "loads": None, "layer": None, "placements": (), "slots": None, "replica": "equal", "kernel": "auto",
        "repeats": 4, "seed": 0, "out": tmp_path, "stall_limit_s": 9.0,
    }  # fmt: skip
    with pytest.raises(kind, match=words):
        hardware.make_job(**(given | changes))
