"""The affine normalization y = activation((x - mean) * (scale / s) + bias + residual), and its derivative.

`normalize` is given the statistics (evaluation, frozen layers). `batch_normalize` measures x itself and
differentiates through that: with z = (x - mean) / s, dz = dL / d(pre-activation), weights w of total n,

    dx = scale / s * (dz - w / n * (sum dz + z sum dz z));   dscale = sum dz z;   dbias = sum dz      (sums over all)

The sums run over all positions, masked ones too (their outputs depend on the moments); only the weighted positions pay
the correction. Saved for the backward pass are x, mean and 1/s, and the output where there is a residual; all else is
recomputed, as reading memory is what a normalization costs: `jaxbn.checkpoint_policies` knows them by name. One
collective serves all the sums.

A method may put constants behind z, `activation((z r + d) * scale + bias + residual)`: for the derivative of x they are
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
from jaxbn._src.numerics import checkpoint_policies as _policies
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics import segments as _segments
from jaxbn._src.numerics.operands import Activation, Measure, Operands, Spec, Stored

_Constants = tuple[jax.Array, jax.Array] | None  # r and d, where there are any
_Sums = Any  # an array for each value, or all of them stacked
_Statistics = TypeVar("_Statistics")

# Activations whose derivative shows in the sign of their output: (at the output 0, below 0); above it is 1.
_SLOPES: dict[Activation, tuple[float, float]] = {jax.nn.relu: (0.0, 0.0), jax.nn.leaky_relu: (1.0, 0.01)}


# Whether `eval` is given statistics of the data that it normalizes, as capture and adapt give it, and not stored ones.
# A context, so that it reaches the functions of every method, however they are composed; compiled programs know of it.
statistics_of_input = jax.make_user_context(False)


def as_constants(statistics: _Statistics) -> _Statistics:
    """Statistics as `eval` takes them: no gradient flows into stored ones; those of the input depend on it."""
    return statistics if statistics_of_input.value else lax.stop_gradient(statistics)


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
    stored = Stored(mean, var, epsilon, limits)
    spec = spec._replace(epsilon=0)
    if autodiff or jnp.iscomplexobj(operands.x):
        return _measure_and_normalize(spec, measure, operands, lax.stop_gradient(stored))[0]
    operands = operands._replace(residual=_collectives.vary_like(operands.residual, operands.x))
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
    dtype = _dtypes.output(spec.dtype, x, operands.scale, operands.bias, residual)
    if spec.activation in _SLOPES:  # before the rounding, which for ReLU changes no bit
        y = spec.activation(y).astype(dtype)
    else:
        y = y.astype(dtype) if spec.activation is None else spec.activation(y.astype(dtype))
    y = _barriers.rounded(y)
    return y if weights is None else jnp.where(_usable(x, weights), y, lax.stop_gradient(y))


def _measure_and_normalize(
    spec: Spec, measure: Measure, operands: Operands, stored: Stored
) -> tuple[tuple[jax.Array, _moments.Moments], tuple[Any, ...]]:
    """The result; and mean, 1/s, how many values they are of, and the constants behind."""
    given = {} if operands.members is None else {"members": operands.members}
    moments = measure(operands.x, mask=operands.weights, **given)
    mean, var, count = moments.mean, moments.var, moments.count
    if operands.weights is not None or operands.members is not None:  # else everything has been seen
        seen = count > 0
        mean = jnp.where(seen, mean, stored.mean.astype(mean.dtype))
        var = jnp.where(seen, var, stored.var.astype(var.dtype))
        count = jnp.where(seen, count, 1)
    inverse = lax.rsqrt(var + stored.epsilon)
    constants = None if spec.correct is None else lax.stop_gradient(spec.correct(stored, mean, var))
    mean, inverse, constants = _policies.name_statistics((mean, inverse, constants))
    y = _forward(spec, operands, mean, inverse, constants)
    return (y, moments), (mean, inverse, count, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _batch_normalize(
    spec: Spec, measure: Measure, operands: Operands, stored: Stored
) -> tuple[jax.Array, _moments.Moments]:
    return _measure_and_normalize(spec, measure, operands, stored)[0]


def _save(
    spec: Spec, measure: Measure, operands: Operands, stored: Stored
) -> tuple[tuple[jax.Array, _moments.Moments], tuple[Any, ...]]:
    inner = spec.activation is not None and operands.residual is None
    operands = operands._replace(x=_policies.name_input(operands.x, inner))
    (y, moments), statistics = _measure_and_normalize(spec, measure, operands, stored)
    if operands.residual is None:
        return (y, moments), (operands, *statistics, None)
    # Of the residual only the dtype is needed from here on. The output is kept in its place: it tells where the
    # activation was cut off, which could not be computed again without the residual.
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
    # An output that was kept is read; else where the activation was cut off is computed again, privately for each use.
    kept = y is not None or spec.activation is None
    cut_off = (None, None) if kept else (lay_out(offset), _zero_of_its_own(x, cotangents[0]))
    vectors = _Vectors(lay_out(mean), lay_out(multiplier), *cut_off)
    differentiate = functools.partial(_differentiate, spec, operands, _barriers.private(y, "cuda"), cotangents[0])

    def private(tree: Any) -> Any:
        return tree if kept else _barriers.private(tree, "cpu", "cuda")

    dz, _ = differentiate(private(vectors))
    turned = _barriers.private(vectors[::-1], "cpu", *(() if kept else ("cuda",)))
    dz_again, centred = differentiate(_Vectors(*turned[::-1]))

    local, (sum_dz, sum_dzx) = _sum(spec, operands, dz, dz_again * centred)
    slopes = lay_out(sum_dz / count), lay_out(sum_dzx / count * jnp.square(inverse))
    vectors, slopes = private((vectors, slopes))
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
    """What the cotangent of the pre-activation is computed from, besides whole arrays."""

    mean: jax.Array  # [..., C], laid out to broadcast against x
    multiplier: jax.Array  # like this the other two
    offset: jax.Array | None
    zero: jax.Array | None  # []


def _differentiate(
    spec: Spec, operands: Operands, y: jax.Array | None, dy: jax.Array, vectors: _Vectors
) -> tuple[jax.Array, jax.Array]:
    """The cotangent of the pre-activation, dz, and x - mean; y is the output where it was kept."""
    x, weights = operands.x, operands.weights
    centred = _centre(x, vectors.mean, weights)
    if y is not None:
        # In the dtype of dy: so it leaves as the derivative of the residual, and from there it can be read again.
        dz = _cut_off(spec.activation, y, dy).astype(centred.dtype)
    else:
        dz = dy.astype(centred.dtype)
        if spec.activation is not None:
            y = centred * vectors.multiplier
            y = y if vectors.offset is None else y + vectors.offset
            dz = _cut_off(spec.activation, y, dz, vectors.zero)
    return (dz if weights is None else jnp.where(_usable(x, weights), dz, 0)), centred


def _zero_of_its_own(x: jax.Array, dy: jax.Array) -> jax.Array | None:
    """The 0 at which an activation is cut off, where equal zeros of other layers may be about.

    XLA takes equal constants together even if they are as large as x, and then writes, keeps and reads zeros.
    """
    return jnp.zeros((), dy.dtype) if dy.dtype == _dtypes.compute(x) else None


_batch_normalize.defvjp(_save, _backward)


def _layout(spec: Spec, operands: Operands) -> Callable[[Any], Any]:
    """Per-channel arrays in the dtype of the computation, laid out to broadcast against x; None stays."""
    x, members = operands.x, operands.members
    axes, dtype = _axes.split(x.ndim, spec.axis), _dtypes.compute(x)

    def lay_out(stat: jax.Array) -> jax.Array:
        if members is not None:
            return _segments.lay_out(stat.astype(dtype), members, axes)
        return _axes.expand(stat.astype(dtype), x.ndim, axes)

    return lambda stat: None if stat is None else lay_out(stat)


def _sum(spec: Spec, operands: Operands, *values: jax.Array) -> tuple[_Sums, _Sums]:
    """The sums [C] of arrays of the shape of x over the rows: of this device, and of all of them."""
    axes = _axes.split(operands.x.ndim, spec.axis)
    if spec.axis_name is None and operands.members is None and _moments.is_whole(operands.x, axes):
        sums = [v.sum(axes.reduced) for v in values]
        return sums, sums
    if operands.members is not None:
        partial = _segments.sum_in_blocks(axes, operands.members, *values)
    else:
        partial = _moments.sum_in_blocks(axes, *values)
    return partial.sum(0), _collectives.total(partial, spec.axis_name, spec.axis_index_groups)


def _centre(x: jax.Array, mean: jax.Array, weights: jax.Array | None) -> jax.Array:
    """The input less its mean, and 0 for what is not usable."""
    centred = x.astype(mean.dtype) - mean
    return centred if weights is None else jnp.where(_usable(x, weights), centred, 0)


def _usable(x: jax.Array, weights: jax.Array) -> jax.Array:
    """False for padding that is NaN or infinite: its output is the bias, a constant, so that it harms nothing."""
    return (weights > 0) | jnp.isfinite(x)


def without_padding(x: jax.Array, mask: ArrayLike | None) -> jax.Array:
    """The input with 0 for padding that is NaN or infinite: by way of the statistics it would reach all gradients."""
    weights = _axes.weights_like(mask, x)
    return x if weights is None else jnp.where(_usable(x, weights), x, jnp.zeros((), x.dtype))


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


def _cut_off(activation: Activation | None, y: jax.Array, dy: jax.Array, zero: Any = None) -> jax.Array:
    """The cotangent before an activation from that behind it, by the sign of y, which is either side of it."""
    at_zero, below = _SLOPES[activation]  # type: ignore[index]  # without one nothing is cut off
    zero = jnp.zeros((), y.dtype) if zero is None else zero
    return jnp.where(y >= zero if at_zero else y > zero, dy, dy * below if below else zero.astype(dy.dtype))
