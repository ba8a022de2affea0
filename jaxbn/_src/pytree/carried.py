"""The states of methods in a pytree: finds them by their type, and makes them carry something to the call of a layer.

Such a state is a NamedTuple with the same fields and a slot. All are leaves of one node, so that transformations slice
the slot together with the statistics, and the static part of the slot makes jit caches distinguish the state from the
plain one. `train` and `eval` of every transform leave a call with it to the state.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxbn._src.methods.captured import CapturedState
from jaxbn._src.methods.protocol import State, is_state
from jaxbn._src.pytree.library import path_of


def own_states(tree: Any) -> dict[str, State]:
    """The states by path, in the order of the tree."""
    found = [(keys, node) for keys, node in jax.tree.leaves_with_path(tree, is_leaf=is_state) if is_state(node)]
    paths = [path_of(keys) for keys, _ in found]
    # The key "a/b" and the keys "a", "b" are written alike; then all paths are written in full.
    if len(set(paths)) < len(paths):
        paths = [jax.tree_util.keystr(keys) for keys, _ in found]
    return dict(zip(paths, (node for _, node in found), strict=True))


def map_states(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """A new tree with `function(path, state)` in the place of each state."""
    paths = iter(own_states(tree))
    return jax.tree.map(lambda node: function(next(paths), node) if is_state(node) else node, tree, is_leaf=is_state)


class Carrier(CapturedState):
    """A state with a slot, which is a pytree. The `run` of a subclass handles the call of a layer."""

    plain_class: Any  # of the state
    slot: Any

    @classmethod
    def made(cls, leaves: Sequence[Any], slot: Any) -> Any:
        """A state of these statistics."""
        state: Any = tuple.__new__(cls, leaves)  # type: ignore[type-var]  # the classes in use derive from tuple
        state.slot = slot
        return state

    @property
    def plain(self) -> Any:
        """The state without the slot."""
        leaves: Any = self
        return tuple.__new__(self.plain_class, leaves)

    def _replace(self, **changes: Any) -> Any:
        return self.made(tuple(self.plain._replace(**changes)), self.slot)


def carrying(state: Any, slot: Any, kind: Any) -> Any:
    """The state with a slot, in the place of the one that it may carry already; `kind` is a class of carriers."""
    cls: Any = state.plain_class if isinstance(state, Carrier) else type(state)
    return _carrier_class(cls, kind).made(tuple(state), slot)


def plain_states(tree: Any) -> Any:
    """The tree with plain states, for outputs of a call."""

    def is_carrier(node: Any) -> bool:
        return isinstance(node, Carrier)

    return jax.tree.map(lambda node: node.plain if is_carrier(node) else node, tree, is_leaf=is_carrier)


@functools.cache
def _carrier_class(cls: Any, kind: Any) -> Any:
    """The carriers of this kind for a class of states, registered as a pytree."""
    made = type(f"Captured{cls.__name__}", (kind, cls), {"plain_class": cls})

    def flatten(state: Any) -> tuple[list[tuple[Any, Any]], None]:
        named = [*zip(cls._fields, state, strict=True), ("slot", state.slot)]
        return [(jax.tree_util.GetAttrKey(name), leaf) for name, leaf in named], None

    def unflatten(_: None, leaves: Iterable[Any]) -> Any:
        *statistics, slot = leaves
        return made.made(statistics, slot)  # type: ignore[attr-defined]  # of Carrier

    jax.tree_util.register_pytree_with_keys(made, flatten, unflatten)
    return made
