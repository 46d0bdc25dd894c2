"""Host overheads of a serving engine: given in a scenario, or calibrated and kept in a file with their provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from moesim.errors import BadInput
from moesim.files import read_text
from moesim.spec.base import Spec
from moesim.spec.yaml_text import FAULTS, parse_yaml, yaml_fault

FORMAT = "moesim-overheads"
# Far above any file that `moesim validate calibrate` writes.
MOST_CHARACTERS = 1_000_000
# No host time of a serving engine comes near; a larger figure is in another unit.
MOST_S = 60.0
NAMES = ("request_s", "step_s", "layer_s")
TagName = Literal["measured", "interpolated", "extrapolated", "formula", "assumed"]


class OverheadsSpec(Spec):
    """Host times in seconds that stand in for the engine's rules; what is left out stays as the rules have it."""

    request_s: float | None = Field(
        default=None, ge=0, le=MOST_S, description="front end's time with a request before its prompt is queued"
    )
    step_s: float | None = Field(default=None, ge=0, le=MOST_S, description="between steps, hidden by nothing")
    layer_s: float | None = Field(
        default=None, ge=0, le=MOST_S, description="of each layer of a step that runs without a captured graph"
    )


class HostTimeSpec(Spec):
    """One host time in seconds: the value, the interval around it where it was fitted, and where it comes from."""

    value: float = Field(ge=0, le=MOST_S)
    low: float | None = Field(default=None, ge=0, le=MOST_S)
    high: float | None = Field(default=None, ge=0, le=MOST_S)
    tag: TagName

    @model_validator(mode="after")
    def _ordered(self) -> HostTimeSpec:
        if (self.low is None) != (self.high is None):
            raise ValueError("give both ends of the interval or none")
        if self.low is not None and self.high is not None and not self.low <= self.value <= self.high:
            raise ValueError("the value lies outside its own interval")
        return self


class EngineTold(Spec):
    """The engine that host times were calibrated for."""

    name: str
    version: str


class CalibrationSpec(Spec):
    """What `moesim validate calibrate` writes: host times with what they were fitted to and how they did held out."""

    format: Literal["moesim-overheads"]
    schema_version: Literal[1] = 1
    written: str
    engine: EngineTold
    model: str
    system: str
    level: float = Field(gt=0, lt=1, description="of the intervals")
    overheads: dict[Literal["request_s", "step_s", "layer_s"], HostTimeSpec] = Field(min_length=1)
    sources: tuple[dict[str, Any], ...] = Field(min_length=1, description="the files, each with its hash")
    moesim: str = ""
    scenario: dict[str, Any] = Field(default_factory=dict)
    not_fitted: dict[str, Any] = Field(default_factory=dict)
    held_out: dict[str, Any] = Field(default_factory=dict)
    verdict: dict[str, Any] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_calibration(path: Path) -> CalibrationSpec:
    """Read a file of calibrated overheads. Raises BadInput (the file, the key and the mend)."""
    text = read_text(path, what="file of overheads")
    if len(text) > MOST_CHARACTERS or "&" in text or "*" in text:
        raise BadInput(
            "not a file of overheads (too long, or with YAML anchors)", where=str(path),
            mend="give what `moesim validate calibrate --out` wrote",
        )  # fmt: skip
    try:
        data = parse_yaml(text)
    except FAULTS as error:
        raise BadInput(f"not valid YAML: {yaml_fault(error)}", where=str(path), mend="calibrate again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BadInput(
            f"not a file of overheads (no `format: {FORMAT}`)", where=str(path),
            mend="give what `moesim validate calibrate --out` wrote",
        )  # fmt: skip
    return CalibrationSpec.read(data, where=path)
