r"""Folding an affine map of each channel into the kernel and the bias of the linear layer before or after it.

A normalization with fixed statistics is :math:`y = a x + c`. It folds into a linear layer before it,
:math:`x = W u + b`, or into a linear layer after it, :math:`y = W u + b` with :math:`u = a x + c`:

.. math:: a (W u + b) + c = (a W) u + (a b + c), \qquad W (a x + c) + b = (W a) x + (b + W c)

The second form requires that the layer maps a constant c to a constant, which padding with zeros prevents unless c = 0.
The arithmetic is in float32 or wider, and the results are rounded once, to the dtype of the kernel or bias.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._src.numerics import dtypes as _dtypes


class Linear(NamedTuple):
    """The correspondence between axes of a kernel and axes of the input and the output; no axis is negative."""

    inputs: Mapping[int, int]  # axis of the input -> axis of the kernel
    outputs: Mapping[int, int]  # axis of the output -> axis of the kernel; in the order of the axes of the bias
    groups: int = 1  # feature groups of a convolution
    uneven: str | None = None  # why the layer does not map a constant to a constant


class Affine(NamedTuple):
    """A normalization with fixed statistics, as a scale and a shift for each channel."""

    scale: jax.Array  # [features]
    shift: jax.Array  # [features]
    axes: tuple[int, ...]  # feature axes of the input, sorted; static


class Weights(NamedTuple):
    """The parameters that folding changes in a layer."""

    kernel: jax.Array
    bias: jax.Array | None


def affine_of(
    evaluate: Callable[[jax.Array], jax.Array], ndim: int, axes: tuple[int, ...], like: jax.Array
) -> tuple[Affine, jax.Array]:
    """Returns a function of each channel as an affine map, from its value and its slope at 0.

    Args:
        evaluate: The function, which is called with one value for each channel.
        ndim: Rank of its input.
        axes: Feature axes of the input.
        like: An array in the shape of the features, in the dtype of the input.

    Returns:
        The map, and whether the function is affine: whether it has the same slope at other points.
    """
    zero = jnp.expand_dims(jnp.zeros_like(like), [axis for axis in range(ndim) if axis not in axes])
    shift, scale = jax.jvp(evaluate, (zero,), (jnp.ones_like(zero),))
    # On both sides of 0: a piecewise linear function has one slope on each side.
    slopes = [jax.jvp(evaluate, (zero + probe,), (jnp.ones_like(zero),))[1] for probe in (-3, 3)]
    same = [(jnp.abs(slope - scale) <= 1e-5 * jnp.abs(scale)).all() for slope in slopes]
    return Affine(scale.reshape(like.shape), shift.reshape(like.shape), axes), same[0] & same[1]


def fold_behind(weights: Weights, affine: Affine, layer: Linear) -> Weights:
    """Returns the weights of one layer that equals the layer followed by the affine map."""
    kernel, bias = _widened(weights, layer)
    order = list(layer.outputs)
    in_kernel = [layer.outputs[axis] for axis in affine.axes]
    in_bias = [order.index(axis) for axis in affine.axes]
    # The first equation at the top: (a W) u + (a b + c).
    folded = kernel * _lay_out(affine.scale, in_kernel, kernel.ndim)
    bias = bias * _lay_out(affine.scale, in_bias, bias.ndim) + _lay_out(affine.shift, in_bias, bias.ndim)
    return _rounded(folded, bias, weights)


def fold_before(weights: Weights, affine: Affine, layer: Linear) -> Weights:
    """Returns the weights of one layer that equals the affine map followed by the layer.

    The layer must map a constant to a constant, or the shift must be 0.
    """
    kernel, bias = _widened(weights, layer)
    # The second equation at the top: (W a) x + (b + W c). At every position of the kernel the input is the constant c,
    # so W c sums over space as well.
    response = kernel * _of_inputs(affine.shift, affine, layer, kernel.shape)
    kept = list(layer.outputs.values())
    total = response.sum([axis for axis in range(kernel.ndim) if axis not in kept])
    answer = total.transpose(np.argsort(np.argsort(kept)))  # from the axis order of the kernel to that of the bias
    return _rounded(kernel * _of_inputs(affine.scale, affine, layer, kernel.shape), bias + answer, weights)


def finish(y: jax.Array, residual: Any, dtype: Any, activation: Callable[[jax.Array], jax.Array] | None) -> jax.Array:
    """Applies the rest of a folded normalization: its residual, its dtype and its activation."""
    if residual is not None:
        # No wider dtype than necessary: XLA fuses the sum into the convolution if all have the same dtype.
        wide = _dtypes.promote(y.dtype, jnp.asarray(residual).dtype, dtype)
        y = y.astype(wide) + jnp.asarray(residual).astype(wide)
    y = y.astype(dtype)
    return y if activation is None else activation(y)


# The layers of Flax. Axes refer to an input of rank `ndim`.
def of_conv(
    ndim: int,
    kernel_size: int | Sequence[int],
    *,
    groups: int = 1,
    padding: Any = "VALID",
    input_dilation: Any = 1,
    masked: bool = False,
) -> Linear:
    """Returns the axes of `Conv`: the kernel is `[*kernel_size, in / groups, out]`."""
    sizes = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
    space, uneven = len(sizes), None
    if _adds_zeros(padding, sizes):
        uneven = "pads its input with zeros, to which the shift does not apply"
    elif input_dilation is not None and any(d != 1 for d in np.ravel(input_dilation)):
        uneven = "dilates its input with zeros, to which the shift does not apply"
    elif masked:
        uneven = "masks its kernel"
    return Linear({ndim - 1: space}, {ndim - 1: space + 1}, groups, uneven)


def of_conv_transpose(ndim: int, kernel_size: int | Sequence[int], *, transpose_kernel: bool) -> Linear:
    """Returns the axes of `ConvTranspose`: `[*kernel_size, in, out]`, or `[*kernel_size, out, in]` if transposed."""
    space = 1 if isinstance(kernel_size, int) else len(kernel_size)
    of_input, of_output = (space + 1, space) if transpose_kernel else (space, space + 1)
    uneven = "is transposed, and adds a constant shift to some positions more often than to others"
    return Linear({ndim - 1: of_input}, {ndim - 1: of_output}, uneven=uneven)


def of_dense(ndim: int, axis: Any, batch_axes: Any, features: Any) -> Linear:
    """Returns the axes of `Dense` and `DenseGeneral`: the kernel is `[*batch, *in, *out]`."""
    summed = sorted(int(a) % ndim for a in np.ravel(axis))
    batch = np.size(batch_axes)  # Flax puts them first
    carried = {a: a for a in range(batch)}
    inputs = carried | {a: batch + i for i, a in enumerate(summed)}
    # The output has the axes that are not summed first, and then the features.
    rest = ndim - len(summed)
    return Linear(inputs, carried | {rest + i: batch + len(summed) + i for i in range(np.size(features))})


def of_einsum(ndim: int, equation: str) -> Linear:
    """Returns the axes of `Einsum`, whose equation names the input, the kernel and the output."""
    operands, result = equation.replace(" ", "").split("->")
    given, kernel = operands.split(",")
    written = len(given.replace("...", ""))
    # Write the ellipsis as unused letters, so that the position of a letter is its axis.
    filled = "".join(letter for letter in _UNUSED if letter not in equation)[: ndim - written]
    given, result = (part.replace("...", filled) for part in (given, result))
    lost = set(given) - set(kernel) - set(result)
    uneven = "sums over an axis of its input that is not in its kernel" if lost else None
    inputs, outputs = ({i: kernel.index(c) for i, c in enumerate(part) if c in kernel} for part in (given, result))
    return Linear(inputs, outputs, uneven=uneven)


def of_flax(kind: str, layer: Any, ndim: int, equation: str | None) -> Linear:
    """Returns the axes of a linear layer of linen or NNX; `kind` is the name of its linen class."""
    if kind == "Conv":
        groups, masked = layer.feature_group_count, layer.mask is not None
        options = {"padding": layer.padding, "input_dilation": layer.input_dilation}
        return of_conv(ndim, layer.kernel_size, groups=groups, masked=masked, **options)
    if kind == "ConvTranspose":
        return of_conv_transpose(ndim, layer.kernel_size, transpose_kernel=layer.transpose_kernel)
    if kind == "Einsum":
        return of_einsum(ndim, equation or layer.einsum_str)
    features = layer.features if hasattr(layer, "features") else layer.out_features
    if kind == "Dense":
        return of_dense(ndim, -1, (), features)
    batch_axes = layer.batch_dims if hasattr(layer, "batch_dims") else tuple(layer.batch_axis)
    return of_dense(ndim, layer.axis, batch_axes, features)


_UNUSED = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _adds_zeros(padding: Any, sizes: Sequence[int]) -> bool:
    """Whether a convolution with a kernel of these sizes pads its input with zeros."""
    if isinstance(padding, str):
        # Circular and reflected padding repeat the input; with kernels of size 1, SAME and CAUSAL add no padding.
        return padding not in ("VALID", "CIRCULAR", "REFLECT") and any(k > 1 for k in sizes)
    return any(np.ravel(np.asarray(padding)))


def _widened(weights: Weights, layer: Linear) -> tuple[jax.Array, jax.Array]:
    """Returns the kernel and bias in the precision of the computation; a missing bias becomes zeros."""
    kernel = weights.kernel.astype(_dtypes.compute(weights.kernel))
    if weights.bias is not None:
        return kernel, weights.bias.astype(_dtypes.compute(weights.bias))
    return kernel, jnp.zeros([kernel.shape[axis] for axis in layer.outputs.values()], kernel.dtype)


def _rounded(kernel: jax.Array, bias: jax.Array, like: Weights) -> Weights:
    of_bias = like.kernel if like.bias is None else like.bias
    return Weights(kernel.astype(like.kernel.dtype), bias.astype(of_bias.dtype))


def _lay_out(stat: jax.Array, positions: Sequence[int], ndim: int) -> jax.Array:
    """Puts the axes of a statistic at these positions, so that it broadcasts against an array of rank `ndim`."""
    ordered = stat.transpose(np.argsort(positions))
    return jnp.expand_dims(ordered, [axis for axis in range(ndim) if axis not in positions])


def _of_inputs(stat: jax.Array, affine: Affine, layer: Linear, shape: Sequence[int]) -> jax.Array:
    """Broadcasts a statistic of the input channels against the kernel; an output channel has those of its group."""
    if layer.groups == 1:
        return _lay_out(stat, [layer.inputs[axis] for axis in affine.axes], len(shape))
    ((of_input,), (of_output,)) = layer.inputs.values(), layer.outputs.values()
    of_group = stat.reshape(layer.groups, -1).T  # [in / groups, groups]
    # The output channels are in the order of their groups.
    each = jnp.repeat(of_group, shape[of_output] // layer.groups, axis=1)
    return _lay_out(each, [of_input, of_output], len(shape))
