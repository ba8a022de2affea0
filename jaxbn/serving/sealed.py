"""A sealed file: a line of JSON that says what it is, and bytes behind it.

The header carries a SHA-256 of all the rest, so that a damaged file is an error and never another network. Nothing in
the file is executed or unpickled. A file is written beside its place and moved there, so that at any moment the old
file or the new one is in place, whole.
"""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple

# More than any header has; a file that begins otherwise is not read to its end in search of a line.
_LONGEST_HEADER = 2**26


class Kind(NamedTuple):
    """What a file holds, and how it is written."""

    format: str
    version: int
    noun: str  # for messages, such as "a frozen network"


def write(path: str | os.PathLike[str], kind: Kind, header: dict[str, Any], *parts: bytes) -> None:
    """Seals the header and the parts behind it, and puts them in the place of what stood there, at once or not."""
    header = {"format": kind.format, "format_version": kind.version} | header | {"bytes": sum(map(len, parts))}
    header["sha256"] = _digest(header, *parts)
    _replace(Path(path), _line(header), *parts)


def read(path: str | os.PathLike[str], kind: Kind) -> tuple[dict[str, Any], bytes]:
    """The header and what is behind it; a ValueError that names the file if it is not what was written."""
    with open(path, "rb") as file:
        header = _read_header(path, kind, file.readline(_LONGEST_HEADER))
        body = file.read()
    if header.pop("sha256", None) != _digest(header, body):
        raise ValueError(f"{path} is damaged or cut off: its checksum is not that of its content.")
    return header, body


def see_through(path: Path) -> None:
    """Sees a file, or the names in a folder, through to the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere folders cannot be opened
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _line(header: dict[str, Any]) -> bytes:
    """The one way in which a header is written, so that it has one checksum."""
    return json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def _digest(header: dict[str, Any], *parts: bytes) -> str:
    digest = hashlib.sha256(_line(header))
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read_header(path: str | os.PathLike[str], kind: Kind, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        known = isinstance(header, dict) and header["format"] == kind.format and _line(header) == line
    except (ValueError, KeyError, RecursionError):  # no text, no JSON, or JSON of another kind
        known = False
    if not known:
        raise ValueError(f"{path} is not {kind.noun} of jaxbn, or its first line is damaged.")
    if header.get("format_version") != kind.version:
        raise ValueError(
            f"{path} has format {header.get('format_version')}, and this version of jaxbn reads {kind.version}. It "
            f"was written with {header.get('versions')}: install those."
        )
    return header


def _replace(path: Path, *parts: bytes) -> None:
    """Writes a new file beside the path, sees it through to the disk, and moves it into place."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to save {path.name} in.")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")
    try:
        with open(beside, "xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    see_through(path.parent)  # the move itself is in the folder
