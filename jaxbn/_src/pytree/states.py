"""All normalization layers in a pytree: states of methods, and the layers of Equinox and Haiku."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxbn._src.framework.selection import natural
from jaxbn._src.inference.frozen import Frozen
from jaxbn._src.methods.protocol import State
from jaxbn._src.pytree.equinox import EQUINOX
from jaxbn._src.pytree.haiku import HAIKU
from jaxbn._src.pytree.own_states import OWN_STATES

LIBRARIES = (OWN_STATES, EQUINOX, HAIKU)


def find_states(tree: Any) -> dict[str, State]:
    """The state of every normalization layer by its path; a ValueError if there is none."""
    check_tree(tree)
    states = {path: state for library in LIBRARIES for path, state in library.find(tree).items()}
    if not states:
        raise ValueError(
            f"There is no state of a normalization method, such as jaxbn.BatchNormState, in this "
            f"{type(tree).__name__}. Pass a pytree with the states that `call` gives to bn.train or bn.eval; or, for "
            f"the layers of Equinox, the model and its eqx.nn.State, and for those of Haiku the states of the "
            f"transform. For Flax models use jaxbn.linen or jaxbn.nnx."
        )
    return {path: states[path] for path in sorted(states, key=natural)}


def foreign_layers(tree: Any) -> list[str]:
    """The paths of the layers of other libraries."""
    return [path for library in LIBRARIES if library is not OWN_STATES for path in library.find(tree)]


def with_states(tree: Any, states: Mapping[str, State]) -> Any:
    """A new tree with these statistics at their paths."""
    for library in LIBRARIES:
        tree = library.with_states(tree, states)
    return tree


def check_tree(tree: Any) -> None:
    """Raises a TypeError for an argument in the place of the state that is clearly something else."""
    if isinstance(tree, Frozen):
        raise TypeError("Got a Frozen instead of a pytree with states of methods. Pass frozen.variables.")
    if callable(tree) and jax.tree_util.all_leaves([tree]):  # a leaf, not a module that is a pytree
        raise TypeError(
            f"Got the function {getattr(tree, '__name__', tree)!r} instead of a pytree with states of methods. The "
            f"order of arguments is (call, state, batches)."
        )
