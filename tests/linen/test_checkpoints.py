"""A checkpoint of a model with Flax's layer loads into the same model with ours, and the other way round."""

import functools

import chex
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax.training.train_state import TrainState

import jaxbn.linen

STOCK, OURS = nn.BatchNorm, jaxbn.linen.BatchNorm
SHAPE = (4, 6, 6, 3)
BOTH_WAYS = pytest.mark.parametrize("written, read", [(STOCK, OURS), (OURS, STOCK)], ids=["flax to ours", "back"])


class Net(nn.Module):
    """A small network, written once, whose normalization layer is an argument."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, train):
        # The two-pass form in both, so that they differ by rounding alone.
        options = {"use_running_average": not train, "momentum": 0.9, "use_fast_variance": False}
        x = nn.relu(self.norm(**options)(nn.Conv(4, (3, 3), use_bias=False)(x)))
        x = nn.relu(self.norm(**options, name="second", use_scale=False)(nn.Conv(5, (3, 3))(x)))
        return nn.Dense(2)(x.mean((1, 2)))


class State(TrainState):
    batch_stats: dict


# One of each, so that every program below is compiled once.
NETS = {norm: Net(norm) for norm in (STOCK, OURS)}
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def data(seed):
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


@functools.partial(jax.jit, static_argnames="norm")
def fresh(norm, seed):
    """A training state before the first step."""
    with jax.numpy_dtype_promotion("standard"):
        variables = NETS[norm].init(jax.random.key(seed), jnp.zeros(SHAPE), train=False)
        state = State.create(apply_fn=NETS[norm].apply, tx=OPTIMIZER, **variables)
        return state.replace(step=jnp.zeros((), jnp.int32))


@jax.jit
def step(state, x):
    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        with jax.numpy_dtype_promotion("standard"):
            y, updates = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return jnp.square(y - 1).mean(), updates

    gradients, updates = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=updates["batch_stats"])


@jax.jit
def evaluate(state, x):
    with jax.numpy_dtype_promotion("standard"):
        return state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, x, train=False)


def through_msgpack(state, empty, path):
    file = path / "checkpoint.msgpack"
    file.write_bytes(flax.serialization.to_bytes(state))
    return flax.serialization.from_bytes(empty, file.read_bytes())


def through_orbax(state, empty, path):
    def arrays(state):
        return {"step": state.step, "params": state.params, "opt": state.opt_state, "batch_stats": state.batch_stats}

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", arrays(state))
        checkpointer.wait_until_finished()
        found = checkpointer.restore(path / "checkpoint", arrays(empty))
    return empty.replace(opt_state=found.pop("opt"), **found)


@pytest.mark.sample(every=3)
@BOTH_WAYS
@pytest.mark.parametrize("through", [through_msgpack, through_orbax], ids=["msgpack", "orbax"])
def test_checkpoint_goes_on_in_the_other_layer(written, read, through, tmp_path):
    state = step(fresh(written, seed=0), data(1))
    other = through(state, fresh(read, seed=1), tmp_path)
    chex.assert_trees_all_equal(
        (other.params, other.batch_stats, other.opt_state, other.step),
        (state.params, state.batch_stats, state.opt_state, state.step),
        strict=True,
    )
    np.testing.assert_allclose(evaluate(other, data(2)), evaluate(state, data(2)), rtol=1e-6, atol=1e-6)
    trained, expected = step(other, data(2)), step(state, data(2))
    # Two normalizations in a row, forward and backward.
    chex.assert_trees_all_close(trained.params, expected.params, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(trained.batch_stats, expected.batch_stats, rtol=1e-5, atol=1e-5)
    assert np.abs(trained.batch_stats["second"]["mean"] - state.batch_stats["second"]["mean"]).max() > 1e-3


@BOTH_WAYS
def test_variables_go_into_the_other_layer_as_they_are(written, read):
    state = step(fresh(written, seed=0), data(1))
    other = state.replace(apply_fn=fresh(read, seed=0).apply_fn)
    np.testing.assert_allclose(evaluate(other, data(2)), evaluate(state, data(2)), rtol=1e-6, atol=1e-6)


def test_a_layer_that_counts_says_what_a_checkpoint_of_flax_lacks():
    """It keeps one variable more; a checkpoint without it is refused by name, not read halfway."""
    stored = flax.serialization.to_bytes(fresh(STOCK, seed=0).batch_stats["second"])
    layer = OURS(use_running_average=True, momentum=jaxbn.cumulative())
    with pytest.raises(ValueError, match="count"):
        flax.serialization.from_bytes(layer.init(jax.random.key(0), jnp.ones((2, 5)))["batch_stats"], stored)
