"""Moments against float64 NumPy, from a cold start, with data on which the textbook formula fails."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AXIS, DEVICES, NAMED, WAYS, mesh, run, shards

import jaxbn
from jaxbn._src.numerics import compensated
from jaxbn._src.numerics.moments import merge_over

# Mean and standard deviation of the data; at the last ones E[x^2] - E[x]^2 is off by up to 8e4 in float32.
TABLE = [(0, 1), (10, 0.01), (100, 0.1), (100, 0.01), (1e3, 1), (1e3, 0.1), (3e3, 1), (1e4, 1), (1e4, 0.1), (1e4, 0.01)]
table = pytest.mark.parametrize("mean, std", TABLE)


def data(mean: float, std: float, shape=(8192, 4)) -> np.ndarray:
    return (mean + std * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


# What the rounding of a float32 sum of squares is worth: 2e-7 with the newest XLA, and with the oldest supported one,
# which adds in sequence, 2e-6 over 3150 values, whatever their mean. (The textbook formula is off by up to 8e4.)
SUMMATION = 5e-6
# Parts carry float32 means: rounding them is worth half a unit in their last place over the standard deviation.
MERGE_1E2, MERGE_1E3 = 6e-8 * 1e2, 6e-8 * 1e3


def relative_error(moments: jaxbn.Moments, x: np.ndarray) -> float:
    exact = np.float64(x).reshape(-1, x.shape[-1]).var(0)
    return float(np.abs(np.float64(moments.var) / exact - 1).max())


@pytest.mark.sample(every=2)
@table
@pytest.mark.parametrize("way", WAYS)
def test_variance_is_that_of_float64(mean, std, way):
    x = data(mean, std)
    axis_name = AXIS if way in NAMED else None
    moments, _ = run(way, lambda _, x: (jaxbn.batch_moments(x, axis_name=axis_name), x), 0, x)
    assert relative_error(moments, x) < SUMMATION
    np.testing.assert_allclose(moments.mean, np.float64(x).mean(0), rtol=1e-7, atol=1e-7)


@table
@pytest.mark.parametrize("fast", [True, False])
def test_variance_over_space_whose_size_is_no_power_of_two(mean, std, fast):
    """XLA must not fuse the mean of the first sample into the sums, because it would then not be rounded."""
    x = data(mean, std, (50, 7, 9, 4))
    for function in (jax.jit(jaxbn.batch_moments, static_argnames="use_fast_variance"), jaxbn.batch_moments):
        assert relative_error(function(x, use_fast_variance=fast), x) < SUMMATION


@pytest.mark.sample(every=2)
@table
@pytest.mark.parametrize("way", ["jit", "jit explicit", "shard_map", "pmap"])
def test_variance_with_a_mask_that_differs_over_devices(mean, std, way):
    x = data(mean, std)
    valid = np.ones((8192, 1), bool)
    valid[:1024] = False  # all of the first device
    valid[5000:6000] = False
    axis_name = AXIS if way in NAMED else None

    def step(_, batch):
        return jaxbn.batch_moments(batch["x"], mask=batch["mask"], axis_name=axis_name), 0 * batch["x"]

    moments, _ = run(way, step, 0, {"x": np.where(valid, x, np.nan).astype(np.float32), "mask": valid})
    assert relative_error(moments, x[valid[:, 0]]) < SUMMATION
    np.testing.assert_array_equal(moments.count, valid.sum())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("a", None, None, "b"), P(("a", "b")), P("a"), P(None, "a", None, "b")])
def test_any_sharding_of_the_input_gives_the_same_moments(kind, spec):
    x = data(1e3, 0.1, (16, 4, 6, 8))
    on = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    with jax.set_mesh(on):
        sharded = jax.device_put(x, NamedSharding(on, spec))
        assert relative_error(jax.jit(jaxbn.batch_moments)(sharded), x) < SUMMATION
        assert relative_error(jaxbn.batch_moments(sharded), x) < SUMMATION


def test_rows_that_the_devices_do_not_divide_are_one_block():
    on = mesh()
    x = jax.device_put(data(1e4, 0.1, (19, 4)), NamedSharding(on, P()))
    assert relative_error(jax.jit(jaxbn.batch_moments)(x), np.asarray(x)) < SUMMATION


@pytest.mark.parametrize("rows", [12, 16, 6])
def test_rows_that_only_some_mesh_axes_divide_are_still_gathered_once(rows):
    on = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = jax.device_put(data(1e3, 1, (rows, 5, 4)), NamedSharding(on, P("a")))
    compiled = jax.jit(jaxbn.batch_moments).lower(x).compile()
    assert relative_error(compiled(x), np.asarray(x)) < SUMMATION
    assert re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text()) == [
        "all-gather"
    ]


@pytest.mark.parametrize("distance", [3, 10, 30, 100])
@pytest.mark.parametrize("fast", [True, False])
def test_a_first_row_that_is_an_outlier(distance, fast):
    """The shift is the mean of at least 16 values; one value at distance d would cost an error of 1e-7 d^2."""
    x = data(0, 1, (8192, 4))
    x[0] = distance
    assert relative_error(jaxbn.batch_moments(x, use_fast_variance=fast), x) < 1e-5


@pytest.mark.parametrize(
    "axis, shape", [(-1, (6, 5, 4)), (1, (6, 5, 4)), (0, (6, 5, 4)), ((1, 2), (6, 5, 4)), ((0, -1), (6, 5, 4))]
)
def test_feature_axes(axis, shape):
    x = data(3, 2, shape)
    features = tuple(sorted(a % 3 for a in (axis if isinstance(axis, tuple) else (axis,))))
    reduced = tuple(a for a in range(3) if a not in features)
    moments = jaxbn.batch_moments(x, axis=axis)
    assert moments.mean.shape == tuple(shape[a] for a in features)
    np.testing.assert_allclose(moments.mean, np.float64(x).mean(reduced), rtol=1e-6)
    np.testing.assert_allclose(moments.var, np.float64(x).var(reduced), rtol=1e-6)


def test_examples_without_rows_are_reduced_over_the_named_axis():
    x = data(1e3, 1, (8, 4))
    moments = jax.vmap(lambda row: jaxbn.batch_moments(row, axis_name="batch"), axis_name="batch")(x)
    assert relative_error(jax.tree.map(lambda part: part[0], moments), x) < SUMMATION


@pytest.mark.parametrize("way", ["shard_map", "shard_map unchecked", "pmap", "vmap"])
def test_groups_of_devices_are_reduced_apart(way):
    x = data(1e3, 1, (32, 4))
    groups = [[0, 2, 4, 6], [1, 3, 5, 7]]

    def step(_, x):
        moments = jaxbn.batch_moments(x, axis_name=AXIS, axis_index_groups=groups)
        return 0, jnp.broadcast_to(moments.var, x.shape)

    _, var = run(way, step, 0, x)
    for group in groups:
        rows = np.concatenate([x.reshape(DEVICES, 4, 4)[device] for device in group])
        for device in group:
            expected = np.broadcast_to(np.float64(rows).var(0), (4, 4))
            np.testing.assert_allclose(var.reshape(DEVICES, 4, 4)[device], expected, rtol=1e-6)


def test_real_weights_weigh(rng):
    x, weights = data(5, 2, (64, 4)), rng.random((64, 4)).astype(np.float32)
    moments = jaxbn.batch_moments(x, mask=weights)
    mean = np.average(np.float64(x), 0, weights)
    np.testing.assert_allclose(moments.count, weights.sum(0), rtol=1e-6)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(moments.var, np.average((x - mean) ** 2, 0, weights), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_narrow_dtypes_are_summed_in_float32(dtype):
    x = jnp.asarray(data(20, 5), dtype)
    moments = jaxbn.batch_moments(x)
    assert {part.dtype for part in moments} == {jnp.dtype(jnp.float32)}
    assert relative_error(moments, np.asarray(x.astype(jnp.float32))) < SUMMATION


def test_complex_values_have_a_complex_mean_and_a_real_variance(rng):
    x = (rng.standard_normal((64, 3)) + 1j * rng.standard_normal((64, 3)) + 2 - 1j).astype(np.complex64)
    moments = jaxbn.batch_moments(x)
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moments.var, np.var(x, 0), rtol=1e-5)


def test_an_empty_batch_has_count_0():
    chex.assert_trees_all_equal(
        jaxbn.batch_moments(np.ones((0, 3), np.float32)), jaxbn.Moments(*np.zeros((3, 3), np.float32))
    )


def test_merge_and_pool_are_the_union_with_empty_parts():
    x = data(100, 1, (60, 4))
    parts = [jaxbn.batch_moments(part) for part in (x[:0], x[:7], x[7:8], x[8:])]
    union = jaxbn.batch_moments(x)
    for merged in (
        jaxbn.pool(jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)),
        jaxbn.merge(jaxbn.merge(parts[3], parts[0]), jaxbn.merge(parts[1], parts[2])),
    ):
        chex.assert_trees_all_close(merged, union, rtol=MERGE_1E2)
    chex.assert_trees_all_equal(jaxbn.merge(parts[0], parts[0]), parts[0])


@pytest.mark.parametrize("way", NAMED)
def test_merge_over_devices_is_the_union(way):
    x = data(100, 1, (16, 4))
    moments, _ = run(way, lambda _, x: (merge_over(jaxbn.batch_moments(x), AXIS, None), x), 0, x)
    assert relative_error(moments, x) < MERGE_1E2


def test_shards_are_what_one_device_holds():
    np.testing.assert_array_equal(shards(np.arange(16))[3], [6, 7])


def test_1e5_batches_do_not_drift():
    """After as many merges plain float32 moments are off by 1e-4; compensated ones are accurate."""
    steps = 100_000
    batches = jaxbn.Moments(
        jnp.full((steps, 2), 3.0),
        jnp.asarray(data(2, 1, (steps, 2))),
        jnp.square(jnp.asarray(data(1, 0.1, (steps, 2)))),
    )

    def add(carry, batch):
        plain, exact = carry
        return (jaxbn.merge(plain, batch), compensated.merge(exact, compensated.single(batch))), None

    empty = jax.tree.map(lambda part: jnp.zeros_like(part[0]), batches)
    start = empty, compensated.single(empty)
    (plain, exact), _ = jax.jit(lambda start, batches: jax.lax.scan(add, start, batches))(start, batches)
    mean, m2 = np.float64(batches.mean), np.float64(batches.m2)
    var = m2.sum(0) / (3 * steps) + mean.var(0)
    found = compensated.total(exact)
    np.testing.assert_array_equal(found.count, 3 * steps)
    np.testing.assert_allclose(found.mean, mean.mean(0), rtol=2e-7)
    np.testing.assert_allclose(found.var, var, rtol=1e-6)
    assert np.abs(plain.var / var - 1).max() > 1e-5  # what the second part is for


def test_accumulators_merge_to_the_same_as_one_pass():
    x = data(1e3, 1, (96, 4))
    parts = [compensated.single(jaxbn.batch_moments(part)) for part in np.split(x, 12)]

    def add(parts):
        total = compensated.empty(parts[0].hi)
        for part in parts:
            total = compensated.merge(total, part)
        return total

    halves = compensated.merge(add(parts[:5]), add(parts[5:]))
    chex.assert_trees_all_close(compensated.total(halves), compensated.total(add(parts)), rtol=1e-6)
    assert relative_error(compensated.total(halves), x) < MERGE_1E3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"axis": 2}, "axis=2 names an axis that an input of rank 2 does not have"),
        ({"mask": np.ones(8, bool)}, r"Pass mask.reshape\(\(8, 1\)\)"),
        ({"mask": np.ones((3, 1), bool)}, "does not broadcast"),
        ({"mask": np.ones((1, 8, 4), bool)}, "does not broadcast"),
        ({"axis_index_groups": [[0, 1]]}, "needs axis_name="),
        ({"axis_name": "i", "axis_index_groups": [[0, 1], [2]]}, "groups of equal size"),
        ({"axis_name": "i", "axis_index_groups": [[0, 1], [1, 2]]}, "each index of the axis once"),
    ],
)
def test_errors_name_the_fix(arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxbn.batch_moments(np.ones((8, 4), np.float32), **arguments)


def test_weights_are_constants(rng):
    x, weights = data(0, 1, (8, 4)), jnp.ones((8, 1))
    for autodiff in (False, True):
        transform = jaxbn.batch_norm(autodiff=autodiff)
        params, state = transform.init(4)
        loss = lambda mask, t=transform, p=params, s=state: jnp.sin(t.train(p, s, x, mask=mask)[0]).sum()
        np.testing.assert_array_equal(jax.grad(loss)(weights), np.zeros_like(weights))


def test_complex_masks_are_refused():
    with pytest.raises(TypeError, match="booleans or real weights"):
        jaxbn.batch_moments(np.ones((8, 4), np.float32), mask=np.ones((8, 1), np.complex64))
