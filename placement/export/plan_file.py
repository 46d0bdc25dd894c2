"""Reading what `export` is given: a plan of the tuner, or a placement map of moesim or of an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesim.engine.role_specs import ROLES
from moesim.errors import BadInput
from moesim.files import kind_of, read_text
from moesim.spec.hf import load_model
from moesim.spec.maps import trtllm
from moesim.spec.maps.frame import MapFrame
from moesim.spec.placement_file import YAML_SUFFIXES, read_placement
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario, load_scenario, resolve_paths
from moesim.spec.yaml_text import read_yaml


def read_plan(
    path: Path, *, model: str | None = None, ranks: int | None = None, nodes: int | None = None
) -> tuple[ExpertPlacement, Scenario | None]:
    """The placement of a plan and its scenario; a map has no scenario.

    A plan is a YAML mapping with `placement` (the file of the map) and `scenario` (a mapping, or a file), both files
    relative to the plan. model, ranks: what an engine's map leaves out; moesim's own map must agree with them. They and
    nodes are for maps alone. Raises BadInput that names the file and the key.
    """
    path = Path(path)
    if kind_of(path) == "folder":
        raise BadInput("a plan is a file, not a folder", where=str(path), mend="give its plan.yaml")
    if path.suffix == ".json" or _is_map(path):
        return _read_map(path, model, ranks), None
    if any(given is not None for given in (model, ranks, nodes)):
        raise BadInput(
            "a plan names its model, its ranks and its nodes itself",
            where=str(path),
            mend="leave out --model, --gpus and --nodes",
        )
    data = _load(path)
    if isinstance(data, dict) and isinstance(data.get("roles"), dict):
        inside = " and ".join(str(one) for one in data["roles"].values())
        raise BadInput("this plan has roles, each with a plan of its own", where=str(path), mend=f"export {inside}")
    if not isinstance(data, dict) or not isinstance(data.get("placement"), str):
        raise BadInput(
            "no `placement: FILE` here", where=str(path), mend="give the plan.yaml of `moesim tune` or a placement map"
        )
    scenario = data.get("scenario")
    if isinstance(scenario, str):
        found: Scenario | None = load_scenario(path.parent / scenario)
    elif scenario is None:
        found = None
    else:
        found = resolve_paths(Scenario.read(scenario, where=f"{path}: scenario"), path.parent)
    return read_placement(path.parent / data["placement"]), found


def role_of(path: Path) -> str:
    """The role whose plan this is, `prefill` or `decode`; empty for a plan without roles, and for a map."""
    if Path(path).suffix not in YAML_SUFFIXES:
        return ""
    data = _load(Path(path))
    role = data.get("role") if isinstance(data, dict) else None
    return role if role in ROLES else ""


def _load(path: Path) -> Any:
    return read_yaml(path, what="plan")


def _is_map(path: Path) -> bool:
    """Whether a file that is not named .json is a map: a JSON mapping, or with TensorRT-LLM's keys at its top level."""
    text = read_text(path, what="plan")
    if path.suffix not in YAML_SUFFIXES and text.lstrip().startswith("{"):
        return True
    return any(line.split(":")[0].strip() in trtllm.KEYS for line in text.splitlines() if line[:1] not in (" ", "#"))


def _read_map(path: Path, model: str | None, ranks: int | None) -> ExpertPlacement:
    frame = None if model is None else MapFrame.of(load_model(model), ranks)
    found = read_placement(path, frame)
    if ranks is not None and found.ranks != ranks:
        raise BadInput(f"the map is for {found.ranks} ranks, not {ranks}", where=str(path), mend="leave out --gpus")
    if frame is not None and (found.experts, tuple(found.layer_ids.tolist())) != (frame.experts, frame.layer_ids):
        raise BadInput(
            f"the map covers {found.layers} layers of {found.experts} experts, {model} has {len(frame.layer_ids)} of "
            f"{frame.experts}",
            where=str(path),
            mend="give the map's own model",
        )
    return found
