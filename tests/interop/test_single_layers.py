"""Layers of other libraries: their outputs with their variables, and with ours, before and after a step."""

import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import normal

import jaxbn
import jaxbn.linen
import jaxbn.serving

MOMENTUM, EPSILON = 0.8, 1e-3
BATCHES = [2 + 3 * normal(16, 3, seed=i) for i in range(3)]


def layer(**fields):
    return jaxbn.linen.BatchNorm(momentum=MOMENTUM, epsilon=EPSILON, **fields)


def evaluated(variables, x):
    return layer(use_running_average=True).apply(variables, x)


def stepped(variables, x):
    """The variables after a step of training."""
    return variables | layer(use_running_average=False).apply(variables, x, mutable=["batch_stats"])[1]


def check_there_and_back(variables, x, theirs, back):
    """`theirs` evaluates as ours does; and so does what `back` makes of it, before and after a step of each."""
    own = stepped(variables, BATCHES[2])
    np.testing.assert_allclose(evaluated(variables, x), theirs(None), atol=1e-5)
    np.testing.assert_allclose(evaluated(own, x), theirs(back(own)), atol=1e-5)
    np.testing.assert_allclose(evaluated(stepped(own, x), x), theirs(back(own), x), atol=1e-5)


def test_keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        norm = keras.layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON)
        for x in BATCHES[:2]:
            norm(x, training=True)
        norm.gamma.assign(np.float32([1, 2, 3]))

        def theirs(weights, x=None):
            if weights is not None:
                norm.set_weights(weights)
            if x is not None:
                norm(x, training=True)
            return np.asarray(norm(BATCHES[0], training=False))

        check_there_and_back(jaxbn.serving.from_keras(norm), BATCHES[0], theirs, jaxbn.serving.to_keras)


def test_haiku():
    hk = pytest.importorskip("haiku")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        net = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, MOMENTUM, eps=EPSILON)(x, train))
        params, state = net.init(None, BATCHES[0], True)
        for x in BATCHES[:2]:
            _, state = net.apply(params, state, None, x, True)
        params["batch_norm"]["scale"] += 1

        def theirs(given, x=None):
            own, stats = (params, state) if given is None else given
            if x is not None:
                _, stats = net.apply(own, stats, None, x, True)
            return net.apply(own, stats, None, BATCHES[0], False)[0]

        variables = jaxbn.serving.from_haiku(params, state)
        check_there_and_back(variables, BATCHES[0], theirs, lambda v: jaxbn.serving.to_haiku(v, params, state))


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_equinox(mode):
    eqx = pytest.importorskip("equinox")
    with jax.numpy_dtype_promotion("standard"):
        norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "rows", EPSILON, momentum=MOMENTUM, mode=mode)
        norm = eqx.tree_at(lambda norm: norm.weight, norm, jnp.arange(1.0, 4.0))
        run = jax.vmap(
            lambda norm, x, state, inference: norm(x, state, inference=inference),
            axis_name="rows", in_axes=(None, 0, None, None), out_axes=(0, None),
        )  # fmt: skip
        for x in BATCHES[:2]:
            _, state = run(norm, x, state, False)
        leaves, structure = jax.tree.flatten(state)

        def theirs(given, x=None):
            own, stats = (norm, jax.tree.unflatten(structure, leaves)) if given is None else given
            if x is not None:
                _, stats = run(own, x, stats, False)
            return run(own, BATCHES[0], stats, True)[0]

        def back(variables):
            return jaxbn.serving.to_equinox(variables, norm, jax.tree.unflatten(structure, leaves))

        variables = jaxbn.serving.from_equinox(norm, jax.tree.unflatten(structure, leaves))
        check_there_and_back(variables, BATCHES[0], theirs, back)


def test_arrays_without_the_libraries():
    """In their names and shapes, as their documentation says them."""
    one, other = jnp.float32([1, 2, 3]), jnp.float32([2, 3, 4])
    variables = {"params": {"scale": other, "bias": one}, "batch_stats": {"mean": one, "var": other}}
    weights = jaxbn.serving.to_keras(variables)
    chex.assert_trees_all_equal(weights, [np.asarray(array) for array in (other, one, one, other)])
    ema = {"hidden": np.zeros((1, 3)), "average": np.zeros((1, 3)), "counter": np.int32(2)}
    empty = {"net/norm/~/mean_ema": ema, "net/norm/~/var_ema": ema, "net/other": {}}
    params = {"net/norm": {"scale": np.ones((1, 3)), "offset": np.ones((1, 3))}}
    params, state = jaxbn.serving.to_haiku(variables, params, empty, "net/norm")
    assert state.keys() == empty.keys() and params["net/norm"]["offset"].tolist() == [[1, 2, 3]]
    chex.assert_trees_all_equal(jaxbn.serving.from_haiku(params, state, "net/norm"), variables)
    assert jaxbn.serving.to_haiku(variables, {}, empty, "net/norm")[0] == {}  # a layer that learns neither
