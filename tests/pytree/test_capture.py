"""Moments and outputs of plain functions under all transformations, against float64."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from own_method import mixed_norm

import jaxbn

ROWS, CHANNELS, DEPTH, EPSILON = 12, 3, 3, 1e-5
BN, SYNCED = jaxbn.batch_norm(), jaxbn.batch_norm(axis_name="data")
every_mode = pytest.mark.parametrize("mode", ["batch", "eval"])


class Model(NamedTuple):
    """A stack of layers, in one pytree."""

    kernels: jax.Array  # [DEPTH, C, C]
    params: jaxbn.NormParams  # [DEPTH, C]
    norms: jaxbn.BatchNormState  # [DEPTH, C]


def started():
    rng = np.random.default_rng(1)
    params, state = BN.init((DEPTH, CHANNELS))
    kernels = jnp.asarray(rng.normal(0, 1, (DEPTH, CHANNELS, CHANNELS)), jnp.float32)
    noise = jnp.asarray(rng.normal(0, 0.3, (DEPTH, CHANNELS)), jnp.float32)
    return Model(kernels, params, state._replace(mean=noise, var=1.5 + noise))


def data():
    return jnp.asarray(np.random.default_rng(0).normal(0.3, 1, (ROWS, CHANNELS)), jnp.float32)


def layer(model, x, *, bn=BN):
    return bn.eval(model.params, model.norms, jnp.tanh(x @ model.kernels))


def training_layer(model, x, *, bn=BN):
    return bn.train(model.params, model.norms, jnp.tanh(x @ model.kernels))


def at(model, i):
    return jax.tree.map(lambda leaf: leaf[i], model)


def over_devices(function, model, x):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    return jax.shard_map(function, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(model, x)


def scanned(model, x, *, layer=layer):
    return lax.scan(lambda x, one: (layer(one, x), None), x, model)[0]


def trained_in_loop(model, x):
    """The new states are stacked again and returned."""
    states = []
    for i in range(DEPTH):
        x, state = jax.jit(training_layer)(at(model, i), x)
        states.append(state)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def trained_in_scan(model, x):
    """The states come out of the scan, and go in again as a new model."""
    body = lambda x, one: training_layer(one, x)
    x, states = lax.scan(body, x, model)
    return x, model._replace(norms=states)


def custom_vjp(model, x):
    fun = jax.custom_vjp(scanned)
    fun.defvjp(lambda model, x: (fun(model, x), None), lambda _, cotangent: (None, cotangent))
    return fun(model, x)


def gradient_inside(model, x):
    """The output, of which the gradient in the kernels is taken too."""

    def loss(kernels):
        y = scanned(model._replace(kernels=kernels), x, layer=jax.checkpoint(layer))
        return jnp.square(y).sum(), y

    return jax.grad(loss, has_aux=True)(model.kernels)[1]


def until(model, x):
    """The first layer, then the second, in a while loop."""

    def body(carry):
        i, x = carry
        return i + 1, layer(at(model, i), x)

    return lax.while_loop(lambda carry: carry[0] < DEPTH, body, (0, x))[1]


def branch(model, x):
    return lax.cond(x.sum() > -1e9, scanned, lambda model, x: x, model, x)


# Each runs all layers in a row over all rows.
CHAINS = {
    "loop": lambda model, x: [x := layer(at(model, i), x) for i in range(DEPTH)][-1],
    "loop of jit": lambda model, x: [x := jax.jit(layer)(at(model, i), x) for i in range(DEPTH)][-1],
    "jit of scan": jax.jit(scanned),
    "scan of remat": partial(scanned, layer=jax.checkpoint(layer)),
    "train, loop": trained_in_loop,
    "train, scan": trained_in_scan,
    "custom_vjp": custom_vjp,
    "gradient inside": gradient_inside,
    "while": until,
    "cond": branch,
    "shard_map": partial(over_devices, partial(scanned, layer=partial(layer, bn=SYNCED))),
    "pmap": lambda model, x: jax.pmap(
        partial(scanned, layer=partial(layer, bn=SYNCED)), axis_name="data", in_axes=(None, 0)
    )(model, x.reshape(2, -1, CHANNELS)).reshape(x.shape),
    "vmap": lambda model, x: jax.vmap(
        partial(scanned, layer=partial(layer, bn=SYNCED)), axis_name="data", in_axes=(None, 0)
    )(model, x.reshape(2, -1, CHANNELS)).reshape(x.shape),
}


def normalized(model, i, x, mode):
    """The input of layer i, and its output, in float64."""
    h = np.tanh(x @ np.float64(model.kernels[i]))
    mean, var = (h.mean(0), h.var(0)) if mode == "batch" else (np.float64(p[i]) for p in model.norms[:2])
    return h, (h - mean) / np.sqrt(var + EPSILON)


def assert_moments(moments, inputs):
    """Of a stack of layers, by the inputs of each of them."""
    np.testing.assert_array_equal(moments.count, [[len(h)] * CHANNELS for h in inputs])
    np.testing.assert_allclose(moments.mean, [h.mean(0) for h in inputs], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.var, [h.var(0) for h in inputs], rtol=1e-5)


@pytest.mark.sample(every=3)
@every_mode
@pytest.mark.parametrize("chain", CHAINS)
def test_layers_in_a_row(chain, mode):
    """Moments and outputs are right, returned states are plain, and the function itself is as it was."""
    model, x, call = started(), data(), CHAINS[chain]
    inputs, y = [], np.float64(x)
    for i in range(DEPTH):
        h, y = normalized(model, i, y, mode)
        inputs.append(h)
    before = call(model, x)
    outputs, moments = jaxbn.capture_moments(call, mode=mode)(model, x)
    assert list(moments) == ["norms"]
    assert_moments(moments["norms"], inputs)
    chex.assert_trees_all_equal_structs(outputs, before)
    np.testing.assert_allclose(jax.tree.leaves(outputs)[0], y, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(call(model, x), before)  # the jit caches are not mixed up
    if isinstance(outputs, tuple):  # train wrote nothing
        returned = outputs[1].norms if isinstance(outputs[1], Model) else outputs[1]
        chex.assert_trees_all_equal(returned, model.norms)
    elif chain in ("loop of jit", "cond"):
        _, again = jax.jit(jaxbn.capture_moments(call, mode=mode))(model, x)
        chex.assert_trees_all_close(again, moments, rtol=1e-5, atol=1e-5)


@every_mode
@pytest.mark.parametrize("layer", [layer, jax.jit(layer), jax.checkpoint(layer)], ids=["plain", "jit", "remat"])
def test_ensembles(layer, mode):
    """The members are stacked, and each sees the same rows."""
    model, x = started(), data()
    outputs, moments = jaxbn.capture_moments(jax.vmap(layer, (0, None)), mode=mode)(model, x)
    pairs = [normalized(model, i, np.float64(x), mode) for i in range(DEPTH)]
    assert_moments(moments["norms"], [h for h, _ in pairs])
    np.testing.assert_allclose(outputs, [y for _, y in pairs], rtol=1e-4, atol=1e-5)


def test_as_called_trains_where_the_model_does():
    """A state that a scan over micro-batches carries is updated, and comes out plain."""
    bn, x = jaxbn.batch_norm(momentum=0.9), data().reshape(3, -1, CHANNELS)
    params, state = bn.init(CHANNELS)

    def call(state, x):
        def body(state, part):
            y, state = bn.train(params, state, part)
            return state, y

        return lax.scan(body, state, x)

    (after, outputs), moments = jaxbn.capture_moments(call, mode="as_called")(state, x)
    chex.assert_trees_all_close((after, outputs), call(state, x), rtol=1e-6)
    assert type(after) is jaxbn.BatchNormState
    assert_moments(jax.tree.map(lambda part: part[None], moments[""]), [np.float64(x.reshape(-1, CHANNELS))])


def test_shared_and_unreached_layers():
    params, state = BN.init(CHANNELS)
    call = lambda states, x: BN.eval(params, states["used"], BN.eval(params, states["used"], x))
    _, moments = jaxbn.capture_moments(call, mode="eval")({"used": state, "unused": state}, data())
    assert moments["used"].count[0] == 2 * ROWS and moments["unused"].count[0] == 0


def test_states_that_the_model_rebuilds():
    """A cast or replaced statistic keeps the layer; the state of a teacher outside of the tree has none."""
    params, state = BN.init(CHANNELS)

    def call(state, x):
        state = jax.tree.map(lambda leaf: leaf * 2 if leaf.dtype == jnp.float32 else leaf, state)
        state = state._replace(mean=state.mean + 1)
        assert isinstance(state, jaxbn.BatchNormState) and state.var.shape == (CHANNELS,)
        return BN.eval(params, state, BN.train(params, teacher, x)[0])

    teacher = state
    y, moments = jaxbn.capture_moments(call, mode="eval")(state, data())
    assert moments[""].count[0] == ROWS
    np.testing.assert_allclose(y, call(state, data()), rtol=1e-6)


def test_capture_inside_a_captured_call():
    """The inner capture meets the layers, as in linen, and the outer one says that it met none."""
    params, state = BN.init(CHANNELS)
    evaluate = lambda state, x: BN.eval(params, state, x)

    def call(state, x):
        y, moments = jaxbn.capture_moments(evaluate, mode="eval")(state, x)
        return y - moments[""].mean[None]

    y, moments = jaxbn.capture_moments(call)(state, data())
    np.testing.assert_array_equal(y, call(state, data()))
    assert moments[""].count[0] == 0


def test_weights_and_masks():
    params, state = BN.init(CHANNELS)
    x, mask = data(), jnp.arange(ROWS)[:, None] % 3 > 0
    call = jax.vmap(lambda state, x: BN.train(params, state, x, mask=mask)[0], (0, None))
    weights = lambda x: jnp.arange(ROWS) < 8
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    y, moments = jaxbn.capture_moments(call, weights=weights)(stack, x)
    valid = np.float64(x)[[row for row in range(8) if row % 3]]
    np.testing.assert_array_equal(moments[""].count, len(valid))
    np.testing.assert_allclose(moments[""].mean, [valid.mean(0)] * 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments[""].var, [valid.var(0)] * 2, rtol=1e-5)
    expected = (np.float64(x) - valid.mean(0)) / np.sqrt(valid.var(0) + EPSILON)
    np.testing.assert_allclose(y, [expected] * 2, rtol=1e-4, atol=1e-5)


def test_methods_made_of_others_are_captured_once():
    """The states of the inner method are not in the tree; the mixture of the own method is kept."""
    own = mixed_norm()
    params, state = own.init(CHANNELS)
    y, moments = jaxbn.capture_moments(lambda state, x: own.train(params, state, x)[0])(state, data())
    x = np.float64(data())
    assert_moments(jax.tree.map(lambda part: part[None], moments[""]), [x])
    share = np.float64(params.mix)
    expected = share * (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON) + (1 - share) * x
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_gradients():
    """In mode "batch" gradients flow through the statistics, as in training."""
    params, state = jaxbn.batch_norm(autodiff=True).init(CHANNELS)
    captured = jaxbn.capture_moments(lambda state, x: BN.eval(params, state, x))
    loss = lambda x: jnp.sum(captured(state, x)[0] ** 3)
    expected = jax.grad(lambda x: jnp.sum(BN.train(params, state, x)[0] ** 3))(data())
    np.testing.assert_allclose(jax.grad(loss)(data()), expected, rtol=1e-4, atol=1e-4)
    of_moments = jax.grad(lambda x: captured(state, x)[1][""].mean.sum())(data())
    np.testing.assert_allclose(of_moments, 1 / ROWS, rtol=1e-6)
