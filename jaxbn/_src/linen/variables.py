"""The statistics in the variables of a linen model: finds layers, and adds leaves to them."""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from jaxbn._src.framework.registry import REGISTRY
from jaxbn._src.framework.selection import natural
from jaxbn._src.inference.arguments import not_variables
from jaxbn._src.linen.layers import STATISTICS

# (variables, batch) -> outputs, written by the user. Type checkers reject a module in its place, because the first
# argument of a module is an array.
Call = Callable[[dict[str, Any], Any], Any]


def check_variables(variables: Any) -> None:
    """Raises a TypeError for anything but a dict of variables."""
    if not isinstance(variables, Mapping):
        raise not_variables(variables)


def find_layers(variables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The statistics of every normalization layer, by path, under their names in Flax's layer."""
    layers, _ = split_by_class(variables)
    if not layers:
        raise ValueError(
            f"There are no statistics of a normalization layer (mean and var) in variables[{STATISTICS!r}]; the "
            f"collections given are {sorted(variables)}. Pass all the variables of the model, not its params alone."
        )
    return layers


def split_by_class(variables: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The statistics of the known layers, as in `find_layers`, and of the other modules that keep some."""
    check_variables(variables)
    layers: dict[str, dict[str, Any]] = {}
    others: dict[str, dict[str, Any]] = {}
    for place, leaves in _holders(variables).items():
        names = {own: name for name, own in REGISTRY.names_in(leaves).items()}
        is_layer = names and all(isinstance(key, str) for key in place)  # other keys are of NNX, inside a bridge
        held = {names.get(own, own): flax.core.meta.unbox(leaf) for own, leaf in leaves.items()}
        (layers if is_layer else others)["/".join(map(str, place))] = held
    return {path: layers[path] for path in sorted(layers, key=natural)}, others


def find_shapes(variables: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of the statistics of every module that keeps some, by path: known layers first, then other modules."""
    layers, others = split_by_class(variables)
    # Of an unknown class any statistic will do: only the axes that transformations slice matter.
    return {path: jnp.shape(held.get("mean", next(iter(held.values())))) for path, held in (layers | others).items()}


def _holders(variables: Mapping[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The statistics of each module, by its place in the collection."""
    holders: dict[tuple[Any, ...], dict[str, Any]] = {}
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(variables.get(STATISTICS, {})))
    for (*place, name), leaf in flat.items():
        holders.setdefault(tuple(place), {})[name] = leaf
    return holders


def with_leaves(variables: dict[str, Any], name: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with an additional leaf of this name in each layer that is given by its path."""
    flat = flax.traverse_util.flatten_dict(variables[STATISTICS]) if leaves else {}
    places = {"/".join(map(str, place)): place for place in _holders(variables)} if leaves else {}
    flat |= {(*places[path], name): leaf for path, leaf in leaves.items()}
    return variables | ({STATISTICS: flax.traverse_util.unflatten_dict(flat)} if leaves else {})


def without(name: str, tree: Any) -> Any:
    """Removes the leaves of this name from outputs that hold variables, as of a call with `mutable=`."""

    def holds_it(node: Any) -> bool:
        return isinstance(node, dict | flax.core.FrozenDict) and name in node

    def strip(node: Any) -> Any:
        if not holds_it(node):
            return node
        return type(node)({key: without(name, value) for key, value in node.items() if key != name})

    return jax.tree.map(strip, tree, is_leaf=holds_it)


def keys(path: str) -> tuple[str, ...]:
    """A path as the keys of nested dicts; the model itself has the path ''."""
    return tuple(path.split("/")) if path else ()
