"""A statistics pass over one value per channel is an error, as training is: its variance would be 0."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

ROWS = jnp.asarray(np.random.default_rng(0).standard_normal((9, 1, 3)), jnp.float32)
PER_BATCH = [jaxbn.mean_of_batches(), jaxbn.mean_of_batches(unbiased=False), jaxbn.moving_average()]
ERROR = "one value per channel of '[^']*': its variance is 0, every output would be the bias"


def linen(layer, **options):
    net = layer(use_running_average=True, **options)
    variables = net.init(jax.random.key(0), ROWS[0])
    return lambda batches, **how: jaxbn.linen.postproc(net.apply, variables, batches, **how)


def in_nnx(layer, **options):
    model = layer(3, rngs=nnx.Rngs(0), **options)
    return lambda batches, **how: jaxbn.nnx.postproc(model, batches, **how)


PASSES = {
    "linen, stock": functools.partial(linen, nn.BatchNorm),
    "linen": functools.partial(linen, jaxbn.linen.BatchNorm),
    "linen, renorm": functools.partial(linen, jaxbn.linen.BatchRenorm),
    "nnx, stock": functools.partial(in_nnx, nnx.BatchNorm),
    "nnx": functools.partial(in_nnx, jaxbn.nnx.BatchNorm),
}


@pytest.mark.parametrize("name", PASSES)
def test_one_value_is_an_error_and_several_batches_of_one_row_are_not(name):
    run = PASSES[name]()
    for estimator in (jaxbn.pooled(), *PER_BATCH):
        with pytest.raises(ValueError, match=ERROR):
            run(ROWS[:1], estimator=estimator)
    for estimator in PER_BATCH:
        with pytest.raises(ValueError, match=ERROR):
            run(ROWS, estimator=estimator)
    with pytest.raises(ValueError, match=ERROR):
        run(ROWS, estimator=jaxbn.mean_of_batches(), stop_when=0.1)
    _, report = run(ROWS)
    np.testing.assert_allclose(report.layers[""].new_var, ROWS.var((0, 1)), rtol=1e-5)
    _, report = run([ROWS[:8, 0], ROWS[8]], estimator=jaxbn.mean_of_batches())  # a rest of one row counts as it does
    np.testing.assert_allclose(report.layers[""].new_var, ROWS[:8, 0].var(0) * 8 / 7 / 2, rtol=1e-5)


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_the_switch_of_the_layer_allows_it_and_the_report_does_not_call_it_constant(name):
    for estimator in (jaxbn.pooled(), jaxbn.mean_of_batches()):
        _, report = PASSES[name](allow_single_value=True)(ROWS[:1], estimator=estimator)
        assert "one value per channel in a batch, which has variance 0" in str(report)
        assert "constant" not in str(report)


def test_a_variance_about_zero_needs_no_second_value():
    _, report = linen(jaxbn.linen.MovingAverageBatchNorm)(ROWS[:1])
    np.testing.assert_allclose(report.layers[""].new_var, ROWS[0, 0] ** 2, rtol=1e-5)


def test_constant_channels_of_many_values_are_fine():
    for estimator in (jaxbn.pooled(), *PER_BATCH):
        _, report = linen(nn.BatchNorm)([jnp.ones((4, 3))] * 3, estimator=estimator)
        assert report.layers[""].count == 12


def test_what_is_written_back_and_the_steps():
    net = nn.BatchNorm(use_running_average=True)
    variables = net.init(jax.random.key(0), ROWS[0])
    _, moments = jaxbn.linen.capture_moments(net.apply)(variables, ROWS[0])
    with pytest.raises(ValueError, match=ERROR):
        jaxbn.linen.install_moments(variables, moments)
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=ERROR):
        jaxbn.nnx.install_moments(model, moments)
    steps = jaxbn.nnx.make_steps(model, lambda y, b: (y.sum(), {}), optax.sgd(0.1), inputs=lambda x: x)
    state = steps.init(jax.random.key(0), ROWS[0])
    with pytest.raises(ValueError, match=ERROR):
        steps.finalize(state, steps.postproc_step(state, steps.start(state, ROWS[0]), ROWS[0]))
    _, report = PASSES["linen, stock"]()(jnp.zeros((2, 4, 3)))
    jaxbn.linen.install_moments(variables, report.old)  # which are of no pass
