"""A map of the kernel as an option of the dense layers and convolutions of flax.linen."""

from collections.abc import Callable
from typing import Any

import jax
from flax.linen.dtypes import promote_dtype

from jaxbn._src.framework.kernels import MapKernel


def map_kernel(function: Callable[[jax.Array], jax.Array]) -> Callable[..., Any]:
    """Makes a Flax layer compute with a function of its kernel: pass it as the layer's `promote_dtype`.

    The layer keeps its class, its name and its parameters, so that checkpoints fit; gradients go through the function.
    It works in all layers that have a kernel and a bias, such as Dense, Conv and ConvTranspose, whose dtypes are
    promoted as ever.

    Args:
        function: `kernel -> kernel`, such as `jaxbn.centralize_kernel` or `jaxbn.standardize_kernel`.

    Returns:
        A value for `promote_dtype`; equal for equal functions.

    Example:
        >>> centralized = jaxbn.linen.map_kernel(jaxbn.centralize_kernel)
        >>> conv = flax.linen.Conv(4, (3, 3), use_bias=False, promote_dtype=centralized)
        >>> x = jnp.ones((1, 8, 8, 2))  # of equal mean in all channels
        >>> y = conv.apply(conv.init(jax.random.key(0), x), x)
        >>> bool(jnp.abs(y[:, 1:-1, 1:-1]).max() < 1e-6)
        True
    """
    return MapKernel(function, _promote)


def _promote(arrays: Any, **options: Any) -> Any:
    return promote_dtype(*arrays, **options)
