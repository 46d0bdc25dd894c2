"""Validations on record as Markdown: a table for each command, and each record's checks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from validate.pages import GeneratedPart
from validate.records.form import ValidationRecord

MAKE = "run `moesim validate records --update` and commit what it writes"
PART = GeneratedPart("moesim validate records --update", MAKE)
# What a record of each command is about, in the order in which they are shown; others come last, under their name.
TITLES = {
    "validate hardware": "A layer on real ranks",
    "validate exchange": "Uneven all-to-alls",
    "validate fabric": "Exchanges over several nodes (network namespaces)",
    "validate replay": "What ranks compute (played in turn, nothing is exchanged)",
    "validate capacity": "Dropped tokens",
    "validate training": "Training steps",
}
_HEAD = (
    "| date | what ran | on | cases, repeats | error: mean and median absolute, signed, largest | reliability | cores "
    "| code |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)
_COUNTED = (
    "| date | what was compared | on | cases | cases that differ | simulated, executed | code |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


def markdown(records: Sequence[ValidationRecord]) -> str:
    """A table of each command's records, the oldest first, and each one's checks."""
    if not records:
        return "No validation is on record."
    commands = [name for name in TITLES if any(one.command == name for one in records)]
    commands += sorted({one.command for one in records} - set(commands))
    parts = []
    for command in commands:
        own = [one for one in records if one.command == command]
        title = TITLES.get(command)
        parts += [f"### {f'{title}: ' if title else ''}`{command}`", ""]
        for head, row, chosen in (
            (_HEAD, _timed, [one for one in own if one.cases]),
            (_COUNTED, _counted, [one for one in own if one.counted]),
        ):
            if chosen:
                parts += [*head, *(row(one) for one in chosen), ""]
        for one in own:
            parts += [f"{one.date[:10]}, {one.what}:", ""]
            parts += [f"- {'' if it.holds else '**missed**: '}{it.goal}: {it.told} ({it.limit})" for it in one.checks]
            parts.append("")
    return "\n".join(parts).strip()


def _timed(record: ValidationRecord) -> str:
    errors = np.asarray(record.errors)
    size = np.abs(errors)
    reliability = "-" if record.reliability is None else f"{record.reliability:.3f}"
    return (
        f"| {record.date[:10]} | {record.what} | {_machine(record)} | {len(errors)}, {record.repeats or '-'} | "
        f"{size.mean():.1%}, {np.median(size):.1%}, {errors.mean():+.1%}, {errors[size.argmax()]:+.1%} | "
        f"{reliability} | {_shares(record)} | {_code(record)} |"
    )


def _counted(record: ValidationRecord) -> str:
    cases, differ, simulated, executed = (
        sum(getattr(one, name) for one in record.counted) for name in ("cases", "differ", "simulated", "executed")
    )
    return (
        f"| {record.date[:10]} | {record.what} | {_machine(record)} | {cases} | {differ} | {simulated}, {executed} | "
        f"{_code(record)} |"
    )


def _code(record: ValidationRecord) -> str:
    return "-" if record.code is None else f"`{record.code[:10]}{'+' if record.code.endswith('+') else ''}`"


def _shares(record: ValidationRecord) -> str:
    """How much of its core a computing rank had, by phase, and how the machine's pace changed between them."""
    told = [f"{phase} {share:.0%}" for phase, share in record.core_share.items() if share is not None]
    if record.pace_s:
        told.append(f"pace {record.pace_s['measured'] / record.pace_s['profile'] - 1.0:+.1%}")
    return ", ".join(told) or "-"


def _machine(record: ValidationRecord) -> str:
    hardware = record.hardware
    told = hardware.get("gpu", hardware.get("cpu", "?"))
    return f"{told}, {hardware.get('cpus', '?')} CPUs, torch {record.versions.get('torch', '?')}"
