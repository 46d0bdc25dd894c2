"""What is installed: Python, the distribution, its four packages and its extras, and what gets in their way."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import sys
import urllib.parse
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from moesim.commands.doctor.findings import Finding

DISTRIBUTION = "moesim"
PACKAGES = ("moesim", "profiles", "placement", "validate")
MIN_PYTHON = (3, 11)  # pyproject.toml, requires-python
# From here on the distribution `pynvml` only sends on to nvidia-ml-py; before, it brought a pynvml.py of its own, which
# lies over that of nvidia-ml-py (gpuopenanalytics/pynvml, README).
PYNVML_REDIRECTS = 12


# The folder that holds the four packages which run.
HOME = Path(__file__).resolve().parents[3]


def installation() -> list[Finding]:
    """Python, the distribution, its four packages, its extras, and what other distributions do to them."""
    return [python_version(), distribution(), *origin(), *packages(), *shadows(), *extras(), *nvml_package()]


def python_version(version: tuple[int, int, int] | None = None) -> Finding:
    """Whether this Python is recent enough."""
    found = version or (sys.version_info.major, sys.version_info.minor, sys.version_info.micro)
    text = f"{platform.python_implementation()} {'.'.join(map(str, found))} on {os.cpu_count()} CPUs"
    if found[:2] < MIN_PYTHON:
        return Finding("python", "fault", text, f"use Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer")
    return Finding("python", "ok", text)


def distribution() -> Finding:
    """Whether the distribution is installed, so that its commands, cost models and solvers are registered."""
    try:
        return Finding("distribution", "ok", f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}")
    except metadata.PackageNotFoundError:
        return Finding("distribution", "fault", f"{DISTRIBUTION} is not installed", "pip install .")


def packages(names: tuple[str, ...] = PACKAGES) -> list[Finding]:
    """Whether each top-level package is found in the folder that this distribution was imported from.

    Other distributions ship packages of the same names (configobj a `validate`); the first on sys.path wins.
    """
    home = HOME
    findings = []
    for name in names:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin is None:
            findings.append(Finding(f"package {name}", "fault", "not found", "install moesim again"))
        elif origin.parent != home / name:
            mend = "install moesim in a virtual environment of its own"
            findings.append(Finding(f"package {name}", "fault", f"{origin} is not moesim's, which is in {home}", mend))
        else:
            findings.append(Finding(f"package {name}", "ok", str(origin.parent)))
    return findings


def extras() -> list[Finding]:
    """Which optional extras are complete, read from the distribution's own metadata; nothing is imported."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    wanted: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", requirement)
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if extra and name:
            wanted.setdefault(extra.group(1), []).append(name.group(0))
    findings = []
    for extra_name, needed in sorted(wanted.items()):
        lacking = [name for name in needed if version_of(name) is None]
        if lacking:
            command = f"pip install '.[{extra_name}]'"
            findings.append(Finding(f"extra {extra_name}", "absent", f"lacks {', '.join(lacking)}", command))
        else:
            findings.append(Finding(f"extra {extra_name}", "ok", ", ".join(needed)))
    return findings


def version_of(name: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def origin(home: Path | None = None) -> list[Finding]:
    """Whether the installed distribution is the code that runs: entry points come from the former."""
    home = HOME if home is None else home
    found = list(metadata.distributions(name=DISTRIBUTION))
    if not found:
        return []
    findings = []
    if len({one.version for one in found}) > 1:
        versions = ", ".join(f"{one.version}" for one in found)
        mend = "pip uninstall moesim until none is left, then install it once"
        findings.append(Finding("distribution", "warn", f"several are on the path ({versions})", mend))
    editable = _editable_folder(found[0].read_text("direct_url.json"))
    if editable is not None and editable != home:
        findings.append(
            Finding(
                "distribution",
                "warn",
                f"the code that runs is in {home}, but the editable install is of {editable}: commands, cost models "
                "and solvers are those registered there",
                f"run from {editable}, or pip install -e {home}",
            )
        )
    return findings


def _editable_folder(direct_url: str | None) -> Path | None:
    """The folder of an editable install, from direct_url.json (PyPA, "Recording the Direct URL Origin")."""
    try:
        told = json.loads(direct_url or "{}")
        if not told.get("dir_info", {}).get("editable"):
            return None
        return Path(urllib.parse.unquote(urllib.parse.urlparse(told["url"]).path)).resolve()
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def shadows(names: Iterable[str] = PACKAGES, owners: Mapping[str, list[str]] | None = None) -> list[Finding]:
    """Other distributions that bring a package of one of our names: whichever was installed last has overwritten it."""
    owners = metadata.packages_distributions() if owners is None else owners
    findings = []
    for name in names:
        others = sorted({owner for owner in owners.get(name, []) if owner.lower() != DISTRIBUTION})
        if others:
            findings.append(
                Finding(
                    f"package {name}",
                    "warn",
                    f"{', '.join(others)} installs a package of this name, too",
                    f"keep {', '.join(others)} out of moesim's virtual environment",
                )
            )
    return findings


def nvml_package() -> list[Finding]:
    """Whether the distribution `pynvml` is in the way of nvidia-ml-py, which brings the module of that name."""
    version = version_of("pynvml")
    if version is None:
        return []
    major = int(re.match(r"\d+", version).group()) if re.match(r"\d", version) else 0  # type: ignore[union-attr]
    if major < PYNVML_REDIRECTS:
        detail = f"pynvml {version} brings its own pynvml.py, over that of nvidia-ml-py"
        mend = "pip uninstall pynvml && pip install --force-reinstall nvidia-ml-py"
    else:
        detail, mend = f"pynvml {version} only sends on to nvidia-ml-py, and warns", "pip uninstall pynvml"
    return [Finding("nvml", "warn", detail, mend)]
