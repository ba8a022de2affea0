"""`move_averages` in linen and NNX: updates the running averages once, with the moments of all micro-batches.

The expected values are computed in float64 from the inputs of the layers; each micro-batch is normalized separately.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from flax import nnx
from meshes import AXIS, run
from nets import (
    LINEN,
    MOMENTUM,
    NNX,
    OPTIMIZER,
    assert_same_statistics,
    every_framework,
    make_batches,
    moved,
    pooled_in_float64,
    pure,
    split,
    squared_error,
    started,
    statistics_of,
    train,
)

import jaxbn
import jaxbn.linen
import jaxbn.nnx

PARTS = 4


@functools.cache
class Loop:
    """What a loop over micro-batches needs of a network, as pure functions of (params, other variables)."""

    def __init__(self, framework, axis_name=None):
        self.net = framework.net(axis_name=axis_name)
        self.params, self.others, self.join = split(started(framework, self.net))
        self.package = framework.package
        self.momentum = (MOMENTUM,) if framework is LINEN else ()  # NNX's layers hold it

    def captured(self, call):
        """The call of (state, batch), as a call of (params, other variables, batch) that also returns moments."""
        capture = self.package.capture_moments(call, mode="as_called")
        return lambda params, others, batch: capture(self.join(params, others), batch)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(self, params, others, batch):
        """(gradients, moments) of one micro-batch."""
        call = self.captured(lambda moving, x: train(self.net, moving, x)[0])

        def loss_of(params):
            outputs, moments = call(params, others, batch["x"])
            return squared_error(outputs, batch)[0], moments

        return jax.grad(loss_of, has_aux=True)(params)

    @functools.partial(jax.jit, static_argnums=0)
    def move(self, params, others, moments):
        return split(self.package.move_averages(self.join(params, others), moments, *self.momentum))[1]


def merged(*parts):
    return functools.reduce(lambda a, b: {path: jaxbn.merge(a[path], b[path]) for path in a}, parts)


def expected_averages(others, params, batches):
    """The averages moved once, by all inputs of the layers in these micro-batches."""
    population = pooled_in_float64(pure(params), [batch["x"] for batch in batches])
    return moved(jax.tree.map(np.float64, statistics_of(others)), population)


@every_framework
def test_averages_are_updated_once_for_each_step_of_the_optimizer(framework):
    loop, batches = Loop(framework), make_batches(2 * PARTS)
    params, others, optimizer = loop.params, loop.others, OPTIMIZER.init(loop.params)
    for micro_batches in (batches[:PARTS], batches[PARTS:]):
        expected = expected_averages(others, params, micro_batches)
        grads, moments = zip(*(loop.gradients(params, others, batch) for batch in micro_batches), strict=True)
        others = loop.move(params, others, merged(*moments))
        mean = jax.tree.map(lambda *parts: sum(parts) / PARTS, *grads)
        updates, optimizer = OPTIMIZER.update(mean, optimizer, params)
        params = optax.apply_updates(params, updates)
        assert_same_statistics(statistics_of(others), expected, 1e-6)


@every_framework
def test_layers_by_themselves_would_update_once_for_each_micro_batch(framework):
    """And without the variance between the micro-batches: what `move_averages` is for."""
    loop, micro_batches = Loop(framework), make_batches(PARTS)
    expected = expected_averages(loop.others, loop.params, micro_batches)
    moving = loop.join(loop.params, loop.others)
    for batch in micro_batches:
        _, moving = train(loop.net, moving, batch["x"])
    naive = statistics_of(moving)
    for layer, right in expected.items():
        assert (abs(naive[layer]["mean"] / right["mean"]) > 3).all()  # 1 - 0.9^4 in the place of 0.1
        assert (abs(naive[layer]["var"] / right["var"] - 1) > 0.05).any()


@pytest.mark.sample(every=2)
@every_framework
def test_micro_batches_of_a_scan_inside_the_call_are_pooled(framework):
    """One compiled program that accumulates the gradients and hands out the moments of all."""
    loop, micro_batches = Loop(framework), make_batches(PARTS)

    def accumulate(moving, batches):
        params, others, join = split(moving)

        def one(total, batch):
            loss_of = lambda params: squared_error(train(loop.net, join(params, others), batch["x"])[0], batch)[0]
            return jax.tree.map(jnp.add, total, jax.grad(loss_of)(params)), None

        return jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), batches)[0]

    @jax.jit
    def step(params, others, batches):
        grads, moments = loop.captured(accumulate)(params, others, batches)
        return grads, moments, loop.move(params, others, moments)

    stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *micro_batches)
    grads, moments, others = step(loop.params, loop.others, stacked)
    expected = expected_averages(loop.others, loop.params, micro_batches)
    assert_same_statistics(statistics_of(others), expected, 1e-6)
    assert (moments["norm_1"].count == 16 * PARTS).all()
    each = [loop.gradients(loop.params, loop.others, batch)[0] for batch in micro_batches]
    chex.assert_trees_all_close(grads, jax.tree.map(lambda *parts: sum(parts), *each), rtol=1e-5, atol=1e-6)


@pytest.mark.sample(every=2)
@every_framework
def test_with_multi_steps_of_optax_the_averages_are_updated_with_the_parameters(framework):
    loop, batches = Loop(framework), make_batches(2 * PARTS)
    optimizer = optax.MultiSteps(OPTIMIZER, PARTS)

    def step(carry, batch):
        params, others, state, moments = carry
        grads, found = loop.gradients(params, others, batch)
        updates, state = optimizer.update(grads, state, params)
        moments = merged(moments, found)
        done = optimizer.has_updated(state)
        others = jaxbn.step_if(done, loop.move(params, others, moments), others)
        moments = jaxbn.step_if(done, jax.tree.map(jnp.zeros_like, moments), moments)
        params = optax.apply_updates(params, updates)
        return (params, others, state, moments), (params, others)

    with jax.numpy_dtype_promotion("standard"):  # optax divides by an integer
        _, like = jax.eval_shape(loop.gradients, loop.params, loop.others, batches[0])
        empty = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), like)
        start = (loop.params, loop.others, optimizer.init(loop.params), empty)
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *batches)
        _, after = jax.jit(lambda start: jax.lax.scan(step, start, stacked))(start)
    at = lambda i: jax.tree.map(lambda leaf: leaf[i], after) if i >= 0 else (loop.params, loop.others)
    for i in range(2 * PARTS):
        params, others = at(i - 1)
        if (i + 1) % PARTS:
            chex.assert_trees_all_equal(at(i), (params, others))
            continue
        expected = expected_averages(others, params, batches[i + 1 - PARTS : i + 1])
        assert_same_statistics(statistics_of(at(i)[1]), expected, 1e-6)


@pytest.mark.slow
@every_framework
@pytest.mark.parametrize("way", ["shard_map", "shard_map unchecked", "pmap"])
def test_moments_merged_over_devices_are_those_of_one(framework, way):
    loop, micro_batches = Loop(framework, AXIS), make_batches(PARTS)
    call = loop.captured(lambda moving, x: train(loop.net, moving, x)[0])

    def step(replicated, x):
        params, others = replicated
        parts = jax.lax.map(lambda x: call(params, others, x)[1], x.swapaxes(0, 1))
        moments = {path: jaxbn.merge_over(jaxbn.pool(part), AXIS) for path, part in parts.items()}
        return loop.move(params, others, moments), ()

    others, _ = run(way, step, (loop.params, loop.others), np.stack([batch["x"] for batch in micro_batches], 1))
    expected = expected_averages(loop.others, loop.params, micro_batches)
    assert_same_statistics(statistics_of(others), expected, 1e-6)


# --- One layer ------------------------------------------------------------------------------------------------------

NO_AVERAGE = next(case for case in CASES if case.name == "batch_norm no average")
AVERAGES = [case for case in CASES if case.arguments.keys() <= {"momentum"} and case is not NO_AVERAGE]
every_average = pytest.mark.parametrize("case", AVERAGES, ids=lambda case: case.name)


def layer_of(framework, case):
    """(state, move), where move(state, moments, **options) is that of the framework."""
    if framework is NNX:
        return case.nnx_module(3), jaxbn.nnx.move_averages
    moving = case.linen_module(use_running_average=False).init(jax.random.key(0), jnp.ones((2, 3)))
    momentum = case.arguments.get("momentum", 0.99)
    return moving, lambda moving, moments, **options: jaxbn.linen.move_averages(moving, moments, momentum, **options)


def state_of(moving):
    if isinstance(moving, nnx.Module):
        return nnx.to_pure_dict(nnx.state(moving, nnx.BatchStat))
    return moving["batch_stats"]


@every_framework
@every_average
def test_every_average_is_updated_as_by_one_large_batch(framework, case):
    """By the formula that the layer itself follows, for a batch of all rows."""
    moving, move = layer_of(framework, case)
    expected = jax.tree.map(np.float64, state_of(moving))
    batches = make_batches(3 * PARTS, rows=8)
    for step in range(3):
        rows = [batch["x"] for batch in batches[step * PARTS : (step + 1) * PARTS]]
        values = np.float64(np.concatenate(rows))
        _, expected = case.train(values, np.ones((len(values), 1)), {}, expected, 1)
        moving = move(moving, merged(*({"": jaxbn.batch_moments(x)} for x in rows)), samples=len(values))
        assert expected.keys() == state_of(moving).keys()
        # 0.99 is rounded, and so 1 - 0.99 is off by 1e-6 of itself.
        chex.assert_trees_all_close(state_of(moving), jax.tree.map(np.float32, expected), rtol=2e-6)


@every_framework
@every_average
@pytest.mark.parametrize("bad", ["nothing seen", np.nan, np.inf], ids=str)
def test_empty_moments_and_nan_keep_the_state(framework, case, bad):
    moving, move = layer_of(framework, case)
    for batch in make_batches(2):
        good = {"": jaxbn.batch_moments(batch["x"])}
        if bad == "nothing seen":
            moments = jax.tree.map(jnp.zeros_like, good)
        else:
            moments = merged(good, {"": jaxbn.batch_moments(np.full((8, 3), bad, np.float32))})
        before = jax.tree.map(np.array, state_of(moving))
        chex.assert_trees_all_equal(state_of(move(moving, moments, samples=16)), before)
        moving = move(moving, good, samples=16)
        assert (state_of(moving)["mean"] != before["mean"]).all()


@every_framework
def test_a_horizon_wants_to_know_the_samples(framework):
    moving, move = layer_of(framework, next(case for case in AVERAGES if case.name == "batch_norm horizon"))
    moments = {"": jaxbn.batch_moments(np.ones((2, 3), np.float32))}
    with pytest.raises(ValueError, match="counts examples, and moments do not contain their number; pass"):
        move(moving, moments)


def test_layers_without_averages_stay_the_same():
    moments = {"": jaxbn.batch_moments(make_batches(1)[0]["x"])}
    moving, move = layer_of(LINEN, NO_AVERAGE)
    with pytest.raises(ValueError, match="not known how '' averages"):
        move(moving, moments)
    call = lambda variables, x: NO_AVERAGE.linen_module(use_running_average=True).apply(variables, x)
    _, captured = jaxbn.linen.capture_moments(call)(moving, make_batches(1)[0]["x"])
    chex.assert_trees_all_equal(jaxbn.linen.move_averages(moving, captured), moving)
    moving, move = layer_of(NNX, NO_AVERAGE)  # some layers may have an average, others none
    chex.assert_trees_all_equal(state_of(move(moving, moments)), state_of(moving))


@every_framework
def test_what_was_given_is_left_untouched(framework):
    loop = Loop(framework)
    moving = loop.join(loop.params, loop.others)
    before = jax.tree.map(np.array, statistics_of(moving))
    moments = {"norm_1": jaxbn.batch_moments(np.full((4, 6), 3.0, np.float32))}
    new = statistics_of(loop.package.move_averages(moving, moments, *loop.momentum))
    chex.assert_trees_all_equal(statistics_of(moving), before)
    chex.assert_trees_all_equal(new["norm_0"], before["norm_0"])
    np.testing.assert_allclose(new["norm_1"]["mean"], np.full(6, 0.3), rtol=1e-6)


@every_framework
def test_moments_that_do_not_fit_are_an_error(framework):
    loop = Loop(framework)
    moving, moments = loop.join(loop.params, loop.others), jaxbn.batch_moments(np.ones((4, 6), np.float32))
    with pytest.raises(ValueError, match="'norm_7' is not a normalization layer; there are 'norm_0', 'norm_1'"):
        loop.package.move_averages(moving, {"norm_7": moments}, *loop.momentum)
    with pytest.raises(ValueError, match=r"features \(6,\), but its statistics have \(4,\)"):
        loop.package.move_averages(moving, {"norm_0": moments}, *loop.momentum)


def test_an_average_that_counts_wants_statistics_with_a_count():
    loop = Loop(LINEN)
    moments = {"norm_1": jaxbn.batch_moments(np.ones((4, 6), np.float32))}
    with pytest.raises(ValueError, match="the state has no `count`"):
        jaxbn.linen.move_averages(loop.join(loop.params, loop.others), moments, jaxbn.cumulative())
