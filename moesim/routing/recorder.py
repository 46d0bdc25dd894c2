"""The files of SGLang's expert distribution recorder (`--expert-distribution-recorder-mode`), as logical counts.

From sgl-project/sglang, python/sglang/srt/eplb/expert_distribution.py. `stat` and `stat_approx` write one file, already
logical and summed over ranks: `logical_count` [steps, layers, experts], rows of the ring buffer that nothing was
written to all zero. `per_pass` and `per_token` write a file for each rank: `records`, one for each forward pass and
gatherer, with `global_physical_count` [layers, slots] (per_token's from the first releases only `topk_ids_of_layer`
[layers, tokens, top-k], the slots that each token went to, -1 for none), and `last_physical_to_logical_map`, which
brings slots back to experts. The map may change while it records, and only the last one is written: where the ranks'
files show that it did, the counts of the passes before cannot be told, and the dump is refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput, MissingPart
from moesim.routing.tensors import MAX_AXIS, MAX_FILE_BYTES, check_cells, tensor_to_numpy

Floats = NDArray[np.float64]
MEND = "give a file that SGLang's expert distribution recorder wrote"
COUNTS, PICKS, MAP = "global_physical_count", "topk_ids_of_layer", "last_physical_to_logical_map"


def load_dump(path: Path) -> Mapping[str, Any]:
    """The content of a `.pt` of plain tensors. Raises BadInput, or MissingPart without torch."""
    try:
        import torch
    except ImportError:
        raise MissingPart("reading a .pt file needs torch", where=str(path), mend="pip install '.[hardware]'") from None
    _check_archive(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the restricted unpickler raises whatever a broken file makes it meet
        raise BadInput(
            f"not a readable .pt file of plain tensors ({type(error).__name__})", where=str(path), mend=MEND
        ) from None
    if not isinstance(data, dict) or not ("logical_count" in data or "records" in data):
        raise BadInput("there is neither logical_count nor records", where=str(path), mend=MEND)
    return data


def _check_archive(path: Path) -> None:
    """Whether the file is a zip as `torch.save` writes it, whose members are stored, not compressed: no zip bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
        raise BadInput("not a readable .pt file (torch.save writes a zip)", where=str(path), mend=MEND) from None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise BadInput("its members are compressed, which torch.save never does", where=str(path), mend=MEND)
    if sum(member.file_size for member in members) > MAX_FILE_BYTES:
        raise BadInput("its members claim more bytes than a dump may have", where=str(path), mend="record less")


@dataclass
class Passes:
    """Logical counts [layers, experts] by forward pass, added up over the ranks' files of one run."""

    counts: dict[int, Floats] = field(default_factory=dict)
    seen: set[tuple[int, int, str]] = field(default_factory=set)
    table: NDArray[np.int64] | None = None

    def add(self, data: Mapping[str, Any], path: Path) -> None:
        """Add one rank's dump. Raises BadInput that names the file and the record."""
        table = _map_of(data, path)
        if self.table is not None and not np.array_equal(table, self.table):
            raise BadInput(
                f"the dumps of one folder differ in {MAP}",
                where=str(path),
                mend="give dumps of one run, during which nothing was rebalanced",
            )
        self.table = table
        records = data["records"]
        if not isinstance(records, list) or not records:
            raise BadInput("records is not a filled list", where=str(path), mend="record a loaded server")
        for index, record in enumerate(records):
            self._add_record(record, table, f"{path}: records[{index}]")

    def _add_record(self, record: Any, table: NDArray[np.int64], where: str) -> None:
        if not isinstance(record, dict) or "forward_pass_id" not in record:
            raise BadInput("a record lacks forward_pass_id", where=where, mend="give the whole dump")
        number, rank, gatherer = record["forward_pass_id"], record.get("rank", 0), record.get("gatherer_key", "primary")
        for key, value in (("forward_pass_id", number), ("rank", rank)):
            if type(value) is not int or value < 0:
                raise BadInput(f"{key} is no number from 0 on", where=where, mend="give the whole dump")
        if not isinstance(gatherer, str):
            raise BadInput("gatherer_key is no text", where=where, mend="give the whole dump")
        # Without ranks in the records, nothing tells whether a pass stands twice.
        if "rank" in record and (number, rank, gatherer) in self.seen:
            raise BadInput(
                f"pass {number} of rank {rank} stands twice", where=where, mend="give dumps of one run, each once"
            )
        self.seen.add((number, rank, gatherer))
        experts = int(table.max()) + 1
        physical = _physical_counts(record, table.shape, where)
        if number not in self.counts:
            check_cells((len(self.counts) + 1, table.shape[0], experts), where=where)
            self.counts[number] = np.zeros((table.shape[0], experts))
        rows = np.repeat(np.arange(table.shape[0]), table.shape[1])
        np.add.at(self.counts[number], (rows, table.ravel()), physical.ravel())

    def stacked(self) -> Floats:
        """Counts [passes, layers, experts] in the order of the passes."""
        return np.stack([self.counts[number] for number in sorted(self.counts)])


def _map_of(data: Mapping[str, Any], path: Path) -> NDArray[np.int64]:
    where = f"{path}: {MAP}"
    if MAP not in data:
        raise BadInput("this key is missing", where=where, mend="give the recorder's whole dump")
    table = tensor_to_numpy(data[MAP], where=where)
    if table.ndim != 2 or table.dtype.kind not in "iu" or table.size == 0 or table.min() < 0 or table.max() >= MAX_AXIS:
        raise BadInput(f"shape {table.shape} is no map of expert ids", where=where, mend="give [layers, slots]")
    return table.astype(np.int64)


def _physical_counts(record: Mapping[str, Any], shape: tuple[int, ...], where: str) -> NDArray[Any]:
    """Tokens of each slot [layers, slots]: as the record counts them, else from the slots that its tokens went to."""
    if COUNTS in record:
        physical = tensor_to_numpy(record[COUNTS], where=f"{where}: {COUNTS}")
        if physical.shape != shape or physical.dtype.kind not in "iuf":
            raise BadInput(f"{COUNTS} has shape {physical.shape}, the map {shape}", where=where, mend="give one dump")
        if not (physical >= 0).all():
            raise BadInput(f"{COUNTS} holds a count below 0", where=where, mend="record the counts again")
        return physical
    if PICKS not in record:
        raise BadInput(f"a record has neither {COUNTS} nor {PICKS}", where=where, mend="give the whole dump")
    picks = tensor_to_numpy(record[PICKS], where=f"{where}: {PICKS}")
    if picks.ndim != 3 or picks.shape[0] != shape[0] or picks.dtype.kind not in "iu":
        raise BadInput(
            f"{PICKS} has shape {picks.shape}", where=where, mend=f"give [{shape[0]} layers, tokens, top-k] of slots"
        )
    if picks.size and (picks.min() < -1 or picks.max() >= shape[1]):
        raise BadInput(
            f"{PICKS} names slot {picks.min() if picks.min() < -1 else picks.max()}",
            where=where,
            mend=f"the map has slots 0 to {shape[1] - 1}, and -1 stands for none",
        )
    flat = (picks.astype(np.int64) + np.arange(shape[0])[:, None, None] * shape[1])[picks >= 0]
    return np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)


def read_dumps(paths: Sequence[Path]) -> Floats:
    """Counts [passes, layers, experts] of the ranks' per_pass or per_token dumps of one run. Raises BadInput."""
    passes = Passes()
    for path in paths:
        data = load_dump(path)
        if "records" not in data:
            raise BadInput(
                "a stat dump is already summed over ranks", where=str(path), mend="give this file alone, not its folder"
            )
        passes.add(data, path)
    return passes.stacked()
