"""Files of expert counts, in any format that an engine or moesim writes, as RoutingCounts; any fault is one line.

Formats: SGLang's recorder (`.pt`) and its JSON, TensorRT-LLM's statistics folder, CSV, `.npz` and `.parquet` of moesim.
SGLang: python/sglang/srt/eplb/expert_distribution.py (sgl-project/sglang). TensorRT-LLM: `ExpertStatistic` in
tensorrt_llm/_torch/modules/fused_moe/moe_load_balancer.py and examples/ep_load_balancer (NVIDIA/TensorRT-LLM).
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput, MissingPart
from moesim.files import read_text, whole_file
from moesim.routing.records import records_of
from moesim.routing.tables import read_table
from moesim.routing.tensors import MAX_FILE_BYTES, check_cells, read_safetensors, tensor_to_numpy
from moesim.routing.trace import RoutingCounts

# Beyond this a count is a corrupt number: at 1e8 routed tokens a second it would take more than three months.
MAX_COUNT = 1e15
# More layers or experts than this is no model that exists (the largest published have 128 layers and 1,024 experts).
MAX_AXIS = 65_536
SUFFIXES = ".json, .pt, .csv, .npz, .parquet or a folder of TensorRT-LLM statistics"


def read_loads(
    path: Path, *, phase: str = "any", weight: float = 1.0, experts: int | None = None, tokens: bool = False
) -> RoutingCounts:
    """Read one file (or folder) of expert counts; the suffix says the format.

    Dense layers (rows that are zero in every step) are dropped, and counted in `absolute_layers`; steps without any
    token are dropped. `experts` fixes the expert axis of CSV and parquet, which may leave out experts that got nothing.
    `tokens`: read which experts each token picked, too, where the file tells.
    Raises BadInput (file, place, mend) for whatever is wrong with the file, MissingPart where `.pt` needs torch.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput("there is no such file", where=str(path), mend="give a path to a file of expert counts")
    frame = None
    if path.is_dir():
        counts, layer_ids, per_step = _read_folder(path)
    else:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise BadInput(
                f"{size:,} bytes is more than the {MAX_FILE_BYTES:,} that a file of counts may have",
                where=str(path),
                mend="aggregate its steps first",
            )
        reader = {".json": _read_json, ".pt": _read_pt, ".npz": _read_npz}.get(path.suffix)
        if path.suffix in (".csv", ".parquet"):
            counts, layer_ids, per_step, frame = read_table(path, experts, most=MAX_AXIS)
        elif reader is not None:
            counts, layer_ids, per_step = reader(path)
        else:
            raise BadInput(f"unknown kind of file {path.suffix!r}", where=str(path), mend=f"give {SUFFIXES}")
    found = clean_counts(
        counts, layer_ids, where=str(path), name=path.stem, phase=phase, weight=weight, per_step=per_step
    )
    if tokens:
        from moesim.routing.tokens import read_tokens

        found = replace(found, tokens=read_tokens(path, found))
    if frame is None:
        return found
    records = records_of(frame, layer_ids=found.layer_ids, experts=found.experts, where=str(path))
    return replace(found, records=records)


def clean_counts(
    counts: NDArray[Any],
    layer_ids: NDArray[np.int64] | None,
    *,
    where: str,
    name: str,
    phase: str = "any",
    weight: float = 1.0,
    per_step: bool = False,
) -> RoutingCounts:
    """Turn counts [steps, layers, experts] as a file holds them into RoutingCounts, or say what is wrong with them.

    layer_ids: absolute layer of each row; None = the rows are the absolute layers 0, 1, 2 and so on.
    """
    if not np.isfinite(counts).all() or (counts < 0).any() or (counts > MAX_COUNT).any():
        step, layer, expert = (
            int(axis[0]) for axis in np.nonzero(~(np.isfinite(counts) & (counts >= 0) & (counts <= MAX_COUNT)))
        )
        raise BadInput(
            f"the count of expert {expert} in row {layer} (step {step}) is {counts[step, layer, expert]}",
            where=where,
            mend=f"a count lies between 0 and {MAX_COUNT:.0e}: record the counts again",
        )
    ids = np.arange(counts.shape[1], dtype=np.int64) if layer_ids is None else np.asarray(layer_ids, dtype=np.int64)
    if len(ids) != counts.shape[1] or len(np.unique(ids)) != len(ids) or (ids < 0).any() or (ids >= MAX_AXIS).any():
        raise BadInput(
            f"layer_ids do not name {counts.shape[1]} different layers between 0 and {MAX_AXIS - 1}",
            where=where,
            mend="give the absolute layer of each row once",
        )
    absolute_layers = int(ids.max()) + 1 if len(ids) else 0
    counts = counts.astype(np.float64, copy=False)
    live_layers = counts.any(axis=(0, 2))
    live_steps = counts.any(axis=(1, 2))
    if not live_layers.any():
        raise BadInput("no expert got any token", where=where, mend="record a server that is loaded")
    order = np.argsort(ids[live_layers], kind="stable")
    return RoutingCounts(
        counts=np.ascontiguousarray(counts[live_steps][:, live_layers][:, order]),
        layer_ids=ids[live_layers][order],
        absolute_layers=absolute_layers,
        name=name,
        phase=phase,
        weight=weight,
        per_step=per_step and int(live_steps.sum()) > 1,
    )


Raw = tuple[NDArray[Any], NDArray[np.int64] | None, bool]


def _as_steps(array: NDArray[Any], *, where: str) -> tuple[NDArray[Any], bool]:
    """[layers, experts] or [steps, layers, experts] -> 3-D, and whether it has steps."""
    if array.dtype.kind not in "iuf":
        raise BadInput("logical_count does not hold numbers only", where=where, mend="give a matrix of counts")
    if array.ndim not in (2, 3):
        raise BadInput(
            f"the counts have shape {array.shape}",
            where=where,
            mend="give [layers, experts] or [steps, layers, experts]",
        )
    if array.size == 0:
        raise BadInput(f"the counts are empty (shape {array.shape})", where=where, mend="record a loaded server")
    check_cells(array.shape, where=where)
    return (array, True) if array.ndim == 3 else (array[None], False)


def _read_json(path: Path) -> Raw:
    text = read_text(path, what="expert counts")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        place = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise BadInput(f"not valid JSON{place}", where=str(path), mend="give SGLang's recorded JSON") from None
    if not isinstance(data, dict) or "logical_count" not in data:
        raise BadInput(
            "there is no key logical_count", where=str(path), mend='give {"logical_count": [[count, ...], ...]}'
        )
    try:
        array = np.asarray(data["logical_count"])
    except (ValueError, OverflowError):
        raise BadInput(
            "the rows of logical_count differ in length", where=str(path), mend="give a full matrix of counts"
        ) from None
    counts, per_step = _as_steps(array, where=f"{path}: logical_count")
    return counts, None, per_step


def _read_npz(path: Path) -> Raw:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "counts.npy" not in names:
                raise BadInput("there is no array counts", where=str(path), mend="save it with counts=...")
            array = _read_npy(archive, "counts.npy", path)
            ids = _read_npy(archive, "layer_ids.npy", path) if "layer_ids.npy" in names else None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, KeyError):
        # RuntimeError: an encrypted member; NotImplementedError: an unknown compression.
        raise BadInput("not a readable .npz file", where=str(path), mend="save it again with numpy.savez") from None
    counts, per_step = _as_steps(array, where=f"{path}: counts")
    if ids is not None and (ids.dtype.kind not in "iu" or ids.ndim != 1):
        raise BadInput("layer_ids is not a row of integers", where=str(path), mend="give one integer for each layer")
    return counts, None if ids is None else ids.astype(np.int64), per_step


def _read_npy(archive: zipfile.ZipFile, member: str, path: Path) -> NDArray[Any]:
    """Read one array of an archive, its header checked before its data is unpacked (never a pickle)."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise BadInput(f"{member} is of an unknown .npy version", where=str(path), mend="save it with NumPy")
        if dtype.kind not in "iuf" or any(length < 0 for length in shape):
            raise BadInput(f"{member} holds {dtype}, not numbers", where=str(path), mend="save integer or float counts")
        check_cells(shape, where=f"{path}: {member}")
        count = int(np.prod(shape, dtype=np.int64))
        data = stream.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise BadInput(f"{member} is cut short", where=str(path), mend="save it again")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")


def _load_pt(path: Path) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise MissingPart("reading a .pt file needs torch", where=str(path), mend="pip install '.[hardware]'") from None
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler raises whatever a broken file makes it meet
        raise BadInput(
            f"not a readable .pt file of plain tensors ({type(error).__name__})",
            where=str(path),
            mend="give a file that SGLang's expert distribution recorder wrote",
        ) from None
    if not isinstance(data, dict) or not ("logical_count" in data or "records" in data):
        raise BadInput(
            "there is neither logical_count nor records",
            where=str(path),
            mend="give a file that SGLang's expert distribution recorder wrote",
        )
    return data


def _read_pt(path: Path) -> Raw:
    data = _load_pt(path)
    if "logical_count" in data:
        array = tensor_to_numpy(data["logical_count"], where=f"{path}: logical_count")
        counts, per_step = _as_steps(array, where=f"{path}: logical_count")
        return counts, None, per_step
    passes: dict[int, NDArray[np.float64]] = {}
    add_records(data, passes, path)
    return _stack_passes(passes, path)


def add_records(data: Mapping[str, Any], passes: dict[int, NDArray[np.float64]], path: Path) -> None:
    """Add the records of one rank's per_pass or per_token dump to the logical counts [layers, experts] by pass."""
    where = f"{path}: last_physical_to_logical_map"
    if "last_physical_to_logical_map" not in data:
        raise BadInput("this key is missing", where=where, mend="give the recorder's whole dump")
    table = tensor_to_numpy(data["last_physical_to_logical_map"], where=where)
    if table.ndim != 2 or table.dtype.kind not in "iu" or table.size == 0 or table.min() < 0 or table.max() >= MAX_AXIS:
        raise BadInput(f"shape {table.shape} is no map of expert ids", where=where, mend="give [layers, slots]")
    experts = int(table.max()) + 1
    rows = np.repeat(np.arange(table.shape[0]), table.shape[1])
    records = data["records"]
    if not isinstance(records, list) or not records:
        raise BadInput("records is not a filled list", where=str(path), mend="record a loaded server")
    for index, record in enumerate(records):
        place = f"{path}: records[{index}]"
        if not isinstance(record, dict) or not {"forward_pass_id", "global_physical_count"} <= set(record):
            raise BadInput(
                "a record lacks forward_pass_id or global_physical_count", where=place, mend="give the whole dump"
            )
        physical = tensor_to_numpy(record["global_physical_count"], where=place)
        number = record["forward_pass_id"]
        if physical.shape != table.shape or physical.dtype.kind not in "iuf" or not isinstance(number, int):
            raise BadInput(
                f"global_physical_count has shape {physical.shape}, the map {table.shape}",
                where=place,
                mend="give one dump",
            )
        logical = passes.get(number)
        if logical is None:
            check_cells((len(passes) + 1, table.shape[0], experts), where=str(path))
            logical = passes[number] = np.zeros((table.shape[0], experts))
        if logical.shape != (table.shape[0], experts):
            raise BadInput("the dumps of one folder differ in shape", where=str(path), mend="give dumps of one run")
        np.add.at(logical, (rows, table.ravel().astype(np.int64)), physical.ravel())


def _stack_passes(passes: Mapping[int, NDArray[np.float64]], path: Path) -> Raw:
    shapes = {matrix.shape for matrix in passes.values()}
    if len(shapes) != 1:
        raise BadInput("the passes differ in shape", where=str(path), mend="give dumps of one run")
    return np.stack([passes[number] for number in sorted(passes)]), None, True


def _read_folder(path: Path) -> Raw:
    """A TensorRT-LLM statistics folder, or one SGLang per_pass / per_token dump of each rank (summed by pass)."""
    if (path / "meta_info.json").is_file():
        return _read_trtllm(path)
    dumps = sorted(path.glob("*.pt"))
    if not dumps:
        raise BadInput(
            "the folder holds neither meta_info.json nor .pt files",
            where=str(path),
            mend="give a folder of TensorRT-LLM statistics or of SGLang's dumps",
        )
    passes: dict[int, NDArray[np.float64]] = {}
    for dump in dumps:
        data = _load_pt(dump)
        if "records" not in data:
            raise BadInput(
                "a stat dump is already summed over ranks", where=str(dump), mend="give this file alone, not its folder"
            )
        add_records(data, passes, dump)
    return _stack_passes(passes, path)


def _read_trtllm(path: Path) -> Raw:
    meta_path = path / "meta_info.json"
    try:
        meta = json.loads(read_text(meta_path, what="statistics"))
        experts = meta["num_experts"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise BadInput("there is no num_experts", where=str(meta_path), mend='give {"num_experts": n, ...}') from None
    if not isinstance(experts, int) or isinstance(experts, bool) or not 0 < experts < MAX_AXIS:
        raise BadInput(f"num_experts is {experts!r}"[:80], where=str(meta_path), mend="give a positive integer")
    files = [file for file in sorted(path.glob("rank*.safetensors")) if file.stem.removeprefix("rank").isdecimal()]
    if not files:
        raise BadInput("there is no rank*.safetensors", where=str(path), mend="give the whole statistics folder")
    total: dict[tuple[int, int], NDArray[np.float64]] = {}
    for file in files:
        for key, array in read_safetensors(file).items():
            iteration, _, layer = key.partition("_")
            if not (iteration.isdecimal() and layer.isdecimal() and len(key) < 32) or int(layer) >= MAX_AXIS:
                raise BadInput(f"tensor {key[:40]!r}", where=str(file), mend="name it {iteration}_{layer}")
            if array.shape != (experts,):
                raise BadInput(
                    f"tensor {key} has shape {array.shape}", where=str(file), mend=f"num_experts is {experts}"
                )
            place = (int(iteration), int(layer))
            total[place] = total[place] + array if place in total else array.astype(np.float64)
    if not total:
        raise BadInput("the files hold no tensors", where=str(path), mend="record a loaded server")
    steps = sorted({number for number, _ in total})
    layers = sorted({number for _, number in total})
    check_cells((len(steps), len(layers), experts), where=str(path))
    counts = np.zeros((len(steps), len(layers), experts))
    step_of = {number: index for index, number in enumerate(steps)}
    layer_of = {number: index for index, number in enumerate(layers)}
    for place, row in total.items():
        counts[step_of[place[0]], layer_of[place[1]]] = row
    return counts, np.asarray(layers, dtype=np.int64), True


def write_npz(path: Path, loads: RoutingCounts) -> None:
    """Write `counts` [steps, layers, experts] and `layer_ids` as `.npz`, whole or not at all."""
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(
            stream, counts=loads.counts if loads.per_step else loads.counts[0], layer_ids=loads.layer_ids
        )


def write_parquet(path: Path, loads: RoutingCounts) -> None:
    """Write the columns step, layer_id, expert_id, count as `.parquet`, whole or not at all."""
    import polars as pl

    steps, layers, experts = loads.counts.shape
    frame = pl.DataFrame(
        {
            "step": np.repeat(np.arange(steps), layers * experts),
            "layer_id": np.tile(np.repeat(loads.layer_ids, experts), steps),
            "expert_id": np.tile(np.arange(experts), steps * layers),
            "count": loads.counts.ravel(),
        }
    )
    with whole_file(path) as temporary:
        frame.write_parquet(temporary)
