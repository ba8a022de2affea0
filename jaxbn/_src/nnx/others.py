"""Modules of NNX with running statistics whose class jaxbn does not know."""

from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from jaxbn._src.framework.unknown_layers import name_of
from jaxbn._src.nnx.registry import known


def find_others(model: Any) -> dict[str, Any]:
    """Every module with running statistics and an unknown class, by its path."""
    return {
        joined(path): module
        for path, module in nnx.iter_modules(model)
        if known(module) is None and statistics_of(module)
    }


def statistics_of(module: Any) -> list[nnx.Variable[Any]]:
    """The running statistics that a module itself holds, or the linen module inside it."""
    # Names with an underscore include those of NNX itself, such as `_pytree__state`.
    held = [value for name, value in sorted(vars(module).items()) if not name.startswith("_")]
    # Child modules are leaves here: `iter_modules` visits them on their own.
    leaves = jax.tree.leaves(held, is_leaf=lambda node: isinstance(node, nnx.Variable | nnx.Module))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.BatchStat)]


def class_of(module: Any) -> str:
    """The name of the class of a module, with the class inside if it is a bridge."""
    inside = type(module.to_nnx__module) if isinstance(module, nnx.bridge.ToNNX) else None
    return name_of(type(module), inside)


def joined(path: Iterable[Any]) -> str:
    """A path as text; the model itself has the path ''."""
    return "/".join(map(str, path))
