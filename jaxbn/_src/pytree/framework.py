"""Plain JAX as a `Framework`: a model is any pytree that holds states of methods."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax

from jaxbn._src import internals as _internals
from jaxbn._src.framework.framework import Framework, ModelLayer
from jaxbn._src.pytree.capture import capture
from jaxbn._src.pytree.states import check_tree, find_states, with_states


class _Structure(NamedTuple):
    """The static part of a tree: its structure, and its leaves that are not arrays, such as functions, by position."""

    tree: Any
    others: tuple[tuple[int, Hashable], ...]


def _split(tree: Any) -> tuple[_Structure, Any]:
    leaves, structure = jax.tree.flatten(tree)
    others = {place: leaf for place, leaf in enumerate(leaves) if not _internals.is_array_of_jax(leaf)}
    arrays = [None if place in others else leaf for place, leaf in enumerate(leaves)]
    # The arrays keep their paths, since checks look for names such as `mean`.
    return _Structure(structure, tuple(others.items())), jax.tree.unflatten(structure, arrays)


def _merge(structure: _Structure, arrays: Any) -> Any:
    others, rest = dict(structure.others), iter(jax.tree.leaves(arrays))
    places = range(structure.tree.num_leaves)
    return jax.tree.unflatten(structure.tree, [others[place] if place in others else next(rest) for place in places])


def _layers(tree: Any) -> dict[str, ModelLayer]:
    return {path: ModelLayer(state._asdict()) for path, state in find_states(tree).items()}


def _variables(tree: Any) -> Any:
    return tree  # what `call` takes


def _params(tree: Any) -> None:
    return None  # the parameters of a layer may be anywhere


PYTREE = Framework(
    check=check_tree,
    split=_split,
    merge=_merge,
    capture=capture,
    layers=_layers,
    with_states=with_states,
    variables=_variables,
    params=_params,
)
