"""Two thousand damaged files of every format, loads and maps: one line and exit 2, or read as a second reader reads it.

Each file goes through the command line in this process. Where the command ends well, what it says is compared with what
independent code (tests/second_readers.py) reads from the same bytes; where that code reads nothing valid, the command
must refuse the file, and the other way round.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim.cli import run
from moesim.routing.readers import write_npz, write_parquet
from moesim.routing.trace import RoutingCounts
from moesim.spec.plan import ExpertPlacement
from placement.export import sglang, trtllm, vllm_ascend
from tests import mutations, second_readers
from tests.scenarios import small
from tests.second_readers import Counts, Held

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# Another set of damages: FUZZ_SEED=7 pytest ...
SEED = os.environ.get("FUZZ_SEED", "0")
LAYERS, EXPERTS, RANKS = [1, 2, 3], 16, 4
ABSOLUTE = 4
CONFIG = {
    "model_type": "deepseek_v3", "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256,
    "num_hidden_layers": ABSOLUTE, "num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 4, "vocab_size": 1000, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
PLANS = 120
# Read by the same modules as another form, which a process of its own has not loaded before either.
ALIKE = {"sglang json, steps", "sglang per_pass", "sglang per_token", "sglang folder"}
# Bounds of one file: far above what a sound one of this size takes.
MOST_CPU_S, MOST_BYTES = 5.0, 512 * 1024**2


@dataclass(frozen=True)
class Kind:
    """A format: how often it is damaged, what writes a damaged one, and the second reader of it."""

    number: int
    write: Callable[[Path, random.Random], Path]
    read: Callable[[Path], Any]


def counts() -> np.ndarray[Any, Any]:
    found = np.random.default_rng(3).integers(1, 1000, (2, ABSOLUTE, EXPERTS))
    found[:, 0] = 0
    return found


def text_of(name: str, content: str, folder: Path, rng: random.Random) -> Path:
    path = folder / name
    path.write_bytes(mutations.of_text(content.encode(), rng))
    return path


def csv_text() -> str:
    rows = [f"{layer},{expert},{counts()[0, layer, expert]}" for layer in LAYERS for expert in range(EXPERTS)]
    return "layer_id,expert_id,count\n" + "\n".join(rows) + "\n"


def binary(path: Path, rng: random.Random) -> Path:
    path.write_bytes(mutations.of_bytes(path.read_bytes(), rng))
    return path


def npz_file(folder: Path, rng: random.Random) -> Path:
    path, array, ids = folder / "a.npz", counts()[:, 1:], np.asarray(LAYERS)
    if rng.random() < 0.5:
        write_npz(path, RoutingCounts(array.astype(float), ids, ABSOLUTE, "x", per_step=True))
        return binary(path, rng)
    which = rng.random() < 0.7
    np.savez(path, counts=mutations.of_array(array, rng) if which else array, layer_ids=ids if which else
             mutations.of_array(ids, rng))  # fmt: skip
    return path


def dump(mode: str, rank: int, rng: random.Random) -> dict[str, Any]:
    """What SGLang's recorder writes, and on every second call with a value of it changed."""
    import torch

    whole = mode == "whole"
    table = torch.arange(20).repeat(ABSOLUTE, 1) % EXPERTS
    data: dict[str, Any]
    if mode == "stat":
        data = {"rank": 0, "logical_count": torch.tensor(counts()), "average_utilization_rate_over_window": None}
    else:
        records = []
        for number in (7, 8):
            record = {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary"}
            if mode == "per_token":
                picks = np.random.default_rng(number).integers(-1, 20, (ABSOLUTE, 5, 8))
                picks[0] = -1
                records.append({**record, "topk_ids_of_layer": torch.tensor(picks), "misc_objects": []})
            else:
                slots = np.random.default_rng(number).integers(0, 90, (ABSOLUTE, 20))
                slots[0] = 0
                records.append({**record, "global_physical_count": torch.tensor(slots)})
        data = {"records": records, "last_physical_to_logical_map": table}
    if whole or rng.random() < 0.4:
        return data
    target = rng.choice([data, *data.get("records", [])])
    name = rng.choice(list(target))
    if isinstance(target[name], torch.Tensor) and rng.random() < 0.7:
        target[name] = torch.from_numpy(mutations.of_array(target[name].numpy(), rng))
    elif rng.random() < 0.3:
        del target[name]
    else:
        target[name] = mutations.of_document({"value": [target[name]]}, rng)
    return data


def pt_file(mode: str, folder: Path, rng: random.Random) -> Path:
    import torch

    path = folder / "a.pt"
    data = dump(mode, 0, rng)
    torch.save(data, path)
    return binary(path, rng) if rng.random() < 0.4 else path


def pt_folder(folder: Path, rng: random.Random) -> Path:
    import torch

    path = folder / "dumps"
    path.mkdir(exist_ok=True)
    damaged = rng.randrange(2)
    for rank in range(2):
        said = rank if rng.random() < 0.8 else 0  # two dumps of one rank are of two runs
        data = dump("per_pass", said, rng) if rank == damaged else dump("whole", said, rng)
        torch.save(data, path / f"expert_distribution_recorder_1.5_{rank}.pt")
    return path


def statistics(folder: Path, rng: random.Random) -> Path:
    from safetensors.numpy import save_file

    path = folder / "statistics"
    path.mkdir(exist_ok=True)
    meta = json.dumps({"num_experts": EXPERTS, "num_experts_per_token": 4}).encode()
    (path / "meta_info.json").write_bytes(mutations.of_text(meta, rng) if rng.random() < 0.2 else meta)
    for rank in range(2):
        tensors = {
            f"{step}_{layer}": counts()[step - 50, layer].astype(np.int32) for step in (50, 51) for layer in LAYERS
        }
        name = rng.choice(list(tensors))
        if rng.random() < 0.5:
            tensors[name] = np.ascontiguousarray(mutations.of_array(tensors[name], rng))
        elif rng.random() < 0.3:
            tensors[rng.choice(["x", "50", "50_x", "50_-1", "\u0665_3", name])] = tensors.pop(name)
        tensors = {key: value for key, value in tensors.items() if value.dtype != np.complex64}
        save_file(tensors, path / f"rank{rank}.safetensors")
        if rng.random() < 0.3:
            binary(path / f"rank{rank}.safetensors", rng)
    return path


def parquet_file(folder: Path, rng: random.Random) -> Path:
    loads = RoutingCounts(counts()[:, 1:].astype(float), np.asarray(LAYERS), ABSOLUTE, "x", per_step=True)
    write_parquet(folder / "a.parquet", loads)
    return binary(folder / "a.parquet", rng)


LOADS: dict[str, Kind] = {
    "sglang json": Kind(
        280, partial(text_of, "a.json", json.dumps({"logical_count": counts()[0].tolist()})), second_readers.sglang_json
    ),
    "sglang json, steps": Kind(
        160, partial(text_of, "a.json", json.dumps({"logical_count": counts().tolist()})), second_readers.sglang_json
    ),
    "csv": Kind(280, partial(text_of, "a.csv", csv_text()), second_readers.csv),
    "npz": Kind(160, npz_file, second_readers.npz),
    "sglang stat": Kind(120, partial(pt_file, "stat"), second_readers.recorder),
    "sglang per_pass": Kind(160, partial(pt_file, "per_pass"), second_readers.recorder),
    "sglang per_token": Kind(160, partial(pt_file, "per_token"), second_readers.recorder),
    "sglang folder": Kind(80, pt_folder, second_readers.recorder),
    "tensorrt-llm folder": Kind(160, statistics, second_readers.statistics),
    "parquet": Kind(8, parquet_file, second_readers.parquet),
}  # fmt: skip


def placement() -> ExpertPlacement:
    """Twenty slots on four ranks, the replicas of an expert apart, another order in each layer."""
    row = np.concatenate([np.roll(np.arange(EXPERTS), 3).reshape(RANKS, -1), np.arange(RANKS)[:, None]], axis=1)
    row[:, -1] = np.roll(row[:, 0], 1)
    table = np.stack([(row + 2 * layer).ravel() % EXPERTS for layer in LAYERS])
    return ExpertPlacement(table, np.asarray(LAYERS), EXPERTS, RANKS, ABSOLUTE)


OF_MODEL: dict[str, Any] = {"experts": EXPERTS, "ranks": RANKS, "layers": LAYERS}
MAPS: dict[str, Kind] = {
    "moesim map": Kind(160, partial(text_of, "m.json", json.dumps(placement().to_json())), second_readers.map_moesim),
    "sglang map": Kind(
        160,
        partial(text_of, "m.json", sglang.render(placement())),
        partial(second_readers.map_sglang, **OF_MODEL, absolute=ABSOLUTE),
    ),
    "tensorrt-llm map": Kind(
        160,
        partial(text_of, "m.yaml", trtllm.render(placement(), 1)),
        partial(second_readers.map_trtllm, **OF_MODEL, extra=[ABSOLUTE]),
    ),
    "vllm-ascend map": Kind(
        160,
        partial(text_of, "m.json", vllm_ascend.render(placement())),
        partial(second_readers.map_vllm_ascend, **OF_MODEL),
    ),
}  # fmt: skip


def the_number_is_2000() -> int:
    return sum(kind.number for kind in (*LOADS.values(), *MAPS.values()))


def test_they_are_2000() -> None:
    assert the_number_is_2000() >= 2000


def one_line(code: int, printed: Any, what: str) -> None:
    """What a refused file must leave: exit 2, one line on stderr, nothing else."""
    assert code == 2, f"{what}: exit {code}: {printed.err}"
    assert printed.err.startswith("error: "), what
    assert printed.err.count("\n") == 1, what
    assert printed.out == "", what


def compare_loads(found: Counts, report: dict[str, Any], written: Path) -> None:
    """The map covers the layers and experts that the second reader found, and has the balance that its counts give."""
    table, layers = found
    content = json.loads(written.read_text())
    assert content["layer_ids"] == layers
    assert (report["layers"], report["experts"]) == (len(layers), table.shape[2])
    total = table.sum(axis=0)
    share = total / total.sum(axis=1, keepdims=True)
    hottest = []
    for profile, row in zip(share, content["physical_to_logical"], strict=True):
        loads = [profile[expert] / row.count(expert) for expert in row]
        each = len(row) // RANKS
        ranks = [sum(loads[rank * each : (rank + 1) * each]) for rank in range(RANKS)]
        hottest.append(max(ranks) * RANKS)
    assert report["max_over_mean"]["mean"] == pytest.approx(np.mean(hottest), rel=1e-9)


def fits(found: Counts) -> bool:
    """Whether 16 slots on 4 ranks can hold a file's experts."""
    return bool(found[0].shape[2] <= EXPERTS <= found[0].shape[2] * RANKS)


@pytest.fixture
def watched(record_testsuite_property: Callable[[str, object], None]) -> Any:
    """The largest CPU time and the growth of memory over a test, held to their bounds."""
    before, longest, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [0.0], [time.process_time()]

    def tick() -> None:
        now = time.process_time()
        longest[0], clock[0] = max(longest[0], now - clock[0]), now

    yield tick
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert longest[0] < MOST_CPU_S
    assert grown < MOST_BYTES


@pytest.mark.parametrize("form", LOADS)
def test_damaged_loads(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], watched: Any) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    rng, kind, ended = random.Random(f"{form} {SEED}"), LOADS[form], Counter[str]()
    out = tmp_path / "out" / "map.json"
    for _ in range(kind.number):
        path = kind.write(tmp_path, rng)
        arguments = ["place", "--loads", str(path), "--gpus", str(RANKS), "--slots", str(EXPERTS), "--holdout", "0"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and zipfile, on what is left of the file
            code = run([*arguments, "--out", str(out), "--json"])
            printed = capsys.readouterr()
            found = kind.read(path) if form != "parquet" or code == 0 else None
        watched()
        what = f"{form} {path}: {printed.err}"
        if found is None:
            one_line(code, printed, what)
            ended["refused"] += 1
        elif not fits(found):
            assert code == 1, what  # a sound file of other experts, which 16 slots cannot hold
            assert printed.err.count("\n") == 1, what
            ended["other experts"] += 1
        else:
            assert code == 0, what
            compare_loads(found, json.loads(printed.out), out)
            ended["read"] += 1
        assert out.exists() == (code == 0)
        out.unlink(missing_ok=True)
        assert not list(tmp_path.rglob("*.tmp"))
    print(form, dict(ended))
    assert ended["refused"] >= kind.number // 4


@pytest.mark.parametrize("form", MAPS)
def test_damaged_maps(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], watched: Any) -> None:
    rng, kind, ended = random.Random(f"{form} {SEED}"), MAPS[form], Counter[str]()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    given = [] if form == "moesim map" else ["--model", str(tmp_path / "config.json"), "--gpus", str(RANKS)]
    out = tmp_path / "out"
    for _ in range(kind.number):
        path = kind.write(tmp_path, rng)
        code = run(["export", str(path), "--engine", "sglang", *given, "--out", str(out)])
        printed = capsys.readouterr()
        watched()
        found: Held | None = kind.read(path)
        what = f"{form} {path.read_bytes()!r}: {printed.err}"
        if found is None:
            one_line(code, printed, what)
            ended["refused"] += 1
        else:
            assert code == 0, what
            rows = json.loads((out / "expert_location.json").read_text())["physical_to_logical_map"]
            assert {layer: [one for rank in held for one in rank] for layer, held in found.items()} == {
                layer: rows[layer] for layer in found
            }
            ended["read"] += 1
        assert out.exists() == (code == 0)
        for file in out.glob("*"):
            file.unlink()
        if out.exists():
            out.rmdir()
    print(form, dict(ended))
    assert ended["refused"] >= kind.number // 4
    assert ended["read"] > 0


def test_damaged_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str], watched: Any) -> None:
    """A plan is a scenario and the name of a map: refused in one line, or exported with the placement of that map."""
    rng, ended = random.Random(f"plan {SEED}"), Counter[int]()
    placement().write(tmp_path / "map.json")
    scenario = small(parallel={"attention_dp": RANKS, "ep": RANKS}, placement={"solver": "greedy"})
    plan = {"format": "moesim-plan", "schema_version": 1, "placement": "map.json", "scenario": scenario}
    for number in range(PLANS):
        path = tmp_path / "plan.yaml"
        if number % 2:
            path.write_text(yaml.safe_dump(mutations.of_document(plan, rng)))
        else:
            path.write_bytes(mutations.of_bytes(yaml.safe_dump(plan).encode(), rng))
        out = tmp_path / "out"
        code = run(["export", str(path), "--engine", "sglang", "--out", str(out)])
        printed = capsys.readouterr()
        watched()
        ended[code] += 1
        assert code in (0, 1, 2), printed.err
        assert out.exists() == (code == 0)
        if code:
            assert printed.err.startswith("error: "), printed.err
            assert printed.err.count("\n") == 1
            continue
        rows = json.loads((out / "expert_location.json").read_text())["physical_to_logical_map"]
        assert [rows[layer] for layer in LAYERS] == placement().physical_to_logical.tolist()
        shutil.rmtree(out)
    assert ended[2] > PLANS // 2
    assert ended[0] > 0


def one_refused(path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    begin = time.process_time()
    code = run([*arguments, str(path)] if arguments[0] == "export" else [*arguments, "--loads", str(path)])
    printed = capsys.readouterr()
    one_line(code, printed, path.name)
    assert time.process_time() - begin < MOST_CPU_S
    return printed.err


PLACE = ("place", "--gpus", str(RANKS), "--slots", str(EXPERTS), "--holdout", "0")


def test_archives_that_unpack_to_far_more_are_refused_unread(tmp_path: Path, capsys: Any, watched: Any) -> None:
    """Four gigabytes of zeros in some megabytes: an .npz by its header, a .pt as torch.save never compresses."""
    torch = pytest.importorskip("torch")
    header = tmp_path / "big.npz"
    with zipfile.ZipFile(header, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("counts.npy", "w") as member:
        np.lib.format.write_array_header_1_0(
            member, {"descr": "<i8", "fortran_order": False, "shape": (1000, 1000, 500)}
        )
        for _ in range(64):
            member.write(bytes(1_000_000))
    assert "more than" in one_refused(header, capsys, *PLACE)
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"rank": 0, "logical_count": torch.zeros(1, ABSOLUTE, EXPERTS)}, plain)
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    assert "compressed" in one_refused(packed, capsys, *PLACE)
    wide = tmp_path / "wide.pt"  # eight bytes of storage, strides of 0: a terabyte when it is laid out
    torch.save({"rank": 0, "logical_count": torch.ones(1).expand(1000, 1000, 1000)}, wide)
    assert "more than" in one_refused(wide, capsys, *PLACE)
    watched()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.json", b'{"logical_count": ' + b"[" * 300_000 + b"]" * 300_000 + b"}"),
        ("deep.csv", b"layer_id,expert_id,count\n" + b'"' * 100_000),
        ("long.json", b'{"logical_count": [[' + b"9" * 1_000_000 + b"]]}"),
        ("wide.csv", b"layer_id,expert_id,count\n65535,65535,1\n" + b"".join(b"%d,0,1\n" % one for one in range(2000))),
        ("nothing.json", b""),
        ("nothing.pt", b""),
        ("nothing.npz", b""),
        ("nothing.csv", b""),
        ("pickle.pt", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        ("counts.npy", b"\x93NUMPY"),
    ],
)
def test_extreme_loads_are_one_line(name: str, content: bytes, tmp_path: Path, capsys: Any, watched: Any) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    one_refused(path, capsys, *PLACE)
    watched()


# Each alias names the ten before it: 10^9 entries when it is laid out.
LAUGHS = "a0: &a0 [0]\n" + "".join(
    f"a{n}: &a{n} [{', '.join(f'*a{n - 1}' for _ in range(10))}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep.json", b'{"physical_to_logical_map": ' + b"[" * 300_000 + b"}"),
        ("deep.yaml", b"num_slots: " + b"[" * 300_000),
        ("block.yaml", b"num_slots: 2\ninitial_global_assignments:\n " + b"- " * 300_000),
        ("laughs.yaml", LAUGHS.encode() + b"num_slots: *a9\n"),
        ("assigned.yaml", LAUGHS.encode().replace(b"a9: ", b"initial_global_assignments: ") + b"num_slots: 2\n"),
        ("tag.yaml", b"num_slots: !!python/object/apply:os.system ['true']\n"),
        ("many.json", json.dumps({"physical_to_logical_map": [[999_999] * 16] * ABSOLUTE}).encode()),
        ("nothing.json", b""),
        ("nothing.yaml", b""),
        ("utf16.json", sglang.render(placement()).encode("utf-16")),
    ],
)
def test_extreme_maps_are_one_line(name: str, content: bytes, tmp_path: Path, capsys: Any, watched: Any) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    given = ("--model", str(tmp_path / "config.json"), "--gpus", str(RANKS), "--out", str(tmp_path / "out"))
    one_refused(path, capsys, "export", "--engine", "sglang", *given)
    assert not (tmp_path / "out").exists()
    watched()


def test_a_sample_through_processes_of_their_own(tmp_path: Path) -> None:
    """As a shell meets it: exit code and one line, without this process's warnings filter or loaded modules."""
    pytest.importorskip("torch")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    given = ["--engine", "sglang", "--model", str(tmp_path / "config.json"), "--gpus", str(RANKS)]
    for form, kind in {**LOADS, **MAPS}.items():
        if form in ALIKE:
            continue
        rng = random.Random(f"{form} {SEED} process")
        for _ in range(100):
            path = kind.write(tmp_path, rng)
            if form == "parquet" or kind.read(path) is None:
                break
        arguments = [*PLACE, "--loads", str(path)] if form in LOADS else ["export", str(path), *given]
        command = [sys.executable, "-m", "moesim.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
        assert done.returncode == 2, f"{form}: {done.stderr}"
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1, done.stderr
