"""Equinox's own BatchNorm, by a class with another call in a copy of the model. jaxbn does not import Equinox itself.

The statistics are in an `eqx.nn.State`, which must be in the same tree as the model, under an index that the layer has.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._src.framework.called import CalledNorm, Operands
from jaxbn._src.framework.layers import Slot, captured_call
from jaxbn._src.framework.method import Method
from jaxbn._src.methods.batch_norm import BatchNormState, batch_norm
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics.averages import LONG
from jaxbn._src.pytree.library import Library, path_of


def _nn() -> Any:
    """The module `equinox.nn`; None if Equinox is not in use."""
    equinox = sys.modules.get("equinox")
    return equinox and equinox.nn


def _is_layer(node: Any) -> bool:
    return type(node) is _nn().BatchNorm


def _is_state(node: Any) -> bool:
    return isinstance(node, _nn().State)


def _is_either(node: Any) -> bool:
    return _is_layer(node) or _is_state(node)


def _index(layer: Any) -> Any:
    """The index of the mean and the variance of a layer."""
    return layer.ema_state_index if layer.mode == "ema" else layer.batch_state_index


def _holds(state: Any, index: Any) -> bool:
    try:
        state.get(index)
    except KeyError:
        return False
    return True


def _statistics(layer: Any, state: Any) -> BatchNormState:
    """The statistics with which a layer evaluates."""
    mean, var = state.get(_index(layer))
    if layer.mode == "ema":
        return BatchNormState(mean, var)
    count = state.get(layer.batch_counter)
    count = jnp.expand_dims(count, range(count.ndim, mean.ndim))  # an ensemble has a counter for each member
    weight = jnp.where(count == 0, 1, 1 - layer.momentum ** count.astype(mean.dtype))
    return BatchNormState(mean / weight, var / weight)


def _find(tree: Any) -> dict[str, State]:
    if _nn() is None:
        return {}
    nodes = jax.tree.leaves_with_path(tree, is_leaf=_is_either)
    states = [node for _, node in nodes if _is_state(node)]
    return {
        path_of(keys): _statistics(layer, state)
        for keys, layer in nodes
        if _is_layer(layer)
        for state in states
        if _holds(state, _index(layer))
    }


def _with_states(tree: Any, states: Mapping[str, State]) -> Any:
    if _nn() is None:
        return tree
    nodes = jax.tree.leaves_with_path(tree, is_leaf=_is_layer)
    new = [(layer, states[path_of(keys)]) for keys, layer in nodes if _is_layer(layer) and path_of(keys) in states]

    def updated(node: Any) -> Any:
        if not _is_state(node):
            return node
        node = jax.tree.map(lambda leaf: leaf, node)  # Equinox invalidates the state that it updates
        for layer, state in new:
            if _holds(node, _index(layer)):
                node = node.set(_index(layer), (state.mean, state.var))
                # The averages continue from here, without debiasing and not from the next batch.
                if layer.mode == "ema":
                    node = node.set(layer.ema_first_time_index, jnp.zeros_like(node.get(layer.ema_first_time_index)))
                else:
                    node = node.set(layer.batch_counter, jnp.full_like(node.get(layer.batch_counter), LONG))
        return node

    return jax.tree.map(updated, tree, is_leaf=_is_state)


def _with_slots(tree: Any, slots: Mapping[str, Slot]) -> Any:
    if _nn() is None:
        return tree

    def new(keys: Any, node: Any) -> Any:
        slot = slots.get(path_of(keys)) if _is_layer(node) else None
        return node if slot is None else _with_class(node, _hooked_class(), jaxbn_slot=slot)

    return jax.tree.map_with_path(new, tree, is_leaf=_is_layer)


def _without_slots(tree: Any) -> Any:
    if _nn() is None:
        return tree

    def is_hooked(node: Any) -> bool:
        return hasattr(node, "jaxbn_slot")

    def new(node: Any) -> Any:
        return _with_class(node, _nn().BatchNorm) if is_hooked(node) else node

    return jax.tree.map(new, tree, is_leaf=is_hooked)


def _with_class(layer: Any, cls: Any, **fields: Any) -> Any:
    """A layer of another class with the fields of this one."""
    made = object.__new__(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    for name, value in {**vars(layer), **fields}.items():
        if name in names:
            object.__setattr__(made, name, value)  # modules are frozen
    return made


@functools.cache
def _hooked_class() -> Any:
    """The class of the layers during a capture."""

    def call(self: Any, x: Any, state: Any, *, key: Any = None, inference: bool | None = None) -> Any:
        return _captured(self, x, state, self.inference if inference is None else inference)

    base = _nn().BatchNorm
    body = {"__annotations__": {"jaxbn_slot": Slot}, "__call__": call, "__module__": __name__}
    return type(base)("CapturedBatchNorm", (base,), body)


class _Statistics:
    """Stands for the state of the model in an evaluation with other statistics."""

    def __init__(self, layer: Any, state: State):
        self.layer, self.state = layer, state

    def get(self, index: Any) -> Any:
        """The statistics, or a counter that asks for no debiasing."""
        return (self.state.mean, self.state.var) if index is _index(self.layer) else jnp.zeros((), jnp.int32)


def _captured(layer: Any, x: Any, state: Any, inference: bool) -> Any:
    slot, stock, after = layer.jaxbn_slot, _nn().BatchNorm.__call__, [state]
    name = layer.axis_name if isinstance(layer.axis_name, str) else tuple(layer.axis_name)
    method = Method(batch_norm, momentum=None, epsilon=layer.eps, axis=0, axis_name=name)

    def normalize(statistics: State, x: jax.Array, *, mask: Any, residual: Any) -> Any:
        """Runs Equinox's own layer in evaluation."""
        return stock(layer, x, _Statistics(layer, statistics), inference=True)[0]

    def as_called() -> Any:
        y, after[0] = stock(layer, x, state, inference=inference)
        return y

    y = captured_call(
        slot,
        method,
        inference,
        CalledNorm(slot.layer.path, method(), _statistics(layer, state), normalize, 0, name, None),
        Operands(jnp.asarray(x), None, None, {}),
        as_called,
    )
    return y, after[0]


EQUINOX = Library(_find, _with_states, _with_slots, _without_slots)
