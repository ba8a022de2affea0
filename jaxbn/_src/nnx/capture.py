"""The capture hook of NNX: the moments of the inputs of all normalization layers, without changes to the model.

On a copy of the model, each normalization layer gets a class whose call measures the input once, normalizes with the
statistics of the mode, whatever flags the model passes, and sows the moments on the output for `harvest`. Each layer
also gets the flat positions of its statistics as one more `BatchStat`, so that transformations slice both together. The
path of the layer and the mode are static, so that jit caches distinguish calls with and without a capture.
"""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn._src.framework import capture as _capture
from jaxbn._src.framework.capture import Hooked, MakeSlot
from jaxbn._src.framework.framework import Call, with_moments
from jaxbn._src.framework.layers import Measured, Mode, Slot, Weights, captured_call, check_mode
from jaxbn._src.framework.norm_layer import called_norm, method_of, operands_of
from jaxbn._src.framework.registry import Registered
from jaxbn._src.framework.selection import is_at_or_below, natural, select
from jaxbn._src.framework.unknown_layers import Touched, check
from jaxbn._src.inference.arguments import not_a_model
from jaxbn._src.methods.protocol import State
from jaxbn._src.nnx.others import class_of, find_others, joined, statistics_of
from jaxbn._src.nnx.registry import (
    REGISTER,
    as_norm,
    evaluates,
    in_flax_names,
    known,
    run_bridge,
    set_call,
    set_class,
    with_touch,
)
from jaxbn._src.numerics import moments as _moments

# Attributes that flax.nnx.BatchNorm.__call__ reads in evaluation, in addition to the variables.
_STOCK_FIELDS = "axis momentum epsilon dtype axis_name axis_index_groups use_fast_variance promote_dtype".split()


class Carried(nnx.BatchStat[jax.Array]):
    """A variable that a capture adds; a BatchStat, so that filters treat it as the statistics."""


def capture_moments(
    call: Call | None = None, *, mode: str = "batch", weights: Weights | None = None
) -> Callable[[Any, Any], tuple[Any, dict[str, _moments.Moments]]]:
    """Makes a function that also returns the moments of the input of every normalization layer.

    The model is not changed. You may jit the function with `nnx.jit`. Both results are differentiable, as
    :func:`jaxbn.linen.capture_moments` describes.

    Args:
        call: Runs the model; None: `lambda model, batch: model(batch)`.
        mode: The statistics that the layers normalize with, whatever flags the model passes: `"batch"`, those of the
            batch; `"eval"`, the running statistics; `"as_called"`, as the flags say.
        weights: `batch -> [N]`, booleans or real weights of the N examples along the leading axis of every layer's
            input, such as 0 for padding. They multiply the mask that the model passes to a layer.

    Returns:
        A function `(model, batch) -> (outputs, moments)`. `moments` maps the path of each layer, such as
        `"blocks/0/norm"`, to `Moments` in the shape of its statistics, of count 0 where the layer was not reached.

    Raises:
        ValueError: If `mode` is unknown; in the function, if the model has no normalization layer.

    Example:
        >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> _, moments = jaxbn.nnx.capture_moments()(model, jnp.array([[1.0], [3.0]]))
        >>> float(moments[""].mean[0])
        2.0
    """
    check_mode(mode)
    return with_moments(capture(run_model if call is None else call, mode=mode, weights=weights))


def capture(
    call: Call, *, mode: Mode, weights: Weights | None = None, examples: bool = False
) -> Callable[[Any, Any], tuple[Any, Measured]]:
    """The capture hook of the framework: as `capture_moments`, but returns all measurements."""
    return _capture.capture(_hook, call, mode, weights, examples)


def _hook(call: Call, model: Any, make: MakeSlot) -> Hooked:
    copy = nnx.clone(model)  # new objects, the same arrays
    layers = find_layers(copy)
    slots = {path: make(path, as_norm(layer).mean.shape) for path, layer in layers.items()}
    for path, layer in layers.items():
        # A frozen layer has no hook, so that its count stays 0 and a statistics pass skips it.
        if not is_frozen(layer):
            _hook_layer(layer, slots[path])
    for path, module in find_others(copy).items():
        _watch(path, module)
    # `harvest` traces functions of arrays; the graphdef, with the tags of the layers, is static.
    graphdef, state = nnx.split(copy)
    return Hooked(lambda state, batch: call(nnx.merge(graphdef, state), batch), state, slots.values(), _without_hooks)


def run_model(model: Any, batch: Any) -> Any:
    """The default `call`."""
    return model(batch)


def find_layers(model: Any) -> dict[str, Any]:
    """Every normalization layer by its path."""
    check_model(model)
    found = {joined(path): module for path, module in nnx.iter_modules(model) if known(module) is not None}
    if not found:
        check({path: class_of(module) for path, module in find_others(model).items()}, (), register=REGISTER)
        raise ValueError("There is no normalization layer, of jaxbn.nnx or flax.nnx.BatchNorm, in this model.")
    return {path: found[path] for path in sorted(found, key=natural)}


def check_model(model: Any) -> None:
    """Raises a TypeError for anything that contains no NNX module."""
    if isinstance(model, type) or next(nnx.iter_modules(model), None) is None:
        raise not_a_model(model)


def select_layers(model: Any, paths: str | Sequence[str]) -> list[str]:
    """The layers at or below the paths; a ValueError for a path without layers.

    An unknown class with running statistics is an error too, or a warning if there are other layers.
    """
    layers, others = find_layers(model), find_others(model)
    for path in [paths] if isinstance(paths, str) else paths:
        unknown = {other: class_of(others[other]) for other in others if is_at_or_below(other, path)}
        check(unknown, [layer for layer in layers if is_at_or_below(layer, path)], register=REGISTER)
    return select(paths, layers)


def set_state(layer: Any, state: State) -> None:
    """Writes the statistics of a layer."""
    registered = cast(Registered, known(layer))
    for name, leaf in state._asdict().items():
        if leaf is not None:
            getattr(layer, registered.names.get(name, name))[...] = leaf


def is_frozen(layer: Any) -> bool:
    """Whether `freeze_layers` froze the layer."""
    return getattr(layer, "jaxbn_frozen", False)


def _hook_layer(module: Any, slot: Slot) -> None:
    set_call(module, _measured)
    module.jaxbn_slot = Carried(slot.index)
    module.jaxbn_layer = nnx.static(slot.layer)
    if slot.weights is not None:
        module.jaxbn_weights = Carried(slot.weights)


def _watch(path: str, module: Any) -> None:
    """Makes a module of an unknown class tag its output."""
    cls: Any = type(module)
    # Any statistic will do: only the axes that transformations slice matter.
    first, *_ = statistics_of(module)
    layer = Touched(path, first[...].size, class_of(module), REGISTER)
    set_class(module, with_touch(cls))
    module.jaxbn_slot = Carried(jnp.arange(layer.size, dtype=jnp.int32).reshape(first.shape))
    module.jaxbn_layer = nnx.static(layer)


def _without_hooks(outputs: Any) -> Any:
    """Removes the hooks from models and states among the outputs of the call."""

    def is_state(node: Any) -> bool:
        return isinstance(node, nnx.State)

    for _, module in nnx.iter_modules(outputs):
        if hasattr(module, "jaxbn_layer"):
            # The first base of a class with a hook is the class without it.
            set_class(module, type(module).__bases__[0])
            for name in {"jaxbn_slot", "jaxbn_layer", "jaxbn_weights"} & vars(module).keys():
                delattr(module, name)
    # A state has variables without their modules, so the slots in it are found by type.
    filtered = nnx.Not(Carried)
    return jax.tree.map(lambda n: nnx.filter_state(n, filtered) if is_state(n) else n, outputs, is_leaf=is_state)


def _measured(module: Any, plain: Callable[..., jax.Array], *args: Any, **kwargs: Any) -> jax.Array:
    """The call of a hooked layer."""
    weights = module.jaxbn_weights[...] if hasattr(module, "jaxbn_weights") else None
    slot = Slot(module.jaxbn_slot[...], weights, module.jaxbn_layer)
    norm, held = as_norm(module, args, kwargs), in_flax_names(module)

    def as_called() -> jax.Array:
        bridged = isinstance(module, nnx.bridge.ToNNX)
        y: jax.Array = run_bridge(module, args, kwargs) if bridged else plain(*args, **kwargs)
        return y

    return captured_call(
        slot,
        method_of(norm),
        evaluates(module, args, kwargs),
        called_norm(norm, slot.layer.path, held, held, _normalize_stock),
        operands_of(norm, args, kwargs),
        as_called,
    )


def _normalize_stock(module: Any, state: State, x: jax.Array, *, mask: Any, residual: Any) -> jax.Array:
    """Runs Flax's own call, so that its rules hold, on a stand-in that holds these statistics."""
    del mask, residual  # Flax ignores the mask in evaluation, and has no residual
    stand_in = types.SimpleNamespace(
        mean=state.mean, var=state.var, scale=module.scale, bias=module.bias, use_running_average=True,
        **{name: getattr(module, name) for name in _STOCK_FIELDS},
    )  # fmt: skip
    if module.jaxbn_layer.mode != "eval":  # Flax rounds running statistics, but not those of the batch
        stand_in.promote_dtype = functools.partial(_promote_all_but_statistics, module.promote_dtype)
    y: jax.Array = nnx.BatchNorm.__call__(stand_in, x)  # type: ignore[arg-type]  # the call reads only the attributes above
    return y


def _promote_all_but_statistics(promote: Callable[..., Any], operands: Any, **options: Any) -> Any:
    x, _, _, scale, bias = promote(operands, **options)
    return x, *operands[1:3], scale, bias
