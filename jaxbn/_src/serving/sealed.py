"""A sealed file: a line of JSON that says what it is, and bytes behind it.

The header carries a SHA-256 of all the rest, so that a damaged file is an error and never another network. Nothing in
the file is executed or unpickled. A file is written beside its place and moved there, so that at any moment the old
file or the new one is in place, whole.
"""

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# More than any header has; a file that begins otherwise is not read to its end in search of a line.
_LONGEST_HEADER = 2**26


class Kind(NamedTuple):
    """What a file holds, and how it is written."""

    format: str
    version: int
    noun: str  # for messages, such as "a frozen network"


Bytes = bytes | memoryview


def write(path: str | os.PathLike[str], kind: Kind, header: dict[str, Any], *parts: Bytes) -> None:
    """Seals the header and the parts behind it, and puts them in the place of what stood there, at once or not.

    The new file has the permissions of the old one. A symbolic link stays, and the file that it leads to is replaced.
    """
    header = {"format": kind.format, "format_version": kind.version} | header | {"bytes": sum(map(len, parts))}
    header["sha256"] = _digest(header, *parts)
    _replace(Path(path), kind, _line(header), *parts)


def read(path: str | os.PathLike[str], kind: Kind) -> tuple[dict[str, Any], bytes]:
    """The header and what is behind it; a ValueError that names the file if it is not what was written."""
    with open(path, "rb") as file:
        header = _read_header(path, kind, file.readline(_LONGEST_HEADER))
        body = file.read()
    if header.pop("sha256", None) != _digest(header, body):
        raise ValueError(f"{path} is damaged or cut off: its checksum is not that of its content.")
    return header, body


@contextlib.contextmanager
def understanding(path: str | os.PathLike[str], kind: Kind) -> Iterator[None]:
    """Whatever goes wrong in the reading of a file with a right checksum is a ValueError that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        noun, told = kind.noun.partition(" ")[2], "" if type(error) is ValueError else f"{type(error).__name__}, "
        raise ValueError(f"{path} is no {noun} that jaxbn has written: {told}{error}") from error


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


def _digest(header: dict[str, Any], *parts: Bytes) -> str:
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


def _replace(path: Path, kind: Kind, line: bytes, *parts: Bytes) -> None:
    """Writes a new file beside the path, sees it through to the disk, reads it back, and moves it into place."""
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to save {path.name} in.")
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")
    try:
        with open(beside, "xb", opener=_opener_like(path)) as file:
            file.writelines((line, *parts))
            file.flush()
            os.fsync(file.fileno())
        _read_back(beside, kind, line, sum(map(len, parts)))
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    see_through(path.parent)  # the move itself is in the folder


def _opener_like(path: Path) -> Any:
    """Opens a new file with the permissions of the one in whose place it comes, from the first moment on."""

    def opener(name: str, flags: int) -> int:
        if not path.is_file():
            return os.open(name, flags, 0o666)  # as the umask has it
        opened = os.open(name, flags, 0o600)
        if os.name == "posix":
            os.fchmod(opened, stat.S_IMODE(path.stat().st_mode))
        return opened

    return opener


def _read_back(path: Path, kind: Kind, line: bytes, length: int) -> None:
    """Raises an OSError if the disk does not give the header back, or has another number of bytes behind it."""
    with open(path, "rb") as file:
        header = _read_header(path, kind, file.readline(_LONGEST_HEADER))
    if _line(header) != line or path.stat().st_size != len(line) + length:
        raise OSError(f"{path} does not hold what was written to it; the disk is at fault.")
