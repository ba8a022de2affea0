"""A frozen network as one sealed file, with its arrays in Flax's msgpack format."""

import os
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx, serialization

from jaxbn.linen.freeze import check_fits as check_fits_linen
from jaxbn.nnx.freeze import check_fits as check_fits_nnx
from jaxbn.population.frozen import Frozen, check_frozen
from jaxbn.serving import sealed
from jaxbn.serving.arrays import describe, info_of, to_device, to_host

KIND = sealed.Kind("jaxbn-frozen", 1, "a frozen network")


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
    arrays = serialization.msgpack_serialize(jax.tree.map_with_path(to_host, frozen.variables))
    sealed.write(path, KIND, describe(frozen.info), arrays)


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
    header, arrays = sealed.read(path, KIND)
    variables = jax.tree.map_with_path(to_device, serialization.msgpack_restore(arrays))
    frozen = Frozen(variables, info_of(header))
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
