"""Another gate than the model's own, with its parameters: the mapping form of `policies.gate`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from moesim.spec.base import Spec


class GateSpec(Spec):
    """A gate by name (moesim/routing/gates/registry.py); what is left out comes from the model's own gate."""

    name: str
    top_k: int | None = Field(default=None, gt=0, description="experts of a token; none = the model's")
    groups: int | None = Field(default=None, gt=0, description="group_limited, device_limited, two_level")
    top_groups: int | None = Field(default=None, gt=0, description="groups that a token may use")
    scoring: Literal["softmax", "sigmoid"] | None = Field(default=None, description="none = the model's")
    normalise: bool | None = Field(default=None, description="a token's weights sum to 1")
    noise: float | None = Field(default=None, gt=0, le=100, description="noisy_topk: sd of the noise on a logit")
    temperature: float | None = Field(default=None, gt=0, le=100, description="gumbel_topk")
    threshold: float | None = Field(default=None, gt=0, le=1, description="top_p: softmax that the experts add up to")
    max_k: int | None = Field(default=None, gt=0, description="top_p: most experts of a token")
    locality: float | None = Field(default=None, ge=0, le=100, description="topology: logit of the own node's experts")
    block: int | None = Field(default=None, gt=0, le=8192, description="base: tokens assigned together")

    def given(self) -> dict[str, object]:
        """The parameters that were given, by name."""
        return {name: value for name, value in self.model_dump().items() if name != "name" and value is not None}


# A name alone, or a mapping with parameters; told apart by type, so that an error speaks of the one that was meant.
GateChosen = Annotated[
    Annotated[str, Tag("name")] | Annotated[GateSpec, Tag("parameters")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "parameters"),
]
