"""Moving averages against their definitions, and invalid arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbn


def run(average, values, samples=1):
    """The average after each value, starting from 1."""
    value, count, path = jnp.ones(()), jnp.zeros(()), []
    step = jax.jit(lambda value, count, new: advance(average, value, count, new, samples))
    for new in values:
        value, count = step(value, count, new)
        path.append(float(value))
    return np.array(path), float(count)


def advance(average, value, count, new, samples):
    decay = average.decay(count, jnp.asarray(samples, jnp.float32))
    return decay * value + (1 - decay) * new, average.advance(count, samples)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.9999])
def test_debiasing_is_the_zero_started_average_divided_by_its_weight(momentum, rng):
    values = rng.standard_normal(500).astype(np.float32)
    hidden, expected = 0.0, []
    for t, value in enumerate(np.float64(values), 1):
        hidden = momentum * hidden + (1 - momentum) * value
        expected.append(hidden / (1 - momentum**t))
    found, count = run(jaxbn.constant(momentum, debias=True), values)
    # 1 - momentum is itself rounded to float32: worth 6e-8 / 1e-4 at 0.9999.
    np.testing.assert_allclose(found, expected, atol=1e-6 + 6e-8 / (1 - momentum))
    assert count == 500


def test_cumulative_is_the_plain_mean(rng):
    values = rng.standard_normal(500).astype(np.float32)
    found, _ = run(jaxbn.cumulative(), values)
    np.testing.assert_allclose(found, np.cumsum(np.float64(values)) / np.arange(1, 501), atol=2e-6)


def test_horizon_does_not_depend_on_how_samples_are_batched(rng):
    """One batch of 8 equal samples has the same effect as 8 batches of one sample, from any state."""
    values = rng.standard_normal(40).astype(np.float32)
    large, count = run(jaxbn.horizon(100), values, samples=8)
    small, _ = run(jaxbn.horizon(100), np.repeat(values, 8), samples=1)
    np.testing.assert_allclose(large, small[7::8], atol=1e-5)
    assert count == 320


def test_horizon_is_an_exponential_of_age(rng):
    values = rng.standard_normal(50)
    weights = np.exp(-np.arange(50)[::-1] / 30)
    found, _ = run(jaxbn.horizon(30), values.astype(np.float32))
    np.testing.assert_allclose(found[-1], np.average(values, weights=weights), atol=1e-5)


@pytest.mark.parametrize("schedule", [lambda step: 0.5, optax.linear_schedule(0.0, 0.9, 10)])
def test_schedules_of_the_step(schedule, rng):
    values = rng.standard_normal(20).astype(np.float32)
    value, expected = 1.0, []
    for step, new in enumerate(values):
        decay = float(schedule(step))
        value = decay * value + (1 - decay) * new
        expected.append(value)
    found, _ = run(jaxbn.scheduled(schedule), values)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_counts_saturate_and_do_not_overflow():
    average = jaxbn.constant(0.99, debias=True)
    full = jnp.asarray(2.0**24)
    assert average.advance(full, 1) == full
    np.testing.assert_allclose(average.decay(full, jnp.ones(())), 0.99, rtol=1e-6)


def test_averages_of_equal_arguments_are_equal():
    """Modules with equal fields are equal."""
    assert jaxbn.constant(0.9) == jaxbn.constant(0.9) != jaxbn.constant(0.9, debias=True)
    assert hash(jaxbn.horizon(10)) == hash(jaxbn.horizon(10))
    assert jaxbn.cumulative() == jaxbn.cumulative()


@pytest.mark.parametrize("momentum", [-0.1, 1, 1.0, 2, float("nan")])
def test_momentum_outside_its_range(momentum):
    for make in (jaxbn.constant, lambda momentum: jaxbn.batch_norm(momentum=momentum)):
        with pytest.raises(ValueError, match=r"outside \[0, 1\): it is the weight of the OLD value"):
            make(momentum)


@pytest.mark.parametrize("momentum", [0.01, 0.1, 0.4])
def test_momentum_that_looks_like_pytorchs(momentum):
    for line in ("jaxbn.constant(momentum)", "jaxbn.batch_norm(momentum=momentum)"):
        with pytest.warns(UserWarning, match=f"if this number comes from PyTorch, pass {1 - momentum:g}") as caught:
            exec(compile(line, "the_users_file.py", "exec"), {"jaxbn": jaxbn, "momentum": momentum})
        assert caught[0].filename == "the_users_file.py"  # one frame more or less is somebody else's line


def test_a_traced_momentum_is_taken_as_it_is():
    x = jnp.array([[1.0], [3.0]])

    @jax.jit
    def mean_after(momentum):
        transform = jaxbn.batch_norm(momentum=momentum)
        return transform.train(*transform.init(1), x)[1].mean

    np.testing.assert_allclose(mean_after(0.75), [0.5], rtol=1e-6)


def test_a_channel_that_a_step_left_out_keeps_a_share_of_its_initial_value():
    """All channels share one count, as `constant` documents."""
    transform = jaxbn.batch_norm(momentum=jaxbn.cumulative())
    params, state = transform.init(2)
    batches = np.full((10, 4, 2), 5, np.float32)
    batches[0, 0, 1] = np.nan
    for batch in batches:
        _, state = transform.train(params, state, batch)
    np.testing.assert_allclose(state.mean, [5.0, 4.5], rtol=1e-6)


@pytest.mark.parametrize("momentum", ["0.9", np.ones(3), 1j])
def test_momentum_that_is_no_number(momentum):
    with pytest.raises(TypeError, match="must be a number, None, or an average"):
        jaxbn.batch_norm(momentum=momentum)


def test_momentum_as_an_array_is_checked():
    with pytest.raises(ValueError, match="outside"):
        jaxbn.batch_norm(momentum=jnp.array(1.5))


@pytest.mark.parametrize(
    "average",
    [
        jaxbn.constant(0.0, unbiased=True),
        jaxbn.constant(0.9, debias=True, unbiased=True),
        jaxbn.scheduled(lambda step: 0.0, unbiased=True),
        jaxbn.cumulative(unbiased=True),
        jaxbn.horizon(10, unbiased=True),
    ],
    ids=lambda average: type(average).__name__,
)
def test_the_unbiased_variance_is_averaged(average, rng):
    """One step of an average that drops its initial values; micro-batches together are one step too."""
    x = rng.standard_normal((6, 3)).astype(np.float32)
    transform = jaxbn.batch_norm(momentum=average, epsilon=0.0)
    params, state = transform.init(3)
    y, after = transform.train(params, state, x)
    np.testing.assert_allclose(after.var, np.float64(x).var(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(y.std(0), np.ones(3), rtol=1e-5)  # by the biased one
    parts = jaxbn.merge(transform.measure(x[:2]), transform.measure(x[2:]))
    np.testing.assert_allclose(transform.update(state, parts, 6).var, after.var, rtol=1e-5)
    _, masked = transform.train(params, state, x, mask=np.arange(6)[:, None] < 4)
    np.testing.assert_allclose(masked.var, np.float64(x[:4]).var(0, ddof=1), rtol=1e-5)


def test_the_unbiased_variance_of_one_value_is_zero():
    transform = jaxbn.batch_norm(momentum=jaxbn.constant(0.5, unbiased=True), allow_single_value=True)
    _, after = transform.train(*transform.init(1), jnp.ones((1, 1)))
    np.testing.assert_array_equal(after.var, [0.5])


def test_what_is_no_average():
    with pytest.raises(TypeError, match=r"write momentum=jaxbn.scheduled\(...\)"):
        jaxbn.batch_norm(momentum=lambda step: 0.9)
    with pytest.raises(TypeError, match="use constant"):
        jaxbn.scheduled(0.9)
    with pytest.raises(ValueError, match="positive number of samples"):
        jaxbn.horizon(0)


def test_a_state_without_a_count_is_refused():
    _, state = jaxbn.batch_norm().init(3)
    counting = jaxbn.batch_norm(momentum=jaxbn.cumulative())
    params, _ = counting.init(3)
    with pytest.raises(ValueError, match=r"state._replace\(count=jnp.zeros\(\(\)\)\)"):
        counting.train(params, state, jnp.ones((4, 3)))
