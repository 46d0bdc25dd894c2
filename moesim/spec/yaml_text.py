"""Reading YAML that people write: by safe loaders that refuse a key that stands twice, its faults told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from moesim.errors import BadInput
from moesim.files import read_text

# What reading a document can raise: PyYAML's own errors, values that cannot be made, nesting without end.
FAULTS = (yaml.YAMLError, ValueError, TypeError, RecursionError)


class Distinct:
    """For a safe loader, before it: a key that stands twice in a mapping is an error; what `<<` brings may be set anew.

    PyYAML calls `flatten_mapping` on every mapping before it makes it, and that adds the merged keys to it.
    """

    def flatten_mapping(self, node: Any) -> None:
        """Refuse a second key like an earlier one. Raises yaml.constructor.ConstructorError at its line."""
        seen: set[int] = self.__dict__.setdefault("_seen", set())
        if id(node) not in seen:
            seen.add(id(node))
            self._refuse_twice(node)
        super().flatten_mapping(node)  # type: ignore[misc]

    def _refuse_twice(self, node: Any) -> None:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            special = key.tag.rpartition(":")[2] in ("merge", "value")
            read = key.value if special else self.construct_object(key)  # type: ignore[attr-defined]
            if read in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {str(key.value)[:60]} stands twice", key.start_mark
                )
            keys.add(read)


class _Loader(Distinct, yaml.SafeLoader):
    pass


def parse_yaml(text: str) -> Any:
    """The one document of a text. Raises one of `FAULTS`, also for a key that stands twice."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path, *, what: str, mend: str = "correct the YAML") -> Any:
    """The content of a YAML file; `what` names its role. Raises BadInput with the file, the fault and its line."""
    text = read_text(path, what=what)
    try:
        return parse_yaml(text)
    except FAULTS as error:
        raise BadInput(f"not valid YAML: {yaml_fault(error)}", where=str(path), mend=mend) from None


def yaml_fault(error: Exception) -> str:
    """The problem and its line, without the excerpt that YAML's own message carries."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error) or type(error).__name__
    problem = " ".join(str(problem).split())[:120]
    return f"{problem} (line {mark.line + 1})" if mark is not None else problem
