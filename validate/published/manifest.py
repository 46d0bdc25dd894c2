"""The published rows: which scenario describes each, what was reported, by whom, and what had to be assumed."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from moesim.errors import BadInput
from moesim.spec.base import Spec
from moesim.spec.yaml_text import read_yaml
from validate.published.step import StepSpec

MANIFEST = "manifest.yaml"
# What a row reports -> its unit for people, and its size in the model's own unit: tokens/s, FLOP/s and seconds of one
# GPU. A node of the sources has 8 GPUs.
UNITS: dict[str, tuple[str, float]] = {
    "tflops_per_s_per_gpu": ("TFLOP/s/GPU", 1.0),
    "tokens_per_s_per_gpu": ("tokens/s/GPU", 1.0),
    "tokens_per_s_per_node": ("tokens/s/node", 8.0),
    "dispatch_us": ("us", 1e6),
}
Metric = Literal["tflops_per_s_per_gpu", "tokens_per_s_per_gpu", "tokens_per_s_per_node", "dispatch_us"]
RatioKind = Literal["dispatcher", "micro_batch", "overlap", "router", "deployment"]


class PublishedRow(Spec):
    """One published figure.

    file: its scenario, beside the manifest; refused: why there is none. step: of a serving row. step_s: the step time
    that was reported beside a training rate. counts: tokens that the source counts for each one that is computed.
    calibrated: the row gave a figure to the scenarios. scatter: relative size of what the source's repeats differ by.
    """

    id: str = Field(min_length=1)
    what: str
    source: str
    gpu: str
    gpus: int | None = Field(default=None, gt=0)
    metric: Metric
    reported: float = Field(gt=0)
    step_s: float | None = Field(default=None, gt=0)
    file: Path | None = None
    refused: str = ""
    step: StepSpec | None = None
    counts: float = Field(default=1.0, gt=0)
    assumed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    calibrated: bool = False
    scatter: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _one(self) -> PublishedRow:
        if (self.file is None) == (not self.refused):
            raise ValueError("give exactly one of file and refused")
        if self.file is not None and (self.step is None) == self.metric.startswith(("tokens", "dispatch")):
            raise ValueError("a serving row needs step, a training row has none")
        return self

    @property
    def unit(self) -> str:
        """Of `reported`, as people write it."""
        return UNITS[self.metric][0]


class PublishedRatio(Spec):
    """Two rows set against each other: the figure of `over` by that of `under`; why: of a sign that comes out wrong."""

    over: str
    under: str
    kind: RatioKind
    what: str
    why: str = ""


class Manifest(Spec):
    """All rows and the ratios that are formed of them."""

    schema_version: Literal[1] = 1
    rows: tuple[PublishedRow, ...] = Field(min_length=1)
    ratios: tuple[PublishedRatio, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        by_id = {row.id: row for row in self.rows}
        if len(by_id) < len(self.rows):
            raise ValueError("two rows have the same id")
        for ratio in self.ratios:
            for name in (ratio.over, ratio.under):
                if name not in by_id:
                    raise ValueError(f"a ratio names row {name!r}, which is not there")
            if UNITS_OF[by_id[ratio.over].metric] != UNITS_OF[by_id[ratio.under].metric]:
                raise ValueError(f"rows {ratio.over} and {ratio.under} report different things")
        return self


UNITS_OF = {name: name.removesuffix("_per_gpu").removesuffix("_per_node") for name in UNITS}


@functools.cache
def bundled_manifest() -> Path:
    """The manifest that ships, with its scenarios beside it."""
    return Path(str(resources.files("validate") / "published" / MANIFEST))


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; scenario files are taken from its folder. Raises BadInput with the file and the key."""
    data = read_yaml(path, what="manifest")
    if not isinstance(data, dict):
        raise BadInput("a manifest is a mapping of keys", where=str(path), mend="start with `rows:`")
    found = Manifest.read(data, where=path)
    rows = tuple(
        row if row.file is None else row.model_copy(update={"file": path.parent / row.file}) for row in found.rows
    )
    return found.model_copy(update={"rows": rows})


def chosen(manifest: Manifest, only: tuple[str, ...]) -> Manifest:
    """The manifest with the rows named `only` (all without) and the ratios among them. Raises BadInput."""
    if not only:
        return manifest
    known = [row.id for row in manifest.rows]
    for name in only:
        if name not in known:
            raise BadInput(f"no row {name!r}", where="--row", mend=f"use some of {', '.join(known)}")
    return manifest.model_copy(
        update={
            "rows": tuple(row for row in manifest.rows if row.id in only),
            "ratios": tuple(one for one in manifest.ratios if one.over in only and one.under in only),
        }
    )
