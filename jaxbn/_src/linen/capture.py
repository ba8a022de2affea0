"""The capture hook of linen: the moments of the inputs of all normalization layers, without changes to the model.

It has three parts. A `Slot` is added to the statistics of each layer. Its arrays hold the flat positions of the
statistics, so that transformations slice both together; its static part makes jit caches distinguish calls with and
without a capture. An interceptor at the call of the layer measures the input once, normalizes with the statistics of
the mode, whatever flags the model passes, and sows the moments on the output. `harvest` collects them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
from flax import nnx

from jaxbn._src import internals as _internals
from jaxbn._src.framework import capture as _capture
from jaxbn._src.framework.called import CalledNorm
from jaxbn._src.framework.capture import Hooked, MakeSlot
from jaxbn._src.framework.framework import with_moments
from jaxbn._src.framework.layers import Measured, Mode, Weights, captured_call, check_mode
from jaxbn._src.framework.norm_layer import called_norm, method_of, operands_of
from jaxbn._src.framework.unknown_layers import Touched, Watch, name_of
from jaxbn._src.linen.layers import STATISTICS
from jaxbn._src.linen.registry import OWN_LEAVES, REGISTER, as_norm, class_inside, evaluates, is_call, run_bridge
from jaxbn._src.linen.variables import Call, find_layers, find_shapes, split_by_class, with_leaves, without
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics import moments as _moments

_SLOT = "jaxbn_slot"
FROZEN = "jaxbn_frozen"  # a leaf among the statistics of frozen layers
REPLACED = "jaxbn_replaced"  # a flag of scopes: the replacement of layers, and the depth of the model
# Fields of the stock layer that evaluation depends on.
_STOCK_FIELDS = (
    "axis epsilon dtype param_dtype use_bias use_scale bias_init scale_init force_float32_reductions".split()
)


def capture_moments(
    call: Call, *, mode: str = "batch", weights: Weights | None = None
) -> Callable[[Any, Any], tuple[Any, dict[str, _moments.Moments]]]:
    """Makes a function that also returns the moments of the input of every normalization layer.

    The model needs no changes, and no collection needs to be mutable. The function is pure, and may be jitted.

    Both results are differentiable. In mode "batch" gradients flow through the statistics of the batch, as in training
    (the plain derivative for every method), and the moments can be part of a loss, such as one that matches statistics
    (DeepInversion). No gradient flows into weights, nor into the running statistics of jaxbn's layers; into those of
    Flax's layers it does in mode "eval", as without a capture.

    Args:
        call: Runs the model, such as `lambda variables, batch: net.apply(variables, batch["image"], train=False)`.
        mode: The statistics that the layers normalize with, whatever flags the model passes: `"batch"`, those of the
            batch; `"eval"`, the running statistics; `"as_called"`, as the flags say.
        weights: `batch -> [N]`, booleans or real weights of the N examples along the leading axis of every layer's
            input, such as 0 for padding. They multiply the mask that the model passes to a layer.

    Returns:
        A function `(variables, batch) -> (outputs, moments)`. `moments` maps the path of each layer, such as
        `"Block_0/BatchNorm_1"`, to `Moments` in the shape of its statistics; the count is 0 if the layer was not
        reached.

    Raises:
        ValueError: If `mode` is unknown; in the function, if the variables hold no statistics.

    Example:
        >>> net = flax.linen.BatchNorm(use_running_average=True)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = net.init(jax.random.key(0), x)
        >>> _, moments = jaxbn.linen.capture_moments(net.apply)(variables, x)
        >>> float(moments[""].mean[0])
        2.0
    """
    check_mode(mode)
    return with_moments(capture(call, mode=mode, weights=weights))


def capture(
    call: Call, *, mode: Mode, weights: Weights | None = None, examples: bool = False
) -> Callable[[Any, Any], tuple[Any, Measured]]:
    """The capture hook of the framework: as `capture_moments`, but returns all measurements."""
    if isinstance(call, nn.Module) and call.scope is None:
        raise TypeError(f"`call` is a module, {type(call).__name__}: pass a function of (variables, batch): net.apply.")
    return _capture.capture(_hook, call, mode, weights, examples)


def _hook(call: Call, variables: Any, make: MakeSlot) -> Hooked:
    variables = flax.core.unfreeze(variables)
    known, _ = split_by_class(variables)
    if not (shapes := find_shapes(variables)):
        find_layers(variables)  # which raises
    # Modules of unknown classes get a slot too: `_pass` tags their output, so that the report can name them.
    slots = {path: make(path, shape) for path, shape in shapes.items()}

    def run(variables: Any, batch: Any) -> Any:
        with nn.intercept_methods(_intercept):
            return call(variables, batch)

    def unhooked(outputs: Any) -> Any:
        if not known:  # only modules of unknown classes have statistics, and none of them ran
            find_layers(variables)  # which raises
        # The call may return variables, as with `mutable=`, and with them the slots.
        return without(_SLOT, outputs)

    return Hooked(run, with_leaves(variables, _SLOT, slots), [slots[path] for path in known], unhooked)


def _intercept(next_call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Runs in the place of every method of every module, and changes the calls of normalization layers only."""
    module: Any = context.module
    if not is_call_of_layer(context):
        return _pass(next_call, args, kwargs, module)
    # A layer without a slot does not belong to the variables that were given: a teacher, or the detached layer below.
    slot = module.get_variable(STATISTICS, _SLOT)
    if slot is None or module.has_variable(STATISTICS, FROZEN):
        return next_call(*args, **kwargs)
    layer = as_norm(module, args, kwargs)
    return captured_call(
        slot,
        method_of(layer),
        evaluates(module, args, kwargs),
        norm_in_call(layer, slot.layer.path),
        operands_of(layer, args, kwargs),
        lambda: called(next_call, args, kwargs, module),
    )


def _pass(next_call: Callable[..., Any], args: Any, kwargs: Any, module: Any) -> Any:
    """Runs a module that is not a known layer, and tags its output if it keeps statistics."""
    slots = [] if module.is_initializing() else slots_of(module)
    y = called(next_call, args, kwargs, module)
    for slot in slots:
        cls = name_of(type(module), class_inside(module))
        y = Touched(slot.layer.path, slot.layer.size, cls, REGISTER).on(y, slot.index)
    return y


def statistics_of(module: Any) -> dict[tuple[Any, ...], Any]:
    """The statistics of the module itself; of a bridge to NNX, those of all modules inside."""
    if module.scope is None or isinstance(module, nn.SpectralNorm):  # which keeps statistics of weights
        return {}
    held = module.variables.get(STATISTICS, {})
    if isinstance(module, nnx.bridge.ToLinen):
        return flax.traverse_util.flatten_dict(flax.core.unfreeze(held))
    return {(name,): leaf for name, leaf in held.items() if not isinstance(leaf, Mapping)}


def slots_of(module: Any, name: str = _SLOT) -> list[Any]:
    """The leaves of this name among the statistics of a module."""
    if module.scope is None or not module.has_variable(STATISTICS, name) and not isinstance(module, nnx.bridge.ToLinen):
        return []  # cheap, as every module is asked
    return [leaf for place, leaf in statistics_of(module).items() if place[-1] == name]


def called(next_call: Callable[..., Any], args: Any, kwargs: Any, module: Any) -> Any:
    """The output of a module; a bridge to NNX runs without the leaves that a capture adds to the statistics."""
    added = (place[-1] for place in statistics_of(module)) if isinstance(module, nnx.bridge.ToLinen) else ()
    if any(str(name).startswith(OWN_LEAVES) for name in added):
        return run_bridge(module, args, kwargs)
    return next_call(*args, **kwargs)


def watched(watch: Watch, module: Any, run: Callable[[], Any], keeps: Callable[[], bool]) -> Any:
    """Runs a module that is not a known layer; `keeps` tells afterwards whether it has running statistics."""
    return watch.run("/".join(module.path), type(module), run, keeps, class_inside(module))


def is_call_of_layer(context: nn.module.InterceptorContext) -> bool:
    """Whether this is the call of a normalization layer, outside initialization and not of a layer to be replaced."""
    module = context.module
    return calls_layer(context) and not module.is_initializing() and successor_of(module) is None


def calls_layer(context: nn.module.InterceptorContext) -> bool:
    """Whether this is the call of a normalization layer."""
    return is_call(context.module, getattr(context.orig_method, "func", None))


def successor_of(layer: Any) -> Callable[[], Any] | None:
    """Makes the layer that replaces this one in its call; None if there is none."""
    # The replaced model may be a part of another one, and its paths start at the replaced model.
    successor, depth = layer.scope.flags.get(REPLACED, (None, 0))
    path = "/".join(layer.path[depth:])
    return functools.partial(successor.make, layer, path) if successor is not None and successor.covers(path) else None


def set_flags(module: Any, flags: Mapping[str, Any]) -> None:
    """Puts flags into the scope of a module and of its parts, those that are bound already and those that will be."""
    module.scope.flags = module.scope.flags.copy(flags)
    for part in _internals.parts_of_module(module):
        if isinstance(part, nn.Module) and part.scope is not None:
            set_flags(part, flags)


def norm_in_call(layer: Any, path: str) -> CalledNorm:
    """A bound layer in a call, with its running statistics and its functions."""
    variables = flax.core.meta.unbox(layer.variables)
    return called_norm(layer, path, variables.get("params", {}), variables[STATISTICS], _normalize_stock)


def _normalize_stock(layer: Any, state: State, x: jax.Array, *, mask: Any, residual: Any) -> jax.Array:
    """Runs a detached stock layer of the same fields, so that Flax's own rules hold."""
    del mask, residual  # Flax ignores the mask in evaluation, and has no residual
    detached = nn.BatchNorm(**{name: getattr(layer, name) for name in _STOCK_FIELDS}, parent=None)
    variables = {name: value for name, value in layer.variables.items() if name == "params"}
    variables[STATISTICS] = {"mean": state.mean, "var": state.var}
    y: jax.Array = detached.apply(variables, x, use_running_average=True)  # type: ignore[assignment]  # not mutable
    return y
