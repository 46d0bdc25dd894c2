"""Files of expert counts, in any format that an engine or moesim writes, as RoutingCounts; any fault is one line.

Formats: SGLang's recorder (`.pt`, moesim/routing/recorder.py) and its JSON, TensorRT-LLM's statistics folder
(moesim/routing/statistics.py), CSV, `.npz` and `.parquet` of moesim.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.files import kind_of, read_text, whole_file
from moesim.routing.recorder import Passes, load_dump, read_dumps
from moesim.routing.records import records_of
from moesim.routing.statistics import META, read_statistics
from moesim.routing.tables import read_table
from moesim.routing.tensors import MAX_AXIS, MAX_FILE_BYTES, check_cells, tensor_to_numpy
from moesim.routing.trace import RoutingCounts

# Beyond this a count is a corrupt number: at 1e8 routed tokens a second it would take more than three months.
MAX_COUNT = 1e15
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
    kind = kind_of(path)
    if kind is None:
        raise BadInput("there is no such file", where=str(path), mend="give a path to a file of expert counts")
    frame = None
    if kind == "folder":
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
        if ("true" in text or "false" in text) and _holds_bool(data["logical_count"]):
            raise BadInput("logical_count holds true or false", where=str(path), mend="give a matrix of counts")
    except (ValueError, OverflowError):
        raise BadInput(
            "the rows of logical_count differ in length", where=str(path), mend="give a full matrix of counts"
        ) from None
    counts, per_step = _as_steps(array, where=f"{path}: logical_count")
    return counts, None, per_step


def _holds_bool(value: Any) -> bool:
    """Whether a nested list holds a truth value, which NumPy would take for 0 or 1."""
    return isinstance(value, bool) or (isinstance(value, list) and any(map(_holds_bool, value)))


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


def _read_pt(path: Path) -> Raw:
    data = load_dump(path)
    if "logical_count" in data:
        array = tensor_to_numpy(data["logical_count"], where=f"{path}: logical_count")
        counts, per_step = _as_steps(array, where=f"{path}: logical_count")
        return counts, None, per_step
    passes = Passes()
    passes.add(data, path)
    return passes.stacked(), None, True


def _read_folder(path: Path) -> Raw:
    """A TensorRT-LLM statistics folder, or one SGLang per_pass / per_token dump of each rank (summed by pass)."""
    if (path / META).is_file():
        counts, layers = read_statistics(path)
        return counts, layers, True
    dumps = sorted(path.glob("*.pt"))
    if not dumps:
        raise BadInput(
            f"the folder holds neither {META} nor .pt files",
            where=str(path),
            mend="give a folder of TensorRT-LLM statistics or of SGLang's dumps",
        )
    return read_dumps(dumps), None, True


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
