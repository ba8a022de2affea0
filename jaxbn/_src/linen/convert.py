"""Conversion of the variables of a linen model to other normalization layers."""

import re
from collections.abc import Iterator
from typing import Any

import flax
from flax.core import meta

from jaxbn._src.framework.conversion import Variable, convert
from jaxbn._src.framework.layers import POPULATION
from jaxbn._src.framework.registry import REGISTRY
from jaxbn._src.linen.layers import STATISTICS
from jaxbn._src.linen.variables import check_variables

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
    given = list(_variables(variables))
    # Without the class names, `BatchNorm_0` and `BatchRenorm_0` are at the same place.
    if len({variable.place for variable in given}) < len(given):
        raise ValueError(
            "Two layers of different classes have the same number in one module; name the layers in the model."
        )
    values = convert(given, _variables(like), "the variables")
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(like))
    converted = dict(flat)
    # `_variables` flattens the same dict, so both are in the same order.
    for path, variable in zip(flat, _variables(like), strict=True):
        if variable.place in values:
            converted[path] = meta.replace_boxed(flat[path], values[variable.place])
    return flax.traverse_util.unflatten_dict(converted)


def _variables(variables: Any) -> Iterator[Variable]:
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(variables))
    held: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for collection, *module, name in flat:
        held.setdefault(tuple(module), {}).setdefault(collection, []).append(name)
    for path, leaf in flat.items():
        collection, *module, name = path
        names = held[tuple(module)]
        statistics = names.get(STATISTICS, [])
        # Variables do not tell the class of their module, so the names in it must.
        own = {theirs: ours for ours, theirs in REGISTRY.names_of(statistics, names.get("params", ())).items()}
        in_flax = [_SBX.get(one, one) for one in (own.get(one, one) for one in statistics)]
        name = own.get(name, name)
        name = _SBX.get(name, name) if collection == STATISTICS else name
        yield Variable(
            path="/".join((*path[:-1], own.get(path[-1], path[-1]))),
            place=(collection, *(_CLASS.sub("", part) for part in module), name),
            name=name,
            statistics=frozenset(in_flax if set(POPULATION) <= set(in_flax) else ()),
            is_statistic=collection == STATISTICS,
            value=meta.unbox(leaf),
        )
