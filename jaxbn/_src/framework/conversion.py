"""Other normalization layers in the place of those of a model: their arguments and their variables."""

import functools
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._src.framework.layers import POPULATION


def as_partial(layer: Any, kinds: tuple[type, ...]) -> functools.partial[Any]:
    """A class of layers of one of these kinds, with the arguments that it was given; else a TypeError."""
    bound = functools.partial(layer) if callable(layer) else None
    if bound is None or not isinstance(bound.func, type) or not issubclass(bound.func, kinds):
        raise TypeError(
            f"layer={layer!r} is no class of normalization layers: give one such as BatchRenorm, or a "
            f"functools.partial of one."
        )
    return bound


def carried(path: str, old: Any, names: Iterable[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the layer that takes the place of the one at `path`: those given, and else those of the old.

    `names` are those that it takes; the attributes of the old layer have the same.
    """
    names = set(names)
    if getattr(old, "activation", None) is not None and "activation" not in names:
        raise ValueError(f"{path!r} has its activation inside, and the layer in its place cannot. Leave it out.")
    return {name: getattr(old, name) for name in names if hasattr(old, name)} | dict(given)


def fitting(path: str, given: Any, like: jax.Array, *, copies: bool) -> jax.Array:
    """A value of another model in the shape and dtype that it has in this one; for `copies`, one for each domain."""
    value = jnp.asarray(given, like.dtype)
    if copies and value.shape != like.shape and value.shape == like.shape[1:]:
        return jnp.broadcast_to(value, like.shape)
    if value.shape != like.shape:
        raise ValueError(f"{path!r} is {value.shape} in the variables and {like.shape} in `like`.")
    return value


def takes_over(name: str, old: Container[str], new: Container[str]) -> bool:
    """Whether a layer with the statistics `new` goes on with this one of a layer with the statistics `old`.

    What counts the batches in a window starts with the window.
    """
    starts = "square_window" in new and "square_window" not in old
    return name in POPULATION or name == "count" or not starts
