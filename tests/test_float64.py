"""With jax_enable_x64: float64 statistics keep all digits, and values beyond float32 stay out of float32 states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

X = 3 + 2 * np.random.default_rng(0).standard_normal((16, 3, 4))
LARGE = X * 1e20  # its variance is 4e40; float32 ends at 3.4e38

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def as_arrays(fields):
    return {name: np.float64(leaf) for name, leaf in fields._asdict().items() if leaf is not None}


def assert_holds(state, before):
    """All of it finite, and in the dtypes that it had."""
    for leaf, old in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        assert leaf.dtype == old.dtype
        assert jnp.isfinite(leaf).all()


@every_case
def test_averages_keep_the_digits_of_float64(case):
    """Momenta, schedules and bounds too; the counters alone are float32, exactly."""
    transform = case.transform()
    params, state = transform.init(4, dtype=jnp.float64)
    expected, train = as_arrays(state), jax.jit(transform.train)
    for step in range(3):
        batch = X * (1 + step) + step
        y, state = train(params, state, batch)
        rows, weights = batch.reshape(-1, 4), np.ones((48, 1))
        expected_y, expected = case.train(rows, weights, as_arrays(params), expected, 3)
        np.testing.assert_allclose(y.reshape(-1, 4), expected_y, rtol=0, atol=1e-14)
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(state, name), value, rtol=1e-14, atol=1e-14, err_msg=name)


@every_case
def test_what_a_float32_state_cannot_hold_does_not_enter_it(case):
    transform = case.transform()
    params, state = transform.init(4)
    state = state._replace(var=state.var * 2)

    @jax.jit
    def all_ways(params, state):
        moments = transform.measure(LARGE)
        updated = state if transform.update is None else transform.update(state, moments, samples=16)
        return moments, (transform.train(params, state, LARGE)[1], transform.postproc(state, moments), updated)

    moments, states = all_ways(params, state)
    assert jnp.isfinite(moments.var).all()
    for after in states:
        assert_holds(after, state)
        np.testing.assert_array_equal(after.var, state.var)


def test_an_unbiased_variance_is_checked_as_it_is_averaged():
    """In float32 too: with two values it is twice the biased one."""
    transform = jaxbn.batch_norm(momentum=jaxbn.constant(0.9, unbiased=True))
    params, state = transform.init(1)
    _, after = transform.train(params, state, jnp.array([[-1.4e19], [1.4e19]], jnp.float32))
    assert_holds(after, state)


def test_nor_by_the_functions_of_linen():
    net = jaxbn.linen.BatchNorm(use_running_average=False, param_dtype=jnp.float32)
    variables = net.init(jax.random.key(0), jnp.ones((2, 4), jnp.float32))
    _, trained = net.apply(variables, LARGE, mutable=["batch_stats"])
    _, moments = jaxbn.linen.capture_moments(net.apply)(variables, LARGE)
    install = jaxbn.linen.install_moments
    after = [trained, jax.jit(install)(variables, moments), jaxbn.linen.move_averages(variables, moments)]
    for one in after:
        assert_holds(one["batch_stats"], variables["batch_stats"])
    with pytest.raises(ValueError, match="not finite in float32"):
        install(variables, moments)
    with pytest.raises(ValueError, match="not finite in float32"):
        jaxbn.linen.postproc(net.apply, variables, [LARGE])
    # Statistics that are not stored need no rounding.
    y = jaxbn.linen.adapt(net.apply, prior_count=0)(variables, LARGE)
    np.testing.assert_allclose(y.std((0, 1)), 1, rtol=1e-12)


def test_nor_by_the_functions_of_nnx():
    model = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    _, moments = jaxbn.nnx.capture_moments()(model, LARGE)
    install = jaxbn.nnx.install_moments
    after = [nnx.jit(install)(model, moments), jaxbn.nnx.move_averages(model, moments)]
    before = nnx.state(model, nnx.BatchStat)
    model(LARGE)
    for one in (model, *after):
        assert_holds(nnx.state(one, nnx.BatchStat), before)
    with pytest.raises(ValueError, match="not finite in float32"):
        install(model, moments)
    with pytest.raises(ValueError, match="not finite in float32"):
        jaxbn.nnx.postproc(model, [LARGE])
