"""Pydantic's report on a spec as one line: the key as the file has it, what is wrong with it, what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from moesim.errors import BadInput

Loc = tuple[int | str, ...]

# What pydantic calls an input of another shape -> what a person reads.
MAPPINGS = ("model_type", "dict_type")
LISTS = ("tuple_type", "list_type")
THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+(\.\d+)?")


def bad_input(error: ValidationError, data: Any, *, where: str, model: type[BaseModel]) -> BadInput:
    """The first fault of `data`: an unknown key before anything else, as a missing one is often that one, mistyped."""
    reported = [fault for fault in error.errors(include_url=False) if not _of_path(fault)]
    faults = reported or list(error.errors(include_url=False))
    if any(fault["type"] == "missing" and fault["loc"] == ("model",) for fault in faults) and _is_plan(data):
        return BadInput(
            "this is a plan of `moesim tune`, not a scenario", where=where, mend="its scenario stands under `scenario:`"
        )
    first = min(faults, key=lambda fault: fault["type"] != "extra_forbidden" and not _of_key(fault))
    loc = _in_file(first["loc"], data)
    key = ".".join(map(str, loc))
    place = f"{where}: {key}" if key else where
    if first["type"] == "extra_forbidden":
        names = known_keys(model, loc[:-1])
        near = _near(str(first["loc"][-1]), names, _at(data, loc[:-1]))
        lacking = [_in_file(fault["loc"], data) for fault in faults if fault["type"] == "missing"]
        guess = f"did you mean {near}? " if near else ""
        mend = f"{guess}known keys here: {', '.join(names)}" if names else "remove it"
        return BadInput(f"unknown key{_more(faults, lacking.count((*loc[:-1], near)))}", where=place, mend=mend)
    more = _more(faults)
    if first["type"] == "missing":
        return BadInput(f"this key is missing{more}", where=place, mend="add it")
    if _of_key(first):
        ends = -1 if first["type"] == "invalid_key" else -2
        return _no_name(first["input"], _in_file((*first["loc"][:ends], "[key]"), data), data, where, more)
    message, mend = _told(first, model, loc)
    given = repr(first.get("input"))
    if len(given) > 60:
        given = given[:57] + "..."
    return BadInput(f"{message}, got {given}{more}", where=place, mend=mend)


def known_keys(model: type[BaseModel], loc: Loc) -> list[str]:
    """Field names of the spec that the path `loc` leads to, as far as it can be followed."""
    spec = _spec_in(_annotation(model, loc)) if loc else model
    return list(spec.model_fields) if spec is not None else []


def _more(faults: Sequence[Any], besides: int = 0) -> str:
    others = len(faults) - 1 - besides
    return f" (and {others} more)" if others > 0 else ""


def _is_plan(data: Any) -> bool:
    return isinstance(data, dict) and data.get("format") == "moesim-plan"


def _of_path(fault: Any) -> bool:
    """Whether it says only that what was given is no path, where a path was one of the choices."""
    return bool(fault["type"] == "path_type" and str(fault["loc"][-1]).startswith("lax-or-strict"))


_NOTHING = object()


def _in_file(loc: Loc, data: Any) -> Loc:
    """A place as the file has it: without the names of classes and choices that pydantic adds on the way."""
    found: list[int | str] = []
    for index, part in enumerate(loc):
        inside = _at(data, (part,))
        # the last part may be a key that the mapping lacks
        if inside is _NOTHING and (index < len(loc) - 1 or part == "[key]" or not isinstance(data, Mapping)):
            continue
        data = inside
        found.append(part)
    return tuple(found)


def _at(data: Any, loc: tuple[Any, ...]) -> Any:
    """What stands there; _NOTHING where nothing does."""
    for part in loc:
        if (isinstance(data, Mapping) and part in data) or (
            isinstance(data, list | tuple) and isinstance(part, int) and 0 <= part < len(data)
        ):
            data = data[part]
        else:
            return _NOTHING
    return data


def _near(key: str, names: list[str], given: Any) -> str:
    """A known key like this one that is not given yet; empty where nothing is near."""
    free = [name for name in names if not isinstance(given, Mapping) or name not in given]
    return next(iter(difflib.get_close_matches(key, free, n=1, cutoff=0.6)), "")


def _of_key(fault: Any) -> bool:
    """Whether it says that a key is no string."""
    return fault["type"] == "invalid_key" or (fault["loc"][-1:] == ("[key]",) and not isinstance(fault["input"], str))


def _no_name(key: Any, parents: Loc, data: Any, where: str, more: str) -> BadInput:
    """A key that is no string: most often the rest of a number with a comma, as {requests: 1,000} reads in YAML."""
    mapping = _at(data, parents)
    place = f"{where}: {'.'.join(map(str, parents))}" if parents else where
    names = list(mapping) if isinstance(mapping, Mapping) else []
    before = names[names.index(key) - 1] if key in names[1:] else None
    if isinstance(key, int) and isinstance(before, str) and _at(mapping, (key,)) is None:
        mend = f"write numbers without commas ({before}: 1000, not 1,000)"
    else:
        mend = "keys are names: correct it"
    return BadInput(f"the key {key!r} is no name{more}", where=place, mend=mend)


def _told(fault: Any, model: type[BaseModel], loc: Loc) -> tuple[str, str]:
    """What is wrong, and what would be right."""
    given = fault.get("input")
    if fault["type"] in MAPPINGS:
        spec = _spec_in(_annotation(model, loc))
        return "this takes a mapping of keys", "correct this value" if spec is None else _mapping(spec, given)
    if fault["type"] in LISTS:
        return "this takes a list", "write [...], or one entry a line after a dash"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if isinstance(given, str) and THOUSANDS.fullmatch(given.strip()):
        return message, f"write it without commas: {given.replace(',', '').strip()}"
    return message, "correct this value"


def _mapping(spec: type[BaseModel], given: Any) -> str:
    """How a spec is written: with what was given under the key that takes it, where one does."""
    for name, field in spec.model_fields.items():
        if isinstance(given, str) and given in _words(field.annotation):
            return f"write {{{name}: {given}}}"
    return f"give some of its keys: {', '.join(spec.model_fields)}"


def _words(annotation: Any) -> list[Any]:
    """The words that a field takes."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _words(part)]


def _annotation(model: type[BaseModel], loc: Loc) -> Any:
    """The type that stands where `loc` leads to; None where it cannot be followed."""
    spec: type[BaseModel] | None = model
    found: Any = model
    for part in loc:
        field = spec.model_fields.get(str(part)) if spec is not None else None
        if field is not None:
            found = field.annotation
        elif _spec_in(found) is None:  # else an index of a list, or a key of a table
            return None
        spec = _spec_in(found)
    return found


def _spec_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _spec_in(argument)
        if found is not None:
            return found
    return None
