"""The base of every spec: frozen, closed to unknown keys, its errors told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moesim.errors import BadInput
from moesim.spec.faults_told import bad_input


class Spec(BaseModel):
    """A frozen value made once at the edge; change it with `model_copy(update=...)`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def read(cls, data: Any, *, where: str | Path) -> Self:
        """Validate `data`; the first fault becomes one BadInput that names the place."""
        refuse_huge(data, str(where))
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise bad_input(error, data, where=str(where), model=cls) from None


# What a float holds exactly; no count, size or rate of a deployment comes near it.
MAX_INTEGER = 2**53


def refuse_huge(data: Any, where: str) -> None:
    """Whole numbers beyond any that computing with them bears. Raises BadInput that names the key."""
    found = _huge(data)
    if found is not None:
        key = ".".join(map(str, found))
        raise BadInput(
            "this whole number is too large", where=f"{where}: {key}" if key else where, mend=f"at most {MAX_INTEGER}"
        )


def _huge(data: Any) -> tuple[Any, ...] | None:
    """Where in nested mappings and lists such a number stands."""
    if isinstance(data, int):
        return () if abs(data) > MAX_INTEGER else None
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        found = _huge(value)
        if found is not None:
            return (key, *found)
    return None
