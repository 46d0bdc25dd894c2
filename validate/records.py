"""Validations on record: what was predicted and measured, on what, in dated files of one compact form.

Any `validate` command that predicts before it measures can be kept so: a name, where it ran, its cases and its checks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from moesim.errors import BadInput
from moesim.files import write_json
from moesim.spec.base import Spec
from profiles.bundle import read_records as in_bundle
from validate.pages import GeneratedPart

FORMAT, SCHEMA_VERSION = "moesim-validation", 1
# What ships: the records that this project's own accuracy page is built from.
FOLDER = Path(__file__).parent / "data" / "records"
MAKE = "run `moesim validate records --update` and commit what it writes"
PART = GeneratedPart("moesim validate records --update", MAKE)
MICROSECOND_DIGITS = 7  # decimals of a second that are kept


class MeasuredCase(Spec):
    """One case: predicted and measured median with p10 and p90, in seconds (None: not told)."""

    case: str
    predicted_s: float = Field(gt=0)
    predicted_p10_s: float | None = None
    predicted_p90_s: float | None = None
    measured_s: float = Field(gt=0)
    measured_p10_s: float | None = None
    measured_p90_s: float | None = None


class HeldCheck(Spec):
    """One figure of the comparison, its limit in words, and whether it holds."""

    goal: str
    told: str
    limit: str
    holds: bool


class ValidationRecord(Spec):
    """One validation; written is when the predictions were, before measured_from; sha256 is of their file."""

    format: str
    schema_version: int
    command: str
    date: str
    what: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    repeats: int
    written: str
    measured_from: str
    predictions_sha256: str
    reliability: float | None
    core_share: dict[str, float | None] = Field(default_factory=dict)  # of computing ranks: phase -> share of a core
    cases: tuple[MeasuredCase, ...] = Field(min_length=1)
    checks: tuple[HeldCheck, ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """Signed relative error of each case."""
        return tuple(case.predicted_s / case.measured_s - 1.0 for case in self.cases)


def of_hardware(record: dict[str, Any]) -> ValidationRecord:
    """The compact form of what `validate hardware` records. Raises BadInput where it is no such record."""
    if record.get("kind") != "validate-hardware":
        raise BadInput(f"a record of {record.get('kind')!r}", where="record", mend="give one of `validate hardware`")
    try:
        return _of_hardware(record)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"not a whole record of `validate hardware` ({type(error).__name__}: {str(error)[:80]})",
            where="record",
            mend="run the command again",
        ) from None


def _of_hardware(record: dict[str, Any]) -> ValidationRecord:
    job, shape = record["job"], record["job"]["shape"]
    tokens = ", ".join(str(count) for count in job["tokens"])
    what = (
        f"{job['backend']}, {job['ranks']} ranks, {record['dtype']}, {shape['experts']} experts of {shape['hidden']} x "
        f"{shape['intermediate']}, top-{shape['top_k']}, {job['profile_source']} routing: {len(job['placements'])} "
        f"placements at {tokens} tokens"
    )
    cases = [
        {
            "case": f"{predicted['placement']}, {predicted['tokens_per_rank']} tokens",
            "predicted_s": _short(predicted["layer_s"]),
            "predicted_p10_s": _short(predicted["layer_p10_s"]),
            "predicted_p90_s": _short(predicted["layer_p90_s"]),
            "measured_s": _short(measured["layer_s"]["median_s"]),
            "measured_p10_s": _short(measured["layer_s"]["p10_s"]),
            "measured_p90_s": _short(measured["layer_s"]["p90_s"]),
        }
        for predicted, measured in zip(record["predicted"], record["measured"], strict=True)
    ]
    checks = [
        {name: goal[name] for name in ("goal", "told", "limit", "holds")} for goal in record["comparison"]["goals"]
    ]
    return ValidationRecord.read(
        {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "command": "validate hardware",
            "date": record["date"],
            "what": what,
            "hardware": record["hardware"],
            "versions": record["versions"],
            "repeats": job["repeats"],
            "written": record["predictions"]["written"],
            "measured_from": record["measured_from"],
            "predictions_sha256": record["predictions"]["sha256"],
            "reliability": record["comparison"]["split_half"]["reliability"],
            "core_share": record["core_share"],
            "cases": cases,
            "checks": checks,
        },
        where="record",
    )


def _short(seconds: float) -> float:
    return round(float(seconds), MICROSECOND_DIGITS)


def read(path: Path) -> ValidationRecord:
    """A compact record. Raises BadInput, also where the predictions are not older than the measurements."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read the record ({error.strerror})", where=str(path), mend="check the path") from None
    except (ValueError, RecursionError):
        raise BadInput("not JSON", where=str(path), mend="fetch the record again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(
            f"no record of the format {FORMAT}", where=str(path), mend="add it with `validate records --add`"
        )
    found = ValidationRecord.read(content, where=path)
    if found.schema_version != SCHEMA_VERSION:
        raise BadInput(
            f"schema version {found.schema_version} is not {SCHEMA_VERSION}", where=str(path), mend="update moesim"
        )
    if found.written >= found.measured_from:
        raise BadInput(
            f"predictions of {found.written} are not older than measurements from {found.measured_from}",
            where=str(path),
            mend="only predictions that came first count",
        )
    return found


def read_all(folder: Path = FOLDER) -> list[ValidationRecord]:
    """All records of a folder, the oldest first. Raises BadInput."""
    return sorted((read(path) for path in sorted(folder.glob("*.json"))), key=lambda one: (one.date, one.what))


@dataclass(frozen=True)
class Added:
    """A record that was put into the folder."""

    path: Path
    record: ValidationRecord


def add(paths: Iterable[Path], folder: Path = FOLDER) -> list[Added]:
    """Put what `validate hardware` recorded (record.json, or a bundle with one) into the folder, in the compact form.

    Raises BadInput.
    """
    return [_put(of_hardware(content), folder) for path in paths for content in _contents(path)]


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
    write_json(path, record.model_dump(mode="json"), indent=1)
    return Added(path, record)


def markdown(records: Sequence[ValidationRecord]) -> str:
    """A table of the records, and each one's checks."""
    if not records:
        return "No validation is on record."
    lines = [
        "| date | command | what ran | on | cases, repeats | error: mean absolute, signed, largest | reliability | "
        "cores |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        errors = record.errors
        size = [abs(error) for error in errors]
        reliability = "-" if record.reliability is None else f"{record.reliability:.3f}"
        lines.append(
            f"| {record.date[:10]} | `{record.command}` | {record.what} | {_machine(record)} | {len(errors)}, "
            f"{record.repeats} | {sum(size) / len(size):.1%}, {sum(errors) / len(errors):+.1%}, "
            f"{max(errors, key=abs):+.1%} | {reliability} | {_shares(record)} |"
        )
    for record in records:
        lines += ["", f"{record.date[:10]}, {record.what}:", ""]
        lines += [
            f"- {'' if one.holds else '**missed**: '}{one.goal}: {one.told} ({one.limit})" for one in record.checks
        ]
    return "\n".join(lines)


def _shares(record: ValidationRecord) -> str:
    """How much of its core a computing rank had, by phase; less than all where other programs ran, too."""
    told = [f"{phase} {share:.0%}" for phase, share in record.core_share.items() if share is not None]
    return ", ".join(told) or "-"


def _machine(record: ValidationRecord) -> str:
    hardware = record.hardware
    told = hardware.get("gpu", hardware.get("cpu", "?"))
    return f"{told}, {hardware.get('cpus', '?')} CPUs, torch {record.versions.get('torch', '?')}"
