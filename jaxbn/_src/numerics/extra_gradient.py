"""An identity with another gradient: the statistics of earlier gradients enter backpropagation through it."""

import jax
import jax.numpy as jnp

from jaxbn._src.numerics import axes as _axes


@jax.custom_vjp
def add_to_gradient(x: jax.Array, weights: jax.Array | None, factor: jax.Array) -> jax.Array:
    """Returns x, and adds `weights * x * factor` to its gradient.

    Args:
        x: An array of real numbers.
        weights: Broadcastable to x; None: 1. Where they are 0, x may be NaN.
        factor: Broadcastable to x; the sum is computed in its dtype. No gradient flows to it.

    Returns:
        x.
    """
    del weights, factor
    return x


def _forward(*operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return operands[0], operands


def _backward(saved: tuple[jax.Array, ...], dx: jax.Array) -> tuple[jax.Array, None, None]:
    x, weights, factor = saved
    x = x if weights is None else jnp.where(_axes.is_valid(weights), x, 0) * weights.astype(x.dtype)
    return (dx.astype(factor.dtype) + x.astype(factor.dtype) * factor).astype(dx.dtype), None, None


add_to_gradient.defvjp(_forward, _backward)
