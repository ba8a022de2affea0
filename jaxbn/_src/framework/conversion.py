"""Replacement of normalization layers: the arguments and the variables of the new layers."""

import functools
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._src.framework.layers import POPULATION


def as_partial(layer: Any, kinds: tuple[type, ...]) -> functools.partial[Any]:
    """The class of layers as a partial; a TypeError if it is not a subclass of one of these."""
    bound = functools.partial(layer) if callable(layer) else None
    if bound is None or not isinstance(bound.func, type) or not issubclass(bound.func, kinds):
        raise TypeError(
            f"layer={layer!r} is not a class of normalization layers: pass one such as BatchRenorm, or a "
            f"functools.partial of one."
        )
    return bound


def carried(path: str, old: Any, names: Iterable[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the layer that replaces the one at `path`: those given, and else the attributes of the old one.

    `names` are the arguments that the new layer takes.
    """
    names = set(names)
    if getattr(old, "activation", None) is not None and "activation" not in names:
        raise ValueError(f"{path!r} has an activation, which the new layer does not support. Exclude it with paths=.")
    return {name: getattr(old, name) for name in names if hasattr(old, name)} | dict(given)


def fitting(path: str, given: Any, like: jax.Array, *, copies: bool) -> jax.Array:
    """A value of another model in the shape and dtype of this one; with `copies` it may be copied for each domain."""
    value = jnp.asarray(given, like.dtype)
    if copies and value.shape != like.shape and value.shape == like.shape[1:]:
        return jnp.broadcast_to(value, like.shape)
    if value.shape != like.shape:
        raise ValueError(f"{path!r} is {value.shape} in the variables and {like.shape} in `like`.")
    return value


def takes_over(name: str, old: Container[str], new: Container[str]) -> bool:
    """Whether a layer with the statistics `new` takes over this statistic of a layer with the statistics `old`.

    Counters of the batches in a window start together with the window.
    """
    starts = "square_window" in new and "square_window" not in old
    return name in POPULATION or name == "count" or not starts
