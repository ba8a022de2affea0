"""`step_if`: a step with overflowed gradients keeps the whole state, including the statistics.

End to end with networks in float16 and the loss scale of Flax.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from meshes import AXIS, DEVICES, gathered, spread
from nets import (
    LINEN,
    OPTIMIZER,
    every_framework,
    make_batches,
    params_of,
    split,
    squared_error,
    started,
    statistics_of,
    train,
)

import jaxbn


def test_step_if_is_the_one_or_the_other_to_the_last_bit():
    def tree(seed):
        rng = np.random.default_rng(seed)
        leaves = {name: rng.standard_normal(3).astype(name) for name in ("float32", "float16", "int32", "bool")}
        return {"leaves": leaves, "none": None, "key": jax.random.key(seed), "step": jnp.int32(seed)}

    new, old = tree(1), tree(2)
    new["leaves"]["float32"][0] = np.nan
    old["leaves"]["float16"][1] = np.inf
    for function in (jaxbn.step_if, jax.jit(jaxbn.step_if)):
        for taken in (True, jnp.array(True), np.array(True)):
            chex.assert_trees_all_equal(function(taken, new, old), new)
            chex.assert_trees_all_equal(function(~np.asarray(taken), new, old), old)


def test_step_if_wants_equal_structures():
    with pytest.raises(ValueError, match="key"):
        jaxbn.step_if(True, {"a": jnp.ones(2)}, {"a": jnp.ones(2), "b": jnp.ones(2)})


def make_step(framework, axis_name=None):
    """(state, step), where step(state, scale, batch) -> (state, scale, taken, what the step alone would have made)."""
    net = framework.net(dtype=jnp.float16, axis_name=axis_name)
    state = framework.steps(net, axis_name=axis_name).init(jax.random.key(0), make_batches(1)[0])
    _, _, join = split(started(framework, net))

    def others_of(state):
        return {"batch_stats": state.batch_stats} if framework is LINEN else state.others

    def step(state, scale, batch):
        def loss_of(params):
            outputs, moving = train(net, join(params, others_of(state)), batch["x"])
            return squared_error(outputs, batch)[0], split(moving)[1]

        gradient = scale.value_and_grad(loss_of, has_aux=True, axis_name=axis_name)
        scale, taken, (_, others), grads = gradient(state.params)
        new = state.apply_gradients(grads=grads, **(others if framework is LINEN else {"others": others}))
        return jaxbn.step_if(taken, new, state), scale, taken, new

    return state, step


def scale_of(value):
    return DynamicScale(scale=jnp.float32(value), fin_steps=jnp.int32(0))


@pytest.mark.sample(every=2)
@every_framework
def test_a_step_with_overflowed_gradients_keeps_the_state(framework):
    state, step = make_step(framework)
    step, scale, taken = jax.jit(step), scale_of(2.0**18), []
    for batch in make_batches(8):
        before, was = state, float(scale.scale)
        state, scale, finite, new = step(state, scale, batch)
        taken.append(bool(finite))
        # What the step would have done: gradients of inf, and statistics that are finite and have moved.
        chex.assert_tree_all_finite((statistics_of(new), statistics_of(state), params_of(state)))
        assert (statistics_of(new)["norm_1"]["var"] != statistics_of(before)["norm_1"]["var"]).any()
        if finite:
            chex.assert_trees_all_equal(state, new)
            assert (state.step, float(scale.scale)) == (before.step + 1, was)
        else:
            chex.assert_trees_all_equal(state, before)
            assert float(scale.scale) == was / 2
            assert not np.isfinite(params_of(new)["head"]["kernel"]).all()
    assert taken == sorted(taken) and {*taken} == {False, True}  # first too large, then small enough
    assert state.step == sum(taken)


@pytest.mark.sample(every=4)
@every_framework
@pytest.mark.parametrize("way", ["shard_map unchecked", "pmap"])
def test_all_devices_skip_where_the_gradients_of_one_overflow(framework, way):
    state, step = make_step(framework, AXIS)
    (batch,) = make_batches(1)
    # Finite in float32, and not in the float16 of the gradients, on the last device alone.
    bad = {**batch, "y": np.where(np.arange(16) >= 16 - 16 // DEVICES, np.float32(1e7), batch["y"])}
    spread_step = lambda state_and_scale, batch: (step(*state_and_scale, batch), ())
    mapped, _ = spread(way, spread_step, (state, scale_of(8.0)), batch)
    for given, goes in ((bad, False), (batch, True)):
        arguments = spread(way, spread_step, (state, scale_of(8.0)), given)[1]
        (after, scale, taken, new), _ = gathered(way, mapped(*arguments))
        chex.assert_trees_all_equal(after, new if goes else state)
        assert (bool(taken), float(scale.scale)) == (goes, 8.0 if goes else 4.0)
        assert (statistics_of(new)["norm_1"]["var"] != statistics_of(state)["norm_1"]["var"]).any()


def test_a_loop_of_nnx_keeps_model_and_optimizer():
    """With nnx.jit and nnx.Optimizer; the state is read and restored as a whole."""
    net = jaxbn.nnx.BatchNorm(3, dtype=jnp.float16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, OPTIMIZER, wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, scale, x):
        before = jax.tree.map(jnp.copy, nnx.state((net, optimizer)))  # those of nnx.state are the variables themselves
        graph, params, others = nnx.split(net, nnx.Param, ...)

        def loss_of(params):
            net = nnx.merge(graph, params, others, copy=True)
            loss = (net(x).astype(jnp.float32) ** 4).mean()
            return loss, nnx.state(net, nnx.BatchStat)

        scale, taken, (_, statistics), grads = scale.value_and_grad(loss_of, has_aux=True)(params)
        optimizer.update(net, grads)
        nnx.update(net, statistics)
        nnx.update((net, optimizer), jaxbn.step_if(taken, nnx.state((net, optimizer)), before))
        return scale, taken

    (batch,) = make_batches(1)
    values = lambda: jax.tree.map(np.array, nnx.state((net, optimizer)))
    for start, goes in ((2.0**30, False), (1.0, True)):
        before = values()
        _, taken = step(net, optimizer, scale_of(start), batch["x"])
        assert taken == goes
        if not goes:
            chex.assert_trees_all_equal(values(), before)
        else:
            assert optimizer.step[...] == 1 and (net.mean[...] != 0).all() and (net.scale[...] != 1).any()
