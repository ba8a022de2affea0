"""Installs moments as the statistics of a model in any framework, after checking them."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._src import internals as _internals
from jaxbn._src.framework.framework import Framework
from jaxbn._src.framework.layer_paths import check_single, is_put_back
from jaxbn._src.framework.processes import check_unstacked
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.statistics.estimators import is_single


def install_moments(framework: Framework, model: Any, moments: Mapping[str, Moments]) -> Any:
    """A new model with the moments as the statistics of their layers; see `jaxbn.linen.install_moments`."""
    layers = framework.layers(model)
    check_unstacked(framework.split(model)[1])
    given = installable(moments, {path: layer.state for path, layer in layers.items()})
    return framework.with_states(model, {path: layers[path].installed(path, found) for path, found in given.items()})


def move_averages(
    framework: Framework, model: Any, moments: Mapping[str, Moments], momentum: Any, samples: ArrayLike | None
) -> Any:
    """A new model with its running averages updated once; see `jaxbn.linen.move_averages`."""
    layers = framework.layers(model)
    given = checked(moments, {path: layer.state for path, layer in layers.items()})
    new = {path: layers[path].averaged(path, found, momentum, samples) for path, found in given.items()}
    return framework.with_states(model, {path: state for path, state in new.items() if state is not None})


def checked(moments: Mapping[str, Moments], states: Mapping[str, State]) -> Mapping[str, Moments]:
    """Returns the moments if they fit existing layers and their features; otherwise raises a ValueError."""
    for path in moments:
        if path not in states:
            raise ValueError(f"{path!r} is not a normalization layer; there are {', '.join(map(repr, states))}.")
        found, features = moments[path].mean.shape, states[path].mean.shape
        if found != features:
            raise ValueError(f"The moments of {path!r} have features {found}, but its statistics have {features}.")
    return moments


def installable(moments: Mapping[str, Moments], states: Mapping[str, State]) -> Mapping[str, Moments]:
    """Returns the moments if they are `checked` and, unless traced, finite in the dtypes of the statistics."""
    for path, found in checked(moments, states).items():
        if is_put_back(path) or any(_internals.is_tracer(part) for part in found):
            continue
        check_single(path, is_single(found), "The moments are of")
        state = states[path]
        # Finite float32 moments may overflow in the dtype of the statistics.
        rounded = (part.astype(of.dtype) for part, of in ((found.mean, state.mean), (found.var, state.var)))
        if any((~jnp.isfinite(part) & (found.count > 0)).any() for part in rounded):
            raise ValueError(
                f"The moments of {path!r} are not finite in {state.var.dtype}, the dtype of its statistics. Look for "
                f"NaN, infinity and very large values in the data and in the parameters."
            )
    return moments
