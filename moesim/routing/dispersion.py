"""How much one step's routing strays from the mean profile, beyond what drawing tokens one by one explains.

A step's tokens come from a few requests, of a few domains, at one time of day; each has tastes of its own. An expert's
share in a step is the mean share times a random factor of mean 1 whose squared coefficient of variation is

    cv2 = request_cv2 / requests in the step + domain_cv2 + time_cv2

With records of single steps `fit_dispersion` estimates the part that does not average out over requests. Aggregates
hold no such information: then DEFAULT applies, and its tag is "assumed".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import BadInput
from moesim.routing.components import Component, fit_components
from moesim.routing.trace import RoutingCounts

# Fewer steps give no usable estimate of a variance (its relative error is about sqrt(2 / steps)).
MIN_STEPS = 8


@dataclass(frozen=True)
class Dispersion:
    """Squared coefficients of variation of an expert's share: of one request, of the domain mix, of the time.

    tag: "measured" (fitted on steps), "assumed" (taken from other models), or "formula" (none, by definition).
    tags: the same of each component where they differ, by "request", "domain", "time". domains_of_requests: each
    request of a step is of a domain of its own, so that domains average out as requests do; else a step is of one.
    """

    request_cv2: float
    domain_cv2: float
    time_cv2: float
    tag: str
    source: str
    tags: Mapping[str, str] = field(default_factory=dict)
    domains_of_requests: bool = False

    def tag_of(self, component: str) -> str:
        """The tag of "request", "domain" or "time"."""
        return self.tags.get(component, self.tag)

    def step_cv2(self, requests: ArrayLike) -> NDArray[np.float64]:
        """cv2 of steps that hold `requests` [...] requests each."""
        held = np.maximum(np.asarray(requests, dtype=np.float64), 1.0)
        if self.domains_of_requests:
            return np.asarray((self.request_cv2 + self.domain_cv2) / held + self.time_cv2)
        return np.asarray(self.request_cv2 / held + self.domain_cv2 + self.time_cv2)


NONE = Dispersion(0.0, 0.0, 0.0, tag="formula", source="tokens drawn independently from the mean profile")


def default_dispersion() -> Dispersion:
    """The default for aggregates: assumed, from the public records named in `params/dispersion.json`.

    request_cv2: an expert's spread between text domains (OLMoE); a request has one domain, so this is a lower bound.
    time_cv2: the spread between neighbouring steps of a training run (SmartMoE), its requests included, so an upper
    bound for that run. domain_cv2 is 0: a scenario's load files are its domains.
    """
    text = resources.files("moesim.routing").joinpath("params/dispersion.json").read_text(encoding="utf-8")
    values = json.loads(text)["default"]
    return Dispersion(
        request_cv2=float(values["request_cv2"]),
        domain_cv2=float(values["domain_cv2"]),
        time_cv2=float(values["time_cv2"]),
        tag="assumed",
        source="moesim/routing/params/dispersion.json",
    )


def excess_cv2(counts: NDArray[np.float64], top_k: int = 1) -> float:
    """Excess squared coefficient of variation of expert shares between steps, of counts [steps, layers, experts].

    By moments, pooled over layers and experts with weight share^2: half the squared difference of neighbouring steps,
    which slow drift does not enter, less what drawing explains (share (1 - top_k share) / picks of the step).
    """
    if len(counts) < MIN_STEPS:
        raise BadInput(
            f"{len(counts)} steps do not show how steps differ", mend=f"record at least {MIN_STEPS} forward passes"
        )
    picks = counts.sum(axis=-1, keepdims=True)
    held = (picks[1:] > 0) & (picks[:-1] > 0)
    share = counts / np.where(picks > 0, picks, 1.0)
    mean = (share[1:] + share[:-1]) / 2.0
    inverse = 0.5 / np.where(picks[1:] > 0, picks[1:], 1.0) + 0.5 / np.where(picks[:-1] > 0, picks[:-1], 1.0)
    drawn = mean * np.maximum(1.0 - top_k * mean, 0.0) * inverse
    excess = np.where(held, (share[1:] - share[:-1]) ** 2 / 2.0 - drawn, 0.0).sum()
    scale = np.where(held, mean**2, 0.0).sum()
    return float(excess / scale) if scale > 0 else 0.0


def fit_dispersion(
    counts: NDArray[np.float64], *, top_k: int = 1, requests_per_step: float | None = None, source: str = "steps"
) -> Dispersion:
    """Fit on counts [steps, layers, experts] of single steps, tag "measured"; a negative estimate is 0.

    With `requests_per_step` the excess is laid to requests, so that it scales to other batches; else to time.
    Raises BadInput with fewer than MIN_STEPS steps.
    """
    excess = max(excess_cv2(counts, top_k), 0.0)
    if requests_per_step is not None:
        return Dispersion(excess * requests_per_step, 0.0, 0.0, tag="measured", source=source)
    return Dispersion(0.0, 0.0, excess, tag="measured", source=source)


def dispersion_of(loads: Sequence[RoutingCounts], *, top_k: int = 1) -> Dispersion:
    """Fitted on what the loads hold, the best first; the mean over loads of a kind.

    Records by request tell components apart (see `fit_components`); single steps tell their sum, laid to time; with
    neither the assumed default applies, as it does to a component that records do not tell.
    """
    told = [load for load in loads if load.records is not None and load.records.request is not None]
    if told:
        return _from_records(told, top_k)
    fitted = [
        fit_dispersion(load.counts, top_k=top_k, source=load.name)
        for load in loads
        if load.per_step and len(load.counts) >= MIN_STEPS
    ]
    if not fitted:
        return default_dispersion()
    return Dispersion(
        0.0,
        0.0,
        float(np.mean([one.time_cv2 for one in fitted])),
        tag="measured",
        source=", ".join(one.source for one in fitted),
    )


def _from_records(loads: Sequence[RoutingCounts], top_k: int) -> Dispersion:
    """Each component as the loads' records tell it, a negative estimate 0; else as by default."""
    default = default_dispersion()
    fitted = [fit_components(load.records, top_k) for load in loads if load.records is not None]
    values, tags = {}, {}
    for name in ("request", "domain", "time"):
        found: list[Component] = [one for parts in fitted if (one := getattr(parts, name)) is not None]
        mean = float(np.mean([one.cv2 for one in found])) if found else float(getattr(default, f"{name}_cv2"))
        values[name], tags[name] = max(mean, 0.0), "measured" if found else "assumed"
    guessed = any(tags[name] == "assumed" and values[name] > 0 for name in values)
    return Dispersion(
        values["request"],
        values["domain"],
        values["time"],
        tag="assumed" if guessed else "measured",
        source=", ".join(load.name for load in loads),
        tags=tags,
        domains_of_requests=True,
    )
