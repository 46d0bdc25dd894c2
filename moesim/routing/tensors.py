"""Tensors as files bring them (safetensors, torch) as NumPy arrays, their sizes checked before they are unpacked."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput

MAX_CELLS = 64_000_000  # 0.5 GB as float64: 4,000 steps of 61 layers x 256 experts
MAX_FILE_BYTES = 2**30
# More layers or experts than this is no model that exists (the largest published have 128 layers and 1,024 experts).
MAX_AXIS = 65_536
# Element types of the safetensors format (huggingface/safetensors, README "Format"), little endian.
DTYPES = {
    "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8",
    "U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
# The format's own limit on its header (same source).
MAX_HEADER_BYTES = 100_000_000


def check_cells(shape: Sequence[int], *, where: str) -> None:
    """Refuse counts of an absurd size. Raises BadInput."""
    cells = math.prod(int(length) for length in shape)
    if cells > MAX_CELLS:
        raise BadInput(
            f"{' x '.join(str(length) for length in shape)} counts are more than {MAX_CELLS:,}",
            where=where,
            mend="aggregate steps first",
        )


def tensor_to_numpy(value: Any, *, where: str) -> NDArray[Any]:
    """A torch tensor (or nested list) of numbers as an array. Raises BadInput."""
    if hasattr(value, "numel") and hasattr(value, "detach"):
        check_cells(tuple(value.shape), where=where)  # strides may make a small storage look huge
        if value.is_floating_point():
            value = value.double()
        try:
            return np.asarray(value.detach().cpu().numpy())
        except (TypeError, RuntimeError, ValueError):
            raise BadInput("the tensor holds no plain numbers", where=where, mend="give counts") from None
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise BadInput("the rows differ in length", where=where, mend="give a full matrix") from None
    if array.dtype.kind not in "iuf":
        raise BadInput("there are no numbers here", where=where, mend="give counts")
    return array


def read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """All tensors of a safetensors file: 8 bytes of header length, a JSON header, raw data. Raises BadInput."""
    mend = "give the file as the engine wrote it"
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise BadInput(f"{size:,} bytes are more than {MAX_FILE_BYTES:,}", where=str(path), mend="record less")
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read it ({error.strerror})", where=str(path), mend=mend) from None
    length = int.from_bytes(content[:8], "little") if len(content) >= 8 else -1
    if not 0 < length <= min(MAX_HEADER_BYTES, len(content) - 8):
        raise BadInput("the safetensors header is cut short", where=str(path), mend=mend)
    try:
        header = json.loads(content[8 : 8 + length], object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        raise BadInput("the safetensors header is not JSON", where=str(path), mend=mend) from None
    if not isinstance(header, dict):
        raise BadInput("the safetensors header is no mapping", where=str(path), mend=mend)
    data = memoryview(content)[8 + length :]
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    found = {name: _tensor(entry, data, f"{path}: {name[:40]}") for name, entry in tensors.items()}
    # The format's own rule: the tensors fill the data, without holes and without sharing a byte.
    spans = sorted(entry["data_offsets"] for entry in tensors.values())
    if any(end != begin for (_, end), (begin, _) in pairwise([[0, 0], *spans, [len(data), len(data)]])):
        raise BadInput("the tensors do not fill the file's data", where=str(path), mend=mend)
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _tensor(entry: Any, data: memoryview, where: str) -> NDArray[Any]:
    fault = BadInput("the header of this tensor is wrong", where=where, mend="give the file as the engine wrote it")
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
        raise fault
    shape, offsets = _naturals(entry.get("shape")), _naturals(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise fault
    check_cells(shape, where=where)
    dtype = np.dtype(DTYPES[entry["dtype"]])
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize or end > len(data):
        raise fault
    return np.frombuffer(data[begin:end], dtype=dtype).reshape(shape)


def _naturals(value: Any) -> list[int] | None:
    """The list, if it is one of natural numbers."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return value
    return None
