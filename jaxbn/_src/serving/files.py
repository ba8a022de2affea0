"""Saves a frozen network to one file: a JSON header, and the bytes of its arrays."""

import os
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxbn._src.framework.framework import Framework
from jaxbn._src.inference import frozen as frozen_network
from jaxbn._src.inference.frozen import Frozen, check_frozen
from jaxbn._src.linen.framework import LINEN
from jaxbn._src.methods.protocol import holds_states
from jaxbn._src.nnx.framework import NNX
from jaxbn._src.pytree.framework import PYTREE
from jaxbn._src.serving import atomic_files
from jaxbn._src.serving.arrays import describe, describe_tree, info_of, pack, shapes_of, to_device, to_host, unpack

KIND = atomic_files.Kind("jaxbn-frozen", 1, "a frozen network")


def save(path: str | os.PathLike[str], frozen: Frozen) -> None:
    """Writes a frozen network, parameters and statistics, to one file. The write is atomic.

    A file that is replaced keeps its permissions. If the path is a symbolic link, its target is replaced.

    Args:
        path: The file; its folder must exist.
        frozen: The result of `freeze`, or of the `finalize` of `make_steps`.

    Returns:
        None.

    Raises:
        TypeError: If `frozen` is not a `Frozen`, or holds anything but arrays in dicts, lists, tuples and
            NamedTuples of jaxbn; the message names it.
        ValueError: If this process does not hold all of an array.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.arange(10.0)[:, None]
        >>> variables, report = jaxbn.linen.postproc(net.apply, net.init(jax.random.key(0), data), [data])
        >>> path = os.path.join(tempfile.mkdtemp(), "network.jaxbn")
        >>> jaxbn.serving.save(path, jaxbn.linen.freeze(variables, report))
    """
    check_frozen(frozen)
    described = describe_tree(frozen.variables)
    arrays = jax.tree.leaves(jax.tree.map_with_path(to_host, frozen.variables))
    atomic_files.write(path, KIND, describe(frozen.info) | {"arrays": described}, *pack(arrays))


def load(path: str | os.PathLike[str], *, like: Any = None) -> Frozen:
    """Reads a frozen network that `save` has written. You may load files that you do not trust.

    Nothing in the file is executed or unpickled, and loading takes no more memory than a few times its size. The
    checksum detects damage, not forgery: anyone can compute it for other numbers.

    Args:
        path: The file.
        like: A model that the network must fit: the variables of a linen model (`net.init`, or its shapes by
            `jax.eval_shape`), an NNX model, or a pytree with states of methods. None: no check.

    Returns:
        The `Frozen`. `net.apply(frozen.variables, ...)` or `eval_step(frozen, batch)` uses it; for NNX
        `jaxbn.nnx.install_frozen(model, frozen)`.

    Raises:
        ValueError: If the file is of another kind, is damaged, incomplete or invalid, was written by a later version,
            or does not fit `like`; the message names the file, or the first variable that differs.
        TypeError: If `like` is none of these.
        FileNotFoundError: If the file does not exist.

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
    header, body = atomic_files.read(path, KIND)
    with atomic_files.parsing(path, KIND):
        arrays, info = unpack(shapes_of(header["arrays"]), body), info_of(header)
    frozen = Frozen(jax.tree.map_with_path(to_device, arrays), info)
    check_fits(frozen, like)
    return frozen


def check_fits(frozen: Frozen, like: Any) -> None:
    """Raises a ValueError if a network does not fit `like`, and a TypeError if `like` is not a model."""
    if like is not None:
        frozen_network.check_fits(framework_of(like), frozen, like)


def framework_of(like: Any) -> Framework:
    """The framework of a model."""
    if isinstance(like, nnx.Module):
        return NNX
    if holds_states(like):
        return PYTREE
    if isinstance(like, Mapping):
        return LINEN
    raise TypeError(
        f"`like` must be the variables of a linen model, an NNX model, or a pytree with states of methods; got "
        f"{type(like)}."
    )
