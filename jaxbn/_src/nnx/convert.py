"""Conversion of an NNX model to other normalization layers."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxbn._src.framework.conversion import fitting, takes_over
from jaxbn._src.framework.layers import AFFINE, POPULATION
from jaxbn._src.nnx.capture import check_model
from jaxbn._src.nnx.framework import SAVED
from jaxbn._src.nnx.registry import known


def convert_norms(model: Any, like: Any) -> Any:
    """Returns the model `like` with the parameters and statistics of a model with other normalization layers.

    From `BatchNorm`, of jaxbn or Flax, to any method and back, to `DomainBatchNorm` each domain with a copy.
    Parameters, means and variances are copied unchanged, so that the outputs in evaluation stay the same if the new
    layers have the epsilon of the old ones, as :func:`replace` ensures. Counters and windows that the old layers lack
    are those of `like`; those that the new layers lack are dropped.

    Args:
        model: The old model.
        like: The new model, with the same attribute names; it is not changed.

    Returns:
        A new model, in the dtypes of `like`.

    Raises:
        ValueError: Names the first variable that is missing on either side or has another shape.

    Example:
        >>> trained = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> y = trained(jnp.array([[1.0], [3.0]]))
        >>> like = jaxbn.nnx.DomainBatchNorm(1, num_domains=2, rngs=nnx.Rngs(0))
        >>> jaxbn.nnx.convert_norms(trained, like).mean[...].ravel().round(3)
        Array([0.02, 0.02], dtype=float32)
    """
    check_model(model)
    check_model(like)
    converted = nnx.clone(like)
    given = _in_flax_names(model)
    old, new = _statistics(model), _statistics(converted)
    for path, variable in nnx.to_flat_state(nnx.state(converted, SAVED)):
        name, layer, source = "/".join(map(str, path)), path[:-1], given.pop(path, None)
        if source is None and not _is_optional(path, new):
            raise ValueError(f"{name!r} of `like` has no counterpart in the model as it was.")
        if source is not None and takes_over(str(path[-1]), old.get(layer, ()), new.get(layer, ())):
            given_value, value = jnp.asarray(source[...]), jnp.asarray(variable[...])
            variable[...] = fitting(name, given_value, value, copies=layer in new)
    unused = ["/".join(map(str, path)) for path in given if path[-1] not in old.get(path[:-1], set()) - set(POPULATION)]
    if unused:
        raise ValueError(f"{', '.join(map(repr, unused))} of the model as it was have no counterpart in `like`.")
    return converted


def _in_flax_names(model: Any, kind: Any = SAVED) -> dict[tuple[Any, ...], Any]:
    """The variables by path; those of registered classes under the names of Flax's layer."""
    layers = {path: registered for path, module in nnx.iter_modules(model) if (registered := known(module))}
    own: dict[Any, dict[Any, str]] = {
        path: {theirs: name for name, theirs in layer.names.items()} for path, layer in layers.items()
    }
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {(*path[:-1], own.get(path[:-1], {}).get(path[-1], path[-1])): variable for path, variable in flat}


def _statistics(model: Any) -> dict[tuple[Any, ...], set[str]]:
    """The names of the statistics of each normalization layer, by its path."""
    paths = list(_in_flax_names(model, nnx.BatchStat))
    layers = {path[:-1] for path in paths if path[-1] == "var"}
    return {layer: {str(path[-1]) for path in paths if path[:-1] == layer} for layer in layers}


def _is_optional(path: tuple[Any, ...], statistics: dict[tuple[Any, ...], set[str]]) -> bool:
    """Whether it is a variable of a normalization layer that not all methods have."""
    return path[:-1] in statistics and path[-1] not in (*POPULATION, *AFFINE)
