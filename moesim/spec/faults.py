"""What goes wrong during a run: the entries of a scenario's `faults`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moesim.errors import BadInput
from moesim.spec.base import Spec

Kind = Literal["slow_gpu", "slow_link", "dead_link", "dead_rank", "jitter"]
# Keys that a kind needs, and those that it may have besides `kind`, `instance`, `from_s` and `to_s`.
_NEEDS = {
    "slow_gpu": ("gpu", "factor"),
    "slow_link": ("gpu", "link", "factor"),
    "dead_link": ("gpu", "link"),
    "dead_rank": ("gpu",),
    "jitter": ("sigma",),
}
_MAY = {"dead_link": ("recovery_s", "reroute"), "dead_rank": ("recovery_s",)}
_OWN = ("gpu", "link", "factor", "sigma", "recovery_s", "reroute")


class FaultSpec(Spec):
    """One fault of one instance, from `from_s` until `to_s` (none: the end) of the simulated time.

    gpu: counted within the instance, TP fastest. factor: times as slow, at least 1. sigma: of the logarithm.
    recovery_s: how long the instance is down where it cannot go on. reroute: a dead NIC's traffic takes the next GPU's.
    """

    kind: Kind
    instance: int = Field(default=0, ge=0)
    from_s: float = Field(default=0.0, ge=0)
    to_s: float | None = Field(default=None, gt=0)
    gpu: int | None = Field(default=None, ge=0)
    link: Literal["nvlink", "nic"] | None = None
    factor: float | None = Field(default=None, ge=1)
    sigma: float | None = Field(default=None, ge=0, le=3)
    recovery_s: float | None = Field(default=None, gt=0)
    reroute: bool | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> FaultSpec:
        needed = _NEEDS[self.kind]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"a {self.kind} fault needs {' and '.join(missing)}")
        odd = [
            name for name in _OWN if getattr(self, name) is not None and name not in (*needed, *_MAY.get(self.kind, ()))
        ]
        if odd:
            raise ValueError(f"a {self.kind} fault has no {' and no '.join(odd)}")
        if self.to_s is not None and self.to_s <= self.from_s:
            raise ValueError("to_s must be later than from_s")
        if self.kind == "dead_link" and bool(self.reroute) == (self.recovery_s is not None):
            raise ValueError("a dead_link either takes reroute: true or recovery_s, how long the instance is down")
        if self.reroute and self.link == "nvlink":
            raise ValueError("only a dead nic can be rerouted; give recovery_s for nvlink")
        if self.recovery_s is not None and self.to_s is not None:
            raise ValueError("give recovery_s or to_s, not both: the instance is back after recovery_s")
        return self

    def active(self, instance: int, now_s: float) -> bool:
        """Whether it is on for an instance at a time."""
        return instance == self.instance and self.from_s <= now_s < (self.to_s if self.to_s is not None else now_s + 1)


def refuse_faults(faults: tuple[FaultSpec, ...], command: str) -> None:
    """Refuse a scenario with faults where a command would leave them aside. Raises BadInput."""
    if faults:
        raise BadInput(
            f"`moesim {command}` compares plans that are whole", where="faults", mend="leave them out, and `simulate`"
        )
