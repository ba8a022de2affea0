"""What XLA must be told on CUDA, so that a normalization reads and writes no more than it has to.

Nothing here changes a number, and all of it may be deleted without touching anything else: both functions may give
back what they are given. Other compilers fuse better without, so elsewhere they compile to nothing. The bytes that this
saves are pinned by the tests behind the marker `compiled`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir


def private(tree: Any) -> Any:
    """The same arrays, as copies of which the compiler does not know what they are equal to.

    An elementwise expression that several kernels need is computed once and written to memory, if XLA sees that it is
    the same one. Made from private per-channel arrays it is computed in each kernel from what that reads anyway. Equal
    barriers are merged: two copies of a tuple must have its arrays in another order.
    """
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, _private_p.bind(*leaves) if leaves else leaves)


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
_private_p: Any = core.Primitive("jaxbn_private")
_private_p.multiple_results = True
_private_p.def_impl(lambda *leaves: list(leaves))
_private_p.def_abstract_eval(lambda *leaves: list(leaves))
mlir.register_lowering(_private_p, lambda ctx, *leaves: list(leaves))
mlir.register_lowering(
    _private_p, mlir.lower_fun(lambda *leaves: lax.optimization_barrier(leaves), multiple_results=True), platform="cuda"
)
# The tangents go round it, so no transpose is needed.
ad.primitive_jvps[_private_p] = lambda primals, tangents: (_private_p.bind(*primals), list(tangents))
batching.primitive_batchers[_private_p] = lambda leaves, dims: (_private_p.bind(*leaves), list(dims))
