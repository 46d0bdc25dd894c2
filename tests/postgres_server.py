"""A PostgreSQL server of a test's own: made in a folder under /tmp, reached by a Unix socket, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def postgres_url() -> Iterator[str]:
    """The URL of an empty database. Skips by name where no server can be installed or started."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install '.[postgres]'")
    if shutil.which("initdb") is None or shutil.which("postgres") is None:
        pytest.skip("PostgreSQL's initdb and postgres are not on the path")
    with tempfile.TemporaryDirectory(prefix="moesim-pg-", dir="/tmp") as name:
        folder = Path(name)
        prefix, user = _as_another(folder)
        made = [*prefix, "initdb", "-D", f"{folder}/data", "-U", "moesim", "-A", "trust", "--no-sync", "-E", "UTF8"]
        done = subprocess.run(made, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"initdb does not run here as {user}: {done.stderr.strip().splitlines()[-1:]}")
        serve = [*prefix, "postgres", "-D", f"{folder}/data", "-k", str(folder), "-c", "listen_addresses="]
        server = subprocess.Popen(serve, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            ready = folder / ".s.PGSQL.5432"
            until = time.monotonic() + 60
            while not ready.exists() and server.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            if not ready.exists():
                pytest.skip(f"postgres does not start here as {user}")
            yield f"postgresql+psycopg://moesim@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGINT)  # fast shutdown: sessions are cut
            server.wait(timeout=60)


def _as_another(folder: Path) -> tuple[list[str], str]:
    """Words to run a command as somebody whom PostgreSQL lets run it (it refuses root), and who that is."""
    if os.geteuid() != 0:
        return [], "this user"
    if shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL refuses root, and setpriv is not on the path")
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    who = names.get("postgres") or names.get("nobody")
    if who is None:
        pytest.skip("PostgreSQL refuses root, and there is no other user")
    os.chown(folder, who.pw_uid, who.pw_gid)
    return ["setpriv", f"--reuid={who.pw_uid}", f"--regid={who.pw_gid}", "--clear-groups"], who.pw_name
