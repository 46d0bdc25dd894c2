"""The base of every spec: frozen, closed to unknown keys, its errors told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moesim.errors import BadInput


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
            raise bad_input(error, where=str(where), model=cls) from None


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


def bad_input(error: ValidationError, *, where: str, model: type[BaseModel]) -> BadInput:
    """Turn pydantic's report into one line: file, key, what is wrong, what would be right."""
    faults = error.errors(include_url=False)
    first = faults[0]
    key = ".".join(str(part) for part in first["loc"])
    place = f"{where}: {key}" if key else where
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if first["type"] == "extra_forbidden":
        names = known_keys(model, first["loc"][:-1])
        mend = f"known keys here: {', '.join(names)}" if names else "remove it"
        return BadInput(f"unknown key{more}", where=place, mend=mend)
    if first["type"] == "missing" and first["loc"][:1] == ("model",) and _is_plan(first.get("input")):
        return BadInput(
            "this is a plan of `moesim tune`, not a scenario", where=where, mend="its scenario stands under `scenario:`"
        )
    if first["type"] == "missing":
        return BadInput(f"this key is missing{more}", where=place, mend="add it")
    message = str(first["msg"]).removeprefix("Value error, ")
    given = repr(first.get("input"))
    if len(given) > 60:
        given = given[:57] + "..."
    return BadInput(f"{message}, got {given}{more}", where=place, mend="correct this value")


def _is_plan(data: Any) -> bool:
    return isinstance(data, dict) and data.get("format") == "moesim-plan"


def known_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the spec that the path `loc` leads to, as far as it can be followed."""
    current: type[BaseModel] | None = model
    for part in loc:
        if current is None:
            return []
        field = current.model_fields.get(str(part))
        if field is None:
            continue  # a union's branch name or a list index
        current = _spec_in(field.annotation)
    return list(current.model_fields) if current is not None else []


def _spec_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _spec_in(argument)
        if found is not None:
            return found
    return None
