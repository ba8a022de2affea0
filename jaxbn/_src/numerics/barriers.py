"""What XLA must be told so that a normalization reads and writes no more than it has to.

Nothing here changes a number, and all of it may be deleted without touching anything else: both functions may give
back what they are given. It is for CUDA and for CPUs, each where it was seen to pay; elsewhere it compiles to nothing,
as on TPU it would cost. The bytes that this saves are pinned by the tests behind the marker `compiled`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._src import internals as _internals


def private(tree: Any, *platforms: str) -> Any:
    """The same arrays, as copies of which the compilers for these platforms do not know what they are equal to.

    An elementwise expression that several kernels need is computed once and written to memory, if XLA sees that it is
    the same one. Made from private per-channel arrays it is computed in each kernel from what that reads anyway. Equal
    barriers are merged: two copies of a tuple must have its arrays in another order.
    """
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, _bind(leaves, platforms) if leaves else leaves)


def rounded(y: jax.Array) -> jax.Array:
    """An output in half precision that is rounded for good.

    XLA otherwise removes the rounding where the next residual is added in float32. It then keeps a sum of residuals in
    float32, or computes it again from the outputs of all the blocks before.
    """
    if not jnp.issubdtype(y.dtype, jnp.floating) or jnp.finfo(y.dtype).bits > 16:
        return y
    bits = {"exponent_bits": jnp.finfo(y.dtype).nexp, "mantissa_bits": jnp.finfo(y.dtype).nmant}
    return lax.platform_dependent(y, cuda=lambda y: lax.reduce_precision(y, **bits), default=lambda y: y)


# The barrier as a JAX primitive: a conditional on the platform, for every copy, would take longer to trace and compile.
def _bind(leaves: Any, platforms: tuple[str, ...]) -> Any:
    return _private_p.bind(*leaves, platforms=platforms)


def _batching(leaves: Any, dims: Any, *, platforms: tuple[str, ...]) -> Any:
    return _bind(leaves, platforms), list(dims)


def _barrier_on(platform: str) -> Any:
    def barrier(*leaves: jax.Array, platforms: tuple[str, ...]) -> Any:
        return lax.optimization_barrier(leaves) if platform in platforms else list(leaves)

    return barrier


_private_p = _internals.identity_primitive(
    "jaxbn_private", lambda *leaves, platforms: list(leaves), _batching, multiple=True
)
for _platform in ("cpu", "cuda"):
    _internals.lower_on(_platform, _private_p, _barrier_on(_platform))
