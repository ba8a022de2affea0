"""Moving average batch normalization against the released layer in float64, in all of its phases."""

import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from meshes import AXIS, spread
from nets import LINEN, NNX, every_framework, make_batches

import jaxbn
import jaxbn.linen
import jaxbn.nnx

EPSILON = 1e-5
MOMENTUM = 63 / 64  # exact in float32
CHANNELS = 5
WINDOW, WARMUP, R_MAX = 4, 20, 1.25
LAYERS = {LINEN: jaxbn.linen.MovingAverageBatchNorm, NNX: jaxbn.nnx.MovingAverageBatchNorm}


def oracle(batches, cotangents, scale, bias, *, window=WINDOW, warmup=WARMUP, r_max=R_MAX):
    """The released layer in float64 with its ring buffers: outputs, dx and dscale of each step, and the buffers."""
    var, ring_x2, ring_gz = np.ones(CHANNELS), np.zeros((window, CHANNELS)), np.zeros((window, CHANNELS))
    outputs, gradients, of_scale, used = [], [], [], []
    for i, (x, dy) in enumerate(zip(np.float64(batches), np.float64(cotangents), strict=True)):
        t = i + 1
        plain = t <= window or t < warmup
        ring_x2[t % window] = (x**2).mean(0)
        v = ring_x2[t % window] if plain else ring_x2.mean(0)
        z, r = x / np.sqrt(v + EPSILON), np.sqrt(v + EPSILON) / np.sqrt(var + EPSILON)
        r = np.ones(CHANNELS) if t <= max(1000, warmup) else np.clip(r, 1 / r_max, r_max)
        outputs.append(scale * r * z + bias)
        var = MOMENTUM * var + (1 - MOMENTUM) * v
        g = scale * r * dy
        ring_gz[t % window] = (g * z).mean(0)
        psi = ring_gz[t % window] if plain else ring_gz.mean(0)
        gradients.append((g - z * psi) / np.sqrt(v + EPSILON))
        of_scale.append((dy * r * z).sum(0))
        used.append(r)
    return *(np.array(a) for a in (outputs, gradients, of_scale)), var, ring_x2, ring_gz, np.array(used)


def drifting(steps, rows=3, seed=0):
    """Batches with a drifting scale, so that r reaches its bounds in some steps."""
    rng = np.random.default_rng(seed)
    wander = np.cumsum(0.03 * rng.standard_normal((steps, 1, CHANNELS)), 0)
    x = np.exp(np.linspace(-2, 2, CHANNELS) + wander) * rng.standard_normal((steps, rows, CHANNELS))
    return x.astype(np.float32), rng.standard_normal(x.shape).astype(np.float32)


def affine(dtype=jnp.float32):
    return jaxbn.NormParams(jnp.linspace(0.5, -2, CHANNELS).astype(dtype), jnp.linspace(-1, 1, CHANNELS).astype(dtype))


def scanned(transform, params, batches, cotangents):
    """Returns outputs, dx and dscale of each step, and the final state; calls `backward` after each gradient."""

    def step(state, batch):
        x, dy = batch

        def loss(params, x):
            y, after = transform.train(params, state, x)
            return (y * dy).sum(), (y, after)

        (grads, dx), (y, after) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return transform.backward(params, after, grads), (y, dx, grads.scale)

    dtype = params.scale.dtype
    state = transform.init(CHANNELS, dtype=dtype)[1]
    batches, cotangents = jnp.asarray(batches, dtype), jnp.asarray(cotangents, dtype)
    state, found = jax.jit(lambda state: jax.lax.scan(step, state, (batches, cotangents)))(state)
    return *found, state


def relative(found, expected):
    return (np.abs(np.float64(found) - expected) / np.abs(expected).max((0, 1), keepdims=True)).max()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-12)])
def test_the_released_layer_over_1300_steps(dtype, tolerance):
    """Covers the end of the warm-up at 20 and of r = 1 at 1000."""
    batches, cotangents = drifting(1300)
    transform = jaxbn.moving_average_batch_norm(momentum=MOMENTUM, window=WINDOW, warmup=WARMUP, r_max=R_MAX)
    with jax.enable_x64(dtype == "float64"):
        params = affine(dtype)
        *found, state = scanned(transform, params, batches, cotangents)
    *expected, var, ring_x2, ring_gz, r = oracle(batches, cotangents, *np.float64(params))
    clipped = (r[1000:] == R_MAX) | (r[1000:] == 1 / R_MAX)
    assert (r[:1000] == 1).all() and 0.1 < clipped.mean() < 0.9, clipped.mean()
    for name, one, other in zip(("y", "dx", "dscale"), found, expected, strict=True):
        other = other.reshape(1300, -1, CHANNELS)
        assert relative(np.reshape(one, other.shape), other) < tolerance, name
    np.testing.assert_allclose(state.var, var, rtol=tolerance)
    np.testing.assert_allclose(np.sort(state.square_window, 0), np.sort(ring_x2, 0), rtol=tolerance)
    bound = tolerance * np.abs(ring_gz).max()
    np.testing.assert_allclose(np.sort(state.gradient_window, 0), np.sort(ring_gz, 0), rtol=tolerance, atol=bound)
    assert state.step == state.gradients == 1300


def test_equals_rms_norm_with_a_window_of_one():
    """The gradient is then the derivative of the output."""
    (x, *_), (dy, *_) = drifting(1)
    transform = jaxbn.moving_average_batch_norm(window=1, warmup=0)
    params, state = transform.init(CHANNELS)
    state = scanned(transform, params, jnp.stack([x] * 3), jnp.stack([dy] * 3))[-1]

    def rms(x):
        return x / jnp.sqrt(jnp.square(x).mean(0, keepdims=True) + EPSILON)

    found = jax.vjp(jax.jit(lambda x: transform.train(params, state, x)[0]), x)
    expected = jax.vjp(jax.jit(rms), x)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1](dy)[0], expected[1](dy)[0], rtol=1e-5, atol=1e-5)


def test_the_gradient_with_constant_weights_is_that_of_the_joint_batch():
    """Compares with RMS norm over W batches at once and the sum of their losses, by differences in float64.

    The W batches repeat, so that all psi in the window come from the same V.
    """
    batches, cotangents = (np.tile(a, (3, 1, 1)) for a in drifting(WINDOW))
    transform = jaxbn.moving_average_batch_norm(window=WINDOW, warmup=0)
    _, found, _, _ = scanned(transform, affine(), batches, cotangents)
    scale, bias = np.float64(affine())
    joint, dy = np.float64(batches[-WINDOW:]), np.float64(cotangents[-WINDOW:])

    def loss(last):
        x = np.concatenate([joint[:-1], last[None]])
        return (dy * (scale * x / np.sqrt((x**2).mean((0, 1)) + EPSILON) + bias)).sum()

    slopes = np.empty(joint[-1].shape)
    for index in np.ndindex(slopes.shape):
        nudge = np.zeros(slopes.shape)
        nudge[index] = 1e-5 * np.abs(joint[..., index[1]]).max()
        slopes[index] = (loss(joint[-1] + nudge) - loss(joint[-1] - nudge)) / (2 * nudge[index])
    np.testing.assert_allclose(found[-1], slopes, rtol=2e-5, atol=2e-5 * np.abs(slopes).max())


def test_psi_from_the_gradient_of_the_scale(rng):
    """Compares with the definition, psi = E[g z], with weights and r."""
    x, dy = (rng.standard_normal((6, CHANNELS)).astype(np.float32) for _ in range(2))
    weights = rng.uniform(0, 2, (6, 1)).astype(np.float32)
    weights[2] = 0
    transform = jaxbn.moving_average_batch_norm(window=3, r_max=1.5)
    params, state = affine(), transform.init(CHANNELS)[1]
    state = state._replace(step=jnp.float32(2000), var=jnp.linspace(0.1, 3, CHANNELS))

    def loss(params):
        y, after = transform.train(params, state, x, mask=weights)
        return (y * dy).sum(), after

    grads, after = jax.grad(loss, has_aux=True)(params)
    after = transform.backward(params, after, grads)
    x, weights = np.float64(x), np.float64(weights)
    v = (1 + 1 + (weights * x**2).sum(0) / weights.sum()) / 3
    r = np.clip(np.sqrt(v + EPSILON) / np.sqrt(np.float64(state.var) + EPSILON), 1 / 1.5, 1.5)
    psi = (np.float64(params.scale) * r * dy * x / np.sqrt(v + EPSILON)).sum(0) / weights.sum()
    np.testing.assert_allclose(after.gradient_window[-1], psi, rtol=1e-5)
    np.testing.assert_array_equal(after.gradient_window[:-1], np.zeros((2, CHANNELS)))
    np.testing.assert_allclose(after.values, np.full(CHANNELS, weights.sum()), rtol=1e-6)


def test_psi_is_that_of_the_batch_without_backward():
    """If `backward` is never called, the windows of zeros must not count."""
    (x, *_), (dy, *_) = drifting(1)
    transform = jaxbn.moving_average_batch_norm(window=2, warmup=0)
    params, state = affine(), transform.init(CHANNELS)[1]
    state = state._replace(step=jnp.float32(50), square_window=jnp.full((2, CHANNELS), 3.0))
    (dx,) = jax.vjp(lambda x: transform.train(params, state, x)[0], x)[1](dy)
    v = (3 + (np.float64(x) ** 2).mean(0)) / 2
    z, g = x / np.sqrt(v + EPSILON), np.float64(params.scale) * dy
    expected = (g - z * (g * z).mean(0)) / np.sqrt(v + EPSILON)
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


# --- Loss scales, devices, remat --------------------------------------------------------------------------------------


def test_a_loss_scale_changes_neither_psi_nor_the_gradient():
    """Like `DynamicScale`: the scale grows, and a step with infinite gradients is skipped."""
    batches, cotangents = drifting(8)
    transform, params = jaxbn.moving_average_batch_norm(window=3, warmup=0), affine()

    def step(state, x, dy, scale):
        def loss(params, x):
            y, after = transform.train(params, state, x)
            return scale * (y * dy).mean(), after

        grads, after = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return jax.tree.map(lambda g: g / scale, grads), after

    step = jax.jit(step)
    plain = scaled = transform.init(CHANNELS)[1]
    scale = 1024.0
    scaled = scaled._replace(loss_scale=jnp.float32(scale))
    for i, (x, dy) in enumerate(zip(batches, cotangents, strict=True)):
        (grads, dx), after = step(plain, x, dy, 1.0)
        plain = transform.backward(params, after, grads)
        if i == 5:  # skipped: the state from before the step learns of the next scale alone
            inf = jax.tree.map(lambda g: jnp.full_like(g, jnp.inf), grads)
            before, scale = scaled, scale / 2
            scaled = transform.backward(params, scaled, inf, loss_scale=scale)
            chex.assert_trees_all_equal(scaled._replace(loss_scale=before.loss_scale), before)
        (grads, dx_scaled), after = step(scaled, x, dy, scale)
        scale *= 2
        scaled = transform.backward(params, after, grads, loss_scale=scale)
        np.testing.assert_allclose(dx_scaled, dx, rtol=1e-5, atol=1e-5 * np.abs(dx).max())
        chex.assert_trees_all_close(scaled._replace(loss_scale=plain.loss_scale), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.sample(every=3)
@pytest.mark.parametrize(
    "framework, way",
    [pytest.param(LINEN, "jit", marks=pytest.mark.slow), (LINEN, "shard_map"), (LINEN, "pmap"), (NNX, "shard_map")],
    ids=lambda value: getattr(value, "name", value),
)
def test_make_steps_on_many_devices_equals_one_device(framework, way):
    """Compares parameters and all statistics, including psi, after the windows are full."""
    batches = make_batches(5)

    def trained(train_step, state):
        for batch in batches:
            state, metrics = train_step(state, batch)
        return state, metrics["loss"]

    def steps(axis_name):
        layer = LAYERS[framework]
        return framework.steps(framework.net(layer, window=2, warmup=0, axis_name=axis_name), axis_name=axis_name)

    state = steps(None).init(jax.random.key(0), batches[0])
    expected = trained(jax.jit(steps(None).train_step), state)
    many = steps(None if way == "jit" else AXIS)
    started = many.init(jax.random.key(0), batches[0])

    def step(state, batch):
        new, metrics = many.train_step(state, batch)
        return (new, metrics), batch["y"]

    mapped, (state, _) = spread(way, step, started, batches[0])
    for batch in batches:
        (state, metrics), _ = mapped(state, spread(way, step, started, batch)[1][1])
    if way == "pmap":
        state = jax.tree.map(lambda leaf: leaf[0], state)
    leaves = lambda tree: jax.tree.leaves((tree.params, tree.batch_stats if framework is LINEN else tree.others))
    for found, wanted in zip(leaves(state), leaves(expected[0]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_remat_updates_the_windows_once():
    (x, *_), _ = drifting(1)
    layer = jaxbn.linen.MovingAverageBatchNorm(use_running_average=False, window=3)
    variables = layer.init(jax.random.key(0), x)

    def step(apply):
        def loss(params):
            y, updates = apply({**variables, "params": params}, x)
            return jnp.square(y + 1).mean(), updates

        grads, updates = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        return jaxbn.linen.update_backward({**variables, **updates}, grads)["batch_stats"]

    call = lambda variables, x: layer.apply(variables, x, mutable=["batch_stats"])
    found = step(jax.checkpoint(call))
    chex.assert_trees_all_close(found, step(call), rtol=1e-6)
    assert found["step"] == found["gradients"] == 1


# --- Constant channels, and errors ------------------------------------------------------------------------------------


def test_channels_without_variance_stay_finite(rng):
    """Channels that are constant, all zero, and far from zero; past the warm-up and r = 1."""
    x = rng.standard_normal((12, 4, CHANNELS)).astype(np.float32)
    x[..., 1:3] = 0.7, 0.0
    x[..., 3] += 1e6
    transform = jaxbn.moving_average_batch_norm(window=2, warmup=4)
    params, state = affine(), transform.init(CHANNELS)[1]
    state = state._replace(step=jnp.float32(994))

    @jax.jit
    def step(state, x):
        def loss(params, x):
            y, after = transform.train(params, state, x)
            return jnp.square(y - 1).mean(), after

        (grads, dx), after = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return transform.backward(params, after, grads), dx

    for batch in x:
        state, dx = step(state, batch)
        for leaf in jax.tree.leaves((state, dx)):
            assert np.isfinite(leaf).all()
    assert state.step == 1006


def test_nan_does_not_enter_the_windows():
    (x, *_), _ = drifting(1)
    transform = jaxbn.moving_average_batch_norm(window=2)
    params, state = transform.init(CHANNELS)
    bad = x.copy()
    bad[0, 2] = np.nan
    grads, after = jax.grad(
        lambda p: (lambda y, after: (jnp.square(y + 1).sum(), after))(*transform.train(p, state, bad)), has_aux=True
    )(params)
    after = transform.backward(params, after, grads)
    assert np.isnan(grads.scale[2])
    for name in ("square_window", "gradient_window", "values"):
        np.testing.assert_array_equal(getattr(after, name)[..., 2], getattr(state, name)[..., 2])
    assert (after.gradient_window[-1, :2] != 0).all()


def test_one_value_per_channel_gives_its_sign_in_the_warm_up():
    transform = jaxbn.moving_average_batch_norm()
    y, _ = transform.train(*transform.init(2), jnp.array([[3.0, -7.0]]))
    np.testing.assert_allclose(y, [[1, -1]], rtol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"use_scale": False}, "Keep the scale; to hold it at 1, exclude it from the optimizer"),
        ({"autodiff": True}, "not the derivative of its output"),
        ({"momentum": None}, "Pass a momentum, such as 0.98"),
        ({"momentum": jaxbn.constant(0.9, unbiased=True)}, "leave out unbiased="),
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"warmup": -1}, "warmup=-1 not negative"),
        ({"r_max": 0.5}, "r_max=0.5 must be at least 1"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxbn.moving_average_batch_norm(**arguments)


def test_complex_input_raises():
    transform = jaxbn.moving_average_batch_norm()
    with pytest.raises(TypeError, match="takes real input"):
        transform.train(*transform.init(2), jnp.ones((4, 2), jnp.complex64))


# --- linen and NNX ----------------------------------------------------------------------------------------------------


def test_factory_and_layers_have_the_same_arguments_and_defaults():
    defaults = {name: p.default for name, p in inspect.signature(jaxbn.moving_average_batch_norm).parameters.items()}
    linen = inspect.signature(jaxbn.linen.MovingAverageBatchNorm).parameters
    own = inspect.signature(jaxbn.nnx.MovingAverageBatchNorm.__init__).parameters
    shared = inspect.signature(jaxbn.nnx.BatchNorm.__init__).parameters
    assert {name: linen[name].default for name in defaults} == defaults
    assert {name: (own if name in own else shared)[name].default for name in defaults} == defaults


def test_after_a_plain_train_state_step_of_linen():
    """One line more, after each gradient and before the optimizer accumulates it."""
    batches, cotangents = drifting(8)
    layer = jaxbn.linen.MovingAverageBatchNorm(
        use_running_average=False, momentum=MOMENTUM, window=WINDOW, warmup=0, r_max=R_MAX
    )
    variables = layer.init(jax.random.key(0), batches[0])
    optimizer = optax.MultiSteps(optax.sgd(0.0), 2)
    state = jaxbn.linen.TrainState.create(
        apply_fn=layer.apply, params=variables["params"], tx=optimizer, batch_stats=variables["batch_stats"], kinds=()
    )

    @jax.jit
    def train_step(state, x, dy):
        def loss(params):
            y, updates = state.apply_fn({**state.variables, "params": params}, x, mutable=["batch_stats"])
            return (y * dy).sum(), updates

        grads, updates = jax.grad(loss, has_aux=True)(state.params)
        stats = jaxbn.linen.update_backward({**state.variables, **updates}, grads)["batch_stats"]
        return state.apply_gradients(grads=grads, batch_stats=stats)

    with jax.numpy_dtype_promotion("standard"):  # MultiSteps wants it
        for x, dy in zip(batches, cotangents, strict=True):
            state = train_step(state, x, dy)
    *_, ring_gz, _ = oracle(batches, cotangents, np.ones(CHANNELS), np.zeros(CHANNELS), warmup=0)
    found = np.sort(state.batch_stats["gradient_window"], 0)
    np.testing.assert_allclose(found, np.sort(ring_gz, 0), rtol=1e-4, atol=1e-6)


def test_in_a_plain_loop_of_nnx():
    batches, cotangents = drifting(8)
    model = jaxbn.nnx.MovingAverageBatchNorm(
        CHANNELS, momentum=MOMENTUM, window=WINDOW, warmup=0, r_max=R_MAX, rngs=nnx.Rngs(0)
    )
    optimizer = nnx.Optimizer(model, optax.sgd(0.0), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, x, dy):
        grads = nnx.grad(lambda model: (model(x) * dy).sum())(model)
        jaxbn.nnx.update_backward(model, grads)
        optimizer.update(model, grads)

    for x, dy in zip(batches, cotangents, strict=True):
        train_step(model, optimizer, x, dy)
    *_, ring_gz, _ = oracle(batches, cotangents, np.ones(CHANNELS), np.zeros(CHANNELS), warmup=0)
    np.testing.assert_allclose(np.sort(model.gradient_window[...], 0), np.sort(ring_gz, 0), rtol=1e-4, atol=1e-6)


def test_layers_under_vmap_use_their_own_gradients():
    x = jnp.asarray(drifting(1)[0][0])
    layer = jaxbn.linen.MovingAverageBatchNorm
    axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    ensemble = nn.vmap(layer, **axes, in_axes=0, out_axes=0)(use_running_average=False, window=3)
    inputs = jnp.stack([x, 2 * x + 1])
    variables = jax.jit(ensemble.init)(jax.random.key(0), inputs)

    @functools.partial(jax.jit, static_argnums=0)
    def step(module, variables, x):
        def loss(params):
            y, updates = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return (y**3).sum(), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        return jaxbn.linen.update_backward({**variables, **updates}, grads)["batch_stats"]

    found = step(ensemble, variables, inputs)
    for member in range(2):
        alone = jax.tree.map(lambda leaf, member=member: leaf[member], variables)
        expected = step(layer(use_running_average=False, window=3), alone, inputs[member])
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, m=member: leaf[m], found), expected, rtol=1e-5)


@every_framework
def test_the_pass_normalizes_with_second_moments_and_installs_them(framework):
    """In float64 for one layer; the frozen layer evaluates with the second moment of all rows."""
    parts = [(3 + np.random.default_rng(seed).standard_normal((4, CHANNELS))).astype(np.float32) for seed in range(3)]
    rows = np.float64(np.concatenate(parts))
    if framework is NNX:
        model = jaxbn.nnx.MovingAverageBatchNorm(CHANNELS, rngs=nnx.Rngs(0))
        outputs, _ = jaxbn.nnx.capture_moments(mode="batch")(model, parts[0])
        model, report = jaxbn.nnx.postproc(model, parts)
        frozen = jaxbn.nnx.freeze(model, report)
        y = model(parts[0], use_running_average=True)
    else:
        net = jaxbn.linen.MovingAverageBatchNorm(use_running_average=True)
        variables = net.init(jax.random.key(0), parts[0])
        outputs, _ = jaxbn.linen.capture_moments(net.apply, mode="batch")(variables, parts[0])
        variables, report = jaxbn.linen.postproc(net.apply, variables, parts)
        frozen = jaxbn.linen.freeze(variables, report)
        y = net.apply(variables, parts[0])
    assert frozen.info.layer("").method == "moving_average_batch_norm"
    one = np.float64(parts[0])
    np.testing.assert_allclose(outputs, one / np.sqrt((one**2).mean(0) + EPSILON), rtol=1e-5)
    np.testing.assert_allclose(y, one / np.sqrt((rows**2).mean(0) + EPSILON), rtol=1e-5)


@every_framework
def test_make_steps_updates_psi_and_freezes(framework):
    batches = make_batches(4)
    steps = framework.steps(framework.net(LAYERS[framework], window=2, warmup=0))
    state = steps.init(jax.random.key(0), batches[0])
    train_step, postproc_step = jax.jit(steps.train_step), jax.jit(steps.postproc_step)
    for batch in batches:
        state, _ = train_step(state, batch)
    stats = state.batch_stats if framework is LINEN else nnx.to_pure_dict(state.others)
    for name in ("norm_0", "norm_1"):
        assert stats[name]["gradients"] == stats[name]["step"] == 4
        assert (stats[name]["gradient_window"] != 0).any()
    acc = steps.start(state, batches[0])
    for batch in batches:
        acc = postproc_step(state, acc, batch)
    frozen, _ = steps.finalize(state, acc)
    alone = np.concatenate([steps.eval_step(frozen, {"x": x[None]}) for x in batches[0]["x"]])
    np.testing.assert_allclose(alone, steps.eval_step(frozen, batches[0]), rtol=1e-5, atol=1e-5)


def test_the_error_names_the_missing_gradient():
    x = jnp.ones((2, 3))
    layer = jaxbn.linen.MovingAverageBatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="There is no gradient of the scale of ''"):
        jaxbn.linen.update_backward(variables, {})
    model = nnx.Sequential(jaxbn.nnx.MovingAverageBatchNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no gradient of the scale of 'layers/0'"):
        jaxbn.nnx.update_backward(model, nnx.State({}))


def test_update_backward_does_not_change_other_layers():
    x = jnp.ones((2, 3))
    net = jaxbn.linen.BatchNorm(use_running_average=False)
    variables = net.init(jax.random.key(0), x)
    chex.assert_trees_all_equal(jaxbn.linen.update_backward(variables, {}), variables)
