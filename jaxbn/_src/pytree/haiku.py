"""Haiku's own BatchNorm, by an interceptor of its calls. Haiku is not imported here, but found if the user did.

The averages of a layer `net/batch_norm` are in the states of `net/batch_norm/~/mean_ema` and `.../var_ema`. A capture
adds a slot to the states of `net/batch_norm` itself.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._src.framework.called import CalledNorm, Operands
from jaxbn._src.framework.layers import Slot, captured_call
from jaxbn._src.framework.method import Method
from jaxbn._src.methods.batch_norm import BatchNormState, batch_norm
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics.averages import LONG
from jaxbn._src.pytree.library import Library, path_of

_MEAN, _VAR, _SLOT = "/~/mean_ema", "/~/var_ema", "jaxbn_slot"


def _is_states(node: Any) -> bool:
    """Whether this is the states of a transform with a BatchNorm."""
    return isinstance(node, Mapping) and any(isinstance(key, str) and key.endswith(_MEAN) for key in node)


def _layers(node: Any) -> list[str]:
    if not _is_states(node):
        return []
    return [key.removesuffix(_MEAN) for key in node if key.endswith(_MEAN) and "average" in node[key]]


def _like(node: Any, content: dict[str, Any]) -> Any:
    """The content in the class of the node: Haiku's states may be immutable."""
    return type(node)(content)


def _find(tree: Any) -> dict[str, State]:
    found: dict[str, State] = {}
    for keys, node in jax.tree.leaves_with_path(tree, is_leaf=_is_states):
        for name in _layers(node):
            averages = [node[f"{name}{part}"]["average"] for part in (_MEAN, _VAR)]
            found[path_of(keys, name)] = BatchNormState(*averages)
    return found


def _map(function: Callable[[str, str, dict[str, Any]], Any], tree: Any) -> Any:
    """A new tree with the states that `function(path, name, states)` returns for each layer."""

    def new(keys: Any, node: Any) -> Any:
        for name in _layers(node):
            node = _like(node, function(path_of(keys, name), name, dict(node)))
        return node

    return jax.tree.map_with_path(new, tree, is_leaf=_is_states)


def _with_states(tree: Any, states: Mapping[str, State]) -> Any:
    def new(path: str, name: str, held: dict[str, Any]) -> dict[str, Any]:
        if path in states:
            for part, value in ((_MEAN, states[path].mean), (_VAR, states[path].var)):
                old = held[f"{name}{part}"]
                # The averages continue from here without debiasing.
                counter = jnp.full_like(old["counter"], LONG)
                held[f"{name}{part}"] = _like(old, {"hidden": value, "average": value, "counter": counter})
        return held

    return _map(new, tree)


def _with_slots(tree: Any, slots: Mapping[str, Slot]) -> Any:
    def new(path: str, name: str, held: dict[str, Any]) -> dict[str, Any]:
        return {**held, name: {**held.get(name, {}), _SLOT: slots[path]}}

    return _map(new, tree)


def _without_slots(tree: Any) -> Any:
    def without_slot(states: Any) -> Any:
        return _like(states, {key: leaf for key, leaf in states.items() if key != _SLOT})

    def strip(node: Any) -> Any:
        if not _is_states(node):
            return node
        # An entry that only the slot has made is removed with it.
        held = {name: states if _SLOT not in states else without_slot(states) for name, states in node.items()}
        return _like(node, {name: states for name, states in held.items() if states or not node[name]})

    return jax.tree.map(strip, tree, is_leaf=_is_states)


def _capturing() -> contextlib.AbstractContextManager[Any]:
    haiku = sys.modules.get("haiku")
    return contextlib.nullcontext() if haiku is None else haiku.intercept_methods(functools.partial(_intercept, haiku))


def _intercept(haiku: Any, next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Runs in the place of every method of every module, and changes the calls of BatchNorm only."""
    if context.orig_class is not haiku.BatchNorm or context.method_name != "__call__":
        return next_call(*args, **kwargs)
    # `get_state` would add an empty entry to the states of a layer that has no slot, such as one of a teacher.
    slot = context.module.state_dict().get(f"{context.module.module_name}/{_SLOT}")
    if slot is None:
        return next_call(*args, **kwargs)
    return _captured(haiku, context.module, slot, next_call, *args, **kwargs)


def _captured(
    haiku: Any,
    module: Any,
    slot: Slot,
    next_call: Callable[..., Any],
    inputs: Any,
    is_training: bool,
    test_local_stats: bool = False,
    scale: Any = None,
    offset: Any = None,
) -> Any:
    reduced = module.axis if module.axis is not None else _others(inputs.ndim, module.channel_index)
    axis = tuple(a for a in range(inputs.ndim) if a not in {b % inputs.ndim for b in reduced})
    features = _axes.feature_shape(inputs.shape, axis)
    names = module.cross_replica_axis
    method = Method(
        batch_norm, momentum=None, epsilon=module.eps, axis=axis,
        axis_name=tuple(names) if isinstance(names, list) else names,
        axis_index_groups=module.cross_replica_axis_index_groups,
    )  # fmt: skip

    def normalize(state: State, x: jax.Array, *, mask: Any, residual: Any) -> Any:
        """Runs Haiku's own layer in evaluation, on these statistics."""
        statistics = {f"{module.module_name}{_MEAN}": state.mean, f"{module.module_name}{_VAR}": state.var}

        def getter(next_getter: Callable[[Any], Any], value: Any, context: Any) -> Any:
            ours = statistics.get(context.module_name) if context.name == "average" else None
            return next_getter(value if ours is None else ours.reshape(value.shape))

        with haiku.custom_getter(getter, params=False, state=True):
            return next_call(x, False, False, scale, offset)

    averages = (ema.average.reshape(features) for ema in (module.mean_ema, module.var_ema))
    settings = method.keywords
    return captured_call(
        dataclasses.replace(slot, index=slot.index.reshape(features)),
        method,
        not (is_training or test_local_stats),
        CalledNorm(
            slot.layer.path, method(), BatchNormState(*averages), normalize, axis, settings["axis_name"],
            settings["axis_index_groups"],
        ),
        Operands(jnp.asarray(inputs), None, None, {}),
        lambda: next_call(inputs, is_training, test_local_stats, scale, offset),
    )  # fmt: skip


def _others(ndim: int, channel: int) -> list[int]:
    """All axes but that of the channels."""
    return [a for a in range(ndim) if a != channel % ndim]


HAIKU = Library(_find, _with_states, _with_slots, _without_slots, _capturing)
