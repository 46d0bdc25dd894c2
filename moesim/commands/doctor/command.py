"""The command `doctor`: all checks, as lines or as one JSON object, and the exit code."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moesim.commands.doctor.findings import Finding
from moesim.errors import CheckFailed, MoesimError


def doctor(
    scenario: Annotated[Path | None, typer.Argument(help="A scenario to check as well.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: a.b=c; repeats.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check the installation, its extras, GPUs and NICs, and a scenario if one is given."""
    from moesim.commands.doctor.installation import installation
    from moesim.commands.doctor.machine import machine
    from moesim.commands.doctor.scenario import check_scenario

    findings = [*installation(), *machine()]
    error: MoesimError | None = None
    coverage: list[Any] = []
    if scenario is not None:
        checked = check_scenario(scenario, tuple(set_ or ()))
        findings += checked.findings
        error, coverage = checked.error, list(checked.coverage)
    if as_json:
        shown = _as_json(findings, error)
        if scenario is not None:
            shown["coverage"] = [row.as_dict() for row in coverage]
        typer.echo(json.dumps(shown))
    else:
        for finding in findings:
            typer.echo(finding.line())
        if coverage:
            from moesim.commands.doctor.coverage import table

            typer.echo("\n" + "\n".join(table(coverage)))
    if error is not None:
        raise error
    faults = [finding for finding in findings if finding.state == "fault"]
    if faults:
        raise CheckFailed(
            f"{len(faults)} of {len(findings)} checks found a fault, first: {faults[0].check}: {faults[0].detail}",
            mend=faults[0].mend,
        )


def _as_json(findings: list[Finding], error: MoesimError | None) -> dict[str, Any]:
    fault = any(finding.state == "fault" for finding in findings)
    return {
        "schema_version": 1,
        "ok": error is None and not fault,
        "findings": [asdict(finding) for finding in findings],
        "error": None if error is None else error.line(),
    }
