"""Reading what `export` is given: a plan of the tuner, or a placement map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from moesim.errors import BadInput
from moesim.files import read_text
from moesim.spec.placement_file import read_placement
from moesim.spec.plan import ExpertPlacement
from moesim.spec.scenario import Scenario, load_scenario, resolve_paths, yaml_fault


def read_plan(path: Path) -> tuple[ExpertPlacement, Scenario | None]:
    """The placement of a plan and its scenario; a map in JSON has no scenario.

    A plan is a YAML mapping with `placement` (the file of the map) and `scenario` (a mapping, or a file), both files
    relative to the plan. Raises BadInput that names the file and the key.
    """
    path = Path(path)
    if path.is_dir():
        raise BadInput("a plan is a file, not a folder", where=str(path), mend="give its plan.yaml")
    if path.suffix == ".json":
        return read_placement(path), None
    try:
        data: Any = yaml.safe_load(read_text(path, what="plan"))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise BadInput(f"not valid YAML: {yaml_fault(error)}", where=str(path), mend="correct the YAML") from None
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
