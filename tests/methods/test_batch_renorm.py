"""Batch Renormalization against the paper in float64, against Keras, and on inputs where others fail."""

import inspect
import os
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import AXIS, run

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving

EPSILON = 1e-3
MOMENTUM = 63 / 64  # exact in float32, and so is 1 - MOMENTUM
CHANNELS = 6


def oracle(batches, r_max, d_max, *, decays=None, track_variance=False, start=(0.0, 1.0)):
    """Algorithm 1 in float64: outputs [steps, rows, C], final mean and variance, and the shares of clipped r and d.

    `decays` are the decays of the averages by step; `start` is the initial mean and variance.
    """
    mean = np.full(batches.shape[-1], start[0])
    sigma = np.full(batches.shape[-1], np.sqrt(start[1] + EPSILON))
    outputs, clipped = [], []
    for step, x in enumerate(np.float64(batches)):
        a = MOMENTUM if decays is None else decays[step]
        mean_batch, sigma_batch = x.mean(0), np.sqrt(x.var(0) + EPSILON)
        r, d = sigma_batch / sigma, (mean_batch - mean) / sigma
        clipped.append([(np.abs(np.log(r)) > np.log(r_max(step))).mean(), (np.abs(d) > d_max(step)).mean()])
        r, d = np.clip(r, 1 / r_max(step), r_max(step)), np.clip(d, -d_max(step), d_max(step))
        outputs.append((x - mean_batch) / sigma_batch * r + d)
        mean = a * mean + (1 - a) * mean_batch
        if track_variance:
            sigma = np.sqrt(a * sigma**2 + (1 - a) * sigma_batch**2)
        else:
            sigma = a * sigma + (1 - a) * sigma_batch
    return np.array(outputs), mean, sigma**2 - EPSILON, np.array(clipped)


def drifting(steps, rows=4, seed=0):
    """Small batches with drifting mean and scale, so that r and d reach their bounds in some steps."""
    rng = np.random.default_rng(seed)
    wander = np.cumsum(0.02 * rng.standard_normal((2, steps, 1, CHANNELS)), 1)
    scale = np.exp(np.linspace(-2, 2, CHANNELS) + wander[0])
    return (scale * (1 + 20 * wander[1] + rng.standard_normal((steps, rows, CHANNELS)))).astype(np.float32)


def scanned(transform, batches, dtype=jnp.float32):
    """Returns all outputs and the final state."""
    params, state = transform.init(CHANNELS, dtype=dtype)
    step = jax.jit(
        lambda state, batches: jax.lax.scan(lambda s, x: transform.train(params, s, x)[::-1], state, batches)
    )
    state, outputs = step(state, jnp.asarray(batches, dtype))
    return outputs, state


def ramp(start, stop, begin, end):
    return lambda step: start + (stop - start) * min(max((step - begin) / (end - begin), 0), 1)


def constant(value):
    return lambda step: value


# name: the arguments, and r_max and d_max as functions of the step
SCHEDULES = {
    "the ramp": (jaxbn.renorm_ramp(warmup=100), ramp(1, 3, 100, 800), ramp(0, 5, 100, 500)),
    "the switch": (
        jaxbn.renorm_switch(300, r_max=1.5, d_max=0.5),
        lambda step: 1.5 if step >= 300 else 1.0,
        lambda step: 0.5 if step >= 300 else 0.0,
    ),
    "optax and a number": (
        {"r_max": optax.linear_schedule(1.0, 2.0, 500), "d_max": 1.0},
        ramp(1, 2, 0, 500),
        constant(1.0),
    ),
    "no bounds": ({"r_max": np.inf, "d_max": np.inf}, constant(np.inf), constant(np.inf)),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


# --- The algorithm ----------------------------------------------------------------------------------------------------


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("track_variance", [False, True], ids=["", "variance"])
@every_schedule
def test_the_paper_over_1200_steps(schedule, track_variance):
    arguments, r_max, d_max = schedule
    batches = drifting(1200)
    expected, mean, var, clipped = oracle(batches, r_max, d_max, track_variance=track_variance)
    transform = jaxbn.batch_renorm(momentum=MOMENTUM, track_variance=track_variance, **arguments)
    outputs, state = scanned(transform, batches)
    if np.isfinite(r_max(1199)):  # the data is such that in each phase bounds cut off some and leave some alone
        assert (clipped[900:].mean(0) > 0.01).all() and (clipped[900:].mean(0) < 0.9).all()
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.var, var, rtol=1e-5)
    if state.step is not None:
        assert state.step == 1200


@pytest.mark.parametrize("name", ["the ramp", "the switch"])
def test_the_paper_in_float64(name):
    arguments, r_max, d_max = SCHEDULES[name]
    batches = drifting(1200)
    expected, mean, var, _ = oracle(batches, r_max, d_max)
    with jax.enable_x64(True):
        outputs, state = scanned(jaxbn.batch_renorm(momentum=MOMENTUM, **arguments), batches, jnp.float64)
        np.testing.assert_allclose(outputs, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())
        np.testing.assert_allclose(state.mean, mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(state.var, var, rtol=1e-12)


def test_the_default_schedule_is_that_of_the_paper():
    defaults = {name: p.default for name, p in inspect.signature(jaxbn.batch_renorm).parameters.items()}
    steps = jnp.array([0.0, 5_000, 25_000, 40_000, 1e6])
    np.testing.assert_allclose(defaults["r_max"](steps), [1, 1, 1 + 2 * 20 / 35, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(defaults["d_max"](steps), [0, 0, 5, 5, 5], rtol=1e-6)
    scaled = jaxbn.renorm_ramp(warmup=50)
    np.testing.assert_allclose(scaled["r_max"](steps / 100), defaults["r_max"](steps), rtol=1e-6)


def test_equals_batch_norm_without_correction():
    x, target = drifting(1, rows=16)[0], drifting(1, rows=16, seed=1)[0]

    def everything(transform):
        def loss(params, x):
            y, state = transform.train(params, transform.init(CHANNELS)[1], x)
            return (jnp.tanh(y) * target).sum(), (y, state.mean, state.var)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(transform.init(CHANNELS)[0], x)

    plain = jaxbn.batch_renorm(r_max=1.0, d_max=0.0, track_variance=True)
    expected = everything(jaxbn.batch_norm(epsilon=EPSILON))
    chex.assert_trees_all_close(everything(plain), expected, rtol=1e-5, atol=1e-6)
    before_the_ramp = jaxbn.batch_renorm(track_variance=True)
    chex.assert_trees_all_close(everything(before_the_ramp), expected, rtol=1e-5, atol=1e-6)


def test_training_equals_evaluation_without_bounds():
    transform = jaxbn.batch_renorm(r_max=np.inf, d_max=np.inf)
    params, state = transform.init(CHANNELS)
    train = jax.jit(transform.train)
    for x in drifting(5):
        y, after = train(params, state, x)
        np.testing.assert_allclose(y, transform.eval(params, state, x), rtol=1e-5, atol=1e-5)
        state = after


# --- The derivative ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autodiff", [False, True], ids=["", "autodiff"])
def test_gradients_with_r_and_d_as_constants(autodiff, rng):
    """Compares with central differences in float64 that keep r and d fixed; with weights."""
    x, target = 2 + 3 * rng.standard_normal((12, 3)), rng.standard_normal((12, 3))
    weights = np.abs(np.sin(np.arange(12.0)))[:, None]
    scale, bias = rng.standard_normal(3) + 1, rng.standard_normal(3)
    transform = jaxbn.batch_renorm(r_max=2.0, d_max=1.5, autodiff=autodiff)
    state = transform.init(3)[1]._replace(mean=jnp.array([1.0, -4.0, 2.0]), var=jnp.array([0.5, 9.0, 2.0]))

    def statistics(x):
        mean = (weights * x).sum(0) / weights.sum()
        return mean, np.sqrt((weights * (x - mean) ** 2).sum(0) / weights.sum() + EPSILON)

    mean, sigma = np.float64(state.mean), np.sqrt(np.float64(state.var) + EPSILON)
    r = np.clip(statistics(x)[1] / sigma, 1 / 2, 2)
    d = np.clip((statistics(x)[0] - mean) / sigma, -1.5, 1.5)
    assert 0 < ((r == 2) | (r == 0.5)).sum() < 3 and 0 < (np.abs(d) == 1.5).sum() < 3

    def forward(x, scale, bias):
        mean_batch, sigma_batch = statistics(x)
        return (np.tanh(((x - mean_batch) / sigma_batch * r + d) * scale + bias) * target).sum()

    def loss(x, scale, bias):
        params = jaxbn.NormParams(scale, bias)
        y, _ = transform.train(params, state, x, mask=jnp.asarray(weights, jnp.float32))
        return (jnp.tanh(y) * target.astype(np.float32)).sum()

    arguments = (x, scale, bias)
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(*(jnp.asarray(a, jnp.float32) for a in arguments))
    for number, argument in enumerate(arguments):
        slopes = np.empty(argument.shape)
        for index in np.ndindex(argument.shape):
            nudge = np.zeros(argument.shape)
            nudge[index] = 1e-5
            plus, minus = (
                forward(*(a + sign * nudge if i == number else a for i, a in enumerate(arguments))) for sign in (1, -1)
            )
            slopes[index] = (plus - minus) / 2e-5
        np.testing.assert_allclose(found[number], slopes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "activation, params",
    [(jax.nn.relu, "scale and bias"), (jax.nn.relu, "none"), (jax.nn.leaky_relu, "scale"), (jnp.tanh, "bias")],
)
def test_the_custom_derivative_equals_that_of_jax(activation, params, rng):
    """With and without a residual, an activation, and parameters in half precision."""
    x, residual, target = (jnp.asarray(rng.standard_normal((12, 3)), jnp.float32) for _ in range(3))
    affine = jaxbn.NormParams(
        jnp.array([1.0, -2.0, 0.5], jnp.bfloat16) if "scale" in params else None,
        jnp.array([0.5, 0.1, -1.0], jnp.float32) if "bias" in params else None,
    )

    def everything(autodiff):
        transform = jaxbn.batch_renorm(r_max=1.2, d_max=0.3, activation=activation, autodiff=autodiff)
        state = transform.init(3)[1]._replace(mean=jnp.array([1.0, -0.1, 0.0]), var=jnp.array([0.5, 1.0, 2.0]))

        def loss(x, residual, affine):
            y, _ = transform.train(affine, state, x, residual=residual)
            return (y.astype(jnp.float32) * target).sum(), y

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, residual, affine)

    chex.assert_trees_all_equal_shapes_and_dtypes(everything(False), everything(True))
    # The gradient of a bfloat16 scale is rounded to 8 bits.
    chex.assert_trees_all_close(
        everything(False), everything(True), rtol=1e-2 if "scale" in params else 1e-5, atol=1e-5
    )


@pytest.mark.parametrize("bounds", [{}, {"r_max": 3.0, "d_max": 5.0}, {"r_max": np.inf, "d_max": np.inf}], ids=str)
def test_channels_without_variance_have_finite_gradients(bounds, rng):
    """Channels that are constant, all zero, and far from zero."""
    x = rng.standard_normal((8, 4)).astype(np.float32)
    x[:, 1:3] = 0.7, 0.0
    x[:, 3] += 1e6
    transform = jaxbn.batch_renorm(**bounds)
    params, state = transform.init(4)

    def loss(x, params):
        return jnp.square(transform.train(params, state, x)[0] - 1).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1)))(x, params)
    for leaf in jax.tree.leaves((gradients, jax.jit(transform.train)(params, state, x))):
        assert np.isfinite(leaf).all()


# --- Averages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "average, decay",
    [
        (jaxbn.constant(MOMENTUM, debias=True), lambda t: MOMENTUM * (1 - MOMENTUM**t) / (1 - MOMENTUM ** (t + 1))),
        (jaxbn.cumulative(), lambda t: t / (t + 1)),
        (jaxbn.scheduled(lambda t: jnp.minimum(t / (t + 2), 0.9)), lambda t: min(t / (t + 2), 0.9)),
        (jaxbn.horizon(100), lambda t: 1 - (1 - np.exp(-4 / 100)) / (1 - np.exp(-4 * (t + 1) / 100))),
    ],
    ids=["debiased", "cumulative", "scheduled", "horizon"],
)
def test_averages_of_every_kind(average, decay):
    """If an average drops its initial values, the first step is batch norm."""
    batches = 3 + drifting(60)
    outputs, state = scanned(jaxbn.batch_renorm(momentum=average, r_max=np.inf, d_max=np.inf), batches)
    none_at_first = lambda bound: lambda step: bound if step == 0 and decay(0) == 0 else np.inf
    expected, mean, var, _ = oracle(
        batches, none_at_first(1.0), none_at_first(0.0), decays=[decay(float(t)) for t in range(60)]
    )
    assert decay(0) == 0
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(state.mean, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.var, var, rtol=1e-5)


def test_the_mean_of_the_statistics_over_devices_keeps_their_dtypes(rng):
    layer, x = jaxbn.linen.BatchRenorm(use_running_average=False), rng.standard_normal((16, 3)).astype(np.float32)
    start = layer.init(jax.random.key(0), x)

    def step(variables, x):
        y, after = layer.apply(variables, x, mutable=["batch_stats"])
        return jax.lax.pmean(after["batch_stats"], AXIS), y

    stats, _ = run("shard_map", step, start, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(stats, start["batch_stats"])
    polyak = optax.incremental_update(stats, start["batch_stats"], 0.005)
    chex.assert_trees_all_equal_shapes_and_dtypes(polyak, start["batch_stats"])
    assert stats["step"] == 1


# --- One value per channel, and errors --------------------------------------------------------------------------------


def test_one_value_per_channel_warns_and_has_no_gradient():
    transform = jaxbn.batch_renorm(r_max=3.0, d_max=5.0)
    params, state = transform.init(2)
    x = jnp.array([[3.0, -7.0]])
    with pytest.warns(
        UserWarning, match="one value per channel along axis=-1: its output depends only on the averages"
    ):
        jax.jit(transform.train)(params, state, x)  # while tracing
    quiet = jaxbn.batch_renorm(r_max=3.0, d_max=5.0, allow_single_value=True)
    y, vjp = jax.vjp(jax.jit(lambda x: quiet.train(params, state, x)[0]), x)
    np.testing.assert_allclose(y, [[3 / np.sqrt(1 + EPSILON), -5]], rtol=1e-6)  # d, once within its bound, once not
    np.testing.assert_array_equal(vjp(jnp.ones((1, 2)))[0], 0 * x)
    synchronized = jaxbn.batch_renorm(r_max=3.0, d_max=5.0, axis_name=AXIS)
    over_two = jax.jit(jax.vmap(lambda x: synchronized.train(params, state, x)[0], axis_name=AXIS))
    assert over_two(jnp.array([[[3.0, -7.0]], [[1.0, 2.0]]])).shape == (2, 1, 2)  # two values, and no warning


def test_one_value_does_not_warn_at_initialization_and_in_evaluation():
    net = jaxbn.linen.BatchRenorm()
    variables = net.init(jax.random.key(0), jnp.ones((1, 2)), use_running_average=False)
    net.apply(variables, jnp.ones((1, 2)), use_running_average=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"momentum": None}, "batch_renorm trains with them"),
        ({"momentum": 1.0}, r"outside \[0, 1\)"),
        ({"momentum": jaxbn.constant(0.9, unbiased=True)}, "leave out unbiased="),
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"r_max": 0.9}, "r_max=0.9 must be at least 1"),
        ({"d_max": -1.0}, "d_max=-1.0 must not be negative"),
        ({"r_max": np.nan}, "r_max=nan"),
        ({"axis_index_groups": [[0, 1]]}, "axis_name="),
        ({"dtype": jnp.int32}, "must be inexact"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxbn.batch_renorm(**arguments)


def test_invalid_schedules_raise():
    with pytest.raises(ValueError, match="pass numbers"):
        jaxbn.renorm_ramp(warmup=0)
    with pytest.raises(ValueError, match="r_max=0.5 must be at least 1"):
        jaxbn.renorm_ramp(r_max=0.5)
    with pytest.raises(ValueError, match="d_max=-5.0 must not be negative"):
        jaxbn.renorm_switch(d_max=-5.0)


def test_input_of_the_wrong_shape_raises():
    transform = jaxbn.batch_renorm()
    params, state = transform.init(2)
    for x, error, message in [
        (jnp.ones((4, 3)), ValueError, "initialize anew for this input"),
        (jnp.ones((0, 2)), ValueError, "Skip empty batches"),
        (jnp.ones((4, 2), jnp.complex64), TypeError, "takes real input"),
    ]:
        with pytest.raises(error, match=message):
            transform.train(params, state, x)
    with pytest.raises(ValueError, match=r"state._replace\(step=jnp.zeros\(\(\)\)\)"):
        transform.train(params, state._replace(step=None), jnp.ones((4, 2)))


# --- Other implementations --------------------------------------------------------------------------------------------


def of_sbx(x, mean, var, r_max=3.0, d_max=5.0):
    """The output of sbx and CrossQ after warm-up: they fold r and d into the statistics and add epsilon again."""
    mean_batch, var_batch = x.mean(0, keepdims=True), x.var(0, keepdims=True)
    root, mean = jnp.sqrt(var[None] + EPSILON), mean[None]
    r, d = jax.lax.stop_gradient((jnp.sqrt(var_batch + EPSILON) / root, (mean_batch - mean) / root))
    r, d = jnp.clip(r, 1 / r_max, r_max), jnp.clip(d, -d_max, d_max)
    return (x - (mean_batch - d * jnp.sqrt(var_batch) / r)) / jnp.sqrt(var_batch / r**2 + EPSILON)


def test_sbx_gives_nan_for_a_constant_feature():
    x = jnp.array([[0.7, 1.0], [0.7, 2.0], [0.7, 4.0]])
    transform = jaxbn.batch_renorm(r_max=3.0, d_max=5.0, track_variance=True)
    params, state = transform.init(2)
    ours = jax.jit(jax.grad(lambda x: jnp.square(transform.train(params, state, x)[0]).sum()))(x)
    theirs = jax.jit(jax.grad(lambda x: jnp.square(of_sbx(x, state.mean, state.var)).sum()))(x)
    assert np.isnan(theirs[:, 0]).all() and np.isfinite(theirs[:, 1]).all()
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("std, differ", [(2.0, 1e-3), (0.02, 0.1)], ids=["above epsilon", "of the size of epsilon"])
def test_sbx_differs_if_the_variance_is_about_epsilon(std, differ):
    """Without clipping the training output should equal the evaluation output; ours does, and that of sbx does not."""
    x, mean, var = jnp.array([[5.0 - std], [5.0 + std]]), jnp.array([5.0 - 5 * std]), jnp.array([(5 * std) ** 2])
    transform = jaxbn.batch_renorm(r_max=30.0, d_max=50.0, track_variance=True)
    params, state = transform.init(1)
    state = state._replace(mean=mean, var=var)
    y, _ = transform.train(params, state, x)
    evaluated = transform.eval(params, state, x)
    np.testing.assert_allclose(y, evaluated, rtol=1e-5)
    distance = np.abs(of_sbx(x, mean, var, 30.0, 50.0) - evaluated).max()
    assert distance > differ if differ > 1e-2 else distance < differ


@pytest.mark.parametrize("clipping", [{"rmin": 1 / 1.5, "rmax": 1.5, "dmax": 0.5}, {}], ids=["clipped", "no bounds"])
def test_keras_over_200_steps(clipping):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", minversion="3.15")
    if keras.backend.backend() != "jax":
        pytest.skip("keras runs on another backend")
    batches = drifting(200)
    bounds = {"r_max": clipping.get("rmax", np.inf), "d_max": clipping.get("dmax", np.inf)}
    transform = jaxbn.batch_renorm(**bounds)
    params, state = transform.init(CHANNELS)
    state = state._replace(var=jnp.full(CHANNELS, 1 - EPSILON))  # Keras starts with sigma = 1
    train = jax.jit(transform.train)
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore")
        layer = keras.layers.BatchNormalization(renorm=True, renorm_clipping=clipping)
        layer.build((None, CHANNELS))
        for x in batches:
            expected = layer(x, training=True)
            y, state = train(params, state, x)
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(state.mean, layer.moving_mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state.var, layer.moving_variance, rtol=1e-5)
        np.testing.assert_allclose(transform.eval(params, state, x), layer(x, training=False), rtol=1e-4, atol=1e-4)
