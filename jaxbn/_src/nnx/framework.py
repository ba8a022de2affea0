"""NNX as a `Framework`: a model is a module."""

from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx, traverse_util

from jaxbn._src.framework.framework import Framework, ModelLayer
from jaxbn._src.methods.protocol import State
from jaxbn._src.nnx.capture import capture, check_model, find_layers, set_state
from jaxbn._src.nnx.others import joined
from jaxbn._src.nnx.registry import as_norm, in_flax_names

# The variables of a model that a frozen network keeps.
SAVED = nnx.Not(nnx.Any(nnx.RngState, nnx.Intermediate))


def _layers(model: Any) -> dict[str, ModelLayer]:
    return {
        path: ModelLayer(in_flax_names(layer, nnx.BatchStat), as_norm(layer))
        for path, layer in find_layers(model).items()
    }


def _with_states(model: Any, states: Mapping[str, State]) -> Any:
    copy = nnx.clone(model)
    layers = find_layers(copy)
    for path, state in states.items():
        set_state(layers[path], state)
    return copy


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
    layers=_layers,
    with_states=_with_states,
    variables=to_variables,
    params=_params,
)
