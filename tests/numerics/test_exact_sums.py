"""Exact sums of bfloat16 values, which programs for a TPU use, against float64 NumPy and from a cold start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import AXIS, NAMED, run

import jaxbn
from jaxbn._src.numerics import barriers, exact_sums

# Mean, standard deviation, and the error of the variance, of which the rounding of the result is 6e-8. At 1024 and
# 724, the exponents of the values and of their squares differ.
# About mean 0 exponents differ, so sums round like any float32 sum, and in sequence with the oldest supported XLA; but
# no digits cancel there. It is the same with outliers.
SUMMATION = 5e-6
TABLE = [(0, 1, SUMMATION), (10, 1, 2e-7), (100, 1, 2e-7), (1000, 1, 5e-7), (1024, 4, 2e-7), (724, 1, 5e-7)]
table = pytest.mark.parametrize("mean, std, most", TABLE)


def data(mean, std, shape):
    return jnp.asarray(mean + std * np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)


def exact(x, axes, valid=None):
    return np.float64(x).var(tuple(axes), where=True if valid is None else np.asarray(valid), keepdims=True)


def variance(x, axes, valid=None):
    assert exact_sums.fits(x, axes, valid)
    shift, first, second = jax.jit(lambda x, valid: exact_sums.sums(axes, x, valid))(x, valid)
    given = True if valid is None else np.asarray(valid)
    mean = np.float64(x).mean(tuple(axes), where=given, keepdims=True)
    deviation = exact(x, axes, valid).max() ** 0.5
    np.testing.assert_allclose(shift + first, mean, rtol=1e-7, atol=1e-6 * deviation)
    return np.float64(second - jnp.square(first))


# Images, few large images, images too large for one sum, and channels in front.
@pytest.mark.parametrize(
    "shape, axes",
    [
        ((8, 14, 14, 4), (0, 1, 2)),
        ((2, 120, 130, 4), (0, 1, 2)),
        ((1, 160, 160, 4), (0, 1, 2)),
        ((6, 4, 10, 10), (0, 2, 3)),
    ],
)
@table
def test_variance(shape, axes, mean, std, most):
    x = data(mean, std, shape)
    np.testing.assert_allclose(variance(x, axes), exact(x, axes), rtol=most)


@table
def test_masks_and_empty_images(mean, std, most):
    valid = jnp.asarray(np.arange(8 * 14 * 14).reshape(8, 14, 14, 1) % 5 > 0).at[2].set(False)
    x = jnp.where(valid, data(mean, std, (8, 14, 14, 4)), jnp.zeros((), jnp.bfloat16))
    np.testing.assert_allclose(variance(x, (0, 1, 2), valid), exact(x, (0, 1, 2), valid), rtol=most)


def test_values_of_very_different_size():
    x = data(100, 1, (8, 14, 14, 4)).at[3, 2, 1].set(3e4).at[5].mul(0.001)
    np.testing.assert_allclose(variance(x, (0, 1, 2)), exact(x, (0, 1, 2)), rtol=SUMMATION)


def test_what_does_not_fit():
    fits = lambda x, weights=None: exact_sums.fits(x, (0, 1), weights)
    x = jnp.ones((8, 8, 2), jnp.bfloat16)
    assert fits(x) and fits(x, jnp.ones((8, 8, 1), bool))
    assert not fits(x, jnp.ones((8, 8, 1))) and not fits(x.astype(jnp.float32)) and not fits(x[:0])
    assert not fits(jnp.ones((1, 16_411, 2), jnp.bfloat16))  # a prime number of positions cannot be cut into pieces
    assert not exact_sums.fits(x[:, 0], (0,), None)  # rows alone


@pytest.fixture
def tpu(monkeypatch):
    """Programs as for a TPU. The shapes below occur in no other test, since JAX keeps traced programs."""
    monkeypatch.setattr(barriers, "on_tpu", lambda tpu, elsewhere, *operands: tpu(*operands))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["jit", "jit explicit", "shard_map", "pmap", "one device"])
def test_batches_over_devices(way, masked, tpu):
    x = data(1000, 1, (64, 11, 4))
    mask = np.arange(64 * 11).reshape(64, 11, 1) % 7 > 0
    mask[:8] = False
    name = AXIS if way in NAMED else None

    def step(_, batch):
        given = {"mask": batch["mask"]} if masked else {}
        return jaxbn.batch_moments(batch["x"], axis_name=name, **given), batch["x"]

    batch = {"x": jnp.where(mask, x, jnp.nan) if masked else x, "mask": mask}
    moments, _ = jax.jit(step)(0, batch) if way == "one device" else run(way, step, 0, batch)
    valid = mask if masked else np.ones_like(mask)
    np.testing.assert_allclose(moments.var, exact(x, (0, 1), valid)[0, 0], rtol=5e-7)
    np.testing.assert_array_equal(moments.count, valid.sum())


def test_derivatives_of_jax_itself(tpu):
    x = data(3, 2, (6, 13, 4))
    loss = lambda x: (jaxbn.batch_moments(x).var * jnp.arange(4.0)).sum()
    expected = 2 * (np.float64(x) - np.float64(x).mean((0, 1))) / (6 * 13) * np.arange(4)
    np.testing.assert_allclose(np.float64(jax.grad(loss)(x)), expected, rtol=1e-2, atol=1e-4)
