"""The states of methods in a pytree: finds them by their type, and replaces them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxbn._src.framework.selection import natural
from jaxbn._src.inference.frozen import Frozen
from jaxbn._src.methods.captured import CapturedState
from jaxbn._src.methods.protocol import State


def is_state(node: Any) -> bool:
    """Whether this is the state of a method, see `State`: a NamedTuple that has a mean and a variance."""
    return isinstance(node, tuple) and {"mean", "var"} <= set(getattr(node, "_fields", ()))


def find_states(tree: Any) -> dict[str, State]:
    """The state of every normalization layer by its path; a ValueError if there is none."""
    check_tree(tree)
    states = _paths(tree)
    if not states:
        raise ValueError(
            f"There is no state of a normalization method, such as jaxbn.BatchNormState, in this "
            f"{type(tree).__name__}. Pass a pytree with the states that `call` gives to bn.train or bn.eval. For Flax "
            f"models use jaxbn.linen or jaxbn.nnx."
        )
    return {path: states[path] for path in sorted(states, key=natural)}


def map_states(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """A new tree with `function(path, state)` in the place of each state."""
    paths = iter(_paths(tree))
    return jax.tree.map(lambda node: function(next(paths), node) if is_state(node) else node, tree, is_leaf=is_state)


def with_states(tree: Any, states: Mapping[str, State]) -> Any:
    """A new tree with these statistics at their paths."""

    def new(path: str, state: Any) -> Any:
        # The method may be known by the names of the statistics only, and its state be of another class.
        given = states[path]._asdict() if path in states else {}
        return state._replace(**{name: leaf for name, leaf in given.items() if leaf is not None})

    return map_states(new, tree)


def check_tree(tree: Any) -> None:
    """Raises a TypeError for an argument in the place of the state that is clearly something else."""
    if isinstance(tree, Frozen):
        raise TypeError("Got a Frozen instead of a pytree with states of methods. Pass frozen.variables.")
    if callable(tree) and jax.tree_util.all_leaves([tree]):  # a leaf, not a module that is a pytree
        raise TypeError(
            f"Got the function {getattr(tree, '__name__', tree)!r} instead of a pytree with states of methods. The "
            f"order of arguments is (call, state, batches)."
        )


def _paths(tree: Any) -> dict[str, Any]:
    """The states by path, in the order of the tree."""
    found = [(path, node) for path, node in jax.tree.leaves_with_path(tree, is_leaf=is_state) if is_state(node)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    # The key "a/b" and the keys "a", "b" are written alike; then all paths are written in full.
    if len(set(names)) < len(names):
        names = [jax.tree_util.keystr(path) for path, _ in found]
    return dict(zip(names, (node for _, node in found), strict=True))


def without_slots(tree: Any) -> Any:
    """The tree with plain states in the place of captured ones, such as those that the call returns."""

    def is_captured(node: Any) -> bool:
        return isinstance(node, CapturedState)

    return jax.tree.map(lambda node: node.plain if is_captured(node) else node, tree, is_leaf=is_captured)
