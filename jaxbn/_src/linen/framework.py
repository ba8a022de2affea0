"""Linen as a `Framework`: a model is the dict of all its variables."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax

from jaxbn._src.framework.framework import Framework, ModelLayer
from jaxbn._src.framework.registry import REGISTRY
from jaxbn._src.linen.capture import capture
from jaxbn._src.linen.layers import STATISTICS
from jaxbn._src.linen.variables import check_variables, find_layers, keys
from jaxbn._src.methods.protocol import State


def _split(variables: Any) -> tuple[None, Any]:
    # There is no static part: the module of linen is known only to the call.
    return None, flax.core.unfreeze(variables)


def _merge(structure: None, variables: Any) -> Any:
    return variables


def _layers(variables: Any) -> dict[str, ModelLayer]:
    return {path: ModelLayer(statistics) for path, statistics in find_layers(variables).items()}


def with_states(variables: Any, states: Mapping[str, State]) -> dict[str, Any]:
    """New variables with these statistics, boxed as they were."""
    variables = flax.core.unfreeze(variables)
    flat = flax.traverse_util.flatten_dict(variables[STATISTICS])
    names: dict[Any, list[str]] = {}
    for *place, name in flat:
        names.setdefault(tuple(place), []).append(name)
    for path, state in states.items():
        # A registered class may have other names for the mean and the variance than the state.
        own = REGISTRY.names_in(names[keys(path)])
        for name, leaf in state._asdict().items():
            if leaf is not None:
                key = (*keys(path), own.get(name, name))
                flat[key] = flax.core.meta.replace_boxed(flat[key], leaf)
    return variables | {STATISTICS: flax.traverse_util.unflatten_dict(flat)}


def _variables(variables: Any) -> dict[str, Any]:
    unboxed: dict[str, Any] = flax.core.meta.unbox(flax.core.unfreeze(variables))
    return unboxed


def _params(variables: Any) -> Iterable[str]:
    return flax.traverse_util.flatten_dict(flax.core.unfreeze(variables.get("params", {})), sep="/")


LINEN = Framework(
    check=check_variables,
    split=_split,
    merge=_merge,
    capture=capture,
    layers=_layers,
    with_states=with_states,
    variables=_variables,
    params=_params,
)
