"""Freezing linen models and layers, and the table of layers."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax.numpy as jnp

from jaxbn._src.framework.norm_layer import kind_of, operands_of
from jaxbn._src.framework.selection import select
from jaxbn._src.framework.unknown_layers import Watch
from jaxbn._src.inference import frozen as _frozen
from jaxbn._src.inference import summary as _summary
from jaxbn._src.inference.frozen import Frozen, check_frozen, check_kinds
from jaxbn._src.linen.capture import FROZEN, called, is_call_of_layer, norm_in_call, slots_of, watched
from jaxbn._src.linen.framework import LINEN
from jaxbn._src.linen.registry import REGISTER, as_norm
from jaxbn._src.linen.variables import Call, find_layers, find_shapes, keys, with_leaves, without
from jaxbn._src.statistics.pass_report import Report


def freeze(variables: Mapping[str, Any], report: Report | None = None) -> Frozen:
    """Makes the frozen network, which you evaluate, save and serve.

    Args:
        variables: All variables of the model, with running averages (Method ONE) or as `postproc` returned them
            (Method TWO).
        report: The report that `postproc` returned with them, which tells the origin of the statistics.

    Returns:
        A `Frozen`, whose `variables` go into `model.apply`.

    Raises:
        ValueError: If the statistics of a layer were never estimated, if they are not finite, or if the report does not
            belong to them.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=True)
        >>> data = jnp.arange(10.0)[:, None]
        >>> variables, report = jaxbn.linen.postproc(net.apply, net.init(jax.random.key(0), data), [data])
        >>> frozen = jaxbn.linen.freeze(variables, report)
        >>> frozen.info.layer("")
        LayerInfo(method='batch_norm', epsilon=1e-05, estimator='pooled', rows=10.0)
        >>> print(f"{net.apply(frozen.variables, data[:1])[0, 0]:.2f}")
        -1.57
    """
    return _frozen.freeze(LINEN, variables, report)


def apply_frozen(apply: Callable[..., Any], frozen: Frozen, *args: Any, **kwargs: Any) -> Any:
    """Runs `apply(frozen.variables, ...)`; a ValueError if its layers differ from those of the frozen network."""
    check_frozen(frozen)

    def check(next_call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if is_call_of_layer(context):
            check_kinds(frozen, {"/".join(context.module.path): kind_of(as_norm(context.module))})
        return next_call(*args, **kwargs)

    with nn.intercept_methods(check):
        return apply(frozen.variables, *args, **kwargs)


def freeze_layers(call: Callable[..., Any], paths: str | Sequence[str]) -> Callable[..., Any]:
    """Makes a call in which some BatchNorm layers are frozen: they use and keep their running statistics.

    Use it to fine-tune with small batches or on little data. The flags that the model passes do not matter. Scale and
    bias still learn, unless you mask them with :func:`affine_mask`. No gradient flows into the statistics (in Flax's
    layers, that of evaluation does). A statistics pass on the call skips these layers. To freeze from step t on, inside
    jit: `jax.lax.cond(step >= t, frozen_call, call, variables, batch)`.

    Args:
        call: Runs the model: `net.apply`, or any function whose first argument is all variables.
        paths: One or several paths of layers, or of modules to freeze all their layers, such as `"backbone"` or
            `"Block_0/BatchNorm_1"`. `""` is the whole model.

    Returns:
        A function like `call`.

    Raises:
        ValueError: When called, if there is no layer at a path or below it, or if only modules of unknown classes are,
            see :func:`register_batch_norm`; it is a warning if there are known layers too.

    Example:
        >>> net = jaxbn.linen.BatchNorm(use_running_average=False)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = net.init(jax.random.key(0), x)
        >>> y, updates = jaxbn.linen.freeze_layers(net.apply, "")(variables, x, mutable=["batch_stats"])
        >>> print(f"output {y[1, 0]:.2f}, mean {updates['batch_stats']['mean'][0]:.2f}")
        output 3.00, mean 0.00
    """
    watch = Watch(REGISTER)

    def frozen_call(variables: Any, *args: Any, **kwargs: Any) -> Any:
        variables = flax.core.unfreeze(variables)
        shapes = find_shapes(variables)
        # In the shape of the statistics, so that transformations slice both together. As a part of the tree structure
        # it makes jit caches distinguish calls with and without frozen layers.
        leaves = {path: jnp.ones(shapes[path], bool) for path in select(paths, shapes)}
        with watch, nn.intercept_methods(functools.partial(_hold, watch)):
            return without(FROZEN, call(with_leaves(variables, FROZEN, leaves), *args, **kwargs))

    return frozen_call


def affine_mask(variables: Any, paths: str | Sequence[str]) -> Any:
    """Makes a mask for optax that is True for the scale and bias of these layers.

    `optax.chain(optimizer, optax.masked(optax.set_to_zero(), mask))` freezes them; `optax.add_decayed_weights(1e-4,
    mask=jax.tree.map(operator.not_, mask))` excludes them from weight decay.

    Args:
        variables: All variables of the model.
        paths: As in :func:`freeze_layers`.

    Returns:
        Booleans, in a tree like `variables["params"]`.

    Raises:
        ValueError: If there is no layer at a path or below it.

    Example:
        >>> net = flax.linen.Sequential([flax.linen.Dense(2), jaxbn.linen.BatchNorm(use_running_average=True)])
        >>> variables = net.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> jaxbn.linen.affine_mask(variables, "layers_1")
        {'layers_0': {'kernel': False, 'bias': False}, 'layers_1': {'scale': True, 'bias': True}}
    """
    layers = {keys(path) for path in select(paths, find_layers(variables))}
    params = flax.core.unfreeze(variables["params"])
    return flax.traverse_util.path_aware_map(lambda path, _: path[:-1] in layers, params)


def summary(variables: Mapping[str, Any] | Frozen, call: Call | None = None, batch: Any = None) -> str:
    """Returns a table of the normalization layers, their methods, and the origin of their statistics.

    Args:
        variables: All variables of a model, or a `Frozen`, which has more information.
        call: Runs the model, as in `postproc`. It tells the method and the epsilon of each layer, which the variables
            do not. It is traced only.
        batch: The batch for the call, or its shapes.

    Returns:
        Text, with a line per layer.

    Raises:
        ValueError: If there is no normalization layer.

    Example:
        >>> net = flax.linen.Sequential([flax.linen.Dense(8), jaxbn.linen.BatchNorm(use_running_average=True)])
        >>> variables = net.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> print(jaxbn.linen.summary(variables, net.apply, jnp.ones((4, 3))))
        1 normalization layer, 8 channels
        layer     channels  learns       method      epsilon  statistics      rows
        layers_1         8  scale, bias  batch_norm  1e-05    initial values     -
    """
    return _summary.summary(LINEN, variables, call, batch)


def _hold(
    watch: Watch, next_call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    module: Any = context.module
    if not slots_of(module, FROZEN) or module.is_initializing():
        return next_call(*args, **kwargs)
    path = "/".join(module.path)
    # Modules of unknown classes have the leaf too: the watch reports those that ran, because they are not frozen.
    if not is_call_of_layer(context):
        return watched(watch, module, lambda: called(next_call, args, kwargs, module), lambda: True)
    watch.serve(path)
    layer = as_norm(module, args, kwargs)
    norm = norm_in_call(layer, path)
    return norm.apply(norm.running, operands_of(layer, args, kwargs))
