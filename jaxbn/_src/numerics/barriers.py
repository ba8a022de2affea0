"""The choices that depend on the platform: above all, optimization barriers.

They keep XLA from storing intermediate arrays that are cheaper to recompute. The barriers do not change results: both
functions could return their arguments instead. They apply on CUDA and CPU, where measurements showed a gain; elsewhere
they compile to no operation, since they would cost time on TPU. Tests with the marker `compiled` pin the saved bytes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._src import internals as _internals


def barrier(tree: Any, *platforms: str) -> Any:
    """Returns the same arrays behind an optimization barrier on these platforms.

    If several kernels need the same elementwise expression, XLA computes it once and writes it to memory. Behind
    different barriers the expressions look different, so each kernel recomputes its own from arrays that it reads
    anyway. XLA merges equal barriers: to get two of them for one tuple, pass its arrays in another order.
    """
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, _bind(leaves, platforms) if leaves else leaves)


def on_tpu(tpu: Callable[..., Any], elsewhere: Callable[..., Any], *operands: jax.Array | None) -> Any:
    """Calls one of two functions with equal results, by the platform that the program is compiled for."""
    return lax.platform_dependent(*operands, tpu=tpu, default=elsewhere)


def rounded(y: jax.Array) -> jax.Array:
    """Rounds a half-precision output so that XLA cannot remove the rounding.

    Otherwise XLA removes it when the next residual is added in float32. It then keeps the sum of residuals in float32,
    or recomputes it from the outputs of all earlier blocks.
    """
    if not jnp.issubdtype(y.dtype, jnp.floating) or jnp.finfo(y.dtype).bits > 16:
        return y
    bits = {"exponent_bits": jnp.finfo(y.dtype).nexp, "mantissa_bits": jnp.finfo(y.dtype).nmant}
    return lax.platform_dependent(y, cuda=lambda y: lax.reduce_precision(y, **bits), default=lambda y: y)


# The barrier is a JAX primitive because a `platform_dependent` conditional for each one is slow to trace and compile.
def _bind(leaves: Any, platforms: tuple[str, ...]) -> Any:
    return _barrier_p.bind(*leaves, platforms=platforms)


def _batching(leaves: Any, dims: Any, *, platforms: tuple[str, ...]) -> Any:
    return _bind(leaves, platforms), list(dims)


def _barrier_on(platform: str) -> Any:
    def lower(*leaves: jax.Array, platforms: tuple[str, ...]) -> Any:
        return lax.optimization_barrier(leaves) if platform in platforms else list(leaves)

    return lower


_barrier_p = _internals.identity_primitive(
    "jaxbn_barrier", lambda *leaves, platforms: list(leaves), _batching, multiple=True
)
for _platform in ("cpu", "cuda"):
    _internals.lower_on(_platform, _barrier_p, _barrier_on(_platform))
