"""Each estimator against float64 NumPy over ragged batches; merging; what batches without a value do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

SIZES = (64, 64, 4)


@pytest.fixture
def batches(rng):
    """The last one is small and far away, as the remainder of sorted data is."""
    values = [2 + rng.standard_normal((size, 3)) for size in SIZES]
    values[-1] += 20
    return [v.astype(np.float32) for v in values]


def measured(batches, **arguments):
    return [{"layer": jaxbn.batch_moments(batch, **arguments)} for batch in batches]


def run(estimator, moments):
    acc = estimator.init(moments[0])
    for one in moments:
        acc = jax.jit(estimator.update)(acc, one)
    return estimator.finalize(acc)["layer"]


def moving(batches, decay, debias):
    mean, std = 0.0, 1.0
    for batch in batches:
        mean = decay * mean + (1 - decay) * batch.mean(0)
        std = decay * std + (1 - decay) * batch.std(0)
    if debias:
        kept = decay ** len(batches)
        mean, std = mean / (1 - kept), (std - kept) / (1 - kept)
    return mean, std**2


def formulas(batches):
    batches = [np.float64(batch) for batch in batches]
    everything = np.concatenate(batches)
    m = np.array([len(batch) for batch in batches])[:, None]
    means, variances = (np.stack([getattr(batch, name)(0) for batch in batches]) for name in ("mean", "var"))
    return [
        (jaxbn.pooled(), everything.mean(0), everything.var(0)),
        (jaxbn.pooled(unbiased=True), everything.mean(0), everything.var(0, ddof=1)),
        (jaxbn.mean_of_batches(), means.mean(0), (variances * m / (m - 1)).mean(0)),
        (jaxbn.mean_of_batches(unbiased=False), means.mean(0), variances.mean(0)),
        (jaxbn.moving_average(), *moving(batches, 0.9, False)),
        (jaxbn.moving_average(0.5, debias=True), *moving(batches, 0.5, True)),
    ]


every_estimator = pytest.mark.parametrize("which", range(6))


@every_estimator
def test_formula(which, batches):
    estimator, mean, var = formulas(batches)[which]
    found = run(estimator, measured(batches))
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(found.var, var, rtol=1e-5)
    np.testing.assert_array_equal(found.count, sum(SIZES))


@every_estimator
@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_merge_is_the_whole_in_order(which, cut, batches):
    estimator = formulas(batches)[which][0]
    moments = measured(batches)

    def accumulate(part):
        acc = estimator.init(moments[0])
        for one in part:
            acc = estimator.update(acc, one)
        return acc

    merged = estimator.finalize(estimator.merge(accumulate(moments[:cut]), accumulate(moments[cut:])))
    chex.assert_trees_all_close(merged["layer"], run(estimator, moments), rtol=1e-5)


@every_estimator
def test_batches_in_which_a_layer_has_no_values_do_not_count(which, batches):
    estimator = formulas(batches)[which][0]
    empty = measured([np.zeros((0, 3), np.float32)])
    moments = measured(batches)
    with_empty = [*empty, moments[0], *empty, *moments[1:], *empty]
    chex.assert_trees_all_equal(run(estimator, with_empty), run(estimator, moments))


@every_estimator
def test_without_batches_the_count_is_0(which, batches):
    estimator = formulas(batches)[which][0]
    found = run(estimator, measured([np.zeros((0, 3), np.float32)]))
    np.testing.assert_array_equal(found.count, 0)
    assert all(np.isfinite(part).all() for part in found)


def test_pooled_is_right_where_the_mean_of_batches_is_not(batches):
    """PyTorch's update_bn is the mean of batches; it is wrong for such data."""
    truth = np.concatenate(batches).mean(0)
    np.testing.assert_allclose(run(jaxbn.pooled(), measured(batches)).mean, truth, rtol=1e-6)
    assert (run(jaxbn.mean_of_batches(), measured(batches)).mean > 2 * truth).all()


@pytest.mark.parametrize("number, size", [(2, 64), (10, 8), (100, 4)])
def test_printed_form_of_the_mean_of_batches_differs_by_a_known_ratio(number, size, rng):
    """The description prints sum(var) / (number - 1); it is read as mean(var) * m / (m - 1)."""
    batches = (3 * rng.standard_normal((number, size, 3))).astype(np.float32)
    printed = np.float64(batches).var(1).sum(0) / (number - 1)
    found = run(jaxbn.mean_of_batches(), measured(batches)).var
    np.testing.assert_allclose(printed / found, np.full(3, number / (number - 1) * (size - 1) / size), rtol=1e-5)


def test_weights_count_in_the_pool(rng):
    x, weights = rng.standard_normal((40, 3)).astype(np.float32), rng.random((40, 1)).astype(np.float32)
    moments = [{"layer": jaxbn.batch_moments(x[i], mask=weights[i])} for i in (slice(0, 30), slice(30, 40))]
    found = run(jaxbn.pooled(), moments)
    mean = np.average(np.float64(x), 0, weights[:, 0])
    np.testing.assert_allclose(found.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.var, np.average((x - mean) ** 2, 0, weights[:, 0]), rtol=1e-5)


def test_one_value_per_batch_has_no_variance_to_correct():
    moments = measured(np.arange(5, dtype=np.float32).reshape(5, 1, 1))
    assert run(jaxbn.mean_of_batches(), moments).var == 0
    np.testing.assert_allclose(run(jaxbn.pooled(), moments).var, 2.0)


def test_equal_arguments_are_the_same_estimator():
    """So that a pass is not compiled again."""
    assert jaxbn.pooled() is jaxbn.pooled()
    assert jaxbn.moving_average(0.5) is jaxbn.moving_average(0.5)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match="outside"):
        jaxbn.moving_average(decay)


def test_estimators_of_complex_moments(rng):
    x = (rng.standard_normal((30, 2)) + 1j * rng.standard_normal((30, 2))).astype(np.complex64)
    found = run(jaxbn.pooled(), measured([x[:20], x[20:]]))
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.var, np.var(x, 0), rtol=1e-5)
    assert found.mean.dtype == jnp.complex64
