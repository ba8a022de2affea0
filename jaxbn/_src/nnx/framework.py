"""NNX as a `Framework`: a model is a module."""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx, traverse_util

from jaxbn._src.framework.framework import Framework
from jaxbn._src.framework.layer_paths import AS_THEY_ARE, is_put_back
from jaxbn._src.framework.layers import LayerKind
from jaxbn._src.framework.norm_layer import evaluating_method, kind_of, method_of
from jaxbn._src.methods.protocol import NormTransform, State
from jaxbn._src.nnx.capture import (
    capture,
    check_model,
    find_layers,
    find_states,
    set_state,
    state_of,
)
from jaxbn._src.nnx.others import joined
from jaxbn._src.nnx.registry import as_norm

# The variables of a model that a frozen network keeps.
SAVED = nnx.Not(nnx.Any(nnx.RngState, nnx.Intermediate))


def _installing(model: Any, paths: Iterable[str]) -> dict[str, tuple[NormTransform[Any, Any], State]]:
    layers = find_layers(model)
    methods = {path: AS_THEY_ARE if is_put_back(path) else evaluating_method(as_norm(layers[path])) for path in paths}
    return {path: (method(), state_of(layers[path])) for path, method in methods.items()}


def _averaging(model: Any, paths: Iterable[str], momentum: None) -> dict[str, tuple[NormTransform[Any, Any], State]]:
    layers = find_layers(model)
    # Layers of NNX know their momentum, so none is passed.
    return {path: (method_of(as_norm(layers[path]))(), state_of(layers[path])) for path in paths}


def _with_states(model: Any, states: Mapping[str, State]) -> Any:
    copy = nnx.clone(model)
    layers = find_layers(copy)
    for path, state in states.items():
        set_state(layers[path], state)
    return copy


def find_kinds(model: Any) -> dict[str, LayerKind]:
    """The kind of every normalization layer by its path."""
    return {path: kind_of(as_norm(layer)) for path, layer in find_layers(model).items()}


def to_variables(model: Any) -> dict[str, Any]:
    """The variables of a model as nested dicts of arrays, by path; a variable may hold a list, a tuple or a dict."""
    flat = nnx.to_flat_state(nnx.state(model, SAVED))
    return traverse_util.unflatten_dict({tuple(map(str, path)): variable.get_value() for path, variable in flat})


def _params(model: Any) -> Iterable[str]:
    return (joined(path) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)))


NNX = Framework(
    check=check_model,
    split=nnx.split,
    merge=nnx.merge,
    capture=capture,
    states=find_states,
    installing=_installing,
    averaging=_averaging,
    with_states=_with_states,
    kinds=find_kinds,
    variables=to_variables,
    params=_params,
)
