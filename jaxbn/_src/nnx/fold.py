"""Folding for NNX: a copy of the model is traced with tags, and another copy is edited."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from jaxbn._src.framework.framework import Call
from jaxbn._src.framework.kernels import MapKernel
from jaxbn._src.framework.method import loaded
from jaxbn._src.framework.norm_layer import evaluating_method, flax_operands, operands_of
from jaxbn._src.framework.registry import Registered
from jaxbn._src.inference import fold_arithmetic as _fold_arithmetic
from jaxbn._src.inference import fold_plan as _fold_plan
from jaxbn._src.inference.fold_check import checked_report
from jaxbn._src.inference.fold_plan import Layer
from jaxbn._src.inference.fold_report import FoldReport
from jaxbn._src.inference.fold_tags import called_linear, called_norm, tag_call
from jaxbn._src.nnx.capture import check_model, is_frozen, run_model, select_layers
from jaxbn._src.nnx.others import joined
from jaxbn._src.nnx.registry import Adapted, as_norm, has_plain_call, in_flax_names, known, set_call, set_class
from jaxbn._src.tracing import dataflow as _dataflow
from jaxbn._src.tracing.harvest import over_arrays

Model = TypeVar("Model")

_LINEAR: dict[Any, str] = {
    nnx.Conv: "Conv",
    nnx.ConvTranspose: "ConvTranspose",
    nnx.Linear: "Dense",
    nnx.LinearGeneral: "DenseGeneral",
    nnx.Einsum: "Einsum",
}


def fold(
    model: Model, example: Any, *, call: Call | None = None, tolerance: float | None = None
) -> tuple[Model, FoldReport]:
    """Folds BatchNorm layers into adjacent linear layers (conv-BN fusion), which makes them free in evaluation.

    :func:`jaxbn.linen.fold` describes the conditions and the precision. Linear layers are `Conv`, `ConvTranspose`,
    `Linear`, `LinearGeneral` and `Einsum`; normalizations are those of jaxbn, of any method, and `flax.nnx.BatchNorm`.
    Put a `Frozen` into a model with `install_frozen` first.

    Args:
        model: The model; it is not changed.
        example: A batch for `call`, to trace the model and to compare outputs.
        call: Runs the model in evaluation; None: `lambda model, batch: model(batch)`.
        tolerance: Maximum difference of the outputs on the example, relative to the largest output; None: by the
            dtypes, 1e-4 in float32.

    Returns:
        A new model in evaluation mode, in which a folded layer only applies its residual and its activation; and a
        :class:`jaxbn.FoldReport`.

    Raises:
        ValueError: If there is no normalization layer, or outputs on the example differ by more than the tolerance.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        >>> model = nnx.Sequential(conv, jaxbn.nnx.BatchNorm(4, activation=jax.nn.relu, rngs=rngs))
        >>> folded, report = jaxbn.nnx.fold(model, jnp.ones((1, 8, 8, 3)))
        >>> report.layers["layers/1"]
        LayerFold(folded=True, into='layers/0', reason="into 'layers/0' before it")
        >>> jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(folded)))
        {'layers': {0: {'bias': (4,), 'kernel': (3, 3, 3, 4)}}}
    """
    call = run_model if call is None else call
    check_model(model)
    paths = select_layers(model, "")
    given, folded = nnx.clone(model), nnx.clone(model)
    for copy in (given, folded):
        copy.eval()  # type: ignore[attr-defined]  # a method of nnx.Module, which `Model` is
    traced = _follow(call, given, example)
    plan = _fold_plan.make_plan(traced, paths)
    _edit(folded, plan, traced)
    before, after = (_as_function(call, copy, example) for copy in (given, folded))
    return folded, checked_report(plan, traced, tolerance, before, after)


class Folded(nnx.Module):
    """A folded normalization: the residual, the dtype and the activation that remain."""

    def __init__(self, dtype: Any, activation: Callable[[jax.Array], jax.Array] | None, input_name: str | None):
        self.dtype = dtype
        self.activation = activation
        self.input_name = input_name  # for classes with other arguments than Flax's; they have no residual

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        if self.input_name is not None:
            args, kwargs = (args[0] if args else kwargs[self.input_name],), {}
        given = flax_operands(*args, **kwargs)
        return _fold_arithmetic.finish(given.x, given.residual, self.dtype, self.activation)


class _Recorder:
    """The layers of a traced call; the tagged copy of the model fills it in. Compared by identity."""

    def __init__(self, model: Any) -> None:
        self.modules = _modules_of(model)
        self.norms: dict[str, _fold_plan.Norm] = {}
        self.layers: dict[str, Layer] = {}

    def record(self, path: str, y: jax.Array, *args: Any, **kwargs: Any) -> None:
        module = self.modules[path]
        if isinstance(module, tuple(_LINEAR)):
            self.layers[path] = _layer(module, *args, **kwargs)
        else:
            self.norms[path] = _norm(module, y, *args, **kwargs)


def _modules_of(model: Any) -> dict[str, Any]:
    """The normalizations and linear layers by path."""
    return {joined(path): module for path, module in nnx.iter_modules(model) if _is_followed(module)}


def _is_followed(module: Any) -> bool:
    is_norm = known(module) is not None and not isinstance(module, nnx.bridge.ToNNX)
    return is_norm or isinstance(module, tuple(_LINEAR))


def _follow(call: Call, model: Any, example: Any) -> _fold_plan.Traced:
    """Traces a copy of the model with tags."""
    recorder, copy = _Recorder(model), nnx.clone(model)
    for path, module in _modules_of(copy).items():
        if isinstance(module, tuple(_LINEAR)):
            cls: Any = type(module)
            set_class(module, _tagged_linear(cls))
        else:
            set_call(module, _tagged_norm)
        module.jaxbn_fold = nnx.static((path, weakref.ref(recorder)))  # caches keep it, but not the arrays
    graphdef, state = nnx.split(copy)

    def run(state: Any, inputs: Any) -> Any:
        return over_arrays(call(nnx.merge(graphdef, state), inputs()))

    flow = _dataflow.follow(jax.make_jaxpr(run)(state, over_arrays(example)))
    # The inputs of the program are the variables, in the order of the state, and then the example.
    places = (joined(path) for path, _ in nnx.to_flat_state(state))
    values = _values_of(model, dict(zip(places, flow.inputs, strict=False)))
    return _fold_plan.Traced(flow, recorder.norms, recorder.layers, values)


def _values_of(model: Any, by_place: dict[str, _dataflow.Value]) -> dict[str, list[_dataflow.Value | None]]:
    """The variables of each module in the program; a shared one is in the state only at its first place."""
    held = [
        (joined(path), joined((*path, name)), variable)
        for path, module in nnx.iter_modules(model)
        for name, variable in vars(module).items()
        if isinstance(variable, nnx.Variable)
    ]
    known = {id(variable): by_place[place] for _, place, variable in held if place in by_place}
    values: dict[str, list[_dataflow.Value | None]] = {}
    for path, _, variable in held:
        values.setdefault(path, []).append(known.get(id(variable)))
    return values


def _tagged(module: Any, call: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """The call of a module of the tagged copy."""
    path, recorder = module.jaxbn_fold[0], module.jaxbn_fold[1]()
    variables = [variable[...] for variable in vars(module).values() if isinstance(variable, nnx.Variable)]
    record = functools.partial(recorder.record, path)
    return tag_call(path, call, args, kwargs, input_name=name, variables=variables, record=record)


def _tagged_norm(module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return _tagged(module, call, cast(Registered, known(module)).input_name, *args, **kwargs)


@functools.cache
def _tagged_linear(cls: Any) -> type:
    """A subclass whose call tags its input, variables and output."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _tagged(self, functools.partial(cls.__call__, self), "inputs", *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call})


def _norm(module: Any, y: jax.Array, *args: Any, **kwargs: Any) -> _fold_plan.Norm:
    layer, registered = as_norm(module, args, kwargs), cast(Registered, known(module))
    # A frozen layer has a call of ours; what counts is the class that it had before.
    cls: Any = type(module).__bases__[0] if is_frozen(module) else type(module)
    refusal = None
    if not (is_frozen(module) or registered.evaluates(module, args, kwargs)):
        refusal = _fold_plan.TRAINS
    elif not has_plain_call(module, cls):
        refusal = f"it is a {cls.__name__}, which overrides __call__"
    held = in_flax_names(module)
    params, state = loaded(evaluating_method(layer)(), held, held)
    return called_norm(layer, params, state, operands_of(layer, args, kwargs), y, refusal)


def _layer(module: Any, *args: Any, **kwargs: Any) -> Layer:
    weights = _fold_arithmetic.Weights(module.kernel[...], None if module.bias is None else module.bias[...])
    return called_linear(module, _LINEAR.get(type(module)), weights, *args, **kwargs)


def _edit(model: Any, plan: _fold_plan.Plan, traced: _fold_plan.Traced) -> None:
    """Folds in place, so that all references to a layer see the folded one."""
    modules = _modules_of(model)
    for one in plan.folds:
        norm = modules[one.norm]
        layer = as_norm(norm)
        of_old = getattr(type(norm), "jaxbn_input", None)  # of the layer before `replace`
        input_name = layer.registered.input_name if isinstance(layer, Adapted) else of_old
        left = Folded(traced.norms[one.norm].dtypes[1], getattr(norm, "activation", None), input_name)
        # The object itself changes its class, since several parents may hold references to it.
        set_class(norm, Folded)
        vars(norm).clear()
        vars(norm).update(vars(left))
    for path, weights in _fold_plan.fold_weights(plan, traced.layers).items():
        layer = modules[path]
        layer.kernel = layer.kernel.replace(weights.kernel)
        layer.bias = nnx.Param(weights.bias) if layer.bias is None else layer.bias.replace(weights.bias)
        if isinstance(layer, nnx.Einsum):
            # Einsum adds a bias if it has a shape for it; the other layers have a flag.
            layer.bias_shape = layer.bias.shape
        else:
            layer.use_bias = True
        if isinstance(layer.promote_dtype, MapKernel):
            layer.promote_dtype = promote_dtype


def _as_function(call: Call, model: Any, example: Any) -> tuple[Any, ...]:
    """A function of the state of the model, and its arguments."""
    graphdef, state = nnx.split(model)
    return lambda state, example: call(nnx.merge(graphdef, state), example), state, example
