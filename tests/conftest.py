"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

# The same examples in every run, so that a change is to blame where a property fails; others under MOESIM_WHOLE, which
# is where they are looked for.
settings.register_profile("moesim", derandomize=not os.environ.get("MOESIM_WHOLE"))
settings.load_profile("moesim")

REPO = Path(__file__).resolve().parent.parent
# Folders whose tests walk the same lines many times: coverage's tracer costs them a third of their time and finds next
# to nothing that unit and hardware tests have not reached; benches would time the tracer, too.
UNCOUNTED = {REPO / "tests" / name for name in ("bench", "oracle", "property", "regression")}


def untraced(function: Any) -> Any:
    """The function without a tracer: coverage counts nothing of a compiler, and makes it half as slow again."""

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            return function(*arguments, **named)
        finally:
            sys.settrace(tracer)

    return run


def pytest_configure() -> None:
    from numba.core.dispatcher import Dispatcher

    Dispatcher.compile = untraced(Dispatcher.compile)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    tracer = sys.gettrace()
    if UNCOUNTED.intersection(item.path.parents):
        sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


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
