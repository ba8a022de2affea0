"""Centralized and standardized kernels in float64, and as an option of Flax's layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

FUNCTIONS = [jaxbn.centralize_kernel, jaxbn.standardize_kernel]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def oracle(function, kernel, axes):
    kernel = np.float64(kernel)
    centred = kernel - kernel.mean(axes, keepdims=True)
    if function is jaxbn.centralize_kernel:
        return centred
    return centred / np.sqrt(kernel.var(axes, ddof=1, keepdims=True) + 1e-5)


@pytest.mark.parametrize(
    "shape, feature_axis, axes",
    [((6, 4), -1, (0,)), ((3, 3, 2, 4), -1, (0, 1, 2)), ((3, 4, 2), 1, (0, 2)), ((6, 2, 4), (-2, -1), (0,))],
)
@every_function
def test_the_formula(function, shape, feature_axis, axes, rng):
    kernel = (0.5 + rng.standard_normal(shape)).astype(np.float32)
    found = function(kernel, feature_axis)
    np.testing.assert_allclose(found, oracle(function, kernel, axes), rtol=1e-5, atol=1e-6)
    assert function(jnp.asarray(kernel, jnp.bfloat16)).dtype == jnp.bfloat16


@every_function
def test_the_gradient_is_a_projection(function, rng):
    """A constant added to all weights of an output has no effect, so the gradient sums to 0."""
    kernel, target = (rng.standard_normal((6, 4)).astype(np.float32) for _ in range(2))
    gradient = jax.grad(lambda k: (jnp.tanh(function(k)) * target).sum())(kernel)
    np.testing.assert_allclose(gradient.sum(0), np.zeros(4), atol=1e-5)
    assert (np.abs(gradient).max(0) > 1e-2).all()


def test_kernels_without_variance_have_finite_gradients():
    for kernel in (jnp.ones((5, 2)), jnp.ones((1, 2))):
        gradient = jax.grad(lambda k: jaxbn.standardize_kernel(k).sum())(kernel)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["", "bfloat16"])
@every_function
def test_as_an_option_of_flax_layers(function, dtype, rng):
    """The layer equals Flax's layer with the transformed kernel; parameters and names are Flax's."""
    x = rng.standard_normal((2, 5, 5, 3)).astype(np.float32)
    for make, arguments in ((nn.Conv, (4, (3, 3))), (nn.Dense, (4,)), (nn.ConvTranspose, (4, (3, 3)))):
        layer = make(*arguments, dtype=dtype, promote_dtype=jaxbn.linen.map_kernel(function))
        assert layer == make(*arguments, dtype=dtype, promote_dtype=jaxbn.linen.map_kernel(function))
        variables = layer.init(jax.random.key(0), x)
        params = variables["params"]
        mapped = {"params": params | {"kernel": function(params["kernel"])}}
        found, expected = layer.apply(variables, x), make(*arguments, dtype=dtype).apply(mapped, x)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    for make, arguments in ((nnx.Conv, (3, 4, (3, 3))), (nnx.Linear, (3, 4)), (nnx.ConvTranspose, (3, 4, (3, 3)))):
        build = lambda make=make, arguments=arguments: make(
            *arguments, dtype=dtype, promote_dtype=jaxbn.nnx.map_kernel(function), rngs=nnx.Rngs(0)
        )
        layer, plain = build(), make(*arguments, dtype=dtype, rngs=nnx.Rngs(0))
        assert nnx.graphdef(layer) == nnx.graphdef(build())
        plain.kernel[...] = function(plain.kernel[...])
        found, expected = layer(x), plain(x)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_centralized_kernels_keep_the_mean_at_zero(rng):
    """Inputs with a common mean; moving average batch normalization does not subtract the mean."""
    x = (5 + rng.standard_normal((64, 6))).astype(np.float32)
    dense = nn.Dense(3, use_bias=False, promote_dtype=jaxbn.linen.map_kernel(jaxbn.centralize_kernel))
    y = dense.apply(dense.init(jax.random.key(0), x), x)
    assert (np.abs(y.mean(0)) < 0.5 * y.std(0)).all()
