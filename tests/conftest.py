"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The calibration data beside the clone; it is not part of the product."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the calibration data (../shared/data) is not beside this clone")
    return folder
