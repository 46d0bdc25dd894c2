"""The folder of validations on record: adding what a command recorded, in the compact form, and reading them all."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.files import write_json
from moesim.spec.evidence import TRAITS
from profiles.bundle import read_records as in_bundle
from validate.records.form import FORMAT, SCHEMA_VERSION, ValidationRecord, compact_of

# What ships: the records that this project's own accuracy page is built from.
FOLDER = Path(__file__).parents[1] / "data" / "records"
# `kind` of a command's record -> the module whose `compact(record)` gives the fields of the compact form: that of every
# command's folder which has one.
KINDS = {
    f"validate-{path.parent.name}": f"validate.{path.parent.name}.compact"
    for path in sorted(Path(__file__).parents[1].glob("*/compact.py"))
}


def compact(record: dict[str, Any]) -> ValidationRecord:
    """The compact form of what a `validate` command recorded. Raises BadInput where it is no such record."""
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise BadInput(
            f"a record of {kind!r}", where="record", mend=f"give one of {', '.join(KINDS)}".replace("-", " ")
        )
    make: Callable[[dict[str, Any]], dict[str, Any]] = importlib.import_module(KINDS[kind]).compact
    return compact_of(kind.replace("-", " "), make, record)


def read(path: Path) -> ValidationRecord:
    """A compact record. Raises BadInput, also where the predictions are not older than the measurements."""
    return checked(_json(path), path)


def checked(content: Any, where: Path) -> ValidationRecord:
    """A compact record of what a file holds. Raises BadInput."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(
            f"no record of the format {FORMAT}", where=str(where), mend="add it with `validate records --add`"
        )
    found = ValidationRecord.read(content, where=where)
    if not 1 <= found.schema_version <= SCHEMA_VERSION:
        raise BadInput(
            f"schema version {found.schema_version} is not {SCHEMA_VERSION}", where=str(where), mend="update moesim"
        )
    if found.written is not None and found.measured_from is not None and found.written >= found.measured_from:
        raise BadInput(
            f"predictions of {found.written} are not older than measurements from {found.measured_from}",
            where=str(where),
            mend="only predictions that came first count",
        )
    return found


def read_all(folder: Path = FOLDER) -> list[ValidationRecord]:
    """All records of a folder, the oldest first. Raises BadInput."""
    return sorted((read(path) for path in sorted(folder.glob("*.json"))), key=lambda one: (one.date, one.what))


def read_any(path: Path) -> list[tuple[str, ValidationRecord]]:
    """Names and records of a folder of records, of one record, compact or as its command wrote it, or of a bundle.

    Raises BadInput, also where there is none.
    """
    if path.is_dir():
        found = [(one.name, read(one)) for one in sorted(path.glob("*.json"))]
        if not found:
            raise BadInput(
                "no record in this folder", where=str(path), mend="`moesim validate records --add` puts some"
            )
        return found
    if path.suffix == ".zip":
        return [(path.name, _made(content, path)) for content in _contents(path)]
    content = _json(path)
    if isinstance(content, dict) and "kind" in content and "format" not in content:
        return [(path.name, _made(content, path))]
    return [(path.name, checked(content, path))]


def _json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read the record ({error.strerror})", where=str(path), mend="check the path") from None
    except (ValueError, RecursionError):
        raise BadInput("not JSON", where=str(path), mend="fetch the record again") from None


@dataclass(frozen=True)
class Added:
    """A record that was put into the folder."""

    path: Path
    record: ValidationRecord


def add(paths: Iterable[Path], folder: Path = FOLDER, *, cluster: str = "") -> list[Added]:
    """Put what `validate` commands recorded (record.json, or a bundle with one) into the folder, in the compact form.

    cluster: what the scenarios call the cluster that it ran on, "" for not told. Raises BadInput.
    """
    made = [_on(_made(content, path), cluster) for path in paths for content in _contents(path)]
    return [_put(one, folder) for one in made]


def _made(content: dict[str, Any], where: Path) -> ValidationRecord:
    """The compact form of a command's record, checked. Raises BadInput."""
    return checked(compact(content).model_dump(mode="json"), where)


def _on(record: ValidationRecord, cluster: str) -> ValidationRecord:
    if not cluster:
        return record
    covers = [
        one.model_copy(update={"traits": {**one.traits, "cluster": cluster}}) if "cluster" in TRAITS[one.claim] else one
        for one in record.covers
    ]
    return record.model_copy(update={"covers": tuple(covers)})


def _contents(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".zip":
        found = [content for name, content in in_bundle(path).items() if name.endswith("record.json")]
        if not found:
            raise BadInput(
                "the bundle holds no validation", where=str(path), mend="make it by validate hardware --bundle"
            )
        return found
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read the record ({error.strerror})", where=str(path), mend="check the path") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise BadInput("not a JSON object", where=str(path), mend="give a record.json or a bundle")
    return [content]


def _put(record: ValidationRecord, folder: Path) -> Added:
    slug = re.sub(r"[^a-z0-9]+", "-", f"{record.command} {' '.join(record.what.split(',')[:2])}".lower()).strip("-")[
        :80
    ]
    stamp = record.date[:19].replace(":", "").replace("T", "-")
    path = folder / f"{stamp}-{slug}.json"
    write_json(path, record.model_dump(mode="json", exclude_defaults=True), indent=1)
    return Added(path, record)
