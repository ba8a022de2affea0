"""Moments out of any linen model, jaxbn's layers and stock `flax.linen.BatchNorm` alike, without changing the model.

Three parts. A `Slot` goes in beside the statistics of each layer: it says which flat positions of the layer a call
holds, whatever transformation carried the statistics there, and being part of the tree structure it keeps compiled
programs with and without capture apart. An interceptor at the layer's call measures the input once, normalizes with the
wanted statistics, whatever flags the model passes, and marks the output. `harvest` brings the marked moments out.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax

from jaxbn.core import calls as _calls
from jaxbn.core import harvest as _harvest
from jaxbn.core import moments as _moments
from jaxbn.linen.modules import STATISTICS, Norm
from jaxbn.methods.base import NormTransform, State
from jaxbn.methods.batch_norm import BatchNormState
from jaxbn.population.arguments import not_variables
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
from jaxbn.population.methods import Method, evaluate, loaded, of_stock, operands_for
from jaxbn.population.mixing import CalledNorm, Mixture

Call = Callable[[Any, Any], Any]

# The interceptor is given a method as a partial of the plain function of the class that defines it, so that a subclass
# which calls super().__call__ is met as well.
STOCK_CALL = inspect.unwrap(nn.BatchNorm.__call__)
OUR_CALL = inspect.unwrap(Norm.__call__)

_SLOT = "jaxbn_slot"
_WEIGHTS = "jaxbn_weights"
FROZEN = "jaxbn_frozen"  # beside the statistics of a layer that is to keep and to use them
REPLACED = (
    "jaxbn_replaced"  # in the flags of scopes: what takes the place of layers, and of how deep a model it was said
)
# Fields of the stock layer that matter once its statistics are given.
_STOCK_FIELDS = (
    "axis epsilon dtype param_dtype use_bias use_scale bias_init scale_init force_float32_reductions".split()
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slot:
    """Which flat positions of the layer the statistics beside it are. `layer` is part of the tree structure."""

    index: jax.Array
    layer: Layer = dataclasses.field(metadata={"static": True})


def capture_moments(
    call: Call, *, mode: str = "batch", weights: Weights | None = None
) -> Callable[[Any, Any], tuple[Any, dict[str, _moments.Moments]]]:
    """Makes a function that also returns the moments of every normalization layer's input.

    The model needs no change, and nothing needs to be mutable. The function is pure, and may be jitted.

    Both results may be differentiated. In mode "batch" gradients flow through the statistics of the batch, as in
    training (for every method the plain derivative); the moments can be part of a loss, such as one that matches
    statistics (DeepInversion). No gradient flows into weights, nor into the stored statistics of jaxbn's layers; into
    those of Flax's it does in mode "eval", as without capture.

    Args:
        call: Runs the model, for one `lambda variables, batch: net.apply(variables, batch["image"], train=False)`.
        mode: What the layers normalize with, whatever flags the model passes them: `"batch"`, the statistics of their
            batch; `"eval"`, the stored ones; `"as_called"`, what the model asks for.
        weights: `batch -> [N]`, booleans or real weights of the N examples along the leading axis of every layer's
            input, such as 0 for those that fill up a batch. Layers that the model gives a mask follow that.

    Returns:
        A function `(variables, batch) -> (outputs, moments)`. `moments` maps the path of each layer, such as
        `"Block_0/BatchNorm_1"`, to `Moments` in the shape of its statistics; their count is 0 where the layer was not
        reached.

    Raises:
        ValueError: If `mode` is none of these; in the function, if the variables hold no statistics.

    Example:
        >>> net = flax.linen.BatchNorm(use_running_average=True)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = net.init(jax.random.key(0), x)
        >>> _, moments = jaxbn.linen.capture_moments(net.apply)(variables, x)
        >>> float(moments[""].mean[0])
        2.0
    """
    check_mode(mode)
    capturing = capture(call, mode=mode, weights=weights)

    def captured(variables: Any, batch: Any) -> tuple[Any, dict[str, _moments.Moments]]:
        outputs, found = capturing(variables, batch)
        return outputs, keyed(found.moments, dict(found.kinds))

    return captured


def capture(
    call: Call, *, mode: str | Mixture, weights: Weights | None = None, examples: bool = False
) -> Callable[[Any, Any], tuple[Any, Measured]]:
    """As `capture_moments`, with the kind of each layer, and the moments of the means of the examples."""
    if isinstance(call, nn.Module) and call.scope is None:
        raise TypeError(f"`call` is a module, {type(call).__name__}: pass a function of (variables, batch): net.apply.")

    def captured(variables: Any, batch: Any) -> tuple[Any, Measured]:
        variables = flax.core.unfreeze(variables)
        count = count_examples(batch) if examples else None
        layers = [Layer(path, state.mean.shape, mode, count) for path, state in find_states(variables).items()]
        whole = {layer: layer.positions() for layer in layers}
        slots = {layer.path: Slot(index, layer) for layer, index in whole.items()}

        def run(variables: Any, batch: Any) -> Any:
            if weights is not None:
                per_example = example_weights(weights, batch)
                carried = {layer.path: carry_weights(per_example, layer) for layer in layers}
                variables = with_leaves(variables, _WEIGHTS, carried)
            with nn.intercept_methods(_intercept):
                return without(_WEIGHTS, call(variables, batch))

        outputs, records = _harvest.harvest(run)(with_leaves(variables, _SLOT, slots), batch)
        return without(_SLOT, outputs), measured(records, whole, calls=examples)

    return captured


def find_states(variables: Mapping[str, Any]) -> dict[str, State]:
    """The state of every normalization layer by its path."""
    check_variables(variables)
    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(variables.get(STATISTICS, {})))
    parents = dict.fromkeys(path[:-1] for path in flat if path[-1] == "mean" and (*path[:-1], "var") in flat)
    states = {
        path: BatchNormState(*(flax.core.meta.unbox(flat.get((*keys(path), name))) for name in BatchNormState._fields))
        for path in sorted(map("/".join, parents), key=natural)
    }
    if not states:
        raise ValueError(
            f"There are no statistics of a normalization layer (mean and var) in variables[{STATISTICS!r}]; the "
            f"collections given are {sorted(variables)}. Pass all the variables of the model, not its params alone."
        )
    return states


def check_variables(variables: Any) -> None:
    """Raises a TypeError for anything but a dict of variables."""
    if not isinstance(variables, Mapping):
        raise not_variables(variables)


def with_leaves(variables: dict[str, Any], name: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with one leaf more, of this name, beside the statistics of each layer given by its path."""
    flat = flax.traverse_util.flatten_dict(variables[STATISTICS])
    flat |= {(*keys(path), name): leaf for path, leaf in leaves.items()}
    return variables | {STATISTICS: flax.traverse_util.unflatten_dict(flat)}


def without(name: str, tree: Any) -> Any:
    """Outputs in which the call returned its variables, as with `mutable=`, without the leaves of this name."""

    def holds_it(node: Any) -> bool:
        return isinstance(node, dict | flax.core.FrozenDict) and name in node

    def strip(node: Any) -> Any:
        if not holds_it(node):
            return node
        return type(node)({key: without(name, value) for key, value in node.items() if key != name})

    return jax.tree.map(strip, tree, is_leaf=holds_it)


def keys(path: str) -> tuple[str, ...]:
    """A path as the keys of nested dicts; the model itself has the path ''."""
    return tuple(path.split("/")) if path else ()


def _intercept(next_call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Runs in the place of every method of every module, and lets all but the calls of normalization layers pass."""
    layer: Any = context.module
    # Without a slot it is no layer of the variables that were passed in: a teacher, or our own call below.
    slot = layer.get_variable(STATISTICS, _SLOT) if is_call_of_layer(context) else None
    if slot is None or layer.has_variable(STATISTICS, FROZEN):
        return next_call(*args, **kwargs)
    x, mask, residual, where = call_arguments(*args, **kwargs)
    transform = _transform_of(layer)
    if mask is None and layer.has_variable(STATISTICS, _WEIGHTS):
        mask = mask_of_examples(layer.get_variable(STATISTICS, _WEIGHTS), x, slot.layer.path, layer.axis)
    moments = transform.measure(x, **operands_for(transform.measure, mask=mask, **where))
    stored, synchronized = stored_state(layer), (layer.axis_name, layer.axis_index_groups)
    asked = asked_stored(layer, *args, **kwargs)
    mode = wanted_mode(slot.layer, asked)
    if mode == "as_called":
        y = next_call(*args, **kwargs)
    else:
        normalizing = functools.partial(normalize, layer)
        norm = CalledNorm(slot.layer.path, transform, stored, normalizing, layer.axis, *synchronized)
        y = normalize_as(mode, norm, moments, x, mask, residual, where)
    marks_layer = dataclasses.replace(slot.layer, method=method_of(layer), asked_stored=asked)
    return marked(y, slot.index, marks_layer, moments, x, axis=layer.axis, mask=mask)


def is_call_of_layer(context: nn.module.InterceptorContext) -> bool:
    """Whether an interceptor has met the call of a normalization layer, other than for its initialization.

    Nor does a layer count in whose place another is about to be called.
    """
    module = context.module
    return meets_layer(context) and not module.is_initializing() and successor_of(module) is None


def meets_layer(context: nn.module.InterceptorContext) -> bool:
    """Whether an interceptor has met the call of a normalization layer."""
    return getattr(context.orig_method, "func", None) in (STOCK_CALL, OUR_CALL)


def successor_of(layer: Any) -> Callable[[], Any] | None:
    """What makes the layer that takes the place of another in this call; None if nothing does."""
    successor, depth = layer.scope.flags.get(REPLACED, (None, 0))
    path = "/".join(layer.path[depth:])
    return functools.partial(successor.make, layer, path) if successor is not None and successor.covers(path) else None


def set_flags(module: Any, flags: Mapping[str, Any]) -> None:
    """Puts flags into the scope of a module and of its parts, those that are bound already and those that will be."""
    module.scope.flags = module.scope.flags.copy(flags)
    for part in _calls.parts_of_module(module):
        if isinstance(part, nn.Module) and part.scope is not None:
            set_flags(part, flags)


def kind_of(layer: Any) -> LayerKind:
    """What a layer does."""
    return LayerKind.of(method_of(layer))


def method_of(layer: Any) -> Method:
    """The method of a layer; a stock one is a batch_norm."""
    return layer.made_by() if isinstance(layer, Norm) else of_stock(layer)


def _transform_of(layer: Any) -> NormTransform:
    """The pure functions of a layer, but for how a stock one averages."""
    return layer.transform() if isinstance(layer, Norm) else of_stock(layer, momentum=None)()


def stored_state(layer: Any) -> State:
    """The statistics that a layer holds, as the methods' functions take them."""
    variables = flax.core.meta.unbox(layer.variables)
    return loaded(_transform_of(layer), variables.get("params", {}), variables[STATISTICS])[1]


def normalize(layer: Any, state: State, x: jax.Array, *, mask: Any, residual: Any, **where: Any) -> jax.Array:
    """What the layer makes of its input with these statistics."""
    if not isinstance(layer, Norm):
        return _normalize_stock(layer, state, x)  # where Flax ignores the mask, and has no residual
    transform, variables = layer.transform(), flax.core.meta.unbox(layer.variables)
    params, _ = loaded(transform, variables.get("params", {}), variables[STATISTICS])
    return evaluate(transform, params, state, x, mask=mask, residual=residual, **where)


def _normalize_stock(layer: Any, state: State, x: jax.Array) -> jax.Array:
    """Through a stock layer of the same fields that stands outside the model, so that Flax's own rules hold."""
    detached = nn.BatchNorm(**{name: getattr(layer, name) for name in _STOCK_FIELDS}, parent=None)
    variables = {name: value for name, value in layer.variables.items() if name == "params"}
    variables[STATISTICS] = {"mean": state.mean, "var": state.var}
    y: jax.Array = detached.apply(variables, x, use_running_average=True)  # type: ignore[assignment]  # not mutable
    return y
