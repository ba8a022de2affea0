"""Files with a checksum and atomic writes: a header, which is one line of JSON, and bytes after it.

The header holds a SHA-256 of everything else, so a damaged file is an error. Nothing in the file is executed or
unpickled. Writes are atomic: a new file is written under a temporary name and renamed.
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

# More than the length of any header; limits the search for the end of the line in other files.
_LONGEST_HEADER = 2**26


DAMAGED = "is damaged or incomplete: its content does not have the recorded checksum."


class Kind(NamedTuple):
    """The format of a file."""

    format: str
    version: int
    noun: str  # for messages, such as "a frozen network"


Bytes = bytes | memoryview


def write(path: str | os.PathLike[str], kind: Kind, header: dict[str, Any], *parts: Bytes) -> None:
    """Writes a header, with its checksum, and the parts after it. The write is atomic.

    A file that is replaced keeps its permissions. If the path is a symbolic link, its target is replaced.
    """
    header = {"format": kind.format, "format_version": kind.version} | header
    header["sha256"] = _digest(header, *parts)
    _replace(Path(path), kind, _line(header), *parts)


def read(path: str | os.PathLike[str], kind: Kind) -> tuple[dict[str, Any], bytes]:
    """Reads the header and the bytes after it; raises a ValueError that names the file if it is damaged."""
    with open(path, "rb") as file:
        header = _read_header(path, kind, file.readline(_LONGEST_HEADER))
        body = file.read()
    # The checksum covers the header without the checksum itself.
    if header.pop("sha256", None) != _digest(header, body):
        raise ValueError(f"{path} {DAMAGED}")
    return header, body


@contextlib.contextmanager
def parsing(path: str | os.PathLike[str], kind: Kind) -> Iterator[None]:
    """Turns errors in parsing a file, whose checksum is right, into a ValueError that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # The message has its own article. A ValueError has a clear text, but a KeyError needs its type.
        noun, told = kind.noun.partition(" ")[2], "" if type(error) is ValueError else f"{type(error).__name__}, "
        raise ValueError(f"{path} is not a {noun} written by jaxbn: {told}{error}") from error


def fsync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":  # other systems cannot open folders
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _line(header: dict[str, Any]) -> bytes:
    """Serializes a header; equal headers give equal bytes, and so equal checksums."""
    return json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def _digest(header: dict[str, Any], *parts: Bytes) -> str:
    digest = hashlib.sha256(_line(header))
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read_header(path: str | os.PathLike[str], kind: Kind, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        # The checksum covers the header as parsed, so another spelling of the same JSON is rejected here.
        known = isinstance(header, dict) and header["format"] == kind.format and _line(header) == line
    except (ValueError, KeyError, RecursionError):  # not text, not JSON, or another kind of JSON
        known = False
    if not known:
        raise ValueError(f"{path} is not {kind.noun} of jaxbn, or its first line is damaged.")
    if header.get("format_version") != kind.version:
        raise ValueError(
            f"{path} has format {header.get('format_version')}, but this version of jaxbn reads format {kind.version}. "
            f"It was written with {header.get('versions')}: install these versions."
        )
    return header


def _replace(path: Path, kind: Kind, line: bytes, *parts: Bytes) -> None:
    """Writes a temporary file, flushes it to the disk, reads its header back, and renames it to the path."""
    # os.replace would replace a symbolic link, and not its target.
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to save {path.name} in.")
    # In the same folder, because a rename is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")
    try:
        with open(temporary, "xb", opener=_opener_like(path)) as file:
            file.writelines((line, *parts))
            # Without fsync before the rename, a power failure could leave an incomplete file at the path.
            file.flush()
            os.fsync(file.fileno())
        _read_back(temporary, kind, line, sum(map(len, parts)))
        os.replace(temporary, path)
    except BaseException:
        # KeyboardInterrupt too must not leave the temporary file.
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)  # which holds the new name


def _opener_like(path: Path) -> Any:
    """Returns an opener that creates a file with the permissions of the one that it will replace."""

    def opener(name: str, flags: int) -> int:
        if not path.is_file():
            return os.open(name, flags, 0o666)  # restricted by the umask
        # Nobody else may open the new file before it has the permissions of the old one.
        opened = os.open(name, flags, 0o600)
        if os.name == "posix":
            os.fchmod(opened, stat.S_IMODE(path.stat().st_mode))
        return opened

    return opener


def _read_back(path: Path, kind: Kind, line: bytes, length: int) -> None:
    """Raises an OSError if the file has another header or another size than was written."""
    with open(path, "rb") as file:
        header = _read_header(path, kind, file.readline(_LONGEST_HEADER))
    if _line(header) != line or path.stat().st_size != len(line) + length:
        raise OSError(f"{path} differs from what was written to it. Check the disk.")
