"""Moments out of any NNX model, jaxbn's layers and stock `flax.nnx.BatchNorm` alike, without changing the model.

The class of every normalization layer is replaced on a copy: by one whose call measures its input once, normalizes with
the wanted statistics, whatever flags the model passes, and marks the output for `harvest`. Beside its statistics each
layer holds their flat positions as one more `BatchStat`, which every transformation carries in the same way; which
layer it is and in which mode is static, so that nothing compiled with and without capture is mistaken for each other.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxbn.core import harvest as _harvest
from jaxbn.core import moments as _moments
from jaxbn.methods.base import NormTransform, State
from jaxbn.methods.batch_norm import BatchNormState
from jaxbn.nnx.modules import Norm
from jaxbn.population.arguments import not_a_model
from jaxbn.population.layer_paths import keyed
from jaxbn.population.layers import (
    Layer,
    LayerKind,
    Measured,
    Weights,
    asked_stored,
    call_arguments,
    carry_weights,
    check_mode,
    count_examples,
    example_weights,
    marked,
    mask_of_examples,
    measured,
    natural,
    normalize_as,
    wanted_mode,
)
from jaxbn.population.methods import Method, evaluate, of_stock, operands_for
from jaxbn.population.mixing import CalledNorm, Mixture
from jaxbn.population.processes import check_unstacked

Call = Callable[[Any, Any], Any]

# What flax.nnx.BatchNorm.__call__ reads of its layer in evaluation, besides the statistics.
_STOCK_FIELDS = "axis momentum epsilon dtype axis_name axis_index_groups use_fast_variance promote_dtype".split()


class Slot(nnx.BatchStat[jax.Array]):
    """What rides beside the statistics; a BatchStat, so that filters carry it wherever they carry those."""


def capture_moments(
    call: Call | None = None, *, mode: str = "batch", weights: Weights | None = None
) -> Callable[[Any, Any], tuple[Any, dict[str, _moments.Moments]]]:
    """Makes a function that also returns the moments of every normalization layer's input.

    The model needs no change, and the one given is left untouched. The function may be jitted with `nnx.jit`.

    Both results may be differentiated. In mode "batch" gradients flow through the statistics of the batch, as in
    training (for every method the plain derivative); the moments can be part of a loss, such as one that matches
    statistics (DeepInversion). No gradient flows into weights, nor into the stored statistics of jaxbn's layers; into
    those of Flax's it does in mode "eval", as without capture.

    Args:
        call: Runs the model; None: `lambda model, batch: model(batch)`.
        mode: What the layers normalize with, whatever flags the model passes them: `"batch"`, the statistics of their
            batch; `"eval"`, the stored ones; `"as_called"`, what the model asks for.
        weights: `batch -> [N]`, booleans or real weights of the N examples along the leading axis of every layer's
            input, such as 0 for those that fill up a batch. Layers that the model gives a mask follow that.

    Returns:
        A function `(model, batch) -> (outputs, moments)`. `moments` maps the path of each layer, such as
        `"blocks/0/norm"`, to `Moments` in the shape of its statistics, of count 0 where the layer was not reached.

    Raises:
        ValueError: If `mode` is none of these; in the function, if the model has no normalization layer.

    Example:
        >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> _, moments = jaxbn.nnx.capture_moments()(model, jnp.array([[1.0], [3.0]]))
        >>> float(moments[""].mean[0])
        2.0
    """
    check_mode(mode)
    capturing = capture(run_model if call is None else call, mode=mode, weights=weights)

    def captured(model: Any, batch: Any) -> tuple[Any, dict[str, _moments.Moments]]:
        outputs, found = capturing(model, batch)
        return outputs, keyed(found.moments, dict(found.kinds))

    return captured


def capture(
    call: Call, *, mode: str | Mixture, weights: Weights | None = None, examples: bool = False
) -> Callable[[Any, Any], tuple[Any, Measured]]:
    """As `capture_moments`, with the kind of each layer, and the moments of the means of the examples."""

    def captured(model: Any, batch: Any) -> tuple[Any, Measured]:
        copy = nnx.clone(model)  # new objects, the same arrays
        modules = find_layers(copy)
        count = count_examples(batch) if examples else None
        whole = dict(_hook(path, layer, mode, count) for path, layer in modules.items())
        if weights is not None:
            per_example = example_weights(weights, batch)
            for layer in (layer for layer in whole if not is_frozen(modules[layer.path])):
                modules[layer.path].jaxbn_weights = Slot(carry_weights(per_example, layer))
        graphdef, state = nnx.split(copy)
        outputs, records = _harvest.harvest(lambda state, batch: call(nnx.merge(graphdef, state), batch))(state, batch)
        return _without_hooks(outputs), measured(records, whole, calls=examples)

    return captured


def run_model(model: Any, batch: Any) -> Any:
    """How a model runs if nothing else is said."""
    return model(batch)


def find_layers(model: Any) -> dict[str, Any]:
    """Every normalization layer by its path."""
    check_model(model)
    found = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm | Norm)
    }
    if not found:
        raise ValueError("There is no normalization layer, of jaxbn.nnx or flax.nnx.BatchNorm, in this model.")
    return {path: found[path] for path in sorted(found, key=natural)}


def check_model(model: Any) -> None:
    """Raises a TypeError for anything that holds no NNX module."""
    if isinstance(model, type) or next(nnx.iter_modules(model), None) is None:
        raise not_a_model(model)


def check_one_model(model: Any) -> None:
    """Raises a ValueError if this is no model with normalization layers, or one that `pmap` has replicated."""
    find_layers(model)
    check_unstacked(nnx.state(model))


def find_states(model: Any) -> dict[str, State]:
    """The state of every normalization layer by its path."""
    return {path: state_of(layer) for path, layer in find_layers(model).items()}


def state_of(layer: Any) -> State:
    """The statistics of a layer; a stock one is a batch_norm."""
    return layer.state if isinstance(layer, Norm) else BatchNormState(layer.mean[...], layer.var[...])


def transform_of(layer: Any) -> NormTransform:
    """The pure functions of a layer, but for how a stock one averages."""
    return layer.transform if isinstance(layer, Norm) else of_stock(layer, momentum=None)()


def kind_of(layer: Any) -> LayerKind:
    """What a layer does."""
    return LayerKind.of(method_of(layer))


def method_of(layer: Any) -> Method:
    """The method of a layer; a stock one is a batch_norm."""
    return layer.made_by if isinstance(layer, Norm) else of_stock(layer)


def is_frozen(layer: Any) -> bool:
    """Whether the layer keeps its statistics and normalizes with them whatever it is asked to."""
    return getattr(layer, "jaxbn_frozen", False)


@functools.cache  # the same class each time, so that equal models have equal graphdefs
def with_call_of(cls: type, ours: type, stock: type) -> type:
    """The class with another call: that of `ours` or `stock`, right above the class that defines the call.

    There super().__call__ meets it.
    """
    hook = ours if issubclass(cls, Norm) else stock
    return hook if cls is nnx.BatchNorm else type(cls.__name__, (cls, hook), {})


def set_class(module: Any, cls: type) -> None:
    """Gives the module another class; not as an attribute that NNX keeps account of, which would be left in graphs."""
    object.__setattr__(module, "__class__", cls)


def _hook(path: str, module: Any, mode: str | Mixture, examples: int | None) -> tuple[Layer, jax.Array]:
    layer = Layer(path, state_of(module).mean.shape, mode, examples, method_of(module))
    positions = layer.positions()
    if not is_frozen(module):
        cls: Any = type(module)
        set_class(module, with_call_of(cls, _OurHook, _StockHook))
        module.jaxbn_slot = Slot(positions)
        module.jaxbn_layer = nnx.static(layer)
    return layer, positions


def _without_hooks(outputs: Any) -> Any:
    """Outputs in which the call returned its model, or a state of it, as they would be without capture."""

    def is_state(node: Any) -> bool:
        return isinstance(node, nnx.State)

    for _, module in nnx.iter_modules(outputs):
        if isinstance(module, _OurHook | _StockHook):
            set_class(module, type(module).__bases__[0])
            for name in {"jaxbn_slot", "jaxbn_layer", "jaxbn_weights"} & vars(module).keys():
                delattr(module, name)
    filtered = nnx.Not(Slot)
    return jax.tree.map(lambda n: nnx.filter_state(n, filtered) if is_state(n) else n, outputs, is_leaf=is_state)


def _measured(
    module: Any, normalize: Callable[..., jax.Array], plain: Callable[..., jax.Array], *args: Any, **kwargs: Any
) -> jax.Array:
    """The call of a hooked layer."""
    layer: Layer = module.jaxbn_layer
    x, mask, residual, where = call_arguments(*args, **kwargs)
    transform = transform_of(module)
    if mask is None and hasattr(module, "jaxbn_weights"):
        mask = mask_of_examples(module.jaxbn_weights[...], x, layer.path, module.axis)
    moments = transform.measure(x, **operands_for(transform.measure, mask=mask, **where))
    stored, synchronized = state_of(module), (module.axis_name, module.axis_index_groups)
    asked = asked_stored(module, *args, **kwargs)
    mode = wanted_mode(layer, asked)
    if mode == "as_called":
        y = plain(*args, **kwargs)
    else:
        normalizing = functools.partial(normalize, module)
        norm = CalledNorm(layer.path, transform, stored, normalizing, module.axis, *synchronized)
        y = normalize_as(mode, norm, moments, x, mask, residual, where)
    layer = dataclasses.replace(layer, asked_stored=asked)
    return marked(y, module.jaxbn_slot[...], layer, moments, x, axis=module.axis, mask=mask)


class _OurHook(Norm):
    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return _measured(self, _normalize, super().__call__, *args, **kwargs)


class _StockHook(nnx.BatchNorm):
    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return _measured(self, _normalize_stock, super().__call__, *args, **kwargs)


def _normalize(module: Any, state: State, x: jax.Array, **arguments: Any) -> jax.Array:
    return evaluate(module.transform, module.params, state, x, **arguments)


def _normalize_stock(module: Any, state: State, x: jax.Array, **arguments: Any) -> jax.Array:
    """Through Flax's own call, so that its rules hold, on a stand-in for the layer that holds the wanted statistics."""
    del arguments  # a mask, which Flax ignores here, and a residual, which it does not have
    stand_in = types.SimpleNamespace(
        mean=state.mean, var=state.var, scale=module.scale, bias=module.bias, use_running_average=True,
        **{name: getattr(module, name) for name in _STOCK_FIELDS},
    )  # fmt: skip
    if module.jaxbn_layer.mode != "eval":  # Flax rounds stored statistics to the dtype of the layer, the batch's not
        stand_in.promote_dtype = functools.partial(_promote_all_but_statistics, module.promote_dtype)
    y: jax.Array = nnx.BatchNorm.__call__(stand_in, x)  # type: ignore[arg-type]  # reads no more than these
    return y


def _promote_all_but_statistics(promote: Callable[..., Any], operands: Any, **options: Any) -> Any:
    x, _, _, scale, bias = promote(operands, **options)
    return x, *operands[1:3], scale, bias
