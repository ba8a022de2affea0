"""A model with the variables of the same model with other normalization layers."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxbn.nnx.capture import find_layers
from jaxbn.nnx.freeze import SAVED
from jaxbn.population.layers import fitting

# What one kind of layer keeps beside mean and var, and another does not.
_COUNTERS = {"count", "step"}


def convert_norms(model: Any, like: Any) -> Any:
    """The model `like` with the parameters and statistics of the same model with other normalization layers.

    From `BatchNorm`, of jaxbn or Flax, to `BatchRenorm` and back, and from any to `DomainBatchNorm`, each domain with a
    copy. In training, give the new layers the epsilon of the old ones. Counters that the old layers did not have are
    those of `like`; those that the new ones do not have are left out.

    Args:
        model: The model as it was.
        like: The model as it is to be; it is left untouched. Its layers are attributes of the same names.

    Returns:
        A new model, in the dtypes of `like`.

    Raises:
        ValueError: If a variable has another shape, or is missing on either side, which is named.

    Example:
        >>> trained = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> y = trained(jnp.array([[1.0], [3.0]]))
        >>> like = jaxbn.nnx.DomainBatchNorm(1, num_domains=2, rngs=nnx.Rngs(0))
        >>> jaxbn.nnx.convert_norms(trained, like).mean[...].ravel().round(3)
        Array([0.02, 0.02], dtype=float32)
    """
    converted = nnx.clone(like)
    given = dict(nnx.to_flat_state(nnx.state(model, SAVED)))
    layers = set(find_layers(converted))
    for path, variable in nnx.to_flat_state(nnx.state(converted, SAVED)):
        name, source = "/".join(map(str, path)), given.pop(path, None)
        if source is None and path[-1] not in _COUNTERS:
            raise ValueError(f"{name!r} of `like` has no counterpart in the model as it was.")
        if source is not None:
            copies = "/".join(map(str, path[:-1])) in layers
            given_value, value = jnp.asarray(source[...]), jnp.asarray(variable[...])
            variable[...] = fitting(name, given_value, value, copies=copies)
    unused = ["/".join(map(str, path)) for path in given if path[-1] not in _COUNTERS]
    if unused:
        raise ValueError(f"{', '.join(map(repr, unused))} of the model as it was have no counterpart in `like`.")
    return converted
