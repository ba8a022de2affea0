"""Standard errors from the spread between batches: against float64 NumPy, and how often intervals hold the truth."""

import functools

import jax
import numpy as np
import pytest

import jaxbn
from jaxbn._src.statistics import standard_errors as spreads

SIZES = (4, 9, 2, 16, 9, 4, 1, 16, 2, 9, 4, 16)
POOLED, MEANS = jaxbn.pooled(), jaxbn.mean_of_batches()


@pytest.fixture
def batches(rng):
    """Ragged, of very different means, and far from 0."""
    values = [300 + rng.normal() + rng.standard_normal((size, 3)) * [1, 0.1, 5] for size in SIZES]
    return [v.astype(np.float32) for v in values]


def accumulated(estimator, batches, **arguments):
    moments = [{"layer": jaxbn.batch_moments(batch, **arguments)} for batch in batches]
    acc = estimator.init(moments[0])
    update = jax.jit(estimator.update)
    for one in moments:
        acc = update(acc, one)
    return acc


def in_float64(estimator, batches):
    """The formulas, from the values."""
    batches = [np.asarray(batch, np.complex128 if np.iscomplexobj(batch) else np.float64) for batch in batches]
    means, n = np.stack([batch.mean(0) for batch in batches]), np.array([len(batch) for batch in batches])[:, None]
    if estimator is POOLED:
        weight, mean = n, np.concatenate(batches).mean(0)
        variances = np.stack([(np.abs(batch - mean) ** 2).mean(0) for batch in batches])
    else:
        weight, mean = np.ones_like(n), means.mean(0)
        variances = np.stack([batch.var(0) * (len(batch) / max(len(batch) - 1, 1)) for batch in batches])
    var = (weight * variances).sum(0) / weight.sum()
    scale = len(n) / (len(n) - 1) / weight.sum() ** 2
    return [
        np.sqrt(scale * (weight**2 * np.abs(part - whole) ** 2).sum(0))
        for part, whole in ((means, mean), (variances, var))
    ]


@pytest.mark.parametrize("estimator", [POOLED, MEANS], ids=["pooled", "mean of batches"])
@pytest.mark.parametrize("kind", ["real", "complex"])
def test_formula(estimator, kind, batches):
    if kind == "complex":
        batches = [(batch + 1j * np.roll(batch, 1, 1)).astype(np.complex64) for batch in batches]
    found = estimator.errors(accumulated(estimator, batches))["layer"]
    mean, var = in_float64(estimator, batches)
    np.testing.assert_allclose(found.mean, mean, rtol=2e-5)
    np.testing.assert_allclose(found.var, var, rtol=2e-4)  # a batch's variance is rounded at 300 / 0.1 std
    np.testing.assert_array_equal(found.batches, len(SIZES))


@pytest.mark.parametrize("estimator", [POOLED, MEANS], ids=["pooled", "mean of batches"])
@pytest.mark.parametrize("cut", [0, 1, 5, len(SIZES)])
def test_merged_about_another_shift(estimator, cut, batches):
    """The second part has its own origin; either may be empty."""
    first, second = batches[:cut], [batch + np.float32(4) for batch in batches[cut:]]
    empty = accumulated(estimator, [batches[0][:0]])
    parts = [accumulated(estimator, part) if part else empty for part in (first, second)]
    found = estimator.errors(estimator.merge(*parts))["layer"]
    mean, var = in_float64(estimator, [*first, *second])
    np.testing.assert_allclose(found.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(found.var, var, rtol=1e-3)
    np.testing.assert_array_equal(found.batches, len(SIZES))


def test_a_first_batch_far_away_costs_little(rng):
    """It is the shift. The squares about it are 400 times those about the mean, which 400 sums round at 6e-8 each."""
    values = [rng.standard_normal((50, 3)) + (40 if i == 0 else 0) for i in range(400)]
    batches = [v.astype(np.float32) for v in values]
    found = POOLED.errors(accumulated(POOLED, batches))["layer"]
    for part, expected in zip((found.mean, found.var), in_float64(POOLED, batches), strict=True):
        np.testing.assert_allclose(part, expected, rtol=400 * np.sqrt(400) * 6e-8)


def test_channels_that_were_not_seen(batches):
    """By a mask for each channel: the first is in all batches, the second in one, the third in none."""
    masks = [np.array([True, i == 3, False]) for i in range(len(batches))]
    moments = [jaxbn.batch_moments(x, mask=np.broadcast_to(m, x.shape)) for x, m in zip(batches, masks, strict=True)]
    acc = functools.reduce(POOLED.update, [{"layer": one} for one in moments], POOLED.init({"layer": moments[0]}))
    found = POOLED.errors(acc)["layer"]
    assert found.batches.tolist() == [len(batches), 1, 0]
    assert np.isnan([*found.mean[1:], *found.var[1:]]).all()
    np.testing.assert_allclose(found.mean[0], in_float64(POOLED, batches)[0][0], rtol=2e-5)


def test_an_average_that_forgets_has_none():
    assert jaxbn.moving_average().errors is None


def test_relative_to_what_was_estimated():
    found = spreads.Errors(*np.float64([[9, 9, 9], [0.2, 1e-9, np.nan], [0.4, 0, np.nan]]))
    mean, var = spreads.relative(found, np.array([1.0, 5.0, 0.0]), np.array([4.0, 1e-13, 1.0]))
    assert mean.tolist()[:2] == [0.1, 0] and var.tolist()[:2] == [0.1, 0]  # the second channel is constant
    assert np.isnan(mean[2]) and np.isnan(var[2])


# --- Coverage ---------------------------------------------------------------------------------------------------------

PASSES, CHANNELS, BATCHES = 200, 2, 40
STUDENT = 2.0227  # 97.5 % of Student's t with 39 degrees of freedom
ROWS, PIXELS = (3, 8, 8, 5), 4  # batches of so many images, in turn


def draw(rng, what):
    """Values [PASSES, rows * pixels, CHANNELS] of each batch, with mean 3 and the variance of all values."""
    for i in range(BATCHES):
        shape = (PASSES, ROWS[i % len(ROWS)], PIXELS, CHANNELS)
        images = rng.standard_normal((*shape[:2], 1, CHANNELS))  # what the pixels of an image have in common
        pixels = rng.standard_normal(shape)
        x = {"rows": pixels, "images": images + pixels, "rectified": np.maximum(images + pixels, 0)}[what]
        yield (3 + 2 * x).reshape(PASSES, -1, CHANNELS).astype(np.float32)


TRUTH = {"rows": (3.0, 4.0), "images": (3.0, 8.0), "rectified": (3 + 2 / np.sqrt(np.pi), 4 * (1 - 1 / np.pi))}


@pytest.mark.parametrize("what", TRUTH)
def test_intervals_of_95_percent_hold_the_truth(what, rng):
    """In 90 to 98 % of 200 passes. Counting pixels as if they were independent would not do."""
    measure, update = jax.jit(jax.vmap(jaxbn.batch_moments)), jax.jit(POOLED.update)
    moments = [{"layer": measure(x)} for x in draw(rng, what)]
    acc = functools.reduce(update, moments, POOLED.init(moments[0]))
    estimate, errors = POOLED.finalize(acc)["layer"], POOLED.errors(acc)["layer"]
    off_mean, off_var = (
        np.abs(np.float64(x) - true) for x, true in zip((estimate.mean, estimate.var), TRUTH[what], strict=True)
    )
    for off, error in ((off_mean, errors.mean), (off_var, errors.var)):
        covered = (off <= STUDENT * error).mean(0)
        assert (covered >= 0.90).all() and (covered <= 0.98).all(), covered
    naive = (off_mean <= 1.96 * np.sqrt(estimate.var / estimate.count)).mean()
    assert (naive < 0.85) == (what != "rows")
