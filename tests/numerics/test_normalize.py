"""Derivatives of the normalization against finite differences and JAX's autodiff, and their residuals."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from meshes import AXIS, NAMED, WAYS, run, sum_gradients

import jaxbn

ACTIVATIONS = [None, jax.nn.relu, jax.nn.leaky_relu, jax.nn.gelu, jnp.tanh]
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "__name__", "none"))
with_residual = pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])


@pytest.fixture
def x(rng):
    return jnp.asarray(2 + 3 * rng.standard_normal((16, 3, 4)), jnp.float32)


@pytest.fixture
def residual(rng):
    return jnp.asarray(rng.standard_normal((16, 3, 4)), jnp.float32)


def step(x, residual, params, **arguments):
    transform = jaxbn.batch_norm(**arguments)
    return transform.train(params, transform.init(4)[1], x, residual=residual)


PARAMS = jaxbn.NormParams(jnp.array([1.5, -0.5, 0.3, 2.0]), jnp.array([0.1, 0.2, -0.7, 0.0]))


@pytest.mark.sample(every=3)
@every_activation
@with_residual
def test_the_rule_is_jaxs_own_derivative(activation, with_residual, x, residual, rng):
    residual = residual if with_residual else None
    target = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)

    def gradients(autodiff):
        def loss(x, residual, params):
            return (jnp.sin(step(x, residual, params, activation=activation, autodiff=autodiff)[0]) * target).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2) if with_residual else (0, 2)))(x, residual, PARAMS)

    chex.assert_trees_all_close(gradients(False), gradients(True), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.leaky_relu], ids=["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "masked"])
@with_residual
def test_second_derivatives_are_jaxs_own(activation, masked, with_residual, x, residual):
    """As for a gradient penalty: the second derivative includes the dependence on the statistics."""
    mask = np.arange(16)[:, None, None] % 3 != 0 if masked else None

    def penalty(autodiff):
        transform = jaxbn.batch_norm(activation=activation, autodiff=autodiff)
        _, state = transform.init(4)

        def loss(x, params):
            y, _ = transform.train(params, state, x, mask=mask, residual=residual if with_residual else None)
            return jnp.sin(y).sum()

        def size(x, params):
            return sum(jnp.square(g).sum() for g in jax.tree.leaves(jax.grad(loss, (0, 1))(x, params)))

        return jax.jit(jax.grad(size, (0, 1)))(x, PARAMS)

    found, expected = penalty(False), penalty(True)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert largest > 0.1
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5 * float(largest))


@pytest.mark.parametrize("activation", [None, jnp.tanh], ids=["none", "tanh"])
@with_residual
def test_the_rule_is_the_slope(activation, with_residual, x, residual):
    """Finite differences in float32, hence the tolerance; only for smooth activations."""
    arguments = (x, residual, PARAMS) if with_residual else (x, PARAMS)

    def function(x, *rest):
        return step(x, rest[0] if with_residual else None, rest[-1], activation=activation)[0]

    check_grads(function, arguments, order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


@pytest.mark.parametrize("mean, std", [(1e3, 0.1), (3e3, 1), (1e4, 1), (1e4, 0.1), (1e4, 0.01)])
@pytest.mark.parametrize("way", ["jit", "shard_map"])
def test_gradients_at_large_means_are_those_of_float64(mean, std, way, rng):
    """As accurate as a float32 mean allows, like Flax's two-pass form; Flax's default form fails here."""
    x = (mean + std * rng.standard_normal((8192, 4))).astype(np.float32)
    target = rng.standard_normal(x.shape).astype(np.float32)
    transform = jaxbn.batch_norm(axis_name=AXIS if way in NAMED else None, use_bias=False, use_scale=False)
    params, state = transform.init(4)

    def step(_, batch):
        return 0, jax.grad(lambda x: (transform.train(params, state, x)[0] * batch["target"]).sum())(batch["x"])

    def flax(x, fast):
        layer = nn.BatchNorm(False, use_bias=False, use_scale=False, use_fast_variance=fast)
        variables = layer.init(jax.random.key(0), x)
        return jax.grad(lambda x: (layer.apply(variables, x, mutable=["batch_stats"])[0] * target).sum())(x)

    exact, g = np.float64(x), np.float64(target)
    s = np.sqrt(exact.var(0) + 1e-5)
    z = (exact - exact.mean(0)) / s
    expected = (g - g.mean(0) - z * (g * z).mean(0)) / s

    def error(dx):
        return np.abs(dx - expected).max() / np.abs(expected).max()

    _, dx = run(way, step, 0, {"x": x, "target": target})
    assert error(dx) < 2 * error(flax(x, fast=False)) + 1e-6
    assert error(dx) < 1e-3 < error(flax(x, fast=True))


@pytest.mark.sample(every=4)
@every_activation
@pytest.mark.parametrize(
    "way", [way if way in ("jit", "shard_map") else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def test_residual_and_activation_over_devices(activation, way, x, residual):
    transform = jaxbn.batch_norm(activation=activation, axis_name=AXIS if way in NAMED else None)
    alone = jaxbn.batch_norm(activation=activation)
    _, state = transform.init(4)

    def gradients(transform, way, params, batch):
        def loss(params, x, residual):
            return jnp.square(transform.train(params, state, x, residual=residual)[0]).sum()

        dparams, *rest = jax.grad(loss, (0, 1, 2))(params, *batch)
        return sum_gradients(way, dparams), rest

    found = run(way, lambda p, b: gradients(transform, way, p, b), PARAMS, (x, residual))
    expected = jax.jit(lambda p, b: gradients(alone, "jit", p, b))(PARAMS, (x, residual))
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, expected), rtol=1e-4, atol=1e-4)


def test_parameters_that_vary_over_devices_get_local_gradients(x):
    """As in a loop that casts its parameters to varying in order to reduce the gradients itself."""
    transform = jaxbn.batch_norm(axis_name=AXIS)
    _, state = transform.init(4)

    def step(params, x):
        varying = jax.lax.pcast(params, AXIS, to="varying")
        local = jax.grad(lambda p: jnp.square(transform.train(p, state, x)[0]).sum())(varying)
        summed = jax.grad(lambda p: jnp.square(transform.train(p, state, x)[0]).sum())(params)
        return (jax.lax.psum(local, AXIS), summed), x

    (local, summed), _ = run("shard_map", step, PARAMS, x)
    chex.assert_trees_all_close(local, summed, rtol=1e-5)


def test_layer_without_a_named_axis_still_sums_gradients_of_replicated_parameters(x):
    """Each device normalizes with its own statistics; all devices share the parameters."""
    transform = jaxbn.batch_norm()
    _, state = transform.init(4)

    def loss(params, x):
        return jnp.square(jnp.sin(transform.train(params, state, x)[0])).sum()

    found, _ = run("shard_map", lambda params, x: (jax.grad(loss)(params, x), x), PARAMS, x)
    parts = [jax.grad(loss)(PARAMS, part) for part in np.split(np.asarray(x), 8)]
    chex.assert_trees_all_close(found, jax.tree.map(lambda *g: sum(g), *parts), rtol=1e-4, atol=1e-4)


def test_backward_keeps_x_and_statistics_and_no_float32_copy(x):
    transform = jaxbn.batch_norm()
    params, state = transform.init(4)
    x = x.astype(jnp.bfloat16)
    _, backward = jax.vjp(lambda x: transform.train(params, state, x)[0], x)
    large = [leaf for leaf in jax.tree.leaves(backward) if leaf.size >= x.size]
    assert [leaf.dtype for leaf in large] == [jnp.bfloat16]


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.leaky_relu])
def test_backward_of_the_residual_form_keeps_the_output_in_its_place(activation, x, residual):
    transform = jaxbn.batch_norm(activation=activation, dtype=jnp.bfloat16)
    params, state = transform.init(4)
    x, residual = x.astype(jnp.bfloat16), residual.astype(jnp.bfloat16)
    _, backward = jax.vjp(lambda x, r: transform.train(params, state, x, residual=r)[0], x, residual)
    large = [leaf for leaf in jax.tree.leaves(backward) if leaf.size >= x.size]
    assert [leaf.dtype for leaf in large] == [jnp.bfloat16] * 2


def test_evaluation_differentiates_forward(x):
    transform = jaxbn.batch_norm(activation=jax.nn.relu)
    params, state = transform.init(4)
    y, tangent = jax.jvp(lambda x: transform.eval(params, state, x), (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(tangent, (np.asarray(y) > 0) / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"epsilon": -1e-5}, ValueError, "must not be negative"),
        ({"dtype": jnp.int32}, ValueError, "must be inexact"),
        ({"activation": "relu"}, TypeError, "jax.nn.relu"),
    ],
)
def test_factory_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        jaxbn.batch_norm(**arguments)


def test_residual_of_another_shape_is_refused(x):
    with pytest.raises(ValueError, match="must have the shape of the input"):
        step(x, x[:, :1], PARAMS)
