"""A frozen network as one sealed file: a header of JSON, and its arrays as they are in memory."""

import os
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jaxbn._src.inference.frozen import Frozen, check_frozen
from jaxbn._src.linen.freeze import check_fits as check_fits_linen
from jaxbn._src.nnx.freeze import check_fits as check_fits_nnx
from jaxbn._src.serving import sealed
from jaxbn._src.serving.arrays import describe, describe_tree, info_of, pack, shapes_of, to_device, to_host, unpack

KIND = sealed.Kind("jaxbn-frozen", 1, "a frozen network")


def save(path: str | os.PathLike[str], frozen: Frozen) -> None:
    """Writes a frozen network, parameters and statistics, to one file; what stood there is replaced at once or not.

    The file keeps the permissions of the one that it replaces, and a symbolic link goes on leading to it.

    Args:
        path: The file; its folder must exist.
        frozen: Of `freeze`, or of the `finalize` of `make_steps`.

    Returns:
        None.

    Raises:
        TypeError: If `frozen` is no `Frozen`, or holds something else than arrays in dicts, lists and tuples, which is
            named.
        ValueError: If an array is not whole on this process.

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
    sealed.write(path, KIND, describe(frozen.info) | {"arrays": described}, *pack(arrays))


def load(path: str | os.PathLike[str], *, like: Any = None) -> Frozen:
    """Reads a frozen network that `save` has written. You may load files that you do not trust.

    Nothing in the file is executed or unpickled, and reading takes no more memory than a few times its size. That the
    numbers are those that somebody has trained is not in a checksum, which anyone can make.

    Args:
        path: The file.
        like: A model that the network must fit: the variables of a linen model (`net.init`, or its shapes by
            `jax.eval_shape`), or an NNX model. None: nothing is checked here.

    Returns:
        The `Frozen`. `net.apply(frozen.variables, ...)` or `eval_step(frozen, batch)` uses it; for NNX
        `jaxbn.nnx.install_frozen(model, frozen)`.

    Raises:
        ValueError: If the file is none of these, is damaged, cut off or forged, was written by a later version, or does
            not fit `like`; the message names the file, or the first variable that differs.
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
    header, body = sealed.read(path, KIND)
    with sealed.understanding(path, KIND):
        arrays, info = unpack(shapes_of(header["arrays"]), body), info_of(header)
    frozen = Frozen(jax.tree.map_with_path(to_device, arrays), info)
    check_fits(frozen, like)
    return frozen


def check_fits(frozen: Frozen, like: Any) -> None:
    """Raises a ValueError if a network does not fit what `load` was given, a TypeError if that is no model."""
    if isinstance(like, nnx.Module):
        check_fits_nnx(frozen, like)
    elif isinstance(like, Mapping):
        check_fits_linen(frozen, like)
    elif like is not None:
        raise TypeError(f"`like` is the variables of a linen model, or an NNX model; given: {type(like)}.")
