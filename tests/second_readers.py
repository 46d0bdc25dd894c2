"""Reading load and map files a second time, by other code: what a file says, or None where it says nothing valid.

Counts come back as (counts [steps, layers, experts], absolute layers), maps as what each rank holds by absolute layer.
Nothing here imports moesim.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

Counts = tuple[NDArray[np.float64], list[int]]
Held = dict[int, list[list[int]]]
MOST = 1e15


def _json(path: Path) -> Any:
    """A JSON document whose keys each stand once and whose numbers are numbers; raises ValueError."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError
        return dict(pairs)

    def number(name: str) -> float:
        raise ValueError(name)

    return json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=distinct, parse_constant=number)


def _matrix(value: Any) -> NDArray[Any] | None:
    """A full nested list of two or three levels, of ints and floats."""

    def shape(part: Any) -> tuple[int, ...] | None:
        if type(part) in (int, float):
            return ()
        if not isinstance(part, list) or not part:
            return None
        inner = {shape(one) for one in part}
        (only,) = inner if len(inner) == 1 else (None,)
        return None if only is None else (len(part), *only)

    found = shape(value)
    return np.asarray(value, dtype=np.float64) if found is not None and len(found) in (2, 3) else None


def cleaned(counts: NDArray[Any] | None, layers: list[int] | None = None) -> Counts | None:
    """Counts without dense layers and idle steps; None where a value is no count, or nothing was counted."""
    if counts is None or counts.dtype.kind not in "iuf" or counts.ndim not in (2, 3) or counts.size == 0:
        return None
    counts = counts.astype(np.float64) if counts.ndim == 3 else counts.astype(np.float64)[None]
    if not ((counts >= 0) & (counts <= MOST)).all() or not counts.any():
        return None
    ids = list(range(counts.shape[1])) if layers is None else layers
    if len(ids) != counts.shape[1] or len(set(ids)) != len(ids) or not all(0 <= one < 65_536 for one in ids):
        return None
    order = sorted((one, row) for row, one in enumerate(ids) if counts[:, row].any())
    live = counts[counts.any(axis=(1, 2))]
    return live[:, [row for _, row in order]], [one for one, _ in order]


def sglang_json(path: Path) -> Counts | None:
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
        return cleaned(_matrix(data["logical_count"])) if isinstance(data, dict) else None
    except (ValueError, KeyError, RecursionError, OverflowError):
        return None


def csv(path: Path) -> Counts | None:
    """layer_id,expert_id,count (other columns ignored), read by polars as text, then by Python's own numbers."""
    import polars as pl

    try:
        frame = pl.read_csv(path, infer_schema=False)
    except Exception:
        return None
    if not {"layer_id", "expert_id", "count"} <= set(frame.columns) or frame.height == 0:
        return None
    rows: dict[tuple[int, int, int], float] = {}
    for row in frame.to_dicts():
        key = []
        for name in [name for name in ("step", "layer_id", "expert_id") if name in frame.columns]:
            if row[name] is None or not re.fullmatch(r"[+-]?[0-9]{1,18}", row[name]):
                return None
            key.append(int(row[name]))
        step, layer, expert = key if len(key) == 3 else (0, *key)
        text = row["count"]
        number = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
        if text is None or not re.fullmatch(number, text) or (step, layer, expert) in rows:
            return None
        rows[step, layer, expert] = float(text)
        if not (0 <= layer < 65_536 and 0 <= expert < 65_536):
            return None
    steps, layers = sorted({key[0] for key in rows}), sorted({key[1] for key in rows})
    shape = (len(steps), len(layers), max(key[2] for key in rows) + 1)
    if np.prod(shape) > 64_000_000:
        return None
    counts = np.zeros(shape)
    for (step, layer, expert), amount in rows.items():
        counts[steps.index(step), layers.index(layer), expert] = amount
    return cleaned(counts, layers)


def npz(path: Path) -> Counts | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            counts = archive["counts"]
            ids = archive.get("layer_ids")
    except Exception:
        return None
    if ids is not None and (ids.dtype.kind not in "iu" or ids.ndim != 1):
        return None
    return cleaned(counts, None if ids is None else ids.tolist())


def _tensor(value: Any) -> NDArray[Any] | None:
    import torch

    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bool or value.is_complex():
            return None
        return np.asarray((value.double() if value.is_floating_point() else value).numpy())
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        return None
    return array if array.dtype.kind in "iuf" else None


def recorder(path: Path) -> Counts | None:
    """SGLang's dump: of stat, or of one rank's per_pass or per_token, or a folder of ranks."""
    import torch

    passes: dict[int, NDArray[np.float64]] = {}
    seen, maps = set(), []
    for file in sorted(path.glob("*.pt")) if path.is_dir() else [path]:
        try:
            data = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:
            return None
        if not isinstance(data, dict):
            return None
        if "logical_count" in data:
            return None if path.is_dir() else cleaned(_tensor(data["logical_count"]))
        table, records = _tensor(data.get("last_physical_to_logical_map")), data.get("records")
        if table is None or table.ndim != 2 or table.size == 0 or table.dtype.kind not in "iu":
            return None
        if table.min() < 0 or table.max() >= 65_536 or not isinstance(records, list) or not records:
            return None
        maps.append(table)
        for record in records:
            try:
                number, slots = record["forward_pass_id"], _slots(record, table.shape)
                rank, gatherer = record.get("rank", -1), record.get("gatherer_key", "primary")
            except (KeyError, TypeError, AttributeError):
                return None
            if slots is None or any(type(one) is not int for one in (number, rank)) or not isinstance(gatherer, str):
                return None
            if number < 0 or ("rank" in record and (rank < 0 or (number, rank, gatherer) in seen)):
                return None
            seen.add((number, rank, gatherer))
            logical = passes.setdefault(number, np.zeros((len(table), int(table.max()) + 1)))
            if logical.shape[1] != int(table.max()) + 1:
                return None
            for layer, row in enumerate(table):
                np.add.at(logical[layer], row, slots[layer])
    if not all(np.array_equal(table, maps[0]) for table in maps):
        return None
    return cleaned(np.stack([passes[number] for number in sorted(passes)]))


def _slots(record: dict[str, Any], shape: tuple[int, ...]) -> NDArray[Any] | None:
    if "global_physical_count" in record:
        counts = _tensor(record["global_physical_count"])
        fine = counts is not None and counts.shape == shape and bool((counts >= 0).all())
        return counts if fine else None
    picks = _tensor(record["topk_ids_of_layer"])
    if picks is None or picks.ndim != 3 or len(picks) != shape[0] or picks.dtype.kind not in "iu":
        return None
    if picks.size and (picks.min() < -1 or picks.max() >= shape[1]):
        return None
    return np.stack([np.bincount(layer[layer >= 0].astype(int), minlength=shape[1]) for layer in picks])


def statistics(path: Path) -> Counts | None:
    """TensorRT-LLM's folder, its safetensors read by the format's own library."""
    from safetensors.numpy import load_file

    try:
        meta = json.loads((path / "meta_info.json").read_bytes().decode("utf-8"))
        experts = meta["num_experts"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if type(experts) is not int or not 0 < experts < 65_536:
        return None
    total: dict[tuple[int, int], Any] = {}
    for file in sorted(path.glob("rank*.safetensors")):
        if not re.fullmatch(r"rank[0-9]+", file.stem):
            continue
        try:
            tensors = load_file(file)
        except Exception:
            return None
        for name, tensor in tensors.items():
            found = re.fullmatch(r"([0-9]+)_([0-9]+)", name)
            if found is None or tensor.shape != (experts,) or tensor.dtype.kind not in "iuf":
                return None
            if not (tensor >= 0).all():
                return None
            place = (int(found[1]), int(found[2]))
            total[place] = total.get(place, 0.0) + tensor.astype(np.float64)
    steps, layers = sorted({one for one, _ in total}), sorted({one for _, one in total})
    if not total or len(total) != len(steps) * len(layers):
        return None
    return cleaned(np.stack([[total[step, layer] for layer in layers] for step in steps]), layers)


def parquet(path: Path) -> Counts | None:
    """Only after moesim has read it: polars may abort the process on a damaged file."""
    import polars as pl

    frame = pl.read_parquet(path)
    wide = frame.pivot("expert_id", index=["step", "layer_id"], values="count", sort_columns=True)
    layers = sorted(wide["layer_id"].unique().to_list())
    counts = wide.sort("step", "layer_id").drop("step", "layer_id").to_numpy()
    return cleaned(counts.reshape(-1, len(layers), counts.shape[1]), layers)


def _rows(value: Any, experts: int, ranks: int) -> list[list[int]] | None:
    """Rows of one length that divide by the ranks, each with every expert and nothing else."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value):
        return None
    if len({len(row) for row in value}) != 1 or len(value[0]) % ranks:
        return None
    fine = all(all(type(one) is int for one in row) and set(row) == set(range(experts)) for row in value)
    return value if fine else None


def _parted(row: list[int], ranks: int) -> list[list[int]]:
    each = len(row) // ranks
    return [row[rank * each : (rank + 1) * each] for rank in range(ranks)]


def map_moesim(path: Path) -> Held | None:
    try:
        data = _json(path)
    except (ValueError, RecursionError):
        return None
    needed = {"format", "schema_version", "experts", "ranks", "absolute_layers", "layer_ids", "physical_to_logical"}
    if not isinstance(data, dict) or not needed <= set(data) <= needed | {"solver", "notes"}:
        return None
    if data["format"] != "moesim-placement" or type(data["schema_version"]) is not int or data["schema_version"] != 1:
        return None
    numbers = [data["experts"], data["ranks"], data["absolute_layers"]]
    if not all(type(one) is int and 1 <= one <= 1_000_000 for one in numbers):
        return None
    if not isinstance(data.get("solver", ""), str) or not isinstance(data.get("notes", {}), dict):
        return None
    rows = _rows(data["physical_to_logical"], data["experts"], data["ranks"])
    ids = data["layer_ids"]
    if rows is None or not isinstance(ids, list) or len(ids) != len(rows) or any(type(one) is not int for one in ids):
        return None
    if ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= data["absolute_layers"]:
        return None
    return {layer: _parted(row, data["ranks"]) for layer, row in zip(ids, rows, strict=True)}


def map_sglang(path: Path, *, experts: int, ranks: int, layers: list[int], absolute: int) -> Held | None:
    try:
        data = _json(path)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or set(data) != {"physical_to_logical_map"}:
        return None
    rows = _rows(data["physical_to_logical_map"], experts, ranks)
    if rows is None or len(rows) != absolute:
        return None
    return {layer: _parted(rows[layer], ranks) for layer in layers}


class _Distinct(yaml.SafeLoader):
    """PyYAML's own loader, which refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        if any(keys.count(key) > 1 for key in keys):
            raise ValueError("twice")
        return super().construct_mapping(node, deep=deep)


def map_trtllm(path: Path, *, experts: int, ranks: int, layers: list[int], extra: list[int]) -> Held | None:
    try:
        data = yaml.load(path.read_bytes().decode("utf-8"), Loader=_Distinct)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        return None
    allowed = {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    if not isinstance(data, dict) or not set(data) <= allowed:
        return None
    slots, updates, rows = data.get("num_slots"), data.get("layer_updates_per_iter", 0), data.get(sorted(allowed)[0])
    if (
        type(slots) is not int
        or type(updates) is not int
        or not 0 <= updates <= 1_000_000
        or not isinstance(rows, dict)
    ):
        return None
    if any(type(layer) is not int for layer in rows) or not set(layers) <= set(rows) <= {*layers, *extra}:
        return None
    if _rows(list(rows.values()), experts, ranks) is None or len(rows[layers[0]]) != slots:
        return None
    return {layer: _parted(rows[layer], ranks) for layer in layers}


def map_vllm_ascend(path: Path, *, experts: int, ranks: int, layers: list[int]) -> Held | None:
    try:
        data = _json(path)
        if type(data["moe_layer_count"]) is not int or len(data["layer_list"]) != data["moe_layer_count"]:
            return None
        if not isinstance(data["layer_list"], list) or len(data["layer_list"]) != len(layers):
            return None
        held, sizes = {}, set()
        for index, layer in enumerate(data["layer_list"]):
            named = [layer["layer_id"], layer["device_count"], *(one["device_id"] for one in layer["device_list"])]
            if named != [index, ranks, *range(ranks)] or any(type(one) is not int for one in named):
                return None
            devices = [one["device_expert"] for one in layer["device_list"]]
            if not all(isinstance(one, list) and all(type(expert) is int for expert in one) for one in devices):
                return None
            if any(len(set(one)) != len(one) for one in devices):
                return None
            if {expert for one in devices for expert in one} != set(range(experts)):
                return None
            sizes |= {len(one) for one in devices}
            held[layers[index]] = devices
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return None
    return held if len(sizes) == 1 else None
