"""What validations on record show, for verdicts to cite: this project's, and those that a scenario names.

Registered as `moesim.records`. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from moesim.spec.evidence import Evidence
from moesim.spec.scenario import Scenario
from validate.records import store
from validate.silicon import coverage


def of_scenario(scenario: Scenario | None) -> list[Evidence]:
    """Evidence of the records that ship, of the measured serving runs, and of a scenario's own `records`.

    Raises BadInput for what a scenario names and what cannot be read.
    """
    return [*of_shipped(), *of_paths(() if scenario is None else scenario.records)]


def of_shipped() -> list[Evidence]:
    """Evidence of the records that ship, and of measured serving runs."""
    return [*of_paths(sorted(store.FOLDER.glob("*.json"))), *coverage.evidence()]


def of_paths(paths: tuple[Path, ...] | list[Path]) -> list[Evidence]:
    """Evidence of folders of records, records and bundles. Raises BadInput."""
    return [one for path in paths for name, record in store.read_any(path) for one in record.evidence(name)]
