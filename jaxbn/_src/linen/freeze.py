"""What stands still in a linen model: the frozen network, and single layers that keep their statistics in training."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbn._src.framework.norm_layer import call_arguments, kind_of
from jaxbn._src.framework.processes import check_unstacked
from jaxbn._src.framework.selection import select
from jaxbn._src.framework.unknown_layers import Watch
from jaxbn._src.inference import frozen as _frozen
from jaxbn._src.inference.frozen import Frozen, check_frozen, check_kinds, check_shapes, shapes_by_path
from jaxbn._src.inference.summary import tabulate
from jaxbn._src.linen.capture import (
    FROZEN,
    called,
    called_norm,
    capture,
    is_call_of_layer,
    slots_of,
)
from jaxbn._src.linen.framework import LINEN
from jaxbn._src.linen.registry import REGISTER, as_norm, class_inside
from jaxbn._src.linen.variables import Call, check_variables, find_shapes, find_states, keys, with_leaves, without
from jaxbn._src.statistics.pass_report import Report


def freeze(variables: Mapping[str, Any], report: Report | None = None) -> Frozen:
    """Makes the network that is evaluated, saved and served, out of variables that are ready for it.

    Args:
        variables: All variables of the model, with running averages (Method ONE) or as `postproc` returned them
            (Method TWO).
        report: What `postproc` returned beside them; it says where the statistics come from.

    Returns:
        A `Frozen`, whose `variables` go into `model.apply`.

    Raises:
        ValueError: If nothing ever estimated the statistics of a layer, if they are not finite, or if the report is
            about others.

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
    """Runs `apply(frozen.variables, ...)`; a ValueError if it normalizes otherwise than the network that was frozen."""
    check_frozen(frozen)

    def check(next_call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if is_call_of_layer(context):
            check_kinds(frozen, {"/".join(context.module.path): kind_of(as_norm(context.module))})
        return next_call(*args, **kwargs)

    with nn.intercept_methods(check):
        return apply(frozen.variables, *args, **kwargs)


def check_fits(frozen: Frozen, variables: Any) -> None:
    """Raises a ValueError that names the first variable in which the frozen network differs from these, or theirs."""
    check_shapes(*(shapes_by_path(LINEN.variables(tree)) for tree in (frozen.variables, variables)))


def freeze_layers(call: Callable[..., Any], paths: str | Sequence[str]) -> Callable[..., Any]:
    """Makes a call in which some layers keep their statistics and normalize with them, whatever flags the model passes.

    For fine-tuning with small batches or on little data. Their scale and bias still learn; :func:`affine_mask` holds
    those. No gradient flows into the statistics (in Flax's layers, that of evaluation does). A `postproc` on the call
    leaves the layers untouched. To freeze from step t on, inside jit:
    `jax.lax.cond(step >= t, frozen_call, call, variables, batch)`.

    Args:
        call: Runs the model: `net.apply`, or any function whose first argument is all its variables.
        paths: Layers, or modules all of whose layers are meant, such as `"backbone"` or `"Block_0/BatchNorm_1"`; one or
            several. `""` is the whole model.

    Returns:
        A function like `call`.

    Raises:
        ValueError: When called, if there is no layer at a path or below it, or one of a class that is not known, see
            :func:`register_batch_norm`; where there are others too, it is a warning.

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
        # In the shape of the statistics, so that every transformation carries it in the same way. Being part of the
        # tree structure it keeps compiled programs with and without it apart.
        marks = {path: jnp.ones(shapes[path], bool) for path in select(paths, shapes)}
        with watch, nn.intercept_methods(functools.partial(_hold, watch)):
            return without(FROZEN, call(with_leaves(variables, FROZEN, marks), *args, **kwargs))

    return frozen_call


def affine_mask(variables: Any, paths: str | Sequence[str]) -> Any:
    """Says of each parameter whether it is the scale or bias of one of these layers, for `optax.masked`.

    `optax.chain(optimizer, optax.masked(optax.set_to_zero(), mask))` holds them; `optax.add_decayed_weights(1e-4,
    mask=jax.tree.map(operator.not_, mask))` keeps weight decay off them.

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
    layers = {keys(path) for path in select(paths, find_states(variables))}
    params = flax.core.unfreeze(variables["params"])
    return flax.traverse_util.path_aware_map(lambda path, _: path[:-1] in layers, params)


def summary(variables: Mapping[str, Any] | Frozen, call: Call | None = None, batch: Any = None) -> str:
    """A table of what is normalized, how, and by what its statistics were estimated.

    Args:
        variables: All variables of a model, or a `Frozen`, which knows more.
        call: Runs the model, as in `postproc`: for the method and the epsilon of each layer, of which variables do not
            tell. It is traced, and nothing is computed.
        batch: What it is called with, or its shapes.

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
    info = variables.info if isinstance(variables, Frozen) else None
    variables = variables.variables if isinstance(variables, Frozen) else variables
    check_variables(variables)
    check_unstacked(variables)
    kinds = {} if call is None else dict(jax.eval_shape(capture(call, mode="eval"), variables, batch)[1].kinds)
    return tabulate(find_states(variables), LINEN.params(variables), info=info, kinds=kinds)


def _hold(
    watch: Watch, next_call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    module: Any = context.module
    if not slots_of(module, FROZEN) or module.is_initializing():
        return next_call(*args, **kwargs)
    path = "/".join(module.path)
    if not is_call_of_layer(context):
        return watch.run(
            path, type(module), lambda: called(next_call, args, kwargs, module), lambda: True, class_inside(module)
        )
    watch.serve(path)
    layer = as_norm(module, args, kwargs)
    x, mask, residual, where = call_arguments(layer, args, kwargs)
    norm = called_norm(layer, path)
    return norm.normalize(norm.stored, x, mask=mask, residual=residual, **where)
