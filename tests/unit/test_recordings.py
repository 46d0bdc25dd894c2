"""Recordings as the engines write them: SGLang's modes over several ranks, TensorRT-LLM's folder with all its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import BadInput
from moesim.routing.readers import read_loads
from moesim.routing.resolve import fit_to_model
from moesim.routing.trace import RoutingCounts
from moesim.routing.traces import read_trace
from moesim.spec.hf import load_model

LAYERS, EXPERTS, SLOTS, RANKS = 4, 6, 8, 2
# Layer 0 is dense; in the others two experts have a replica each, elsewhere in every layer.
TABLE = np.stack([np.roll(np.concatenate([np.arange(EXPERTS), [layer, 5 - layer]]), layer) for layer in range(LAYERS)])


def picks(number: int, rank: int, tokens: int = 7) -> np.ndarray[Any, Any]:
    """Slots [layers, tokens, 8] that a rank's tokens went to in one pass; top-4, the rest -1, as padded rows."""
    found = np.full((LAYERS, tokens, 8), -1)
    rng = np.random.default_rng([number, rank])
    for layer in range(1, LAYERS):
        for token in range(tokens - 2):  # two rows of padding
            found[layer, token, :4] = rng.choice(SLOTS, 4, replace=False)
    return found


def by_hand(number: int) -> list[list[int]]:
    """Logical counts [layers, experts] of one pass over both ranks, counted one by one."""
    counts = [[0] * EXPERTS for _ in range(LAYERS)]
    for rank in range(RANKS):
        for layer, rows in enumerate(picks(number, rank).tolist()):
            for slot in (slot for row in rows for slot in row if slot != -1):
                counts[layer][TABLE[layer][slot]] += 1
    return counts


def record(mode: str, number: int, rank: int) -> dict[str, Any]:
    """A record as `_DetailAccumulator.append` makes it; first releases of per_token had no global_physical_count."""
    torch = pytest.importorskip("torch")
    found = torch.tensor(picks(number, rank), dtype=torch.int32)
    made: dict[str, Any] = {"forward_pass_id": number, "rank": rank, "gatherer_key": "primary"}
    if mode != "per_pass":
        tokens = list(range(found.shape[1]))
        made |= {"input_ids": tokens, "positions": tokens, "extend_seq_lens": None, "forward_mode": 2}
        made |= {"topk_ids_of_layer": found, "misc_objects": []}
    if mode != "first per_token":
        flat = found.reshape(LAYERS, -1)
        counts = torch.zeros(LAYERS, SLOTS, dtype=torch.int32)
        counts.scatter_add_(1, flat.masked_fill(flat == -1, 0).long(), (flat != -1).int())
        made["global_physical_count"] = counts
    return made


def write_ranks(folder: Path, mode: str, ranks: int = RANKS) -> Path:
    import torch

    folder.mkdir()
    for rank in range(ranks):
        records = [record(mode, number, rank) for number in (12, 11)]
        data = {"records": records, "last_physical_to_logical_map": torch.tensor(TABLE)}
        torch.save(data, folder / f"expert_distribution_recorder_17.5_{rank}.pt")
    return folder


@pytest.mark.parametrize("mode", ["per_pass", "per_token", "first per_token"])
def test_ranks_are_added_up_by_pass_and_slots_become_experts(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = read_loads(write_ranks(tmp_path / "dumps", mode))
    assert found.layer_ids.tolist() == [1, 2, 3]
    assert found.absolute_layers == LAYERS
    assert found.per_step
    assert found.counts.tolist() == [by_hand(11)[1:], by_hand(12)[1:]]  # passes in order


def test_a_trace_may_be_one_ranks_tokens(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = write_ranks(tmp_path / "dumps", "first per_token", ranks=1)
    (path,) = folder.glob("*.pt")
    assert read_trace(path).counts.sum() == 2 * 3 * 5 * 4


def test_stat_is_logical_and_its_unused_buffer_is_dropped(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    counts = torch.zeros(6, LAYERS, EXPERTS, dtype=torch.int32)
    counts[:2, 1:] = torch.tensor([by_hand(11)[1:], by_hand(12)[1:]])
    path = tmp_path / "expert_distribution_recorder_17.5.pt"
    torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": 0.5}, path)
    assert read_loads(path).counts.tolist() == [by_hand(11)[1:], by_hand(12)[1:]]
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / path.name)
    with pytest.raises(BadInput, match="already summed over ranks"):
        read_loads(tmp_path / "folder")


def changed(folder: Path, rank: int, change: Any) -> None:
    import torch

    (path,) = folder.glob(f"*_{rank}.pt")
    data = torch.load(path, weights_only=True)
    change(data)
    torch.save(data, path)


def _another_map(data: Any) -> None:
    data["last_physical_to_logical_map"] = data["last_physical_to_logical_map"].roll(1, 1)


def _same_rank(data: Any) -> None:
    for one in data["records"]:
        one["rank"] = 0


def _slot_beyond(data: Any) -> None:
    data["records"][0]["topk_ids_of_layer"][1, 0, 0] = SLOTS


def _less(data: Any) -> None:
    data["records"][0]["topk_ids_of_layer"] = data["records"][0]["topk_ids_of_layer"][1:]


def _neither(data: Any) -> None:
    del data["records"][0]["topk_ids_of_layer"]


def _negative(data: Any) -> None:
    import torch

    data["records"][0]["global_physical_count"] = torch.full((LAYERS, SLOTS), -1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_another_map, "differ in last_physical_to_logical_map"),
        (_same_rank, "pass 12 of rank 0 stands twice"),
        (_slot_beyond, "names slot 8"),
        (_less, r"shape \(3, 7, 8\)"),
        (_neither, "neither global_physical_count nor topk_ids_of_layer"),
        (_negative, "below 0"),
    ],
)
def test_a_fault_of_one_ranks_dump_is_named(change: Any, said: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = write_ranks(tmp_path / "dumps", "first per_token")
    changed(folder, 1, change)
    with pytest.raises(BadInput, match=said) as caught:
        read_loads(folder)
    assert "_1.pt" in caught.value.where
    assert caught.value.mend


def statistics(folder: Path, **other: np.ndarray[Any, Any]) -> Path:
    """A folder as ExpertStatistic writes it, with the files beside the counts that newer releases add."""
    numpy_format = pytest.importorskip("safetensors.numpy")
    folder.mkdir()
    meta = {"num_experts": EXPERTS, "num_experts_per_token": 4, "ep_size": 2, "experts_per_rank": 3}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    for rank in range(RANKS):
        tensors = {f"{step}_{layer}": np.asarray(by_hand(step)[1 + layer % 2]) for step in (50, 51) for layer in (3, 4)}
        numpy_format.save_file({**tensors, **other} if rank else tensors, folder / f"rank{rank}.safetensors")
        for name in (f"rank{rank}_raw", f"cooccurrence_rank{rank}", f"token_selected_experts_rank{rank}"):
            numpy_format.save_file({"50_3": np.zeros((5, 4), np.int64)}, folder / f"{name}.safetensors")
    (folder / "rank0_numtokens.json").write_text("{}")
    return folder


def test_statistics_sum_ranks_and_leave_other_files_out(tmp_path: Path) -> None:
    found = read_loads(statistics(tmp_path / "x"))
    assert found.layer_ids.tolist() == [3, 4]
    assert found.counts.tolist() == [
        [[2 * one for one in by_hand(step)[1 + layer % 2]] for layer in (3, 4)] for step in (50, 51)
    ]


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("52_3", np.ones(EXPERTS, np.int64), "iteration 52 lacks layer 4"),
        ("50_3", -np.ones(EXPERTS, np.int64), "below 0"),
        ("50", np.ones(EXPERTS, np.int64), "name it {iteration}_{layer}"),
        ("\u0665_3", np.ones(EXPERTS, np.int64), "name it {iteration}_{layer}"),
        ("50_3", np.ones(5, np.int64), "num_experts is 6"),
    ],
)
def test_faults_of_statistics_are_named(name: str, tensor: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        read_loads(statistics(tmp_path / "x", **{name: tensor}))
    assert said in caught.value.line()


@pytest.mark.parametrize("spans", [[[0, 8], [16, 24]], [[0, 8], [4, 12]], [[0, 8], [8, 16]]])
def test_safetensors_fill_their_data(spans: list[list[int]], tmp_path: Path) -> None:
    """A hole, bytes of two tensors, bytes of none: the format forbids each."""
    header = json.dumps(
        {f"1_{layer}": {"dtype": "I32", "shape": [2], "data_offsets": span} for layer, span in enumerate(spans)}
    ).encode()
    (tmp_path / "rank0.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes([1] * 24))
    (tmp_path / "meta_info.json").write_text(json.dumps({"num_experts": 2}))
    with pytest.raises(BadInput, match="do not fill"):
        read_loads(tmp_path)


def test_truth_values_are_no_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"logical_count": [[1, true], [2, 3]]}')
    with pytest.raises(BadInput, match="true or false"):
        read_loads(path)


def test_counts_of_draft_layers_are_left_out_for_the_model(tmp_path: Path) -> None:
    """TensorRT-LLM counts layer 61 of DeepSeek-V3 when it drafts: no MoE layer of the 61 that are placed."""
    model = load_model("deepseek-ai/DeepSeek-V3")
    rng = np.random.default_rng(0)
    layers = np.asarray([*model.moe.layer_ids, 61])
    loads = RoutingCounts(rng.uniform(1.0, 2.0, (2, 59, 256)), layers, 62, "x", per_step=True)
    found = fit_to_model(loads, model, where="x")
    assert tuple(found.layer_ids.tolist()) == model.moe.layer_ids
    assert found.absolute_layers == 61
    assert np.array_equal(found.counts, loads.counts[:, :58])
    more = RoutingCounts(rng.uniform(1.0, 2.0, (1, 59, 256)), np.asarray([*model.moe.layer_ids, 62]), 63, "x")
    with pytest.raises(BadInput, match="layer 62 has counts"):
        fit_to_model(more, model, where="x")
