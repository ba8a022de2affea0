"""What a normalization is computed from: its static side, and the arrays of a call, checked against each other."""

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
Measure = Callable[..., Any]  # (x, mask=) -> Moments, or what has more than their count, mean, m2 and var
Correction = Callable[["Stored", jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Spec(NamedTuple):
    """The static side of a normalization, as a method's factory fixes it."""

    axis: _axes.Axis
    epsilon: float
    activation: Activation | None = None
    dtype: DTypeLike | None = None  # of the output; None: Flax's rule
    axis_name: _collectives.AxisName | None = None
    axis_index_groups: _collectives.Groups | None = None
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
    if spec.epsilon is None or isinstance(spec.epsilon, str):
        raise TypeError(f"epsilon={spec.epsilon!r} must be a number; it is added to the variance.")
    if isinstance(spec.epsilon, Real) and not 0 <= spec.epsilon <= float(jnp.finfo(jnp.float32).max):
        raise ValueError(f"epsilon={spec.epsilon} must not be negative or infinite: it is added to the variance.")
    if spec.dtype is not None and not jnp.issubdtype(spec.dtype, jnp.inexact):
        raise ValueError(
            f"dtype={spec.dtype} must be inexact, such as jnp.float32 or jnp.bfloat16: it is the output's."
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
    """Everything that a call computes from, checked against the statistics `mean` that it has."""
    x = jnp.asarray(x)
    _axes.check_features(x.shape, spec.axis, mean.shape)
    if residual is not None and jnp.shape(residual) != x.shape:
        raise ValueError(f"residual {jnp.shape(residual)} must have the shape of the input, {x.shape}.")
    residual = None if residual is None else _explicit_meshes.on_values(jnp.asarray(residual), x)
    return Operands(x, scale, bias, residual, _axes.weights_like(mask, x))
