"""Variables of a model for the same model with other normalization layers."""

import re
from typing import Any

import flax
from flax.core import meta

from jaxbn.linen.capture import find_states, keys
from jaxbn.linen.modules import STATISTICS
from jaxbn.population.layers import fitting

# Linen names a layer by its class, so that the kind of a layer shows in the paths of its variables.
_CLASS = re.compile(r"^(BatchNorm|BatchRenorm|GhostBatchNorm|DomainBatchNorm)(?=_\d+$)")
# What one kind of layer keeps beside mean and var, and another does not.
_COUNTERS = {"count", "step"}
_SBX = {"steps": "step"}  # the name of a counter there
_SBX_CONSTANTS = {"r_max", "d_max"}  # hyper-parameters here


def convert_norms(variables: Any, like: Any) -> dict[str, Any]:
    """The variables of a model for the same model with other normalization layers.

    From `BatchNorm`, of jaxbn or Flax, to `BatchRenorm` or `GhostBatchNorm` and back; from the `BatchRenorm` of sbx and
    CrossQ, whose statistics hold the bounds too; and from `BatchNorm` to `DomainBatchNorm`, each domain with a copy.
    Parameters and statistics are carried over as they are: give the new layers the epsilon of the old ones. Counters
    that the old layers did not have are those of `like`; those that the new ones do not have are left out.

    Args:
        variables: All variables of the model as it was.
        like: Those of the model as it is to be, as `init` gives them.

    Returns:
        New variables, in the structure and the dtypes of `like`.

    Raises:
        ValueError: If a variable has no place in `like`, has another shape there, or is missing, which is named.

    Example:
        >>> x = jnp.ones((4, 3))
        >>> old = flax.linen.Sequential([flax.linen.BatchNorm(use_running_average=True)])
        >>> new = flax.linen.Sequential([jaxbn.linen.BatchRenorm(use_running_average=True)])
        >>> key = jax.random.key(0)
        >>> variables = jaxbn.linen.convert_norms(old.init(key, x), like=new.init(key, x))
        >>> sorted(variables["batch_stats"]["layers_0"])
        ['mean', 'step', 'var']
    """
    given, wanted = _flat(variables), _flat(like)
    sources = {_place(path): path for path in given}
    if len(sources) < len(given):
        raise ValueError("Layers of two kinds have the same number beside each other; name the layers in the model.")
    layers = {keys(path) for path in find_states(like)}
    converted = {}
    for path, leaf in wanted.items():
        source = sources.pop(_place(path), None)
        if source is None and not _is_optional(path):
            raise ValueError(f"{'/'.join(path)!r} of `like` has no counterpart in the variables.")
        if source is not None:
            value = fitting("/".join(path), meta.unbox(given[source]), meta.unbox(leaf), copies=path[1:-1] in layers)
            leaf = meta.replace_boxed(leaf, value)
        converted[path] = leaf
    unused = ["/".join(path) for path in sources.values() if not _is_optional(path)]
    if unused:
        raise ValueError(f"{', '.join(map(repr, unused))} of the variables have no counterpart in `like`.")
    return flax.traverse_util.unflatten_dict(converted)


def _flat(variables: Any) -> dict[tuple[str, ...], Any]:
    return flax.traverse_util.flatten_dict(flax.core.unfreeze(variables))


def _place(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path without the kind of the layer, and with our name for a counter."""
    *parents, name = (_CLASS.sub("", part) for part in path)
    return *parents, _SBX.get(name, name) if path[0] == STATISTICS else name


def _is_optional(path: tuple[str, ...]) -> bool:
    return path[0] == STATISTICS and path[-1] in _COUNTERS | _SBX.keys() | _SBX_CONSTANTS
