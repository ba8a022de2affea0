"""Dtype rules for computation, state and output."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


@functools.cache  # a handful of combinations, asked for many times in each trace
def promote(*dtypes: Any) -> np.dtype:
    """JAX's dtype promotion, available under strict promotion too."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, [jnp.dtype(d) for d in dtypes])


def compute(x: jax.Array) -> np.dtype:
    """Dtype of the computation: at least float32; float64 and complex stay."""
    return promote(x.dtype, jnp.float32)


def statistics(x: jax.Array) -> np.dtype:
    """Dtype of variances and counts: the real part of `compute`."""
    return jnp.finfo(compute(x)).dtype


def output(dtype: DTypeLike | None, *operands: jax.Array | None) -> np.dtype:
    """Dtype of the output by Flax's rule: `dtype` if given, otherwise the promoted operands, at least a float."""
    if dtype is not None:
        return jnp.dtype(dtype)
    with jax.numpy_dtype_promotion("standard"):
        found = jnp.result_type(*[operand for operand in operands if operand is not None])
    return found if jnp.issubdtype(found, jnp.inexact) else promote(found, jnp.float32)
