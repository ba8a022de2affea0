"""The affine normalization y = activation((x - mean) * (scale / s) + bias + residual), and its derivative.

`normalize` takes the statistics as constants (evaluation, frozen layers). `batch_normalize` measures x itself and
differentiates through that: with z = (x - mean) / s, dz = dL / d(pre-activation), weights w of total n,

    dx = scale / s * (dz - w / n * (sum dz + z sum dz z));   dscale = sum dz z;   dbias = sum dz      (sums over all)

The sums run over all positions, masked ones too (their outputs depend on the moments); only the weighted positions pay
the correction. Saved for the backward pass are x, mean and 1/s, and the output where there is a residual; all else is
recomputed, as reading memory is what a normalization costs. One collective serves all the sums.

A method may put constants behind z, `activation((z r + d) * scale + bias + residual)`: for the derivative of x they are
part of the scale, r scale, and dscale = sum dz (z r + d).
"""

import functools
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn.core import axes as _axes
from jaxbn.core import devices as _devices
from jaxbn.core import domains as _domains
from jaxbn.core import dtypes as _dtypes
from jaxbn.core import moments as _moments

Activation = Callable[[jax.Array], jax.Array]
Measure = Callable[..., Any]  # (x, mask=) -> Moments, or what has more than their count, mean, m2 and var
Correction = Callable[["Stored", jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

_Constants = tuple[jax.Array, jax.Array] | None  # r and d, where there are any

# Activations whose derivative shows in the sign of their output: (at the output 0, below 0); above it is 1.
_SLOPES: dict[Activation, tuple[float, float]] = {jax.nn.relu: (0.0, 0.0), jax.nn.leaky_relu: (1.0, 0.01)}


class Spec(NamedTuple):
    """The static side of a normalization, as a method's factory fixes it."""

    axis: _axes.Axis
    epsilon: float
    activation: Activation | None = None
    dtype: DTypeLike | None = None  # of the output; None: Flax's rule
    axis_name: _devices.AxisName | None = None
    axis_index_groups: _devices.Groups | None = None
    correct: Correction | None = None  # (stored, mean, var) -> (r, d) [C], of which no gradient is taken


class Operands(NamedTuple):
    """What a normalization computes from, besides its statistics."""

    x: jax.Array  # [..., C]
    scale: jax.Array | None = None  # [C]
    bias: jax.Array | None = None  # [C]
    residual: jax.Array | None = None  # [..., C]
    weights: jax.Array | None = None  # of the rank of x, constant
    # bool[N, D]: where given, statistics, scale and bias are [D, C], and an example has those of its domain
    members: jax.Array | None = None


class Stored(NamedTuple):
    """What a training step knows besides its batch."""

    mean: jax.Array  # [C]
    var: jax.Array  # [C]
    epsilon: jax.Array  # []
    limits: Any = None  # arrays that `correct` needs besides


def check_spec(spec: Spec) -> None:
    """Raises a ValueError for hyper-parameters that no normalization can have."""
    if isinstance(spec.epsilon, Real) and not spec.epsilon >= 0:
        raise ValueError(f"epsilon={spec.epsilon} must not be negative: it is added to the variance.")
    if spec.dtype is not None and not jnp.issubdtype(spec.dtype, jnp.inexact):
        raise ValueError(
            f"dtype={spec.dtype} must be inexact, such as jnp.float32 or jnp.bfloat16: it is the output's."
        )
    if spec.activation is not None and not callable(spec.activation):
        raise TypeError(f"activation={spec.activation!r} must be a function of arrays, such as jax.nn.relu, or None.")


def operands(
    spec: Spec,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array,
    x: ArrayLike,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
) -> Operands:
    """Everything that a call computes from, checked against the statistics `mean` that it has."""
    x = jnp.asarray(x)
    _axes.check_features(x.shape, spec.axis, mean.shape)
    if residual is not None and jnp.shape(residual) != x.shape:
        raise ValueError(f"residual {jnp.shape(residual)} must have the shape of the input, {x.shape}.")
    residual = None if residual is None else jnp.asarray(residual)
    return Operands(x, scale, bias, residual, _axes.weights_like(mask, x.shape))


def normalize(
    spec: Spec, operands: Operands, mean: jax.Array, var: jax.Array, constants: _Constants = None
) -> jax.Array:
    """Normalizes with the statistics `mean` and `var` `[C]`; all derivatives are JAX's own, in either mode."""
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
    """Normalizes with the moments of x, as `measure(x, mask=weights)` finds them, and differentiates through them.

    Beside the result they come out, as constants.

    Channels of count 0 are normalized with the stored `mean` and `var`, as constants. With `autodiff` the derivatives
    are JAX's own, in either mode; else the rule of this file, in reverse mode. It covers the measuring, so that nothing
    of that is kept, and as it is made of differentiable functions, derivatives of higher order are right too.
    """
    epsilon = jnp.asarray(spec.epsilon, _dtypes.statistics(operands.x))  # an operand, as it may be traced
    stored = Stored(*lax.stop_gradient((mean, var, epsilon, limits)))
    spec = spec._replace(epsilon=0)
    if autodiff or jnp.iscomplexobj(operands.x):
        return _measure_and_normalize(spec, measure, operands, stored)[0]
    operands = operands._replace(residual=_devices.vary_like(operands.residual, operands.x))
    fused = spec.activation is None or spec.activation in _SLOPES
    inner = spec if fused else spec._replace(activation=None)
    y, moments = _batch_normalize(inner, measure, operands, stored)
    return (y if fused or spec.activation is None else spec.activation(y)), lax.stop_gradient(moments)


def _forward(
    spec: Spec, operands: Operands, mean: jax.Array, inverse: jax.Array, constants: _Constants = None
) -> jax.Array:
    """Flax's order of operations, so that results agree to the last bit."""
    x, residual, weights = operands.x, operands.residual, operands.weights
    scale, bias = _affine(operands, constants)
    lay_out = _layout(spec, operands)
    y = _centre(x, lay_out(mean), weights)
    y = y * lay_out(_multiplier(inverse, scale))
    if bias is not None:
        y = y + lay_out(bias)
    if residual is not None:
        y = y + residual.astype(y.dtype)
    y = y.astype(_dtypes.output(spec.dtype, x, operands.scale, operands.bias, residual))
    y = y if spec.activation is None else spec.activation(y)
    return y if weights is None else jnp.where(_usable(x, weights), y, lax.stop_gradient(y))


def _measure_and_normalize(
    spec: Spec, measure: Measure, operands: Operands, stored: Stored
) -> tuple[tuple[jax.Array, _moments.Moments], tuple[Any, ...]]:
    """The result; and mean, 1/s, the share 1/n of a value in them, and the constants behind."""
    given = {} if operands.members is None else {"members": operands.members}
    moments = measure(operands.x, mask=operands.weights, **given)
    seen = moments.count > 0
    mean = jnp.where(seen, moments.mean, stored.mean.astype(moments.mean.dtype))
    var = jnp.where(seen, moments.var, stored.var.astype(moments.m2.dtype))
    inverse = lax.rsqrt(var + stored.epsilon)
    constants = None if spec.correct is None else lax.stop_gradient(spec.correct(stored, mean, var))
    y = _forward(spec, operands, mean, inverse, constants)
    return (y, moments), (mean, inverse, 1 / jnp.where(seen, moments.count, 1), constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _batch_normalize(
    spec: Spec, measure: Measure, operands: Operands, stored: Stored
) -> tuple[jax.Array, _moments.Moments]:
    return _measure_and_normalize(spec, measure, operands, stored)[0]


def _save(
    spec: Spec, measure: Measure, operands: Operands, stored: Stored
) -> tuple[tuple[jax.Array, _moments.Moments], tuple[Any, ...]]:
    result, statistics = _measure_and_normalize(spec, measure, operands, stored)
    if operands.residual is None:
        return result, (operands, *statistics, None)
    # Of the residual only the dtype is needed from here on. The output is kept in its place: it tells where the
    # activation was cut off, which could not be computed again without the residual.
    operands = operands._replace(residual=jnp.zeros((), operands.residual.dtype))
    return result, (operands, *statistics, None if spec.activation is None else result[0])


def _backward(
    spec: Spec, measure: Measure, saved: tuple[Any, ...], cotangents: tuple[jax.Array, _moments.Moments]
) -> tuple[Operands, None]:
    del measure
    operands, mean, inverse, share, constants, y = saved
    x, scale, bias, residual, weights, _ = operands
    lay_out = _layout(spec, operands)
    centred = _centre(x, lay_out(mean), weights)
    scale_of_z, offset = _affine(operands, constants)
    multiplier = _multiplier(inverse, scale_of_z)
    dz = _before_activation(spec, operands, centred, lay_out(multiplier), offset, y, cotangents[0])

    partial = _sum_in_blocks(spec, operands, dz, dz * centred)
    local_dz, local_dzx = partial.sum(0)
    sum_dz, sum_dzx = _devices.total(partial, spec.axis_name, spec.axis_index_groups)
    correction = lay_out(sum_dz * share) + centred * lay_out(sum_dzx * share * jnp.square(inverse))
    if weights is not None:
        correction = correction * weights.astype(dz.dtype)
    dx = lay_out(multiplier) * (dz - correction)

    def cotangent(local: jax.Array, primal: jax.Array | None, summed: jax.Array | None = None) -> Any:
        if primal is None or not jnp.issubdtype(primal.dtype, jnp.inexact):
            return None  # integers have no derivative
        return _devices.match_cotangent(local, primal, summed, spec.axis_name).astype(primal.dtype)

    def of_scale(dz: jax.Array, dzx: jax.Array) -> jax.Array:
        return dzx * inverse if constants is None else constants[0] * (dzx * inverse) + constants[1] * dz

    dscale = cotangent(of_scale(local_dz, local_dzx), scale, of_scale(sum_dz, sum_dzx))
    dbias = cotangent(local_dz, bias, sum_dz)
    dresidual = None if residual is None else dz.astype(residual.dtype)
    return Operands(cotangent(dx, x), dscale, dbias, dresidual, None, None), None


def _before_activation(
    spec: Spec,
    operands: Operands,
    centred: jax.Array,
    multiplier: jax.Array,
    bias: jax.Array | None,
    y: jax.Array | None,
    dy: jax.Array,
) -> jax.Array:
    """The cotangent of the pre-activation, dz; y is the output where it was kept. The moments leave as constants."""
    x, weights = operands.x, operands.weights
    dz = dy.astype(centred.dtype)
    if spec.activation is not None:
        if y is None:
            y = centred * multiplier + (0 if bias is None else _layout(spec, operands)(bias))
        dz = dz * _activation_slope(spec.activation, y, dz.dtype)
    return dz if weights is None else jnp.where(_usable(x, weights), dz, 0)


_batch_normalize.defvjp(_save, _backward)


def _layout(spec: Spec, operands: Operands) -> Callable[[jax.Array], jax.Array]:
    """Per-channel arrays in the dtype of the computation, laid out to broadcast against x."""
    x, members = operands.x, operands.members
    axes, dtype = _axes.split(x.ndim, spec.axis), _dtypes.compute(x)
    if members is not None:
        return lambda stat: _domains.lay_out(stat.astype(dtype), members, axes)
    return lambda stat: _axes.expand(stat.astype(dtype), x.ndim, axes)


def _sum_in_blocks(spec: Spec, operands: Operands, *values: jax.Array) -> jax.Array:
    axes = _axes.split(operands.x.ndim, spec.axis)
    if operands.members is not None:
        return _domains.sum_in_blocks(axes, operands.members, *values)
    return _moments.sum_in_blocks(axes, *values)


def _centre(x: jax.Array, mean: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The input less its mean, and 0 for what is not usable."""
    centred = x.astype(mean.dtype) - mean
    return centred if weights is None else jnp.where(_usable(x, weights), centred, 0)


def _usable(x: jax.Array, weights: jax.Array) -> jax.Array:
    """False for padding that is NaN or infinite: its output is the bias, a constant, so that it harms nothing."""
    return (weights > 0) | jnp.isfinite(x)


def _affine(operands: Operands, constants: _Constants) -> tuple[jax.Array | None, jax.Array | None]:
    """The map of z: scale and bias, or with constants those of (z r + d) * scale + bias."""
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


def _activation_slope(activation: Activation, y: jax.Array, dtype: Any) -> jax.Array:
    at_zero, below = _SLOPES[activation]
    return jnp.where((y > 0) | ((y == 0) & (at_zero > 0)), jnp.ones((), dtype), jnp.asarray(below, dtype))
