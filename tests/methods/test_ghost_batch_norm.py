"""Ghost batch norm against batch norm of each group in float64, on one device and on eight."""

import inspect
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import every_average, normal
from meshes import AXIS, NAMED, run, spread, sum_gradients

import jaxbn
import jaxbn.linen
import jaxbn.nnx

EPSILON = 1e-5
ROWS, SPACE, FEATURES = 32, 3, 4
every_grouping = pytest.mark.parametrize("grouping", ["contiguous", "strided"])


@pytest.fixture
def x(rng):
    """Rows of different means, so that the result depends on the grouping."""
    drift = np.linspace(-3, 5, ROWS)[:, None, None]
    return (drift + 2 * rng.standard_normal((ROWS, SPACE, FEATURES))).astype(np.float32)


def members(size, grouping, rows=ROWS):
    """The rows of each group."""
    indices = np.arange(rows)
    return indices.reshape(-1, size) if grouping == "contiguous" else indices.reshape(size, -1).T


def oracle(x, size, grouping, weights=None, stored=(0.0, 1.0)):
    """Batch norm of each group in float64: outputs, and counts, means and biased variances [G, C]."""
    x = np.float64(x)
    weights = np.broadcast_to(1.0 if weights is None else weights, x.shape)
    y, moments = np.empty(x.shape), []
    for rows in members(size, grouping, len(x)):
        group, w = (a[rows].reshape(-1, a.shape[-1]) for a in (x, weights))
        n = w.sum(0)
        mean = (w * group).sum(0) / np.maximum(n, 1e-30)
        var = (w * (group - mean) ** 2).sum(0) / np.maximum(n, 1e-30)
        moments.append((n, mean, var))
        mean, var = np.where(n > 0, mean, stored[0]), np.where(n > 0, var, stored[1])
        y[rows] = (x[rows] - mean) / np.sqrt(var + EPSILON)
    return y, *map(np.array, zip(*moments, strict=True))


def started(**arguments):
    transform = jaxbn.ghost_batch_norm(**{"momentum": 0.0} | arguments)
    return transform._replace(train=jax.jit(transform.train)), *transform.init(FEATURES)


# --- The formula ------------------------------------------------------------------------------------------------------


@every_grouping
@pytest.mark.parametrize("size", [1, 4, 100])
def test_each_group_is_batch_norm_by_itself(x, size, grouping):
    transform, params, state = started(ghost_size=size, grouping=grouping)
    y, after = transform.train(params, state, x)
    expected, _, means, variances = oracle(x, min(size, ROWS), grouping)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after.mean, means.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after.var, variances.mean(0), rtol=1e-5)


@every_grouping
def test_the_pooled_variance_is_that_of_the_batch(x, grouping):
    transform, params, state = started(ghost_size=4, grouping=grouping, running="pooled")
    _, after = transform.train(params, state, x)
    np.testing.assert_allclose(after.mean, np.float64(x).mean((0, 1)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after.var, np.float64(x).var((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("running", ["group_mean", "pooled"])
def test_the_unbiased_variance(x, running):
    transform, params, state = started(ghost_size=4, running=running, momentum=jaxbn.constant(0.0, unbiased=True))
    _, after = transform.train(params, state, x)
    groups = np.float64(x).reshape(-1, 4 * SPACE, FEATURES) if running == "group_mean" else np.float64(x)[None]
    expected = groups.reshape(len(groups), -1, FEATURES).var(1, ddof=1).mean(0)
    np.testing.assert_allclose(after.var, expected, rtol=1e-5)


@every_average
def test_averages_of_every_kind(momentum):
    """With pooled variances the averages equal those of batch norm: one update with all rows per training step."""
    ghost = jaxbn.ghost_batch_norm(ghost_size=4, running="pooled", momentum=momentum)
    plain = jaxbn.batch_norm(momentum=momentum)
    (params, state), (_, expected) = ghost.init(FEATURES), plain.init(FEATURES)
    steps = [jax.jit(lambda state, x, t=transform: t.train(params, state, x)[1]) for transform in (ghost, plain)]
    for seed in range(3):
        x = 2 + 3 * normal(ROWS, SPACE, FEATURES, seed=seed)
        state, expected = steps[0](state, x), steps[1](expected, x)
    chex.assert_trees_all_close(tuple(state), tuple(expected), rtol=1e-5)
    assert state.count == (3 * ROWS if momentum.counts_samples else 3)


@every_grouping
def test_masks_and_a_group_without_values_which_uses_the_running_statistics(x, grouping):
    weights = np.abs(np.sin(np.arange(ROWS * SPACE) + 1.0)).reshape(ROWS, SPACE, 1).astype(np.float32)
    weights[members(8, grouping)[2]] = 0
    transform, params, state = started(ghost_size=8, grouping=grouping)
    state = state._replace(mean=state.mean + 2, var=state.var * 3)
    y, after = transform.train(params, state, np.where(weights > 0, x, np.nan), mask=weights)
    expected, counts, means, variances = oracle(x, 8, grouping, weights, stored=(2.0, 3.0))
    valid = np.broadcast_to(weights > 0, x.shape)
    np.testing.assert_allclose(y[valid], expected[valid], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.mean, (counts * means).sum(0) / counts.sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after.var, (counts * variances).sum(0) / counts.sum(0), rtol=1e-5)


@every_grouping
@pytest.mark.parametrize("axis", [0, (0, 2)], ids=str)
def test_feature_axes_before_and_behind_the_rows(axis, grouping, rng):
    """The result is the same as with the features last."""
    x = rng.standard_normal((8, 6, 4)).astype(np.float32)
    features = tuple(sorted(a % 3 for a in (axis if isinstance(axis, tuple) else (axis,))))
    last = np.moveaxis(x, features, range(3 - len(features), 3))
    size = last.shape[0] // 2
    flat = last.reshape(*last.shape[: 3 - len(features)], -1)
    flat = flat if flat.ndim == 3 else flat[:, None]
    transform = jaxbn.ghost_batch_norm(ghost_size=size, grouping=grouping, axis=axis, momentum=0.0)
    params, state = transform.init(tuple(x.shape[a] for a in features))
    y, after = jax.jit(transform.train)(params, state, x)
    expected, _, means, _ = oracle(flat, size, grouping)
    expected = np.moveaxis(expected.reshape(last.shape), range(3 - len(features), 3), features)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after.mean, means.mean(0).reshape(after.mean.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autodiff", [False, True], ids=["", "autodiff"])
def test_gradients_equal_those_of_batch_norm_of_each_group(x, autodiff, rng):
    residual, target = (rng.standard_normal(x.shape).astype(np.float32) for _ in range(2))
    params = jaxbn.NormParams(jnp.array([1.0, -0.5, 2.0, 0.1]), jnp.array([0.0, 1.0, -1.0, 0.3]))

    def gradients(train):
        def loss(x, residual, params):
            return (train(params, x, residual) * target).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(x, residual, params)

    ghost, _, state = started(ghost_size=8, activation=jax.nn.relu, autodiff=autodiff)
    plain = jaxbn.batch_norm(activation=jax.nn.relu, autodiff=True)

    def by_group(params, x, residual):
        parts = [slice(first, first + 8) for first in range(0, ROWS, 8)]
        return jnp.concatenate([plain.train(params, state, x[part], residual=residual[part])[0] for part in parts])

    found = gradients(lambda params, x, residual: ghost.train(params, state, x, residual=residual)[0])
    chex.assert_trees_all_close(found, gradients(by_group), rtol=1e-5, atol=1e-5)


def test_one_group_is_batch_norm(x):
    """Also if the batch is smaller than a group."""
    for size in (ROWS, 10 * ROWS):
        transform, params, state = started(ghost_size=size, momentum=0.9)
        plain = jaxbn.batch_norm(momentum=0.9)
        y, after = transform.train(params, state, x)
        expected_y, expected = jax.jit(plain.train)(params, plain.init(FEATURES)[1], x)
        np.testing.assert_allclose(y, expected_y, rtol=1e-6, atol=1e-6)
        chex.assert_trees_all_close(tuple(after[:2]), tuple(expected[:2]), rtol=1e-6)


def test_gradients_of_half_precision_parameters_are_added_up_in_float32():
    """32 groups add 1 each to a sum of 256; in bfloat16, with 8 bits, the sum would not change."""
    transform, params, state = started(ghost_size=1, use_scale=False)
    params = params._replace(bias=params.bias.astype(jnp.bfloat16))
    x, weight = jnp.ones((ROWS, SPACE, FEATURES)), np.zeros((ROWS, 1, 1), np.float32)
    weight[0], weight[1:] = 256 / SPACE, 1 / SPACE

    def loss(params):
        y, _ = transform.train(params, state, x)
        return (y.astype(jnp.float32) * weight).sum()

    np.testing.assert_array_equal(np.float32(jax.jit(jax.grad(loss))(params).bias), [288.0] * FEATURES)
    y, _ = transform.train(params, state, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


# --- Devices ----------------------------------------------------------------------------------------------------------

# 8 devices with 4 rows each: two groups per device, one group on two devices, and one and two groups on all.
LAYOUTS = [(2, "contiguous"), (8, "contiguous"), (32, "contiguous"), (16, "strided")]
ON_DEVICES = [(*layout, way) for layout in LAYOUTS for way in ("jit", "shard_map")]
OTHER_WAYS = [(2, "contiguous", way) for way in ("jit explicit", "pmap")]
OTHER_WAYS += [(8, "contiguous", way) for way in ("shard_map unchecked", "pmap", "vmap")]
OTHER_WAYS += [(32, "contiguous", "jit explicit"), (16, "strided", "jit explicit")]
ON_DEVICES += [pytest.param(*layout, marks=pytest.mark.slow) for layout in OTHER_WAYS]


@pytest.mark.sample(every=7)
@pytest.mark.parametrize("size, grouping, way", ON_DEVICES)
def test_devices_equal_one_device(size, grouping, way, x, rng):
    """Outputs, statistics and gradients; some devices and groups are masked entirely."""
    mask = rng.random((ROWS, SPACE, 1)) > 0.3
    mask[8:12] = False
    batch = {"x": x, "mask": mask, "target": rng.standard_normal(x.shape).astype(np.float32)}
    one, params, state = started(ghost_size=size, grouping=grouping)
    many, *_ = started(ghost_size=size, grouping=grouping, axis_name=AXIS if way in NAMED else None)

    def step(transform, way, params, batch):
        def loss(params, x):
            y, after = transform.train(params, state, x, mask=batch["mask"])
            return (jnp.tanh(y) * batch["target"]).sum(), (y, after)

        (dparams, dx), (y, after) = jax.grad(loss, (0, 1), has_aux=True)(params, batch["x"])
        return (after, sum_gradients(way, dparams)), (y, dx)

    expected = jax.jit(lambda p, b: step(one, "jit", p, b))(params, batch)
    found = run(way, lambda p, b: step(many, way, p, b), params, batch)
    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, expected), rtol=1e-5, atol=1e-5)


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("momentum, count", [(None, 0), (0.9, 1)], ids=["no averages", "averages"])
@pytest.mark.parametrize("size, way", [(2, "jit"), (2, "jit explicit"), (2, "shard_map"), (4, "jit"), (4, "pmap")])
def test_groups_on_one_device_need_no_collective(size, way, momentum, count, x):
    """Forward and backward; the averages, which are the same on all devices, take one collective."""
    transform, params, state = started(
        ghost_size=size, momentum=momentum, axis_name=AXIS if way in NAMED else None, activation=jax.nn.relu
    )

    def step(params, batch):
        def loss(x):
            y, after = transform.train(params, state, x)
            return jnp.square(y).sum(), after

        dx, after = jax.grad(loss, has_aux=True)(batch["x"])
        return after, dx

    mapped, arguments = spread(way, step, params, {"x": x})
    text = mapped.lower(*arguments).compile().as_text()
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    assert len(re.findall(rf" ({names})(?:-start)?\(", text)) == count


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_groups_over_devices_take_one_collective_in_each_direction(momentum, x):
    transform, params, state = started(ghost_size=8, momentum=momentum, axis_name=AXIS)

    def step(params, batch):
        def loss(x):
            y, after = transform.train(params, state, x)
            return jnp.square(y).sum(), after

        dx, after = jax.grad(loss, has_aux=True)(batch["x"])
        return after, dx

    mapped, arguments = spread("shard_map", step, params, {"x": x})
    text = mapped.lower(*arguments).compile().as_text()
    assert len(re.findall(r" (?:all-gather|all-reduce)(?:-start)?\(", text)) == 2


def test_rows_along_a_named_axis_only():
    """Inside the vmap the input has features only."""
    x = np.array([[1.0], [3.0], [11.0], [13.0]], np.float32)
    transform = jaxbn.ghost_batch_norm(ghost_size=2, axis_name=AXIS, momentum=0.0, epsilon=0.0)
    y, after = jax.jit(jax.vmap(lambda x: transform.train(*transform.init(1), x), axis_name=AXIS))(x)
    np.testing.assert_allclose(y, [[-1.0], [1.0], [-1.0], [1.0]], rtol=1e-6)
    np.testing.assert_allclose(after.var, np.ones((4, 1)), rtol=1e-6)


# --- Layers and errors ------------------------------------------------------------------------------------------------


def test_factory_and_layers_have_the_same_arguments_and_defaults():
    defaults = {name: p.default for name, p in inspect.signature(jaxbn.ghost_batch_norm).parameters.items()}
    linen = inspect.signature(jaxbn.linen.GhostBatchNorm).parameters
    own = inspect.signature(jaxbn.nnx.GhostBatchNorm.__init__).parameters
    shared = inspect.signature(jaxbn.nnx.BatchNorm.__init__).parameters
    assert {name: linen[name].default for name in defaults} == defaults
    assert {name: (own if name in own else shared)[name].default for name in defaults} == defaults
    graphs = [nnx.graphdef(jaxbn.nnx.GhostBatchNorm(3, ghost_size=4, rngs=nnx.Rngs(0))) for _ in range(2)]
    assert graphs[0] == graphs[1]


def test_pass_and_frozen_network_equal_those_of_batch_norm(x):
    """A pass normalizes with the statistics of its whole batch, and accepts batches of any size."""
    net = nn.Sequential([nn.Dense(5), jaxbn.linen.GhostBatchNorm(ghost_size=8, use_running_average=False)])
    x = x.reshape(-1, FEATURES)
    variables = net.init(jax.random.key(0), x[:3])  # of any size too, if it is smaller than a group
    call = lambda variables, x: net.apply(variables, x, mutable=["batch_stats"])[0]
    outputs, moments = jaxbn.linen.capture_moments(call)(variables, x[:13])
    np.testing.assert_allclose(outputs.std(0), np.ones(5), atol=1e-3)
    variables, report = jaxbn.linen.postproc(call, variables, [x[:13], x[13:]])
    frozen = jaxbn.linen.freeze(variables, report)
    assert frozen.info.layer("layers_1").method == "ghost_batch_norm"
    inputs = np.float64(x) @ np.float64(variables["params"]["layers_0"]["kernel"])
    np.testing.assert_allclose(variables["batch_stats"]["layers_1"]["var"], inputs.var(0), rtol=1e-5)
    stock = nn.Sequential([nn.Dense(5), jaxbn.linen.BatchNorm(use_running_average=True)])
    np.testing.assert_allclose(
        stock.apply(frozen.variables, x), (inputs - inputs.mean(0)) / np.sqrt(inputs.var(0) + EPSILON), atol=1e-5
    )


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"ghost_size": 0}, ValueError, "ghost_size=0 must be positive"),
        ({"ghost_size": 2.5}, TypeError, "ghost_size=2.5 must be a number of samples"),
        ({"grouping": "random"}, ValueError, "grouping='random' is none of 'contiguous', 'strided'"),
        ({"running": "mean"}, ValueError, "running='mean' is none of 'group_mean', 'pooled'"),
        ({"axis_index_groups": [[0, 1]], "axis_name": "i"}, ValueError, "takes no axis_index_groups"),
        ({"epsilon": -1.0}, ValueError, "must not be negative"),
        ({"momentum": 1.0}, ValueError, r"outside \[0, 1\)"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_invalid_arguments_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        jaxbn.ghost_batch_norm(**{"ghost_size": 4} | arguments)


def test_batches_that_do_not_divide_raise(x):
    def train(x, axis_name=None, **arguments):
        transform, params, state = started(axis_name=axis_name, **arguments)
        return transform.train(params, state, x)

    with pytest.raises(ValueError, match="A batch of 32 samples does not divide into groups of ghost_size=5"):
        train(x, ghost_size=5)
    with pytest.raises(ValueError, match="Skip empty batches"):
        train(x[:0], ghost_size=5)
    with pytest.raises(ValueError, match="has one value per channel"):
        train(x[:, 0], ghost_size=1)
    with pytest.raises(ValueError, match="initialize anew for this input"):
        train(x[..., :3], ghost_size=4)
    halves = x[:24].reshape(2, 12, SPACE, FEATURES)
    with pytest.raises(ValueError, match="contiguous groups of ghost_size=8 do not fit on 2 devices with 12 samples"):
        jax.vmap(lambda x: train(x, AXIS, ghost_size=8), axis_name=AXIS)(halves)
    with pytest.raises(ValueError, match="strided groups of ghost_size=3 do not fit"):
        jax.vmap(lambda x: train(x, AXIS, ghost_size=3, grouping="strided"), axis_name=AXIS)(halves)
    with pytest.raises(ValueError, match="Explicit mesh axis cannot be cut into 4 pieces"):
        run("jit explicit", lambda _, x: train(x, ghost_size=8), (), x)
