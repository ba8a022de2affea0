"""A frozen network whose arrays are spread over devices and processes, as a folder.

Each save writes a step, a folder of its own, in which orbax has every process store the shards that it holds. The
manifest is a sealed file: it names the step and has the size and the checksum of each file in it. Process 0 reads the
step back and moves the manifest into place when all have written, so that at any moment it names the old network or the
new one, whole.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from flax import nnx, traverse_util

from jaxbn._src.framework.processes import exchange, is_here
from jaxbn._src.inference.frozen import Frozen, check_frozen
from jaxbn._src.nnx.framework import SAVED
from jaxbn._src.serving import chunks, sealed
from jaxbn._src.serving.arrays import check_dtype, describe, describe_tree, info_of, shapes_of
from jaxbn._src.serving.files import check_fits

KIND = sealed.Kind("jaxbn-sharded", 1, "the manifest of a network")
MANIFEST = "manifest.jaxbn"


def save_sharded(folder: str | os.PathLike[str], frozen: Frozen) -> None:
    """Writes a frozen network to a folder, each process the shards that it holds; what stood there is replaced at once.

    Every process calls it, with a folder that all of them see. The network that was there before stays on the disk, for
    those who are reading it, until the next save. What a killed save leaves is in the way of nothing.

    Args:
        folder: It is made if it is not there; the one that it is in must exist.
        frozen: Of `freeze`, or of the `finalize` of `make_steps`. Arrays may be spread over any devices. What several
            processes hold is taken from one: `jaxbn.check_replicas` tells whether they agree.

    Returns:
        None.

    Raises:
        TypeError: If `frozen` is no `Frozen`, or holds something else than arrays in dicts, lists and tuples, which is
            named.
        ValueError: If another process does not see the folder, or its manifest is a symbolic link.
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
        if jax.process_index() == 0:
            shutil.rmtree(step, ignore_errors=True)
        raise
    _together(lambda: _publish(folder, step, frozen))


def load_sharded(folder: str | os.PathLike[str], *, like: Any = None) -> Frozen:
    """Reads a frozen network that `save_sharded` has written, onto the devices that `like` says.

    It does not matter on how many processes and devices it was saved. If there are several now, every process calls it.
    You may load folders that you do not trust: nothing in them is executed or unpickled, no file outside is read, and
    what is read takes no more memory than the files do, on each device that is to hold it.

    Args:
        folder: The folder.
        like: A model that the network must fit, as in `load`. Where its leaves have a `sharding`, as arrays have, and
            `jax.ShapeDtypeStruct(shape, dtype, sharding=...)`, the network takes it over. None: nothing is checked, and
            all arrays are whole on the default device, of each process.

    Returns:
        The `Frozen`, as `load` gives it.

    Raises:
        ValueError: If the folder holds no such network, a file is damaged, cut off, missing, forged or not part of it,
            it was written by a later version, or it does not fit `like`; the message names the file, or the first
            variable that differs.
        TypeError: If `like` is no model.
        FileNotFoundError: If there is no folder.
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
    header = _together(lambda: _read_manifest(folder) if jax.process_index() == 0 else None)[0]
    frozen = Frozen(shapes_of(header["arrays"]), info_of(header))
    step = folder / str(header["step"])
    _together(lambda: _check(step, header, frozen, like))
    _together(lambda: _check_chunks(step, frozen))
    return Frozen(_restore(step, frozen.variables, like), frozen.info)


def _together(work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on each process, when all have done it; if it failed on one, all raise."""
    result, error = None, None
    try:
        result = work()
    except Exception as raised:  # whatever it is, the others must hear of it
        error = raised
    failed = None if error is None else f"{type(error).__name__}: {error}"
    said = [json.loads(message) for message in exchange(json.dumps([result, failed]).encode())]
    if error is not None:
        raise error
    for process, (_, failed) in enumerate(said):
        if failed is not None:
            raise RuntimeError(f"Process {process} failed: {failed}")
    return [result for result, _ in said]


# --- Saving -----------------------------------------------------------------------------------------------------------


def _check_network(folder: Path, frozen: Frozen) -> None:
    check_frozen(frozen)
    describe_tree(frozen.variables)
    if (folder / MANIFEST).is_symlink():
        raise ValueError(f"{folder / MANIFEST} is a symbolic link, and a save would write elsewhere: remove it.")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {folder.parent} to save {folder.name} in.")


def _begin(folder: Path) -> str:
    """The name of a step; process 0, whose name is taken, makes its folder."""
    name = f"step-{secrets.token_hex(8)}"
    if jax.process_index() == 0:
        (folder / name).mkdir(parents=True)
    return name


def _check_seen(step: Path) -> None:
    if not step.is_dir():
        raise ValueError(f"Process {jax.process_index()} does not see {step}: save to a folder that all processes see.")


def _store(step: Path, leaves: list[Any]) -> None:
    """Every process its shards; process 0 what each of them has whole. What is empty is known from the manifest."""
    several = jax.process_count() > 1
    chunks.store(step, [np.asarray(leaf) if several and is_here(leaf) else leaf for leaf in leaves])


def _publish(folder: Path, step: Path, frozen: Frozen) -> None:
    """Reads back and seals what all have written, and moves the manifest to it; the step before the last one goes."""
    if jax.process_index():
        return
    try:
        last = _read_manifest(folder)
    except (ValueError, FileNotFoundError):  # there is none to keep
        last = {"step": None, "before": None}
    arrays, sizes = describe_tree(frozen.variables), _files_in(step)
    files = {name: [size, _digest(step / name)] for name, size in sizes.items()}
    for path in (step, *step.rglob("*")):
        sealed.see_through(path)
    chunks.check(step, jax.tree.leaves(shapes_of(arrays)), sizes)
    header = {"step": step.name, "before": last["step"], "arrays": arrays, "files": files}
    sealed.write(folder / MANIFEST, KIND, describe(frozen.info) | header)
    if last["before"] is not None:
        shutil.rmtree(folder / last["before"], ignore_errors=True)


def _files_in(step: Path) -> dict[str, int]:
    """The files of a step, and their sizes; a ValueError if there is a symbolic link, which may lead anywhere."""
    found = {}
    for path in (step, *sorted(step.rglob("*"))):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is no file and no folder, of which the network in {step.parent} consists.")
        if path.is_file():
            found[path.relative_to(step).as_posix()] = path.stat().st_size
    return found


# --- Loading ----------------------------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if folder.is_dir() and (path.is_symlink() or not path.is_file()):
        raise ValueError(f"{folder} holds no network: there is no {MANIFEST} in it.")
    header, _ = sealed.read(path, KIND)
    with sealed.understanding(path, KIND):
        for name in (header["step"], header["before"]):
            if name is not None and not re.fullmatch("step-[0-9a-f]{16}", name):  # which may be deleted
                raise ValueError(f"it names {name!r}, which is no step of a network.")
        jax.tree.leaves(shapes_of(header["arrays"]))
        info_of(header)
        for size, digest in header["files"].values():
            if type(size) is not int or type(digest) is not str:
                raise ValueError("of each file it has the size and the checksum.")
    return header


def _check(step: Path, header: dict[str, Any], frozen: Frozen, like: Any) -> None:
    """Checks the network against the model, and this process' share of the files against their checksums."""
    check_fits(frozen, like)
    jax.tree.map_with_path(lambda path, leaf: check_dtype(path, leaf.dtype), frozen.variables)
    files, found = header["files"], _files_in(step)
    for name in files.keys() - found.keys():
        raise ValueError(f"{step / name} is missing, which the network in {step.parent} consists of.")
    for name in found.keys() - files.keys():
        raise ValueError(f"{step / name} is not in the manifest of the network.")
    for name, (size, digest) in list(files.items())[jax.process_index() :: jax.process_count()]:
        if found[name] != size or _digest(step / name) != digest:
            raise ValueError(f"{step / name} is damaged or cut off: its checksum is not that of its content.")


def _check_chunks(step: Path, frozen: Frozen) -> None:
    """Checks what the files say of the arrays; when all processes know that the checksums are right."""
    with sealed.understanding(step, KIND._replace(noun="a step of a network")):
        chunks.check(step, jax.tree.leaves(frozen.variables), _files_in(step))


def _restore(step: Path, wanted: Any, like: Any) -> Any:
    """The arrays in the structure `wanted`, where `like` has them."""
    named = jax.tree.leaves_with_path(wanted)
    shardings = [None] * len(named) if like is None else list(map(_sharding_of, _values(like)))
    try:
        leaves = chunks.restore(step, named, shardings)
    except OSError:
        raise
    except Exception as error:  # of orbax and what it is made of, on files whose checksums are right
        raise ValueError(f"{step} was not read: {type(error).__name__}, {error}") from error
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def _values(like: Any) -> list[Any]:
    """The leaves of a model, arrays or their shapes, in the order of those of a network that fits."""
    if isinstance(like, nnx.Module):
        flat = nnx.to_flat_state(nnx.state(like, SAVED))
        like = traverse_util.unflatten_dict({tuple(map(str, path)): leaf.get_value() for path, leaf in flat})
    return jax.tree.leaves(flax.core.meta.unbox(flax.core.unfreeze(like)))


def _sharding_of(leaf: Any) -> Any:
    """Where a leaf wants to be; arrays that are nowhere in particular follow others, and so do those in their place."""
    return None if isinstance(leaf, jax.Array) and not leaf.committed else getattr(leaf, "sharding", None)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
