r"""What folding an affine map of each channel does to the kernel and the bias of a linear layer beside it.

A normalization with fixed statistics is :math:`y = a x + c`. Behind a linear layer, :math:`x = W u + b`, or before one,
:math:`u = a x + c`, it disappears into the layer:

.. math:: a (W u + b) + c = (a W) u + (a b + c), \qquad W (a x + c) + b = (W a) x + (b + W c)

The second needs the layer to answer a constant c with a constant, which padding with zeros prevents; c = 0 always does.
All is computed in at least float32, and rounded once, to the dtype of the kernel or bias.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._src.numerics import dtypes as _dtypes


class Linear(NamedTuple):
    """How the kernel of a linear layer lies to its input and its output; axes are not negative."""

    inputs: Mapping[int, int]  # axis of the input -> axis of the kernel
    outputs: Mapping[int, int]  # axis of the output -> axis of the kernel; in the order of the axes of the bias
    groups: int = 1  # of channels, as a convolution has them
    uneven: str | None = None  # why it answers a constant input with something that is no constant


class Affine(NamedTuple):
    """What a normalization with fixed statistics does to each channel."""

    scale: jax.Array  # [features]
    shift: jax.Array  # [features]
    axes: tuple[int, ...]  # of the input, sorted, that hold the features; static


class Weights(NamedTuple):
    """What folding changes in a layer."""

    kernel: jax.Array
    bias: jax.Array | None


def affine_of(
    evaluate: Callable[[jax.Array], jax.Array], ndim: int, axes: tuple[int, ...], like: jax.Array
) -> tuple[Affine, jax.Array]:
    """The map of a function that acts on each channel by itself, from its value and its slope at 0.

    Args:
        evaluate: The function, of an input with one value for each channel.
        ndim: Rank of its input.
        axes: The axes of the input that hold the features.
        like: An array in the shape of the features, in the dtype of the input.

    Returns:
        The map, and whether it is one: the slope is the same elsewhere.
    """
    zero = jnp.expand_dims(jnp.zeros_like(like), [axis for axis in range(ndim) if axis not in axes])
    shift, scale = jax.jvp(evaluate, (zero,), (jnp.ones_like(zero),))
    slopes = [jax.jvp(evaluate, (zero + probe,), (jnp.ones_like(zero),))[1] for probe in (-3, 3)]
    same = [(jnp.abs(slope - scale) <= 1e-5 * jnp.abs(scale)).all() for slope in slopes]
    return Affine(scale.reshape(like.shape), shift.reshape(like.shape), axes), same[0] & same[1]


def fold_behind(weights: Weights, affine: Affine, layer: Linear) -> Weights:
    """The layer followed by the affine map, as one layer."""
    kernel, bias = _widened(weights, layer)
    order = list(layer.outputs)
    in_kernel = [layer.outputs[axis] for axis in affine.axes]
    in_bias = [order.index(axis) for axis in affine.axes]
    folded = kernel * _lay_out(affine.scale, in_kernel, kernel.ndim)
    bias = bias * _lay_out(affine.scale, in_bias, bias.ndim) + _lay_out(affine.shift, in_bias, bias.ndim)
    return _rounded(folded, bias, weights)


def fold_before(weights: Weights, affine: Affine, layer: Linear) -> Weights:
    """The affine map followed by the layer, as one layer; the layer must be even, or the shift 0."""
    kernel, bias = _widened(weights, layer)
    response = kernel * _of_inputs(affine.shift, affine, layer, kernel.shape)
    kept = list(layer.outputs.values())
    total = response.sum([axis for axis in range(kernel.ndim) if axis not in kept])
    answer = total.transpose(np.argsort(np.argsort(kept)))  # from the order of the kernel's axes to that of the bias
    return _rounded(kernel * _of_inputs(affine.scale, affine, layer, kernel.shape), bias + answer, weights)


def finish(y: jax.Array, residual: Any, dtype: Any, activation: Callable[[jax.Array], jax.Array] | None) -> jax.Array:
    """What is left of a folded normalization: its residual, its dtype, its activation."""
    if residual is not None:
        # Not wider than it need be: XLA makes the sum a part of the convolution where all have one dtype.
        wide = _dtypes.promote(y.dtype, jnp.asarray(residual).dtype, dtype)
        y = y.astype(wide) + jnp.asarray(residual).astype(wide)
    y = y.astype(dtype)
    return y if activation is None else activation(y)


# How layers of Flax lie. The axes are those of an input of rank `ndim`.
def of_conv(
    ndim: int,
    kernel_size: int | Sequence[int],
    *,
    groups: int = 1,
    padding: Any = "VALID",
    input_dilation: Any = 1,
    masked: bool = False,
) -> Linear:
    """Of `Conv`: the kernel is `[*kernel_size, in / groups, out]`."""
    sizes = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
    space, uneven = len(sizes), None
    if padding not in ("VALID", "CIRCULAR", "REFLECT") and not _is_zero(padding) and any(k > 1 for k in sizes):
        uneven = "pads its input with zeros, which the shift would not reach"
    elif input_dilation is not None and any(d != 1 for d in np.ravel(input_dilation)):
        uneven = "dilates its input with zeros, which the shift would not reach"
    elif masked:
        uneven = "masks its kernel"
    return Linear({ndim - 1: space}, {ndim - 1: space + 1}, groups, uneven)


def of_conv_transpose(ndim: int, kernel_size: int | Sequence[int], *, transpose_kernel: bool) -> Linear:
    """Of `ConvTranspose`: the kernel is `[*kernel_size, in, out]`, or `[*kernel_size, out, in]` if transposed."""
    space = 1 if isinstance(kernel_size, int) else len(kernel_size)
    of_input, of_output = (space + 1, space) if transpose_kernel else (space, space + 1)
    uneven = "is transposed, and gives a constant shift in some places more often than in others"
    return Linear({ndim - 1: of_input}, {ndim - 1: of_output}, uneven=uneven)


def of_dense(ndim: int, axis: Any, batch_axes: Any, features: Any) -> Linear:
    """Of `Dense` and `DenseGeneral`: the kernel is `[*batch, *in, *out]`."""
    summed = sorted(int(a) % ndim for a in np.ravel(axis))
    batch = np.size(batch_axes)  # Flax has them in front
    carried = {a: a for a in range(batch)}
    inputs = carried | {a: batch + i for i, a in enumerate(summed)}
    rest = ndim - len(summed)
    return Linear(inputs, carried | {rest + i: batch + len(summed) + i for i in range(np.size(features))})


def of_einsum(ndim: int, equation: str) -> Linear:
    """Of `Einsum`: the input, the kernel, the output."""
    operands, result = equation.replace(" ", "").split("->")
    given, kernel = operands.split(",")
    written = len(given.replace("...", ""))
    filled = "".join(letter for letter in _UNUSED if letter not in equation)[: ndim - written]
    given, result = (part.replace("...", filled) for part in (given, result))
    lost = set(given) - set(kernel) - set(result)
    uneven = "sums over an axis of its input that its kernel does not have" if lost else None
    inputs, outputs = ({i: kernel.index(c) for i, c in enumerate(part) if c in kernel} for part in (given, result))
    return Linear(inputs, outputs, uneven=uneven)


_UNUSED = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _is_zero(padding: Any) -> bool:
    return not isinstance(padding, str) and not any(np.ravel(np.asarray(padding)))


def _widened(weights: Weights, layer: Linear) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias in the precision of the computation; a bias of zeros where there is none."""
    kernel = weights.kernel.astype(_dtypes.compute(weights.kernel))
    if weights.bias is not None:
        return kernel, weights.bias.astype(_dtypes.compute(weights.bias))
    return kernel, jnp.zeros([kernel.shape[axis] for axis in layer.outputs.values()], kernel.dtype)


def _rounded(kernel: jax.Array, bias: jax.Array, like: Weights) -> Weights:
    of_bias = like.kernel if like.bias is None else like.bias
    return Weights(kernel.astype(like.kernel.dtype), bias.astype(of_bias.dtype))


def _lay_out(stat: jax.Array, positions: Sequence[int], ndim: int) -> jax.Array:
    """A statistic whose axes are to be these axes of an array of rank `ndim`, so that it broadcasts against that."""
    ordered = stat.transpose(np.argsort(positions))
    return jnp.expand_dims(ordered, [axis for axis in range(ndim) if axis not in positions])


def _of_inputs(stat: jax.Array, affine: Affine, layer: Linear, shape: Sequence[int]) -> jax.Array:
    """A statistic of the input's channels, laid out against the kernel: each output channel has those of its group."""
    if layer.groups == 1:
        return _lay_out(stat, [layer.inputs[axis] for axis in affine.axes], len(shape))
    ((of_input,), (of_output,)) = layer.inputs.values(), layer.outputs.values()
    of_group = stat.reshape(layer.groups, -1).T  # [in / groups, groups]
    each = jnp.repeat(of_group, shape[of_output] // layer.groups, axis=1)
    return _lay_out(each, [of_input, of_output], len(shape))
