"""Freezing NNX models and layers, and the table of layers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from jaxbn._src.framework.framework import ModelLayer
from jaxbn._src.framework.layers import AFFINE, POPULATION
from jaxbn._src.framework.processes import check_unstacked
from jaxbn._src.framework.selection import select
from jaxbn._src.inference import frozen as _frozen
from jaxbn._src.inference import summary as _summary
from jaxbn._src.inference.frozen import Frozen, check_fits, check_kinds, copied
from jaxbn._src.nnx.capture import find_layers, is_frozen, select_layers
from jaxbn._src.nnx.framework import NNX, SAVED
from jaxbn._src.nnx.others import joined
from jaxbn._src.nnx.registry import evaluate, set_call
from jaxbn._src.statistics.pass_report import Report


def freeze(model: Any, report: Report | None = None) -> Frozen:
    """Makes the frozen network, which you evaluate, save and serve.

    Args:
        model: The model, with running averages (Method ONE) or as `postproc` returned it (Method TWO). It is not
            changed.
        report: The report that `postproc` returned with it, which tells the origin of the statistics.

    Returns:
        A `Frozen` with all variables of the model except random states and intermediates. `install_frozen` puts it
        into a model again.

    Raises:
        ValueError: If the statistics of a layer were never estimated, if they are not finite, or if the report does not
            belong to the model.

    Example:
        >>> data = jnp.arange(10.0)[:, None]
        >>> model, report = jaxbn.nnx.postproc(nnx.BatchNorm(1, rngs=nnx.Rngs(0)), [data])
        >>> frozen = jaxbn.nnx.freeze(model, report)
        >>> frozen.info.layer("")
        LayerInfo(method='batch_norm', epsilon=1e-05, estimator='pooled', rows=10.0)
    """
    return _frozen.freeze(NNX, model, report)


def install_frozen(model: Any, frozen: Frozen) -> Any:
    """Returns a model with the variables of a frozen network.

    Args:
        model: A model of the same structure; it is not changed. Its values do not matter. If `nnx.eval_shape` made it,
            the random streams start from a key of zeros.
        frozen: A network from `freeze` or `jaxbn.serving.load`.

    Returns:
        A new model, in evaluation mode.

    Raises:
        ValueError: Names the first variable that is missing or has another shape, or the layer that has another method
            or epsilon.
        TypeError: If `frozen` is not a `Frozen`.

    Example:
        >>> data = jnp.arange(10.0)[:, None]
        >>> model, report = jaxbn.nnx.postproc(nnx.BatchNorm(1, rngs=nnx.Rngs(0)), [data])
        >>> frozen = jaxbn.nnx.freeze(model, report)
        >>> served = jaxbn.nnx.install_frozen(jaxbn.nnx.BatchNorm(1, rngs=nnx.Rngs(1)), frozen)
        >>> print(f"{served(data[:1])[0, 0]:.2f}")
        -1.57
    """
    check_fits(NNX, frozen, model)
    check_kinds(frozen, NNX.kinds(model))
    copy = nnx.clone(model)
    copy.eval()
    for path, variable in nnx.to_flat_state(nnx.state(copy, SAVED)):
        value: Any = frozen.variables
        for key in path:
            value = value[str(key)]
        # A copy, because a later training step of this model may donate its arrays.
        variable.set_value(copied(value))
    for _, variable in nnx.to_flat_state(nnx.state(copy, nnx.RngState)):
        if isinstance(variable.get_value(), jax.ShapeDtypeStruct):  # of an abstract model, so that it can be jitted
            variable.set_value(jnp.zeros(variable.shape, variable.dtype))
    return copy


def freeze_layers(model: Any, paths: str | Sequence[str]) -> Any:
    """Returns a model in which some BatchNorm layers are frozen: they use and keep their running statistics.

    Use it to fine-tune with small batches or on little data. Flags and `train()` do not matter. Scale and bias still
    learn, unless you mask them with :func:`affine_mask`. No gradient flows into the statistics (in Flax's layers, that
    of evaluation does). A statistics pass skips these layers. The variables do not change, so that
    `nnx.update(model, nnx.state(frozen_model))` copies them back, and `jax.lax.cond` may choose between both models
    inside jit.

    Args:
        model: The model; it is not changed.
        paths: One or several paths of layers, or of modules to freeze all their layers, such as `"backbone"` or
            `"blocks/0/norm"`. `""` is the whole model.

    Returns:
        A new model, with copies of the variables.

    Raises:
        ValueError: If there is no layer at a path or below it, or if only modules of unknown classes are, see
            :func:`register_batch_norm`; it is a warning if there are known layers too.

    Example:
        >>> model = jaxbn.nnx.freeze_layers(jaxbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0)), "")
        >>> y = model(jnp.array([[1.0], [3.0]]))
        >>> print(f"output {y[1, 0]:.2f}, mean {model.mean[0]:.2f}")
        output 3.00, mean 0.00
    """
    copy = nnx.clone(model)
    layers = find_layers(copy)
    for path in select_layers(copy, paths):
        if not is_frozen(layers[path]):
            set_call(layers[path], evaluate, ("jaxbn_frozen", True))
    return copy


def affine_mask(model: Any, paths: str | Sequence[str]) -> Any:
    """Makes a mask for optax that is True for the scale and bias of these layers.

    `optax.chain(optimizer, optax.masked(optax.set_to_zero(), mask))` freezes them; the negated mask excludes them from
    weight decay.

    Args:
        model: The model.
        paths: As in :func:`freeze_layers`.

    Returns:
        Booleans, in a state like `nnx.state(model, nnx.Param)`, which `nnx.Optimizer` optimizes.

    Raises:
        ValueError: If there is no layer at a path or below it.

    Example:
        >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(2, rngs=nnx.Rngs(1)))
        >>> mask = jaxbn.nnx.affine_mask(model, "layers/1")
        >>> nnx.to_flat_state(mask).paths
        (('layers', 0, 'bias'), ('layers', 0, 'kernel'), ('layers', 1, 'bias'), ('layers', 1, 'scale'))
        >>> jax.tree.leaves(mask)
        [False, False, True, True]
    """
    layers = set(select(paths, find_layers(model)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return nnx.from_flat_state([(path, joined(path[:-1]) in layers) for path, _ in flat])


def summary(model: Any) -> str:
    """Returns a table of the normalization layers, their methods, and the origin of their statistics.

    Args:
        model: A model, or a `Frozen`, which has more information.

    Returns:
        Text, with a line per layer.

    Raises:
        ValueError: If there is no normalization layer.

    Example:
        >>> model = nnx.Sequential(nnx.Linear(3, 8, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(8, rngs=nnx.Rngs(1)))
        >>> print(jaxbn.nnx.summary(model))
        1 normalization layer, 8 channels
        layer     channels  learns       method      epsilon  statistics      rows
        layers/1         8  scale, bias  batch_norm  1e-05    initial values     -
    """
    if isinstance(model, Frozen):
        check_unstacked(model.variables)
        flat = traverse_util.flatten_dict(model.variables, sep="/")
        # A `Frozen` has no modules, so the layers are those that its `info` lists.
        paths = {path: f"{path}/" if path else "" for path, _ in model.info.layers}
        if missing := [path for path, start in paths.items() if f"{start}mean" not in flat]:
            raise TypeError(
                f"This Frozen has no {missing[0]!r} of an NNX model; of a linen one use jaxbn.linen.summary."
            )
        layers = {path: ModelLayer({n: flat[f"{start}{n}"] for n in POPULATION}) for path, start in paths.items()}
        # The variables of a frozen NNX network have no types, only names.
        params = (name for name in flat if name.rpartition("/")[2] in AFFINE)
        return _summary.tabulate({path: layer.state for path, layer in layers.items()}, params, info=model.info)
    return _summary.summary(NNX, model)
