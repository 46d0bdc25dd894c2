"""TensorRT-LLM's expert statistics (`EXPERT_STATISTIC_ITER_RANGE`, `EXPERT_STATISTIC_PATH`), as counts.

From NVIDIA/TensorRT-LLM: `ExpertStatistic` writes `meta_info.json` (num_experts, num_experts_per_token) and for each
rank `rank{rank}.safetensors` with a tensor `{iteration}_{layer}` [experts] of counts; the loader
(examples/wide_ep/ep_load_balancer/utils.py) adds the ranks up, leaves out other files (`rank0_raw.safetensors`,
`cooccurrence_rank0.safetensors`), and requires every layer in every iteration. Layers are absolute.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import BadInput
from moesim.files import read_text
from moesim.routing.tensors import MAX_AXIS, check_cells, read_safetensors

META = "meta_info.json"


def read_statistics(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Counts [iterations, layers, experts] summed over the ranks' files, and the absolute layers. Raises BadInput."""
    experts = _experts(path / META)
    files = [file for file in sorted(path.glob("rank*.safetensors")) if file.stem.removeprefix("rank").isdecimal()]
    if not files:
        raise BadInput("there is no rank*.safetensors", where=str(path), mend="give the whole statistics folder")
    total: dict[tuple[int, int], NDArray[np.float64]] = {}
    for file in files:
        for key, array in read_safetensors(file).items():
            iteration, _, layer = key.partition("_")
            if not (_plain(iteration) and _plain(layer) and len(key) < 32) or int(layer) >= MAX_AXIS:
                raise BadInput(f"tensor {key[:40]!r}", where=str(file), mend="name it {iteration}_{layer}")
            if array.shape != (experts,):
                raise BadInput(
                    f"tensor {key} has shape {array.shape}", where=str(file), mend=f"num_experts is {experts}"
                )
            if not (array >= 0).all():
                raise BadInput(f"tensor {key} holds a count below 0", where=str(file), mend="record the counts again")
            place = (int(iteration), int(layer))
            total[place] = total[place] + array if place in total else array.astype(np.float64)
    if not total:
        raise BadInput("the files hold no tensors", where=str(path), mend="record a loaded server")
    steps = sorted({number for number, _ in total})
    layers = sorted({number for _, number in total})
    check_cells((len(steps), len(layers), experts), where=str(path))
    lacking = next(((step, layer) for step in steps for layer in layers if (step, layer) not in total), None)
    if lacking is not None:
        raise BadInput(
            f"iteration {lacking[0]} lacks layer {lacking[1]}, which others have",
            where=str(path),
            mend="give the statistics of a run that was recorded to its end",
        )
    return np.stack([[total[step, layer] for layer in layers] for step in steps]), np.asarray(layers, dtype=np.int64)


def _plain(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _experts(path: Path) -> int:
    try:
        experts = json.loads(read_text(path, what="statistics"))["num_experts"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise BadInput("there is no num_experts", where=str(path), mend='give {"num_experts": n, ...}') from None
    if not isinstance(experts, int) or isinstance(experts, bool) or not 0 < experts < MAX_AXIS:
        raise BadInput(f"num_experts is {experts!r}"[:80], where=str(path), mend="give a positive integer")
    return experts
