"""Replacement of normalization layers: the arguments and the variables of the new layers."""

import functools
from collections.abc import Container, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._src.framework.layers import AFFINE, POPULATION


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


class Variable(NamedTuple):
    """One variable of a model whose normalization layers are converted."""

    path: str  # for messages
    place: Hashable  # its module and its name, without the class of a normalization layer: equal in both models
    name: str  # in Flax's layer
    statistics: frozenset[str]  # the statistics of its normalization layer by name; empty for other modules
    is_statistic: bool
    value: Any

    @property
    def is_optional(self) -> bool:
        """Whether it is a variable of a normalization layer that not all methods have."""
        return bool(self.statistics) and self.name not in (*POPULATION, *AFFINE)


def convert(given: Iterable[Variable], wanted: Iterable[Variable], model: str) -> dict[Hashable, jax.Array]:
    """The values for a model with other normalization layers.

    Args:
        given: The variables of the old model.
        wanted: The variables of the new model.
        model: How messages name the old model.

    Returns:
        The values by place, in the shapes and dtypes of the new model; variables that keep theirs are left out.

    Raises:
        ValueError: Names the first variable that is missing on either side or has another shape.
    """
    sources, converted = {variable.place: variable for variable in given}, {}
    for new in wanted:
        old = sources.pop(new.place, None)
        if old is None and not new.is_optional:
            raise ValueError(f"{new.path!r} of `like` has no counterpart in {model}.")
        if old is not None and (not new.is_statistic or takes_over(new.name, old.statistics, new.statistics)):
            converted[new.place] = _fitting(new.path, old.value, new.value, copies=bool(new.statistics))
    # Statistics that only some methods have may be dropped; any other variable left over is a mistake.
    unused = [old.path for old in sources.values() if not (old.is_statistic and old.is_optional)]
    if unused:
        raise ValueError(f"{', '.join(map(repr, unused))} of {model} have no counterpart in `like`.")
    return converted


def _fitting(path: str, given: Any, like: Any, *, copies: bool) -> jax.Array:
    """A value of another model in the shape and dtype of this one; with `copies` it may be copied for each domain."""
    like = jnp.asarray(like)
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
    # Batch renorm has a `step` too, but it counts batches that are not in the new windows.
    starts = "square_window" in new and "square_window" not in old
    return name in POPULATION or name == "count" or not starts
