"""The inputs of a normalization: its static specification, and the checked arrays of one call."""

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import explicit_meshes as _explicit_meshes

Activation = Callable[[jax.Array], jax.Array]
Measure = Callable[..., Any]  # (x, mask=) -> Moments, or a result with count, mean, m2, var and more
Correction = Callable[["Running", jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Spec(NamedTuple):
    """The static specification of a normalization, as a method's factory defines it."""

    axis: _axes.Axis
    epsilon: float
    activation: Activation | None = None
    dtype: DTypeLike | None = None  # of the output; None: Flax's rule
    axis_name: _collectives.AxisName | None = None
    axis_index_groups: _collectives.Groups | None = None
    correct: Correction | None = None  # (running, mean, var) -> (r, d) [C], without gradient


class Operands(NamedTuple):
    """The arrays of a normalization, except its statistics."""

    x: jax.Array  # [..., C]
    scale: jax.Array | None = None  # [C]
    bias: jax.Array | None = None  # [C]
    residual: jax.Array | None = None  # [..., C]
    weights: jax.Array | None = None  # constants, of the rank of x
    # bool[N, D]: if given, statistics, scale and bias are [D, C], and each example uses those of its domain
    members: jax.Array | None = None


class Running(NamedTuple):
    """The running statistics and constants that a training step uses, in addition to its batch."""

    mean: jax.Array  # [C]
    var: jax.Array  # [C]
    epsilon: jax.Array  # []
    limits: Any = None  # further arrays for `correct`


def check_spec(spec: Spec) -> None:
    """Raises a ValueError or TypeError for invalid hyper-parameters."""
    if spec.epsilon is None or isinstance(spec.epsilon, str):
        raise TypeError(f"epsilon={spec.epsilon!r} must be a number; it is added to the variance.")
    if isinstance(spec.epsilon, Real) and not 0 <= spec.epsilon <= float(jnp.finfo(jnp.float32).max):
        raise ValueError(f"epsilon={spec.epsilon} must not be negative or infinite: it is added to the variance.")
    if spec.dtype is not None and not jnp.issubdtype(spec.dtype, jnp.inexact):
        raise ValueError(
            f"dtype={spec.dtype} must be inexact, such as jnp.float32 or jnp.bfloat16: it is the dtype of the output."
        )
    if spec.activation is not None and not callable(spec.activation):
        raise TypeError(f"activation={spec.activation!r} must be a function of arrays, such as jax.nn.relu, or None.")


def of_call(
    spec: Spec,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array,
    x: ArrayLike,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
) -> Operands:
    """The operands of one call, checked against the shape of its statistics `mean`."""
    x = jnp.asarray(x)
    _axes.check_features(x.shape, spec.axis, mean.shape)
    if residual is not None and jnp.shape(residual) != x.shape:
        raise ValueError(f"residual {jnp.shape(residual)} must have the shape of the input, {x.shape}.")
    residual = None if residual is None else _explicit_meshes.on_values(jnp.asarray(residual), x)
    return Operands(x, scale, bias, residual, _axes.weights_like(mask, x))
