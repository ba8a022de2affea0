"""Conversion of an NNX model to other normalization layers."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

from jaxbn._src.framework.conversion import Variable, convert
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
    held = dict(_variables(converted))
    values = convert((variable for _, variable in _variables(model)), held.values(), "the model as it was")
    for path, variable in nnx.to_flat_state(nnx.state(converted, SAVED)):
        if held[path].place in values:
            variable[...] = values[held[path].place]
    return converted


def _variables(model: Any) -> Iterator[tuple[tuple[Any, ...], Variable]]:
    """Each variable by its path."""
    found = {path: registered for path, module in nnx.iter_modules(model) if (registered := known(module))}
    layers: dict[Any, dict[Any, str]] = {
        path: {theirs: ours for ours, theirs in layer.names.items()} for path, layer in found.items()
    }
    flat = nnx.to_flat_state(nnx.state(model, SAVED))
    statistics: dict[tuple[Any, ...], set[str]] = {}
    for path, variable in flat:
        if path[:-1] in layers and isinstance(variable, nnx.BatchStat):
            statistics.setdefault(path[:-1], set()).add(str(layers[path[:-1]].get(path[-1], path[-1])))
    for path, variable in flat:
        name = str(layers.get(path[:-1], {}).get(path[-1], path[-1]))
        yield (
            path,
            Variable(
                path="/".join(map(str, (*path[:-1], name))),
                place=(*path[:-1], name),
                name=name,
                statistics=frozenset(statistics.get(path[:-1], ())),
                is_statistic=isinstance(variable, nnx.BatchStat),
                value=variable.get_value(),
            ),
        )
