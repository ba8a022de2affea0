"""Linen as a `Framework`: a model is the dict of all its variables."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax

from jaxbn._src.framework.framework import Framework
from jaxbn._src.framework.layer_paths import averaging_method, method_at
from jaxbn._src.framework.layers import LayerKind
from jaxbn._src.framework.method import state_of
from jaxbn._src.framework.registry import REGISTRY
from jaxbn._src.linen.capture import capture
from jaxbn._src.linen.layers import STATISTICS
from jaxbn._src.linen.variables import check_variables, find_states, keys, statistics_by_layer
from jaxbn._src.methods.protocol import NormTransform, State


def _split(variables: Any) -> tuple[None, Any]:
    # There is no static part: the module of linen is known only to the call.
    return None, variables


def _merge(structure: None, variables: Any) -> Any:
    return variables


def _installing(variables: Any, paths: Iterable[str]) -> dict[str, tuple[NormTransform[Any, Any], State]]:
    held = statistics_by_layer(variables)
    transforms = {path: method_at(path, held[path]) for path in paths}
    return {path: (transform, state_of(transform, held[path])) for path, transform in transforms.items()}


def _averaging(variables: Any, paths: Iterable[str], momentum: Any) -> dict[str, tuple[NormTransform[Any, Any], State]]:
    held = statistics_by_layer(variables)
    transforms = {path: averaging_method(path, held[path], momentum) for path in paths}
    return {path: (transform, state_of(transform, held[path])) for path, transform in transforms.items()}


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


def _kinds(variables: Any) -> dict[str, LayerKind]:
    return {}  # variables do not tell


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
    states=find_states,
    installing=_installing,
    averaging=_averaging,
    with_states=with_states,
    kinds=_kinds,
    variables=_variables,
    params=_params,
)
