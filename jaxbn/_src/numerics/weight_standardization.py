"""Centered kernels and weight standardization, for dense layers and convolutions before a normalization."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import dtypes as _dtypes
from jaxbn._src.numerics import moments as _moments


def centralize_kernel(kernel: ArrayLike, feature_axis: _axes.Axis = -1) -> jax.Array:
    r"""Subtracts the mean of the kernel for each output feature; inputs of equal mean then give outputs of mean 0.

    `moving_average_batch_norm` does not subtract the mean: use centered kernels in all convolutions of such a network,
    without bias. The mean is computed in every call, and gradients flow through it. `jaxbn.linen.map_kernel` and
    `jaxbn.nnx.map_kernel` apply this function inside Flax's layers.

    Args:
        kernel: `[..., in, out]`, of any rank, as in Flax's dense layers and convolutions.
        feature_axis: Axis of the output features, or several; the mean is over the other axes.

    Returns:
        An array of the same shape and dtype; the mean is computed in at least float32.

    Example:
        >>> jaxbn.centralize_kernel(jnp.array([[1.0, 5.0], [3.0, 5.0]]))
        Array([[-1.,  0.],
               [ 1.,  0.]], dtype=float32)

    References:
        Yan et al., `Towards Stabilizing Batch Statistics <https://arxiv.org/abs/2001.06838>`_, 2020.
    """
    kernel = jnp.asarray(kernel)
    return _centred(kernel, feature_axis).astype(kernel.dtype)


def standardize_kernel(kernel: ArrayLike, feature_axis: _axes.Axis = -1, *, epsilon: float = 1e-5) -> jax.Array:
    r"""Weight standardization: scales the kernel to mean 0 and variance 1 for each output feature.

    .. math:: \hat{w} = \frac{w - \bar{w}}{\sqrt{s^2 + \epsilon}}, \qquad s^2 = \sum (w - \bar{w})^2 / (n - 1)

    For small batches, followed by group normalization or batch normalization.

    Args:
        kernel: As in `centralize_kernel`.
        feature_axis: As in `centralize_kernel`.
        epsilon: Added to the variance.

    Returns:
        An array of the same shape and dtype.

    Example:
        >>> jaxbn.standardize_kernel(jnp.array([[1.0], [2.0], [3.0]])).round(3).ravel()
        Array([-1.,  0.,  1.], dtype=float32)

    References:
        Qiao et al., `Micro-Batch Training with Batch-Channel Normalization and Weight Standardization
        <https://arxiv.org/abs/1903.10520>`_, 2019; the variance is unbiased, as in their code.
    """
    kernel = jnp.asarray(kernel)
    centred = _centred(kernel, feature_axis)
    reduced = _axes.split(kernel.ndim, feature_axis).reduced
    # Bessel's factor is 1 for n = 1, so a kernel with one weight per output gives zeros and no NaN.
    n = jnp.asarray(_axes.values_per_channel(kernel.shape, feature_axis), centred.dtype)
    var = jnp.square(centred).mean(reduced, keepdims=True) * _moments.bessel(n)
    return (centred * lax.rsqrt(var + epsilon)).astype(kernel.dtype)


def _centred(kernel: jax.Array, feature_axis: _axes.Axis) -> jax.Array:
    values = kernel.astype(_dtypes.compute(kernel))
    return values - values.mean(_axes.split(kernel.ndim, feature_axis).reduced, keepdims=True)
