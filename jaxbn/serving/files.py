"""A frozen network as one file: a line of JSON that says what it is, and the arrays in Flax's msgpack format.

The header carries a SHA-256 of all the rest, so that a damaged file is an error and never another network. Nothing in
the file is executed or unpickled. A file is written beside its place and moved there, so that at any moment the old
network or the new one is in place, whole.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization
from jax.extend import core

from jaxbn.linen.freeze import check_fits as check_fits_linen
from jaxbn.nnx.freeze import check_fits as check_fits_nnx
from jaxbn.population.frozen import Frozen, Info, LayerInfo, check_frozen

FORMAT = "jaxbn-frozen"
FORMAT_VERSION = 1
# More than any header has; a file that begins otherwise is not read to its end in search of a line.
_LONGEST_HEADER = 2**26


def save(path: str | os.PathLike[str], frozen: Frozen) -> None:
    """Writes a frozen network, parameters and statistics, to one file; what stood there is replaced at once or not.

    Args:
        path: The file; its folder must exist.
        frozen: Of `freeze`, or of the `finalize` of `make_steps`.

    Returns:
        None.

    Raises:
        TypeError: If `frozen` is no `Frozen`, or holds something that is no array.
        ValueError: If an array is not whole on this process.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.arange(10.0)[:, None]
        >>> variables, report = jaxbn.linen.postproc(net.apply, net.init(jax.random.key(0), data), [data])
        >>> path = os.path.join(tempfile.mkdtemp(), "network.jaxbn")
        >>> jaxbn.serving.save(path, jaxbn.linen.freeze(variables, report))
    """
    check_frozen(frozen)
    arrays = serialization.msgpack_serialize(jax.tree.map_with_path(_to_host, frozen.variables))
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "layers": {name: layer._asdict() for name, layer in frozen.info.layers},
        "versions": dict(frozen.info.versions),
        "bytes": len(arrays),
    }
    header["sha256"] = _digest(header, arrays)
    _replace(Path(path), _line(header), arrays)


def load(path: str | os.PathLike[str], *, like: Any = None) -> Frozen:
    """Reads a frozen network that `save` has written; nothing in the file is unpickled.

    Args:
        path: The file.
        like: A model that the network must fit: the variables of a linen model (`net.init`, or its shapes by
            `jax.eval_shape`), or an NNX model. None: nothing is checked here.

    Returns:
        The `Frozen`. `net.apply(frozen.variables, ...)` or `eval_step(frozen, batch)` uses it; for NNX
        `jaxbn.nnx.install_frozen(model, frozen)`.

    Raises:
        ValueError: If the file is none of these, is damaged or cut off, was written by a later version, or does not fit
            `like`; the message names the first variable that differs.
        TypeError: If `like` is neither of these.
        FileNotFoundError: If there is no file.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.arange(10.0)[:, None]
        >>> variables, report = jaxbn.linen.postproc(net.apply, net.init(jax.random.key(0), data), [data])
        >>> path = os.path.join(tempfile.mkdtemp(), "network.jaxbn")
        >>> jaxbn.serving.save(path, jaxbn.linen.freeze(variables, report))
        >>> frozen = jaxbn.serving.load(path, like=variables)
        >>> print(jaxbn.linen.summary(frozen))
        1 normalization layer, 1 channel
        layer        channels  learns       method      epsilon  statistics  rows
        (the model)         1  scale, bias  batch_norm  1e-05    pooled        10
    """
    with open(path, "rb") as file:
        header = _read_header(path, file.readline(_LONGEST_HEADER))
        arrays = file.read()
    if header.pop("sha256", None) != _digest(header, arrays):
        raise ValueError(f"{path} is damaged or cut off: its checksum is not that of its content.")
    variables = jax.tree.map_with_path(_to_device, serialization.msgpack_restore(arrays))
    layers = tuple((name, LayerInfo(**layer)) for name, layer in header["layers"].items())
    frozen = Frozen(variables, Info(layers, tuple(header["versions"].items())))
    if isinstance(like, nnx.Module):
        check_fits_nnx(frozen, like)
    elif isinstance(like, Mapping):
        check_fits_linen(frozen, like)
    elif like is not None:
        raise TypeError(f"`like` is the variables of a linen model, or an NNX model; given: {type(like)}.")
    return frozen


def _line(header: dict[str, Any]) -> bytes:
    """The one way in which a header is written, so that it has one checksum."""
    return json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def _digest(header: dict[str, Any], arrays: bytes) -> str:
    digest = hashlib.sha256(_line(header))
    digest.update(arrays)
    return digest.hexdigest()


def _read_header(path: str | os.PathLike[str], line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        known = isinstance(header, dict) and header["format"] == FORMAT and _line(header) == line
    except (ValueError, KeyError, RecursionError):  # no text, no JSON, or JSON of another kind
        known = False
    if not known:
        raise ValueError(f"{path} is not a frozen network of jaxbn, or its first line is damaged.")
    if header.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {header.get('format_version')}, and this version of jaxbn reads {FORMAT_VERSION}. It "
            f"was written with {header.get('versions')}: install those."
        )
    return header


def _to_host(path: Any, leaf: Any) -> np.ndarray:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    # What JAX does not take would not come back as it is: text, and numbers in the byte order of other machines.
    if not is_array or not core.valid_jaxtype(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(
            f"{name!r} is {leaf.dtype if is_array else type(leaf)}; a frozen network holds arrays of numbers as JAX "
            f"has them."
        )
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError(f"{name!r} lies on several processes: gather it on one, and save it there.")
    return np.asarray(leaf)


def _to_device(path: Any, array: np.ndarray) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise ValueError(f"{name!r} is {array.dtype}, which JAX would round: set jax_enable_x64 before loading.")
    return jnp.asarray(array)


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
    if os.name == "posix":  # the move itself is in the folder, which elsewhere cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
