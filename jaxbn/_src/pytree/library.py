"""Where the layers of a library keep their statistics in a pytree, and how their calls are captured."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxbn._src.framework.layers import Slot
from jaxbn._src.methods.protocol import State


class Library(NamedTuple):
    """The layers of one library in a pytree. No function changes the tree that it is given."""

    # (tree) -> the state of every layer by path
    find: Callable[[Any], dict[str, State]]
    # (tree, states by path) -> a tree with these statistics
    with_states: Callable[[Any, Mapping[str, State]], Any]
    # (tree, slots by path) -> a tree with a slot in every layer
    with_slots: Callable[[Any, Mapping[str, Slot]], Any]
    # (outputs of a call) -> the same without slots
    without_slots: Callable[[Any], Any]
    # () -> the context in which a captured call runs
    capturing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def path_of(keys: Any, *names: str) -> str:
    """A path of a tree, with further names, as text."""
    return "/".join(filter(None, (jax.tree_util.keystr(keys, simple=True, separator="/"), *names)))
