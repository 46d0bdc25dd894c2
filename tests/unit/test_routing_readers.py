"""Every format of expert counts, read back as it was written; every fault told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput, MoesimError
from moesim.routing import parquet
from moesim.routing.readers import read_loads, write_npz, write_parquet
from moesim.routing.trace import RoutingCounts
from moesim.routing.traces import read_trace

COUNTS = np.arange(1, 25, dtype=np.float64).reshape(2, 3, 4)  # [steps, layers, experts]


@pytest.fixture
def loads() -> RoutingCounts:
    return RoutingCounts(COUNTS, np.asarray([3, 4, 5]), 6, name="x", per_step=True)


def write_json(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_sglang_json_drops_dense_layers_and_keeps_their_number(tmp_path: Path) -> None:
    matrix = [[0, 0], [0, 0], [1.5, 2], [3, 4]]
    found = read_loads(write_json(tmp_path / "a.json", {"logical_count": matrix}), phase="decode", weight=2.0)
    assert found.absolute_layers == 4
    assert found.layer_ids.tolist() == [2, 3]
    assert found.counts.tolist() == [[[1.5, 2.0], [3.0, 4.0]]]
    assert (found.phase, found.weight, found.per_step, found.name) == ("decode", 2.0, False, "a")


def test_json_with_steps_drops_idle_steps(tmp_path: Path) -> None:
    steps = [[[0, 0], [1, 2]], [[0, 0], [0, 0]], [[0, 0], [3, 0]]]
    found = read_loads(write_json(tmp_path / "a.json", {"logical_count": steps}))
    assert found.per_step
    assert found.counts.tolist() == [[[1, 2]], [[3, 0]]]


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_own_formats_round_trip(tmp_path: Path, loads: RoutingCounts, kind: str) -> None:
    path = tmp_path / f"x.{kind}"
    (write_npz if kind == "npz" else write_parquet)(path, loads)
    found = read_loads(path)
    assert np.array_equal(found.counts, COUNTS)
    assert found.layer_ids.tolist() == [3, 4, 5]
    assert found.per_step
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_csv_may_leave_out_experts_that_got_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("layer_id,expert_id,count\n4,1,7\n3,0,2.5\n")
    assert read_loads(path).counts.tolist() == [[[2.5, 0.0], [0.0, 7.0]]]
    assert read_loads(path, experts=4).counts.shape == (1, 2, 4)
    with pytest.raises(BadInput, match="more than the model has"):
        read_loads(path, experts=1)


def test_sglang_recorder_stat_and_detail(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    stat = tmp_path / "stat.pt"
    counts = torch.zeros(2, 4, 3, dtype=torch.int32)
    counts[:, 2:] = torch.arange(12).reshape(2, 2, 3)
    torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, stat)
    found = read_loads(stat)
    assert found.layer_ids.tolist() == [2, 3]
    assert np.array_equal(found.counts, counts.numpy()[:, 2:])

    folder = tmp_path / "ranks"
    folder.mkdir()
    table = torch.tensor([[0, 1, 2, 1]] * 2)  # expert 1 twice
    for rank in range(2):
        records = [
            {
                "forward_pass_id": number,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]) * (rank + 1) * number,
            }
            for number in (1, 2)
        ]
        torch.save({"records": records, "last_physical_to_logical_map": table}, folder / f"r{rank}.pt")
    one = read_loads(folder / "r0.pt")
    assert one.counts.tolist() == [[[1, 6, 3], [5, 14, 7]], [[2, 12, 6], [10, 28, 14]]]
    assert np.array_equal(read_loads(folder).counts, one.counts * 3)


def test_tensorrt_llm_statistics_sum_ranks(tmp_path: Path) -> None:
    numpy_format = pytest.importorskip("safetensors.numpy")
    for rank in range(2):
        tensors = {
            f"{step}_{layer}": np.asarray([step, layer, rank], np.int32) for step in (50, 51) for layer in (3, 7)
        }
        numpy_format.save_file(tensors, tmp_path / f"rank{rank}.safetensors")
    write_json(tmp_path / "meta_info.json", {"num_experts": 3, "num_experts_per_token": 2})
    found = read_loads(tmp_path)
    assert found.layer_ids.tolist() == [3, 7]
    assert found.counts.tolist() == [[[100, 6, 1], [100, 14, 1]], [[102, 6, 1], [102, 14, 1]]]


def test_trace_of_tokens_is_counted_by_step(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    path = tmp_path / "t.parquet"
    polars.DataFrame({"step": [0, 0, 1], "layer_id": [3, 3, 3], "experts": [[0, 1], [1, 2], [2, 0]]}).write_parquet(
        path
    )
    found = read_trace(path, experts=4)
    assert found.counts.tolist() == [[[1, 2, 1, 0]], [[1, 0, 1, 0]]]
    with pytest.raises(BadInput, match="no format of traces"):
        read_trace(tmp_path / "t.txt")


BAD_JSON = {
    "no key": {"counts": [[1]]},
    "ragged": {"logical_count": [[1, 2], [3]]},
    "text": {"logical_count": [["a", "b"]]},
    "text that looks like numbers": {"logical_count": [["1", "2"]]},
    "negative": {"logical_count": [[1, -2]]},
    "not a number": {"logical_count": [[1, float("nan")]]},
    "infinite": {"logical_count": [[1, 1e308]]},
    "one axis": {"logical_count": [1, 2]},
    "four axes": {"logical_count": [[[[1]]]]},
    "empty": {"logical_count": []},
    "empty rows": {"logical_count": [[], []]},
    "all zero": {"logical_count": [[0, 0]]},
    "huge integer": {"logical_count": [[10**40]]},
    "mapping": {"logical_count": {"a": 1}},
    "none": {"logical_count": None},
    "a list": [1, 2],
}


@pytest.mark.parametrize("fault", BAD_JSON)
def test_bad_json_is_one_line(tmp_path: Path, fault: str) -> None:
    path = write_json(tmp_path / "bad.json", BAD_JSON[fault])
    with pytest.raises(BadInput) as caught:
        read_loads(path)
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    assert caught.value.mend


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not a readable"),
        ("layer_id,expert_id\n1,2\n", "count is missing"),
        ("layer_id,expert_id,count\n", "no rows"),
        ("layer_id,expert_id,count\n1,2,3\n1,x,3\n", "line 3"),
        ("layer_id,expert_id,count\n1,-2,3\n", "line 2"),
        ("layer_id,expert_id,count\n1,99999999,3\n", "lies outside"),
        ("layer_id,expert_id,count\n1,2,3\n1,2,3\n", "twice"),
        ("layer_id,expert_id,count\n1,2,-3\n", "between 0"),
        ("layer_id,expert_id,count\n1,2,nan\n", "nan"),
    ],
)
def test_bad_csv_names_the_line(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=part):
        read_loads(path)


def test_missing_file_unknown_suffix_and_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("1")
    for path in (tmp_path / "none.json", tmp_path / "x.txt", tmp_path):
        with pytest.raises(BadInput):
            read_loads(path)


def test_npz_of_absurd_size_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, counts=np.zeros((100, 1000, 1000), np.int8))
    with pytest.raises(BadInput, match="aggregate steps"):
        read_loads(path)


def test_npz_never_unpickles(tmp_path: Path) -> None:
    path = tmp_path / "pickle.npz"
    np.savez(path, counts=np.asarray([{"a": 1}], dtype=object))
    with pytest.raises(BadInput, match="not numbers"):
        read_loads(path)


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Flip bytes, cut, repeat or overwrite a stretch."""
    data = bytearray(content)
    kind = rng.integers(4)
    if kind == 0:
        for _ in range(int(rng.integers(1, 20))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
    elif kind == 1:
        del data[int(rng.integers(len(data))) :]
    elif kind == 2:
        start = int(rng.integers(len(data)))
        data[start:start] = data[start : start + int(rng.integers(1, 64))]
    else:
        start = int(rng.integers(len(data)))
        stretch = int(rng.integers(1, 16))
        data[start : start + stretch] = b"\xff" * stretch
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # torch and zipfile warn about what the mutations left of a file
def test_250_mutated_files_never_end_in_another_exception(tmp_path: Path, loads: RoutingCounts) -> None:
    torch = pytest.importorskip("torch")
    numpy_format = pytest.importorskip("safetensors.numpy")
    write_npz(tmp_path / "a.npz", loads)
    write_parquet(tmp_path / "a.parquet", loads)
    write_json(tmp_path / "a.json", {"logical_count": COUNTS.tolist()})
    rows = [f"{layer},{expert},{COUNTS[0, layer, expert]}" for layer in range(3) for expert in range(4)]
    (tmp_path / "a.csv").write_text("layer_id,expert_id,count\n" + "\n".join(rows) + "\n")
    torch.save({"rank": 0, "logical_count": torch.tensor(COUNTS)}, tmp_path / "a.pt")
    folder = tmp_path / "trtllm"
    folder.mkdir()
    write_json(folder / "meta_info.json", {"num_experts": 4})
    numpy_format.save_file({"1_3": COUNTS[0, 0].astype(np.int32)}, folder / "rank0.safetensors")
    names = ["a.npz", "a.json", "a.csv", "a.pt", "trtllm/rank0.safetensors", "trtllm/meta_info.json"]
    rng = np.random.default_rng(20261122)
    refused = 0
    for index in range(252):
        # Parquet is decoded in a process of its own, half a second each: fewer of those.
        name = names[index % len(names)] if index % 25 else "a.parquet"
        path = tmp_path / name
        original = path.read_bytes()
        path.write_bytes(mutate(original, rng))
        try:
            found = read_loads(path if path.parent == tmp_path else folder)
            assert np.isfinite(found.counts).all()
        except MoesimError as error:
            refused += 1
            assert "\n" not in str(error)
        finally:
            path.write_bytes(original)
    assert refused > 100


def test_parquet_faults_are_told_by_the_child(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    polars = pytest.importorskip("polars")
    cases = {
        "columns": ({"layer": [1]}, "the columns are"),
        "list": ({"layer_id": [1], "experts": [3]}, "no list"),
    }
    for name, (columns, part) in cases.items():
        path = tmp_path / f"{name}.parquet"
        polars.DataFrame(columns).write_parquet(path)
        assert parquet.main([str(path), str(tmp_path / "out.arrow")]) == 2
        assert part in json.loads(capsys.readouterr().out)["what"]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no PAR1")
    assert parquet.main([str(tmp_path / "broken.parquet"), str(tmp_path / "out.arrow")]) == 2
    with pytest.raises(BadInput, match="the columns are"):
        read_loads(tmp_path / "columns.parquet")
    picks = tmp_path / "picks.parquet"
    polars.DataFrame({"layer_id": [3, 3, 3], "expert_id": [1, 1, 0]}).write_parquet(picks)
    assert parquet.main([str(picks), str(tmp_path / "out.arrow")]) == 0
    found = polars.read_ipc((tmp_path / "out.arrow").read_bytes()).sort("expert_id")
    assert found.rows() == [(3, 0, 1.0), (3, 1, 2.0)]


@pytest.mark.parametrize("fault", ["header", "length", "offsets", "dtype", "shape"])
def test_broken_safetensors_are_one_line(tmp_path: Path, fault: str) -> None:
    header: dict[str, Any] = {"1_3": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}
    if fault == "offsets":
        header["1_3"]["data_offsets"] = [0, 80]
    if fault == "dtype":
        header["1_3"]["dtype"] = "X9"
    if fault == "shape":
        header["1_3"]["shape"] = [10**12]
    text = b"[1]" if fault == "header" else json.dumps(header).encode()
    length = 10**9 if fault == "length" else len(text)
    (tmp_path / "rank0.safetensors").write_bytes(length.to_bytes(8, "little") + text + bytes(8))
    write_json(tmp_path / "meta_info.json", {"num_experts": 2})
    with pytest.raises(BadInput, match=r"rank0\.safetensors"):
        read_loads(tmp_path)


BAD_PT: dict[str, dict[str, Any]] = {
    "no map": {"records": [{}]},
    "no records": {"records": [], "last_physical_to_logical_map": [[0, 1]]},
    "bare record": {"records": [{}], "last_physical_to_logical_map": [[0, 1]]},
    "map of text": {"records": [{}], "last_physical_to_logical_map": ["a"]},
    "other shape": {
        "records": [{"forward_pass_id": 1, "global_physical_count": [[1]]}],
        "last_physical_to_logical_map": [[0, 1]],
    },
    "neither": {"x": 1},
}


@pytest.mark.parametrize("fault", BAD_PT)
def test_broken_recorder_dumps_are_one_line(tmp_path: Path, fault: str) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    torch.save(BAD_PT[fault], path)
    with pytest.raises(BadInput, match=r"x\.pt"):
        read_loads(path)
