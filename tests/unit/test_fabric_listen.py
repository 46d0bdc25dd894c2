"""What starts a lab listens to it: a result, an error, an end without a word, and silence."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from moesim.errors import CheckFailed, MissingPart
from validate.fabric.run import _listen


@contextmanager
def cell(code: str) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """A process that stands in for a lab."""
    with tempfile.TemporaryFile() as log:
        line = [sys.executable, "-c", f"import sys, time\n{code}"]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log)
        try:
            yield process, log
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def listened(code: str, silence_s: float = 30.0) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    with cell(code) as (process, log):
        return _listen(process, silence_s, said.append, log), said


def test_progress_signs_of_life_and_a_result() -> None:
    lines = '{"progress": "building"}', '{"alive": 3}', '{"result": {"busy": 1.0}}'
    assert listened(f"print({chr(10).join(lines)!r})") == ({"busy": 1.0}, ["building"])


def test_an_error_is_the_one_that_the_lab_told() -> None:
    told = '{"error": {"kind": "MissingPart", "what": "no tun", "where": "here", "mend": "load it"}}'
    with pytest.raises(MissingPart, match="no tun"):
        listened(f"print({told!r})")


def test_an_end_without_a_word_is_told_with_its_last_line() -> None:
    with pytest.raises(CheckFailed, match="ended with code 7: broken"):
        listened("sys.stderr.write('broken'); sys.exit(7)")


def test_a_lab_that_hangs_is_not_waited_for() -> None:
    with pytest.raises(CheckFailed, match="hangs: no sign of life for 1 s"):
        listened("time.sleep(60)", silence_s=1.0)
