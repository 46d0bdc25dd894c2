"""Cluster presets by name, and cluster files of one's own with the same keys."""

from __future__ import annotations

import difflib
import functools
from importlib import resources
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.spec.cluster import ClusterSpec
from moesim.spec.cluster_units import check_units
from moesim.spec.scenario import ClusterChoice
from moesim.spec.yaml_text import parse_yaml, read_yaml


@functools.cache
def _shelf() -> dict[str, ClusterSpec]:
    folder = resources.files("moesim.spec") / "clusters"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".yaml"):
            data = parse_yaml(entry.read_text(encoding="utf-8"))
            found[entry.name.removesuffix(".yaml")] = ClusterSpec.read(data, where=entry.name)
    return found


def presets() -> list[str]:
    """Names of the cluster presets, in order of name."""
    return sorted(_shelf())


def near_preset(name: str, likeness: float = 0.5) -> str:
    """The preset that a name may have meant: one that begins with it, else one so much like it; empty where none is."""
    low = name.strip().lower()
    starts = [preset for preset in presets() if preset == low or preset.startswith(f"{low}_")]
    return next(iter(starts or difflib.get_close_matches(low, presets(), n=1, cutoff=likeness)), "")


def load_cluster(choice: ClusterChoice | Path) -> ClusterSpec:
    """The cluster that a scenario chooses: a preset at the chosen size, or a cluster file.

    Raises BadInput for an unknown preset, for more GPUs in a node than the preset's node carries, and for a file that
    is not a cluster; the message names the file and the key.
    """
    if isinstance(choice, Path):
        return _load_file(choice)
    name = choice.system.strip().lower()
    if name not in _shelf():
        near = near_preset(name)
        guess = f"did you mean {near}? " if near else ""
        raise BadInput(
            f"unknown cluster preset {choice.system!r}",
            where="cluster.system",
            mend=f"{guess}use one of {', '.join(presets())}, or give a path to a cluster file",
        )
    preset = _shelf()[name]
    update: dict[str, Any] = {"nodes": choice.nodes}
    if choice.gpus_per_node is not None:
        if choice.gpus_per_node > preset.gpus_per_node:
            raise BadInput(
                f"a node of {name} carries {preset.gpus_per_node} GPUs, not {choice.gpus_per_node}",
                where="cluster.gpus_per_node",
                mend=f"use at most {preset.gpus_per_node} and more nodes, or give a cluster file",
            )
        update["gpus_per_node"] = choice.gpus_per_node
    found = preset.model_copy(update={**update, "background": choice.background})
    try:
        found.check_background()
    except ValueError as error:
        raise BadInput(str(error), where="cluster.background", mend=f"count GPUs from 0 to {found.gpus - 1}") from None
    return found


def _load_file(path: Path) -> ClusterSpec:
    data = read_yaml(path, what="cluster file")
    if not isinstance(data, dict):
        raise BadInput("a cluster file is a mapping of keys", where=str(path), mend=f"known keys: {', '.join(_keys())}")
    cluster = ClusterSpec.read(data, where=path)
    if "bf16" not in cluster.gpu.flops_per_s:
        raise BadInput("the bf16 peak is missing", where=f"{path}: gpu.flops_per_s", mend="add bf16: <FLOP/s>")
    check_units(cluster, where=path)
    return cluster


def _keys() -> list[str]:
    return list(ClusterSpec.model_fields)
