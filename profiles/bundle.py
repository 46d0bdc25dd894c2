"""Measurements of a machine in one file that imports anywhere: a zip of JSON lines, with where they come from.

`manifest.json` names the files of lines with their digests, the versions, the device, the network cards and the
command; `topology.txt` is what `nvidia-smi topo -m` said, where there is one; under `records`, what a validation on
the machine recorded. Written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.files import whole_file
from profiles.capture import Line, parsed, read_lines

FORMAT = "moesim-bundle"
SCHEMA_VERSION = 1
MANIFEST, TOPOLOGY = "manifest.json", "topology.txt"
# A whole sweep of a node writes a few MB of lines; this is what a file that claims more may not do to a reader.
MOST_BYTES = 2**28
STAMP = (1980, 1, 1, 0, 0, 0)  # the same content gives the same file


def write_bundle(path: Path, lines: Mapping[str, bytes], manifest: dict[str, Any], *, topology: str = "") -> None:
    """Write the files of lines (name -> content) and their manifest to `path`. Raises BadInput where it cannot."""
    files = [
        {"name": name, "sha256": _digest(content), "lines": content.count(b"\n")} for name, content in lines.items()
    ]
    members = dict(lines) | ({TOPOLOGY: topology.encode()} if topology else {})
    _write(path, {"format": FORMAT, "schema_version": SCHEMA_VERSION, **manifest, "files": files}, members)


def add_records(path: Path, records: Mapping[str, bytes], told: Mapping[str, Any]) -> None:
    """Put JSON files (name -> content) beside the lines of a bundle, and `told` into its manifest, as `validation`.

    Those of an earlier validation go. Raises BadInput.
    """
    members = _members(path)
    manifest = _manifest(members.pop(MANIFEST, b""), path)
    for old in _records(manifest, path):
        members.pop(old["name"], None)
    manifest["records"] = [{"name": name, "sha256": _digest(content)} for name, content in records.items()]
    _write(path, {**manifest, "validation": dict(told)}, {**members, **records})


def read_records(path: Path) -> dict[str, Any]:
    """The JSON files that `add_records` put into a bundle, by name; none where it has none. Raises BadInput."""
    members = _members(path)
    found = {}
    for file in _records(_manifest(members.get(MANIFEST, b""), path), path):
        content = members.get(file["name"], b"")
        if _digest(content) != file["sha256"]:
            raise _wrong(path, f"{file['name']} is not as it was written")
        try:
            found[str(file["name"])] = json.loads(content)
        except (ValueError, RecursionError):
            raise _wrong(path, f"{file['name']} is not JSON") from None
    return found


def _records(manifest: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    files = manifest.get("records", [])
    if not _named(files):
        raise _wrong(path, f"{MANIFEST} does not name its records")
    return list(files)


def _named(files: Any) -> bool:
    return isinstance(files, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("sha256"), str)
        for one in files
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write(path: Path, manifest: dict[str, Any], others: Mapping[str, bytes]) -> None:
    members = {MANIFEST: json.dumps(manifest, indent=1, allow_nan=False).encode() + b"\n", **others}
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name, STAMP)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)


def read_any(paths: Iterable[Path]) -> tuple[list[Line], list[dict[str, Any]]]:
    """Lines of the files, be they JSON lines or bundles, and the manifests of the bundles. Raises BadInput."""
    found: list[Line] = []
    manifests = []
    for path in paths:
        if _is_zip(path):
            lines, manifest = read_bundle(path)
            found += lines
            manifests.append(manifest)
        else:
            found += read_lines([path])
    return found, manifests


def _is_zip(path: Path) -> bool:
    try:
        with Path(path).open("rb") as handle:
            return handle.read(2) == b"PK"
    except OSError:
        return False  # whoever reads it as lines says why


def read_bundle(path: Path) -> tuple[list[Line], dict[str, Any]]:
    """The lines of a bundle and its manifest; every line is checked as in a file of its own. Raises BadInput."""
    members = _members(path)
    manifest = _manifest(members.get(MANIFEST, b""), path)
    lines: list[Line] = []
    for file in manifest["files"]:
        content = members.get(file["name"])
        if content is None or _digest(content) != file["sha256"]:
            raise _wrong(path, f"{file['name']} is {'missing' if content is None else 'not as it was written'}")
        where = Path(f"{path}/{file['name']}")
        try:
            lines += parsed(content.decode("utf-8"), where)
        except UnicodeDecodeError:
            raise _wrong(path, f"{file['name']} is not UTF-8 text") from None
    if not lines:
        raise _wrong(path, "no measurement here")
    return lines, manifest


def _members(path: Path) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            found = archive.infolist()
            if sum(one.file_size for one in found) > MOST_BYTES:
                raise _wrong(path, f"more than {MOST_BYTES} bytes of content")
            if any(one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for one in found):
                raise _wrong(path, "compressed in another way than bundles are")
            return {one.filename: archive.read(one) for one in found}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _wrong(path, f"not a readable zip file ({str(error)[:60] or type(error).__name__})") from None


def _manifest(content: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise _wrong(path, f"no {MANIFEST} of a {FORMAT}")
    if found.get("schema_version") != SCHEMA_VERSION or found["schema_version"] is True:
        raise _wrong(path, f"schema version {str(found.get('schema_version'))[:20]} is not {SCHEMA_VERSION}")
    if not _named(found.get("files")):
        raise _wrong(path, f"{MANIFEST} does not name its files")
    return found


def _wrong(path: Path, what: str) -> BadInput:
    return BadInput(what, where=str(path), mend="fetch it again, or write it anew with the command that did")
