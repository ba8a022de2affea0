"""Saves a frozen network, whose arrays may be spread over devices and processes, to a folder.

Each save writes a new subfolder, a step, in which each process stores its shards through orbax. The manifest names the
step, with the size and the checksum of each of its files. When all processes have written, process 0 reads the step
back and replaces the manifest. So saving is atomic.
"""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbn._src.framework.processes import agree, is_here
from jaxbn._src.inference.frozen import Frozen, check_frozen
from jaxbn._src.serving import atomic_files, chunks
from jaxbn._src.serving.arrays import check_dtype, describe, describe_tree, info_of, shapes_of
from jaxbn._src.serving.files import check_fits, framework_of

KIND = atomic_files.Kind("jaxbn-sharded", 1, "the manifest of a network")
MANIFEST = "manifest.jaxbn"


def save_sharded(folder: str | os.PathLike[str], frozen: Frozen) -> None:
    """Writes a frozen network to a folder; each process writes its shards. Saving is atomic.

    Call it on all processes, with a folder that all of them can access. The previous network stays on the disk until
    the next save, for programs that are reading it. You may save again after a save was killed.

    Args:
        folder: The folder, which is created if it does not exist; its parent must exist.
        frozen: The result of `freeze`, or of the `finalize` of `make_steps`. Arrays may be spread over any devices. An
            array that several processes hold is written by one: `jaxbn.check_replicas` checks that they agree.

    Returns:
        None.

    Raises:
        TypeError: If `frozen` is not a `Frozen`, or holds anything but arrays in dicts, lists, tuples and
            NamedTuples of jaxbn; the message names it.
        ValueError: If another process cannot access the folder, or its manifest is a symbolic link.
        RuntimeError: If another process failed.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.arange(10.0)[:, None]
        >>> variables, report = jaxbn.linen.postproc(net.apply, net.init(jax.random.key(0), data), [data])
        >>> folder = os.path.join(tempfile.mkdtemp(), "network")
        >>> jaxbn.serving.save_sharded(folder, jaxbn.linen.freeze(variables, report))
    """
    folder = Path(folder).absolute()
    _together(lambda: _check_network(folder, frozen))
    step = folder / _together(lambda: _begin(folder))[0]
    try:
        _together(lambda: _check_seen(step))
        _together(lambda: _store(step, jax.tree.leaves(frozen.variables)))
    except BaseException:
        # The folder is shared, so one process removes it.
        if jax.process_index() == 0:
            shutil.rmtree(step, ignore_errors=True)
        raise
    # Not in the `try`: once the manifest names the step, the step must stay.
    _together(lambda: _publish(folder, step, frozen))


def load_sharded(folder: str | os.PathLike[str], *, like: Any = None) -> Frozen:
    """Reads a frozen network that `save_sharded` has written, onto the devices of `like`.

    The numbers of processes and devices may differ from those of the save. Call it on all processes. You may load
    folders that you do not trust: nothing in them is executed or unpickled, no file outside is read, and the arrays
    take no more memory than the files, on each device that holds them.

    Args:
        folder: The folder.
        like: A model that the network must fit, as in `load`. If its leaves have a `sharding`, as arrays and
            `jax.ShapeDtypeStruct(shape, dtype, sharding=...)` have, the loaded arrays get the same. None: no check, and
            each process holds all arrays on its default device.

    Returns:
        The `Frozen`, as `load` gives it.

    Raises:
        ValueError: If the folder does not hold such a network, if a file is damaged, incomplete, missing, invalid or
            unexpected, if it was written by a later version, or if it does not fit `like`; the message names the file,
            or the first variable that differs.
        TypeError: If `like` is not a model.
        FileNotFoundError: If the folder does not exist.
        RuntimeError: If another process failed.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.arange(10.0)[:, None]
        >>> variables, report = jaxbn.linen.postproc(net.apply, net.init(jax.random.key(0), data), [data])
        >>> folder = os.path.join(tempfile.mkdtemp(), "network")
        >>> jaxbn.serving.save_sharded(folder, jaxbn.linen.freeze(variables, report))
        >>> everywhere = jax.NamedSharding(jax.make_mesh((jax.device_count(),), ("data",)), jax.P())
        >>> shapes = jax.eval_shape(net.init, jax.random.key(0), data)
        >>> like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), shapes)
        >>> frozen = jaxbn.serving.load_sharded(folder, like=like)
        >>> print(f"{frozen.variables['batch_stats']['mean'][0]:.2f}")
        4.50
    """
    folder = Path(folder).absolute()
    # One process reads the manifest, so that all load the same step even if another program is saving.
    header = _together(lambda: _read_manifest(folder) if jax.process_index() == 0 else None)[0]
    frozen = Frozen(shapes_of(header["arrays"]), info_of(header))
    step = folder / str(header["step"])
    _together(lambda: _check(step, header, frozen, like))
    _together(lambda: _check_chunks(step, frozen))
    return Frozen(_restore(step, frozen.variables, like), frozen.info)


def _together(work: Callable[[], Any]) -> list[Any]:
    """Returns the results of `work` on all processes; if it fails on one process, all raise."""
    return agree(lambda: (None, work()))[1]


# --- Saving -----------------------------------------------------------------------------------------------------------


def _check_network(folder: Path, frozen: Frozen) -> None:
    check_frozen(frozen)
    describe_tree(frozen.variables)
    if (folder / MANIFEST).is_symlink():
        raise ValueError(f"{folder / MANIFEST} is a symbolic link, and saving would write elsewhere: remove it.")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {folder.parent} to save {folder.name} in.")


def _begin(folder: Path) -> str:
    """Returns a name for the step; all processes use the name from process 0, which creates the folder."""
    name = f"step-{secrets.token_hex(8)}"
    if jax.process_index() == 0:
        (folder / name).mkdir(parents=True)
    return name


def _check_seen(step: Path) -> None:
    if not step.is_dir():
        raise ValueError(f"Process {jax.process_index()} cannot access {step}: use a folder that all processes share.")


def _store(step: Path, leaves: list[Any]) -> None:
    """Each process writes its shards; process 0 writes arrays that each of them holds. Empty arrays are not written."""
    several = jax.process_count() > 1
    chunks.store(step, [np.asarray(leaf) if several and is_here(leaf) else leaf for leaf in leaves])


def _publish(folder: Path, step: Path, frozen: Frozen) -> None:
    """Checks the files of all processes, replaces the manifest, and removes the step before the last one."""
    if jax.process_index():
        return
    try:
        last = _read_manifest(folder)
    except (ValueError, FileNotFoundError):  # there is no network to keep
        last = {"step": None, "before": None}
    arrays, sizes = describe_tree(frozen.variables), _files_in(step)
    files = {name: [size, _digest(step / name)] for name, size in sizes.items()}
    # All files must be on the disk before a manifest names them.
    for path in (step, *step.rglob("*")):
        atomic_files.fsync(path)
    chunks.check(step, jax.tree.leaves(shapes_of(arrays)), sizes)
    header = {"step": step.name, "before": last["step"], "arrays": arrays, "files": files}
    atomic_files.write(folder / MANIFEST, KIND, describe(frozen.info) | header)
    # Keep the last step: another program may have read the old manifest and be loading it.
    if last["before"] is not None:
        shutil.rmtree(folder / last["before"], ignore_errors=True)


def _files_in(step: Path) -> dict[str, int]:
    """Returns the files of a step and their sizes; a ValueError if there is a symbolic link."""
    found = {}
    for path in (step, *sorted(step.rglob("*"))):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is neither a file nor a folder, so not part of the network in {step.parent}.")
        if path.is_file():
            found[path.relative_to(step).as_posix()] = path.stat().st_size
    return found


# --- Loading ----------------------------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    # If there is no folder, `read` raises a FileNotFoundError.
    if folder.is_dir() and (path.is_symlink() or not path.is_file()):
        raise ValueError(f"{folder} does not hold a network: there is no {MANIFEST} in it.")
    header, _ = atomic_files.read(path, KIND)
    with atomic_files.parsing(path, KIND):
        for name in (header["step"], header["before"]):
            if name is not None and not re.fullmatch("step-[0-9a-f]{16}", name):  # the folder may be deleted
                raise ValueError(f"it names {name!r}, which is not a step of a network.")
        # Parse all parts here, so that errors name the manifest.
        jax.tree.leaves(shapes_of(header["arrays"]))
        info_of(header)
        for size, digest in header["files"].values():
            if type(size) is not int or type(digest) is not str:
                raise ValueError("it must list the size and the checksum of each file.")
    return header


def _check(step: Path, header: dict[str, Any], frozen: Frozen, like: Any) -> None:
    """Checks the network against the model, and this process's share of the files against their checksums."""
    check_fits(frozen, like)
    jax.tree.map_with_path(lambda path, leaf: check_dtype(path, leaf.dtype), frozen.variables)
    files, found = header["files"], _files_in(step)
    for name in files.keys() - found.keys():
        raise ValueError(f"{step / name} is missing, which is part of the network in {step.parent}.")
    for name in found.keys() - files.keys():
        raise ValueError(f"{step / name} is not in the manifest of the network.")
    for name, (size, digest) in list(files.items())[jax.process_index() :: jax.process_count()]:
        if found[name] != size or _digest(step / name) != digest:
            raise ValueError(f"{step / name} {atomic_files.DAMAGED}")


def _check_chunks(step: Path, frozen: Frozen) -> None:
    """Checks the metadata of the arrays, after all processes have checked the checksums."""
    with atomic_files.parsing(step, KIND._replace(noun="a step of a network")):
        chunks.check(step, jax.tree.leaves(frozen.variables), _files_in(step))


def _restore(step: Path, wanted: Any, like: Any) -> Any:
    """Returns the arrays in the structure `wanted`, with the shardings of `like`."""
    named = jax.tree.leaves_with_path(wanted)
    given = wanted if like is None else framework_of(like).variables(like)
    shardings = [None if like is None else _sharding_of(leaf) for leaf in jax.tree.leaves(given)]
    try:
        leaves = chunks.restore(step, named, shardings)
    except OSError:
        raise
    except Exception as error:  # errors of orbax and its dependencies, for files whose checksums are right
        raise ValueError(f"{step} could not be read: {type(error).__name__}, {error}") from error
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def _sharding_of(leaf: Any) -> Any:
    """Returns the sharding of a leaf; None for uncommitted arrays, which JAX may move."""
    return None if isinstance(leaf, jax.Array) and not leaf.committed else getattr(leaf, "sharding", None)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
