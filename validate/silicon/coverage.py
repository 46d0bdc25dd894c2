"""Which deployments the measured serving runs cover, and how far predictions were off there: a committed summary.

Measured figures stay in the package that ships them. The summary holds, of the runs of one model, GPU, engine, expert
type and layout together, what was run and the mean absolute error; of fewer than five runs their number alone, as on
the accuracy page. Verdicts read it (`moesim.records`), so this imports no simulator; nothing that fits reads it.
"""

from __future__ import annotations

import json
from pathlib import Path

from moesim.errors import BadInput, CheckFailed
from moesim.files import read_text, write_json
from moesim.spec.base import Spec
from moesim.spec.evidence import Evidence, device_trait
from moesim.spec.presets import load_cluster
from moesim.spec.scenario import ClusterChoice
from validate.silicon.scenario import SYSTEMS

FOLDER = Path(__file__).parents[1] / "data"
MAKE = "run `moesim validate silicon --update` and commit what it writes"
FILE, FORMAT = "silicon_coverage.json", "moesim-silicon-coverage"


class Group(Spec):
    """Runs of one deployment. tokens in and out and requests in flight from the least to the most.

    half: whether the cell calibrates (`even`) or is blind (`odd`). tpot, ttft: mean absolute error, None of few runs.
    """

    model: str
    system: str
    engine: str
    experts: str
    layout: str
    drafts: int
    half: str
    runs: int
    isl: tuple[int, int]
    osl: tuple[int, int]
    concurrency: tuple[int, int]
    measured: tuple[str, str]
    versions: tuple[str, ...]
    tpot: float | None
    ttft: float | None


class Summary(Spec):
    """All groups, and of which record they are made."""

    format: str
    table_sha256: str
    package_version: str
    groups: tuple[Group, ...]


def write(folder: Path, told: Summary) -> None:
    """Write it beside the record, whole or not at all."""
    write_json(folder / FILE, told.model_dump(mode="json"))


def read(folder: Path = FOLDER) -> Summary:
    """The committed summary. Raises BadInput."""
    path = folder / FILE
    try:
        content = json.loads(read_text(path, what="summary of measured runs"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f"not a {FORMAT}", where=str(path), mend=MAKE)
    return Summary.read(content, where=path)


def check(folder: Path, told: Summary) -> None:
    """Raises CheckFailed where the committed summary is not that of the record."""
    if read(folder) != told:
        raise CheckFailed("the summary of coverage is not the record's", where=str(folder / FILE), mend=MAKE)


def evidence(folder: Path = FOLDER) -> list[Evidence]:
    """What the measured runs show of the whole time of serving: a piece for each group; none without a summary."""
    if not (folder / FILE).is_file():
        return []
    told = read(folder)
    devices = {one.system: _device(one.system) for one in told.groups}
    found = []
    for one in told.groups:
        versions = {"aiconfigurator-core": told.package_version, one.engine: ", ".join(one.versions)}
        kind = "blind" if one.half == "odd" else "calibrating"
        name = f"silicon: {one.model}, {one.system}, {one.engine}, {one.experts}, {one.layout}, drafts {one.drafts}"
        found.append(
            Evidence(
                claim="serving_time", record=f"{name} ({kind} cell)", command="validate silicon",
                date=one.measured[1], versions=versions, cases=one.runs,
                figure="TPOT" if one.half == "odd" else "in-sample TPOT", mean_absolute=one.tpot,
                others={} if one.ttft is None else {"TTFT": one.ttft},
                traits={
                    "gpu": devices[one.system], "model": one.model, "engine": one.engine, "layout": one.layout,
                    "experts_dtype": one.experts, "drafts": one.drafts, "isl": one.isl, "osl": one.osl,
                    "concurrency": one.concurrency,
                },
            )
        )  # fmt: skip
    return found


def _device(system: str) -> str:
    """The GPU of a system as its preset names it; the system's own name where there is no preset."""
    try:
        return device_trait(load_cluster(ClusterChoice(system=SYSTEMS.get(system, system))).gpu.name)
    except BadInput:
        return system
