"""A function of the kernel as an option of the linear layers of flax.linen."""

from collections.abc import Callable
from typing import Any

import jax
from flax.linen.dtypes import promote_dtype

from jaxbn._src.framework.kernels import MapKernel


def map_kernel(function: Callable[[jax.Array], jax.Array]) -> Callable[..., Any]:
    """Makes a Flax layer apply a function to its kernel: pass the result as `promote_dtype`.

    Use it for weight standardization and centered kernels. The layer keeps its class, name and parameters, so that
    checkpoints fit. Gradients flow through the function. It works in all layers with a kernel and a bias, such as
    Dense, Conv and ConvTranspose, and dtypes are promoted as usual.

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
    # In linen it takes the arrays one by one, and `MapKernel` passes a tuple.
    return promote_dtype(*arrays, **options)
