"""Stores arrays through orbax: each array is a folder of uncompressed chunks in the Zarr 2 format.

The size of each file follows from the shape and the chunk size of its array. All files are checked before orbax reads
them, so a forged folder can neither allocate more memory than it takes on the disk nor make orbax read other files.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxbn._src.serving.arrays import from_bytes, to_device

_FOLDER = "arrays"
# Other files of orbax.
_OWN = re.compile(r"_METADATA|_CHECKPOINT_METADATA|_sharding|commit_success\.txt|array_metadatas/process_\d+")
# Dtypes that tensorstore, which orbax uses, does not support. They are stored as bytes.
_AS_BYTES = {"uint2", "uint4", "float8_e4m3"}


def store(step: Path, leaves: Sequence[Any]) -> None:
    """Writes the shards of this process; empty arrays are not written."""
    stored = {str(i): _to_bytes(leaf) for i, leaf in enumerate(leaves) if leaf.size}
    if not stored:  # orbax rejects empty trees
        return
    with _checkpointer() as checkpointer:
        checkpointer.save(step / _FOLDER, args=ocp.args.PyTreeSave(stored))


def restore(step: Path, named: Sequence[tuple[Any, Any]], shardings: Sequence[Any]) -> list[jax.Array]:
    """Reads arrays of these paths and shapes, with these shardings; None is the default device."""
    on_host = ocp.RestoreArgs(restore_type=np.ndarray)
    arguments = {
        str(i): on_host if sharding is None else ocp.ArrayRestoreArgs(sharding=sharding)
        for i, ((_, leaf), sharding) in enumerate(zip(named, shardings, strict=True))
        if leaf.size
    }
    stored = {}
    if arguments:
        with _checkpointer() as checkpointer:
            stored = checkpointer.restore(step / _FOLDER, args=ocp.args.PyTreeRestore(restore_args=arguments))
    arrays = []
    for i, ((path, leaf), sharding) in enumerate(zip(named, shardings, strict=True)):
        array = _from_bytes(stored[str(i)], leaf) if leaf.size else np.zeros(leaf.shape, leaf.dtype)
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{step / _FOLDER / str(i)} holds {array.dtype}{array.shape} instead of {leaf}.")
        # Empty arrays are not on the disk, so orbax did not give them their sharding.
        if sharding is not None and not leaf.size:
            array = jax.make_array_from_callback(leaf.shape, sharding, array.__getitem__)
        arrays.append(array if isinstance(array, jax.Array) else to_device(path, array))
    return arrays


def check(step: Path, leaves: Sequence[Any], sizes: Mapping[str, int]) -> None:
    """Raises a ValueError unless the names and sizes of the files of a step fit arrays of these shapes."""
    wanted: dict[str, int] = {}
    for i, leaf in enumerate(leaves):
        if leaf.size:
            wanted |= _files_of(step, f"{_FOLDER}/{i}", leaf, sizes)
    for name, size in wanted.items():
        if sizes.get(name) != size:
            raise ValueError(f"{step / name} does not have the {size} bytes of its array.")
    for name in sizes.keys() - wanted.keys():
        if not name.endswith("/.zarray") and not _OWN.fullmatch(name.removeprefix(f"{_FOLDER}/")):
            raise ValueError(f"{step / name} does not belong to an array of the network.")
    names = [str(i) for i, leaf in enumerate(leaves) if leaf.size]
    if names:
        _check_tree(_read(step, f"{_FOLDER}/_METADATA", sizes), names)


def _files_of(step: Path, name: str, leaf: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the chunks of an array and their sizes; a ValueError if its metadata does not fit its shape."""
    path, stored = step / name / ".zarray", np.dtype(_stored(leaf))
    found = _read(step, f"{name}/.zarray", sizes)
    chunks = found["chunks"]
    # Compressed chunks are rejected: they could take more memory than they take on the disk.
    known = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None, "fill_value": None}
    # Zarr writes the dtypes of NumPy as codes, such as "<f4", and those of ml_dtypes by name.
    known |= {"dimension_separator": ".", "dtype": stored.str if stored.isbuiltin == 1 else stored.name}
    known |= {"shape": list(leaf.shape), "chunks": chunks}
    whole = len(chunks) == leaf.ndim and all(
        type(chunk) is int and 0 < chunk <= size for chunk, size in zip(chunks, leaf.shape, strict=True)
    )
    grid = [-(-size // chunk) for size, chunk in zip(leaf.shape, chunks, strict=True)] if whole else []
    # Forged metadata can describe billions of chunks, so compare their number before listing them.
    if found != known or not whole or math.prod(grid) > len(sizes):
        raise ValueError(f"{path} is not the metadata of {leaf}.")
    length = math.prod(chunks) * stored.itemsize
    names = [f"{name}/{'.'.join(map(str, index)) or '0'}" for index in np.ndindex(*grid)]
    # `restore` does not check the values of booleans. Files of a wrong size are errors in `check`.
    if leaf.dtype == bool:
        for part in names:
            if sizes.get(part) == length:
                from_bytes(jax.ShapeDtypeStruct((length,), np.bool_), (step / part).read_bytes())
    return dict.fromkeys(names, length)


def _read(step: Path, name: str, sizes: Mapping[str, int]) -> Any:
    if name not in sizes:
        raise ValueError(f"{step / name} is missing.")
    return json.loads((step / name).read_bytes())


def _check_tree(found: Any, names: Sequence[str]) -> None:
    """Raises a ValueError if orbax would read other arrays, or another format."""
    # In the other formats orbax reads files whose sizes were not checked.
    of_zarr = found["use_ocdbt"] is False and found["use_zarr3"] is False
    keys = [[key["key"] for key in entry["key_metadata"]] for entry in found["tree_metadata"].values()]
    if not of_zarr or sorted(keys) != sorted([name] for name in names):
        raise ValueError("_METADATA does not describe the arrays of the network.")


def _checkpointer() -> Any:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False))


def _stored(leaf: Any) -> Any:
    return np.uint8 if leaf.dtype.name in _AS_BYTES else leaf.dtype


def _to_bytes(leaf: Any) -> Any:
    if leaf.dtype.name not in _AS_BYTES:
        return leaf
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf).view(np.uint8)
    # A bitcast of 2-bit or 4-bit values to bytes would merge values and change the shape, so cast them.
    return leaf.astype(np.uint8) if "uint" in leaf.dtype.name else jax.lax.bitcast_convert_type(leaf, np.uint8)


def _from_bytes(array: Any, leaf: Any) -> Any:
    if leaf.dtype.name not in _AS_BYTES or array.dtype != np.uint8:
        return array
    if not isinstance(array, jax.Array):
        return array.view(leaf.dtype)
    return array.astype(leaf.dtype) if "uint" in leaf.dtype.name else jax.lax.bitcast_convert_type(array, leaf.dtype)
