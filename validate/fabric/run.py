"""Starting a lab in namespaces of its own, and reading what it tells."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moesim import errors
from moesim.errors import CheckFailed, MissingPart, MoesimError
from validate.fabric.net import limited
from validate.fabric.rank import Case
from validate.fabric.spec import WHERE, LabSpec

# setpriv and unshare are util-linux, ip and tc iproute2.
TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "setpriv": "util-linux", "mount": "util-linux"}
# Everything that ends with the process: names of namespaces, mounts, processes. --kill-child: process 1 dies with
# `unshare`, which dies with this process.
UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child")
# What one cell may take to build its network and import torch before it tells anything more.
STARTING_S = 60.0
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def named(name: str, say: Callable[[str], None]) -> Callable[[str], None]:
    """`say` with the lab's name before each line."""

    def tell(line: str) -> None:
        say(f"{name}: {line}")

    return tell


def check_parts() -> None:
    """Raise MissingPart, named, unless this machine can run a lab."""
    if not sys.platform.startswith("linux"):
        raise MissingPart("the fabric lab needs Linux network namespaces", where=WHERE, mend="run it on Linux")
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            raise MissingPart(f"`{tool}` is not installed", where=WHERE, mend=f"install {package}")
    if os.geteuid():
        raise MissingPart("the fabric lab needs root, to make network namespaces", where=WHERE, mend="run it with sudo")
    done = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingPart(
            f"this machine refuses namespaces ({done.stderr.strip()[:120]})", where=WHERE,
            mend="in a container, give it CAP_SYS_ADMIN and CAP_NET_ADMIN",
        )  # fmt: skip
    lines = "\n".join(limited("lo", 1e6, 10_000))
    done = subprocess.run([*UNSHARE, "tc", "-batch", "-"], input=lines, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingPart(
            f"the kernel cannot limit and order what a NIC sends ({done.stderr.strip()[:120]})", where=WHERE,
            mend="load sch_tbf, sch_htb and cls_u32",
        )  # fmt: skip
    if importlib.util.find_spec("torch") is None:
        raise MissingPart("validate fabric needs torch", mend="pip install '.[hardware]'")


def run_cell(lab: LabSpec, cases: Sequence[Case], *, stall_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Build the lab's network, run the cases on it, and return what was measured; nothing is left behind.

    The result: seconds [cases, parts, repeats], first_stage (the same shape), delay (how), busy (processors that the
    ranks used). Raises the error that the lab told, or CheckFailed.
    """
    job = {
        "lab": lab.model_dump(mode="json"),
        "cases": [
            {"patterns": case.patterns, "scheme": case.scheme, "bytes_per_rank": case.bytes_per_rank} for case in cases
        ],
        "stall_s": stall_s,
    }
    environment = os.environ | ENVIRONMENT
    # -P keeps a user's folder called `validate` from standing in for ours, which may be a copy, not installed.
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    line = [*UNSHARE, sys.executable, "-P", "-m", "validate.fabric.cell"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job).encode())
                process.stdin.close()
            return _listen(process, stall_s + STARTING_S, say, log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _listen(process: subprocess.Popen[bytes], silence_s: float, say: Callable[[str], None], log: Any) -> dict[str, Any]:
    """Lines until a result or an error. The cell watches its ranks; this watches the cell."""
    assert process.stdout is not None
    descriptor, buffered, heard = process.stdout.fileno(), b"", time.monotonic()
    while True:
        ready, _, _ = select.select([descriptor], [], [], 1.0)
        if ready:
            part = os.read(descriptor, 1 << 16)
            if not part:
                raise CheckFailed(_death(process, log), where=WHERE, mend="nothing was recorded; run again")
            heard, buffered = time.monotonic(), buffered + part
            *lines, buffered = buffered.split(b"\n")
            for line in lines:
                told = json.loads(line)
                if "progress" in told:
                    say(told["progress"])
                elif "error" in told:
                    raise _error(told["error"])
                elif "result" in told:
                    found: dict[str, Any] = told["result"]
                    return found
        elif time.monotonic() - heard > silence_s:
            raise CheckFailed(
                f"the lab hangs: no sign of life for {silence_s:g} s", where=WHERE,
                mend="nothing was recorded; raise --stall-limit if the machine is only slow",
            )  # fmt: skip


def _error(word: dict[str, str]) -> MoesimError:
    kind = getattr(errors, word["kind"])
    found: MoesimError = kind(word["what"], where=word["where"], mend=word["mend"])
    return found


def _death(process: subprocess.Popen[bytes], log: Any) -> str:
    code = process.wait()
    log.seek(0)
    said = log.read().decode("utf-8", errors="replace").strip().splitlines()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"the lab {how}: {said[-1][:200] if said else 'it said nothing'}"
