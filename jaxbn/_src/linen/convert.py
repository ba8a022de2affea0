"""Conversion of the variables of a linen model to other normalization layers."""

import re
from typing import Any

import flax
from flax.core import meta

from jaxbn._src.framework.conversion import fitting, takes_over
from jaxbn._src.framework.layers import AFFINE, POPULATION
from jaxbn._src.framework.registry import REGISTRY
from jaxbn._src.linen.layers import STATISTICS
from jaxbn._src.linen.variables import check_variables, find_states, keys

# Linen names a layer after its class, so the paths of its variables contain the class.
_CLASS = re.compile(
    r"^(BatchNorm|BatchRenorm|GhostBatchNorm|MovingAverageBatchNorm|DomainBatchNorm)(?=_\d+$)",
)
_SBX = {"steps": "step"}  # the name of the counter in sbx


def convert_norms(variables: Any, like: Any) -> dict[str, Any]:
    """Converts the variables of a model for the same model with other normalization layers.

    From `BatchNorm`, of jaxbn or Flax, to `BatchRenorm`, `GhostBatchNorm` or `MovingAverageBatchNorm` and back; from
    the `BatchRenorm` of sbx and CrossQ, whose statistics hold the bounds too; and from `BatchNorm` to
    `DomainBatchNorm`, each domain with a copy. Parameters, means and variances are copied unchanged, so that the
    outputs in evaluation stay the same if the new layers have the epsilon of the old ones, as :func:`replace` ensures.
    Counters and windows that the old layers lack are those of `like`; those that the new layers lack are dropped.

    Args:
        variables: All variables of the old model.
        like: The variables of the new model, as `init` returns them.

    Returns:
        New variables, in the structure and the dtypes of `like`.

    Raises:
        ValueError: Names the first variable that is missing on either side or has another shape.

    Example:
        >>> x = jnp.ones((4, 3))
        >>> old = flax.linen.Sequential([flax.linen.BatchNorm(use_running_average=True)])
        >>> new = flax.linen.Sequential([jaxbn.linen.BatchRenorm(use_running_average=True)])
        >>> key = jax.random.key(0)
        >>> variables = jaxbn.linen.convert_norms(old.init(key, x), like=new.init(key, x))
        >>> sorted(variables["batch_stats"]["layers_0"])
        ['mean', 'step', 'var']
    """
    check_variables(variables)
    check_variables(like)
    given, wanted = _flat(variables), _flat(like)
    sources = {_place(path): path for path in given}
    # Without the class names, `BatchNorm_0` and `BatchRenorm_0` are at the same place.
    if len(sources) < len(given):
        raise ValueError(
            "Two layers of different classes have the same number in one module; name the layers in the model."
        )
    layers = {keys(path) for path in find_states(like)}
    old, new = _names_by_module(given), _names_by_module(wanted)
    converted = {}
    for path, leaf in wanted.items():
        *layer, name = _place(path)
        source = sources.pop((*layer, name), None)
        if source is None and not _is_optional(path, new):
            raise ValueError(f"{'/'.join(path)!r} of `like` has no counterpart in the variables.")
        if source is not None and takes_over(name, old[tuple(layer)], new[tuple(layer)]):
            value = fitting("/".join(path), meta.unbox(given[source]), meta.unbox(leaf), copies=path[1:-1] in layers)
            leaf = meta.replace_boxed(leaf, value)
        converted[path] = leaf
    unused = ["/".join(path) for path in sources.values() if path[0] != STATISTICS or not _is_optional(path, old)]
    if unused:
        raise ValueError(f"{', '.join(map(repr, unused))} of the variables have no counterpart in `like`.")
    return flax.traverse_util.unflatten_dict(converted)


def _flat(variables: Any) -> dict[tuple[str, ...], Any]:
    """The variables by path; those of registered classes under the names of Flax's layer."""
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(variables))
    held: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for collection, *module, name in flat:
        held.setdefault(tuple(module), {}).setdefault(collection, []).append(name)
    own = {
        module: {theirs: name for name, theirs in REGISTRY.names_of(by[STATISTICS], by.get("params", ())).items()}
        for module, by in held.items()
        if STATISTICS in by
    }
    return {(*path[:-1], own.get(path[1:-1], {}).get(path[-1], path[-1])): leaf for path, leaf in flat.items()}


def _place(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path without the class of the layer, and with jaxbn's name of the counter."""
    *parents, name = (_CLASS.sub("", part) for part in path)
    return *parents, _SBX.get(name, name) if path[0] == STATISTICS else name


def _names_by_module(flat: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], set[str]]:
    """The names of the variables of each module."""
    names: dict[tuple[str, ...], set[str]] = {}
    for *module, name in map(_place, flat):
        names.setdefault(tuple(module), set()).add(name)
    return names


def _is_optional(path: tuple[str, ...], names: dict[tuple[str, ...], set[str]]) -> bool:
    """Whether it is a variable of a normalization layer that not all methods have."""
    collection, *module, name = _place(path)
    statistics = names.get((STATISTICS, *module), set())
    return name not in (*POPULATION, *AFFINE) and statistics.issuperset(POPULATION)
