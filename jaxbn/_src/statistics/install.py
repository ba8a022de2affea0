"""Moments that are about to be installed, or averaged: checked against the layers that there are."""

from collections.abc import Mapping

import jax.numpy as jnp

from jaxbn._src import internals as _internals
from jaxbn._src.framework.layer_paths import AS_THEY_ARE, LayerPath, check_single
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.statistics.estimators import is_single


def checked(moments: Mapping[str, Moments], states: Mapping[str, State]) -> Mapping[str, Moments]:
    """The moments, if all are of layers that there are and have their features; else a ValueError."""
    for path in moments:
        if path not in states:
            raise ValueError(f"{path!r} is not a normalization layer; there are {', '.join(map(repr, states))}.")
        found, features = moments[path].mean.shape, states[path].mean.shape
        if found != features:
            raise ValueError(f"The moments of {path!r} are for features {found}, its statistics for {features}.")
    return moments


def installable(moments: Mapping[str, Moments], states: Mapping[str, State]) -> Mapping[str, Moments]:
    """The moments, if they are `checked`, and finite in the dtypes of the statistics, as far as they are known yet."""
    for path, found in checked(moments, states).items():
        # Statistics from before a pass go back as they were, NaN too.
        as_they_are = isinstance(path, LayerPath) and path.method is AS_THEY_ARE
        if as_they_are or any(_internals.is_tracer(part) for part in found):
            continue
        check_single(path, is_single(found), "The moments are of")
        state = states[path]
        rounded = (part.astype(of.dtype) for part, of in ((found.mean, state.mean), (found.var, state.var)))
        if any((~jnp.isfinite(part) & (found.count > 0)).any() for part in rounded):
            raise ValueError(
                f"The moments of {path!r} are not finite, or not in {state.var.dtype}, the dtype of its "
                f"statistics. Look for NaN, infinity and very large values in the data and in the parameters."
            )
    return moments
