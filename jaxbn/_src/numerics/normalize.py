"""The affine normalization y = activation((x - mean) * (scale / s) + bias + residual), and its derivative.

`normalize` takes the statistics as arguments (evaluation, frozen layers). `batch_normalize` computes them from x and
differentiates through that: with z = (x - mean) / s, dz = dL / d(pre-activation), weights w of total n,

    dx = scale / s * (dz - w / n * (sum dz + z sum dz z));   dscale = sum dz z;   dbias = sum dz      (sums over all)

The sums run over all positions, including masked ones (their outputs depend on the moments); the correction applies to
weighted positions only. The backward pass saves x, mean and 1/s, and the output if there is a residual. It recomputes
the rest, since reading memory dominates the cost of a normalization; `jaxbn.checkpoint_policies` selects the saved
arrays by name. All sums share one collective.

A method may add constants after z, `activation((z r + d) * scale + bias + residual)`: for the derivative of x they are
part of the scale, r scale, and dscale = sum dz (z r + d).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import barriers as _barriers
from jaxbn._src.numerics import block_sums as _block_sums
from jaxbn._src.numerics import checkpoint_policies as _policies
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics import segments as _segments
from jaxbn._src.numerics.operands import Activation, Measure, Operands, Running, Spec

_Constants = tuple[jax.Array, jax.Array] | None  # r and d, if the method has them
_Sums = Any  # one array per value, or all of them stacked
_Statistics = TypeVar("_Statistics")

# Activations whose derivative follows from the sign of their output: (at output 0, below 0); above 0 it is 1.
_SLOPES: dict[Activation, tuple[float, float]] = {jax.nn.relu: (0.0, 0.0), jax.nn.leaky_relu: (1.0, 0.01)}


# True if `eval` receives statistics of the very data that it normalizes (capture and adapt), not running statistics.
# A context reaches the functions of every method, however they are composed, and is part of the jit cache key.
statistics_of_input = jax.make_user_context(False)


def as_constants(statistics: _Statistics) -> _Statistics:
    """Statistics for `eval`: running statistics get no gradient; statistics of the input depend on the input."""
    return statistics if statistics_of_input.value else lax.stop_gradient(statistics)


def normalize(
    spec: Spec, operands: Operands, mean: jax.Array, var: jax.Array, constants: _Constants = None
) -> jax.Array:
    """Normalizes with the statistics `mean` and `var` `[C]`; derivatives in both modes are JAX's own."""
    return _forward(spec, operands, mean, lax.rsqrt(var + spec.epsilon), constants)


def batch_normalize(
    spec: Spec,
    measure: Measure,
    operands: Operands,
    mean: jax.Array,
    var: jax.Array,
    *,
    limits: Any = None,
    autodiff: bool = False,
) -> tuple[jax.Array, Any]:
    """Normalizes with the moments of x, computed by `measure(x, mask=weights)`, and differentiates through them.

    Returns the output, and the moments as constants.

    Channels of count 0 are normalized with the running `mean` and `var`, as constants. With `autodiff` the derivatives
    are JAX's own, in both modes; otherwise the reverse-mode rule of this file applies. The rule includes the moments,
    so none of their intermediates are saved. It consists of differentiable functions, so higher derivatives are right.
    """
    epsilon = jnp.asarray(spec.epsilon, _dtypes.statistics(operands.x))  # an operand, as it may be traced
    running = Running(mean, var, epsilon, limits)
    spec = spec._replace(epsilon=0)
    if autodiff or jnp.iscomplexobj(operands.x):
        return _measure_and_normalize(spec, measure, operands, lax.stop_gradient(running))[0]
    operands = operands._replace(residual=_collectives.vary_like(operands.residual, operands.x))
    fused = spec.activation is None or spec.activation in _SLOPES
    inner = spec if fused else spec._replace(activation=None)
    y, moments = _batch_normalize(inner, measure, operands, running)
    return (y if fused or spec.activation is None else spec.activation(y)), lax.stop_gradient(moments)


def _forward(
    spec: Spec, operands: Operands, mean: jax.Array, inverse: jax.Array, constants: _Constants = None
) -> jax.Array:
    """Applies Flax's order of operations, so that results agree to the last bit."""
    x, residual, weights = operands.x, operands.residual, operands.weights
    scale, bias = _affine(operands, constants)
    lay_out = _layout(spec, operands)
    y = _centre(x, lay_out(mean), weights)
    y = y * lay_out(_multiplier(inverse, scale))
    if bias is not None:
        y = y + lay_out(bias)
    if residual is not None:
        y = y + residual.astype(y.dtype)
    dtype = _dtypes.output(spec.dtype, x, operands.scale, operands.bias, residual)
    if spec.activation in _SLOPES:  # before rounding: for ReLU the order changes no bit, and it fuses
        y = spec.activation(y).astype(dtype)
    else:
        y = y.astype(dtype) if spec.activation is None else spec.activation(y.astype(dtype))
    y = _barriers.rounded(y)
    return y if weights is None else jnp.where(_usable(x, weights), y, lax.stop_gradient(y))


def _measure_and_normalize(
    spec: Spec, measure: Measure, operands: Operands, running: Running
) -> tuple[tuple[jax.Array, _moments.Moments], tuple[Any, ...]]:
    """The output and moments; and mean, 1/s, their counts and the constants of the method."""
    given = {} if operands.members is None else {"members": operands.members}
    moments = measure(operands.x, mask=operands.weights, **given)
    mean, var, count = moments.mean, moments.var, moments.count
    if operands.weights is not None or operands.members is not None:  # otherwise every channel has values
        # Channels without values use the running statistics; a count of 1 keeps their gradient finite.
        seen = count > 0
        mean = jnp.where(seen, mean, running.mean.astype(mean.dtype))
        var = jnp.where(seen, var, running.var.astype(var.dtype))
        count = jnp.where(seen, count, 1)
    inverse = lax.rsqrt(var + running.epsilon)
    constants = None if spec.correct is None else lax.stop_gradient(spec.correct(running, mean, var))
    mean, inverse, constants = _policies.name_statistics((mean, inverse, constants))
    y = _forward(spec, operands, mean, inverse, constants)
    return (y, moments), (mean, inverse, count, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _batch_normalize(
    spec: Spec, measure: Measure, operands: Operands, running: Running
) -> tuple[jax.Array, _moments.Moments]:
    return _measure_and_normalize(spec, measure, operands, running)[0]


def _save(
    spec: Spec, measure: Measure, operands: Operands, running: Running
) -> tuple[tuple[jax.Array, _moments.Moments], tuple[Any, ...]]:
    inner = spec.activation is not None and operands.residual is None
    operands = operands._replace(x=_policies.name_input(operands.x, inner))
    (y, moments), statistics = _measure_and_normalize(spec, measure, operands, running)
    if operands.residual is None:
        return (y, moments), (operands, *statistics, None)
    # The backward pass needs only the dtype of the residual. The output is saved instead: its sign gives the derivative
    # of the activation, which could not be recomputed without the residual.
    operands = operands._replace(residual=jnp.zeros((), operands.residual.dtype))
    y = _policies.name_output(y)
    return (y, moments), (operands, *statistics, None if spec.activation is None else y)


def _backward(
    spec: Spec, measure: Measure, saved: tuple[Any, ...], cotangents: tuple[jax.Array, _moments.Moments]
) -> tuple[Operands, None]:
    del measure
    operands, mean, inverse, count, constants, y = saved
    x, scale, bias, residual, weights, _ = operands
    lay_out = _layout(spec, operands)
    scale_of_z, offset = _affine(operands, constants)
    multiplier = _multiplier(inverse, scale_of_z)
    # A saved output is read. Otherwise each use recomputes the sign of the pre-activation behind a barrier of its own.
    kept = y is not None or spec.activation is None
    cut_off = (None, None) if kept else (lay_out(offset), _distinct_zero(x, cotangents[0]))
    vectors = _Vectors(lay_out(mean), lay_out(multiplier), *cut_off)
    differentiate = functools.partial(_differentiate, spec, operands, _barriers.barrier(y, "cuda"), cotangents[0])
    # One reduction and one collective for both sums; dx needs their totals, dscale and dbias the local parts too.
    local, (sum_dz, sum_dzx) = _sum(spec, operands, *_summands(differentiate, vectors, kept))
    slopes = lay_out(sum_dz / count), lay_out(sum_dzx / count * jnp.square(inverse))
    if not kept:
        vectors, slopes = _barriers.barrier((vectors, slopes), "cpu", "cuda")
    dz, centred = differentiate(vectors)
    correction = slopes[0] + centred * slopes[1]
    if weights is not None:
        correction = correction * weights.astype(correction.dtype)
    dx = vectors.multiplier * (dz - correction)

    def cotangent(local: jax.Array, primal: jax.Array | None, summed: jax.Array | None = None) -> Any:
        if primal is None or not jnp.issubdtype(primal.dtype, jnp.inexact):
            return None  # integers have no derivative
        return _collectives.match_cotangent(local, primal, summed, spec.axis_name).astype(primal.dtype)

    def of_scale(dz: jax.Array, dzx: jax.Array) -> jax.Array:
        return dzx * inverse if constants is None else constants[0] * (dzx * inverse) + constants[1] * dz

    dscale = cotangent(of_scale(*local), scale, of_scale(sum_dz, sum_dzx))
    dbias = cotangent(local[0], bias, sum_dz)
    dresidual = None if residual is None else dz.astype(residual.dtype)
    return Operands(cotangent(dx, x), dscale, dbias, dresidual, None, None), None


class _Vectors(NamedTuple):
    """The small arrays from which the cotangent of the pre-activation is computed."""

    mean: jax.Array  # [..., C], broadcastable to x
    multiplier: jax.Array  # of the same shape, and so is the offset
    offset: jax.Array | None
    zero: jax.Array | None  # []


def _summands(differentiate: Callable[..., Any], vectors: _Vectors, kept: bool) -> tuple[jax.Array, jax.Array]:
    """The arrays dz and dz (x - mean) to sum; `kept` says that the pre-activation is not recomputed."""
    # Both sums need dz. Behind separate barriers, each recomputes it from x and dy instead of reading it from memory.
    dz, _ = differentiate(vectors if kept else _barriers.barrier(vectors, "cpu", "cuda"))
    # The reversed order makes this a second barrier: XLA merges equal ones.
    turned = _barriers.barrier(vectors[::-1], "cpu", *(() if kept else ("cuda",)))
    dz_again, centred = differentiate(_Vectors(*turned[::-1]))
    return dz, dz_again * centred


def _differentiate(
    spec: Spec, operands: Operands, y: jax.Array | None, dy: jax.Array, vectors: _Vectors
) -> tuple[jax.Array, jax.Array]:
    """The cotangent dz of the pre-activation, and x - mean; y is the output if it was saved."""
    x, weights = operands.x, operands.weights
    centred = _centre(x, vectors.mean, weights)
    if y is not None:
        # In the dtype of dy: this array is also the derivative of the residual, so XLA can read it again.
        dz = _cut_off(spec.activation, y, dy).astype(centred.dtype)
    else:
        dz = dy.astype(centred.dtype)
        if spec.activation is not None:
            y = centred * vectors.multiplier
            y = y if vectors.offset is None else y + vectors.offset
            dz = _cut_off(spec.activation, y, dz, vectors.zero)
    return (dz if weights is None else jnp.where(_usable(x, weights), dz, 0)), centred


def _distinct_zero(x: jax.Array, dy: jax.Array) -> jax.Array | None:
    """The threshold 0 of an activation, as a constant that differs from the zeros of other layers.

    XLA merges equal constants even if they are as large as x, and would then write, keep and read zeros.
    """
    return jnp.zeros((), dy.dtype) if dy.dtype == _dtypes.compute(x) else None


_batch_normalize.defvjp(_save, _backward)


def _layout(spec: Spec, operands: Operands) -> Callable[[Any], Any]:
    """A function that makes per-channel arrays broadcastable to x, in the dtype of the computation; None stays None."""
    x, members = operands.x, operands.members
    axes, dtype = _axes.split(x.ndim, spec.axis), _dtypes.compute(x)

    def lay_out(stat: jax.Array | None) -> jax.Array | None:
        if stat is None or members is None:
            return None if stat is None else _axes.expand(stat.astype(dtype), axes)
        return _segments.lay_out(stat.astype(dtype), members, axes)

    return lay_out


def _sum(spec: Spec, operands: Operands, *values: jax.Array) -> tuple[_Sums, _Sums]:
    """Sums [C] over the rows of arrays of the shape of x: on this device, and over all devices."""
    axes = _axes.split(operands.x.ndim, spec.axis)
    if spec.axis_name is None and operands.members is None and _block_sums.is_whole(operands.x, axes):
        sums = [v.sum(axes.reduced) for v in values]
        return sums, sums
    if operands.members is not None:
        partial = _segments.sum_in_blocks(axes, operands.members, *values)
    else:
        partial = _block_sums.sum_in_blocks(axes, *values)
    return partial.sum(0), _collectives.total(partial, spec.axis_name, spec.axis_index_groups)


def _centre(x: jax.Array, mean: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The input minus its mean, and 0 at unusable positions."""
    centred = x.astype(mean.dtype) - mean
    return centred if weights is None else jnp.where(_usable(x, weights), centred, 0)


def _usable(x: jax.Array, weights: jax.Array) -> jax.Array:
    """False for padding that is NaN or infinite. Its output is the constant bias, so it does no harm."""
    return _axes.is_valid(weights) | jnp.isfinite(x)


def without_padding(x: jax.Array, mask: ArrayLike | None) -> jax.Array:
    """Replaces NaN and infinite padding in the input by 0; it would reach all gradients through the statistics."""
    weights = _axes.weights_like(mask, x)
    return x if weights is None else jnp.where(_usable(x, weights), x, jnp.zeros((), x.dtype))


def _affine(operands: Operands, constants: _Constants) -> tuple[jax.Array | None, jax.Array | None]:
    """The affine map of z: scale and bias, or the combined ones of (z r + d) * scale + bias."""
    scale, bias = operands.scale, operands.bias
    if constants is None:
        return scale, bias
    dtype = _dtypes.promote(constants[0].dtype, *(p.dtype for p in (scale, bias) if p is not None))
    r, d = (c.astype(dtype) if scale is None else c.astype(dtype) * scale.astype(dtype) for c in constants)
    return r, d if bias is None else d + bias.astype(dtype)


def _multiplier(inverse: jax.Array, scale: jax.Array | None) -> jax.Array:
    if scale is None:
        return inverse
    dtype = _dtypes.promote(inverse.dtype, scale.dtype)
    return inverse.astype(dtype) * scale.astype(dtype)


def _cut_off(activation: Activation | None, y: jax.Array, dy: jax.Array, zero: Any = None) -> jax.Array:
    """The cotangent before an activation from that after it. The sign of y may be that of its input or its output."""
    at_zero, below = _SLOPES[activation]  # type: ignore[index]  # callers have an activation
    zero = jnp.zeros((), y.dtype) if zero is None else zero
    return jnp.where(y >= zero if at_zero else y > zero, dy, dy * below if below else zero.astype(dy.dtype))
