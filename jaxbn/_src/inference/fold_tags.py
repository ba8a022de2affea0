"""Tags and records the calls of normalizations and linear layers for `fold_plan`, in any framework."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxbn._src.framework.called import Operands
from jaxbn._src.framework.kernels import MapKernel
from jaxbn._src.framework.method import as_affine
from jaxbn._src.framework.norm_layer import evaluating_method
from jaxbn._src.inference import fold_arithmetic as _fold_arithmetic
from jaxbn._src.inference.fold_plan import DOMAINS, Layer, Norm, Tag
from jaxbn._src.methods.protocol import State
from jaxbn._src.tracing import dataflow as _dataflow

# Arguments with which a layer of Flax replaces its operations.
_OWN = "conv_general_dilated conv_general_dilated_cls dot_general dot_general_cls einsum_op promote_dtype".split()


def tag_call(
    path: str,
    call: Callable[..., jax.Array],
    args: Any,
    kwargs: Any,
    *,
    input_name: str,
    variables: Iterable[Any],
    record: Callable[..., None],
    own: bool = True,
) -> jax.Array:
    """Runs the call of a layer with tags on its input, its variables and its output.

    Args:
        path: The path of the layer.
        call: The call.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        input_name: The name of its first parameter.
        variables: The arrays of the layer.
        record: `(y, *args, **kwargs)`, called for layers of this model.
        own: Whether the layer belongs to this model.

    Returns:
        The output.
    """
    x = _dataflow.tag(args[0] if args else kwargs[input_name], Tag(path, "input", own))
    args, kwargs = ((x, *args[1:]), kwargs) if args else ((), kwargs | {input_name: x})
    # The results are not needed: `follow` records the values that a tag receives even if the tag is dead code.
    for variable in variables:
        _dataflow.tag(variable, Tag(path, "variable"))
    y = call(*args, **kwargs)
    # Another network in the same call, such as a teacher, is tagged but not folded.
    if own:
        record(y, *args, **kwargs)
    return _dataflow.tag(y, Tag(path, "output", own))


def called_norm(layer: Any, params: Any, state: State, operands: Operands, y: jax.Array, refusal: str | None) -> Norm:
    """Records a call of a normalization; `refusal` is the reason why it cannot be folded."""
    x, _, residual, where = operands
    return Norm(
        # `finish` applies the dtype and the activation in the folded model.
        as_affine(evaluating_method(layer)),
        params,
        state,
        axis=layer.axis,
        ndim=x.ndim,
        dtypes=(x.dtype, y.dtype),
        bare=residual is None and getattr(layer, "activation", None) is None,
        refusal=refusal or (DOMAINS if where else None),
    )


def called_linear(
    module: Any,
    kind: str | None,
    weights: _fold_arithmetic.Weights,
    inputs: Any,
    equation: str | None = None,
    *,
    einsum_str: str | None = None,
    **_: Any,
) -> Layer:
    """Records a call of a linear layer of Flax.

    Args:
        module: The layer.
        kind: Its operation, as in `fold_arithmetic.of_flax`; None: unknown, as for a subclass.
        weights: Its kernel and bias.
        inputs: The input.
        equation: An argument of the call of `Einsum`.
        einsum_str: Another name of `equation`.

    Returns:
        The layer.
    """
    defaults = inspect.signature(type(module).__init__).parameters
    own = [name for name in _OWN if name in defaults and getattr(module, name) is not defaults[name].default]
    map_kernel = module.promote_dtype.function if isinstance(module.promote_dtype, MapKernel) else None
    if map_kernel is not None:
        own.remove("promote_dtype")
    refusal = f"uses a custom {own[0]}" if own else None
    if kind is None:
        return Layer(None, weights, refusal or f"is a {type(module).__name__}, which fold does not support", map_kernel)
    linear = _fold_arithmetic.of_flax(kind, module, inputs.ndim, equation or einsum_str)
    return Layer(linear, weights, refusal, map_kernel)
