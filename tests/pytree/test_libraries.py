"""The own layers of Equinox and Haiku, unmodified, against float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.serving

ROWS, CHANNELS, EPSILON = 24, 3, 1e-5
# Of the two layers, after the name of the model or the states in the tree.
EQUINOX_PATHS, HAIKU_PATHS = ["0/first", "0/rest/layers/0"], ["1/net/first", "1/net/second"]


@pytest.fixture(autouse=True)
def as_for_users():
    """Neither library runs with strict promotion of dtypes or ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def data():
    return np.random.default_rng(0).normal(2, 3, (ROWS, CHANNELS)).astype(np.float32)


def equinox_model(mode):
    """(model, state), after two steps on other data; how to run it; its statistics."""
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        first: eqx.nn.BatchNorm
        rest: eqx.nn.Sequential

        def __init__(self):
            self.first = eqx.nn.BatchNorm(CHANNELS, "rows", EPSILON, mode=mode, momentum=0.9)
            self.rest = eqx.nn.Sequential([eqx.nn.BatchNorm(CHANNELS, "rows", EPSILON, mode=mode, momentum=0.9)])

        def __call__(self, x, state):
            x, state = self.first(x, state)
            return self.rest(jnp.tanh(x), state)

    def run(model, x):
        net, state = model
        return jax.vmap(net, axis_name="rows", in_axes=(0, None), out_axes=(0, None))(x, state)

    def statistics(model):
        net, state = model
        for norm in (net.first, net.rest.layers[0]):
            index = norm.ema_state_index if mode == "ema" else norm.batch_state_index
            weight = 1 if mode == "ema" else 1 - 0.9 ** min(int(state.get(norm.batch_counter)), 10**4)
            yield [np.float64(part) / weight for part in state.get(index)]

    net, state = eqx.nn.make_with_state(Net)()
    for scale in (1.5, 2.0):
        state = run((net, state), scale * data())[1]
    evaluated = lambda model, x: run((eqx.nn.inference_mode(model[0]), model[1]), x)
    return (net, state), eqx.filter_jit(run), eqx.filter_jit(evaluated), statistics


def haiku_model(mode):
    hk = pytest.importorskip("haiku")

    class Net(hk.Module):
        def __call__(self, x, train):
            first, second = (hk.BatchNorm(True, True, 0.9, eps=EPSILON, name=name) for name in ("first", "second"))
            return second(jnp.tanh(first(x, train)), train)

    net = hk.without_apply_rng(hk.transform_with_state(lambda x, train: Net()(x, train)))
    params, state = net.init(None, data(), True)
    for scale in (1.5, 2.0):
        state = net.apply(params, state, scale * data(), True)[1]

    def statistics(model):
        for name in ("first", "second"):
            yield [np.float64(model[1][f"net/{name}/~/{part}_ema"]["average"]).ravel() for part in ("mean", "var")]

    run, evaluated = (jax.jit(lambda model, x, train=train: net.apply(*model, x, train)) for train in (True, False))
    return (params, state), run, evaluated, statistics


MODELS = {
    "equinox ema": (equinox_model, "ema", EQUINOX_PATHS),
    "equinox batch": (equinox_model, "batch", EQUINOX_PATHS),
    "haiku": (haiku_model, None, HAIKU_PATHS),
}


@pytest.fixture(params=MODELS)
def library(request):
    make, mode, paths = MODELS[request.param]
    return *make(mode), paths


def chain(x, statistics=None):
    """The inputs of the two layers and the output, with the statistics of the rows or with these."""
    inputs, y = [], np.float64(x)
    for i in range(2):
        y = y if i == 0 else np.tanh(y)
        inputs.append(y)
        mean, var = (y.mean(0), y.var(0)) if statistics is None else statistics[i]
        y = (y - mean) / np.sqrt(var + EPSILON)
    return inputs, y


@pytest.mark.parametrize("mode", ["batch", "eval"])
@pytest.mark.parametrize("train", [False, True])
def test_moments_and_outputs_whatever_the_flag(library, mode, train):
    model, training, evaluation, statistics, paths = library
    call = training if train else evaluation
    inputs, expected = chain(data(), None if mode == "batch" else list(statistics(model)))
    before = jax.tree.map(np.array, jax.tree.leaves(model))
    (y, state), moments = jaxbn.capture_moments(call, mode=mode)(model, data())
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert list(moments) == paths
    for path, h in zip(paths, inputs, strict=True):
        np.testing.assert_array_equal(moments[path].count.ravel(), ROWS)
        np.testing.assert_allclose(moments[path].mean.ravel(), h.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moments[path].var.ravel(), h.var(0), rtol=1e-5)
    # Nothing was written, and what is returned has no slot.
    chex.assert_trees_all_equal(jax.tree.leaves(model), before)
    chex.assert_trees_all_equal(state, model[1])
    y, state = jaxbn.capture_moments(call, mode="as_called")(model, data())[0]
    chex.assert_trees_all_close((y, state), call(model, data()), rtol=1e-5, atol=1e-5)


def test_consistent_statistics_freezing_and_further_training(library):
    model, training, evaluation, statistics, paths = library
    batches = [data()[:10], data()[10:]]
    new, report = jaxbn.postproc(lambda model, x: evaluation(model, x)[0], model, batches, consistent=True)
    inputs, expected = chain(data())
    for (mean, var), h in zip(statistics(new), inputs, strict=True):
        np.testing.assert_allclose(mean, h.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(var, h.var(0), rtol=1e-4)
    np.testing.assert_allclose(evaluation(new, data())[0], expected, rtol=1e-3, atol=1e-3)
    frozen = jaxbn.freeze(new, report)
    assert [frozen.info.layer(path).method for path in paths] == ["batch_norm"] * 2
    with pytest.raises(TypeError, match=f"'{paths[0]}' is a layer of Equinox or Haiku"):
        jaxbn.serving.export("program", evaluation, frozen, data())
    # Training goes on from these statistics.
    going_on = (new[0], training(new, data() + 1)[1])
    (before, _), (after, _) = list(statistics(new))[0], list(statistics(going_on))[0]
    np.testing.assert_allclose(after, 0.9 * before + 0.1 * (np.float64(data()) + 1).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_ensembles_of_equinox(mode):
    """The members are stacked, with their counters, as one layer."""
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        linear: eqx.nn.Linear
        norm: eqx.nn.BatchNorm

        def __init__(self, key):
            self.linear = eqx.nn.Linear(CHANNELS, 2, key=key)
            self.norm = eqx.nn.BatchNorm(2, "rows", mode=mode)

        def __call__(self, x, state):
            return self.norm(self.linear(x), state)

    def run(model, x):
        member = lambda net, state, x: jax.vmap(net, (0, None), (0, None), axis_name="rows")(x, state)
        return eqx.filter_vmap(member, in_axes=(eqx.if_array(0), eqx.if_array(0), None))(*model, x)[0]

    model = eqx.filter_vmap(eqx.nn.make_with_state(Net))(jax.random.split(jax.random.key(0), 4))
    (net, state), report = jaxbn.postproc(run, model, [data()[:10], data()[10:]])
    mean, var = state.get(net.norm.ema_state_index if mode == "ema" else net.norm.batch_state_index)
    rows = np.einsum("nc,ekc->enk", np.float64(data()), np.float64(net.linear.weight))
    rows += np.float64(net.linear.bias)[:, None]
    np.testing.assert_allclose(mean, rows.mean(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(var, rows.var(1), rtol=1e-5)
    assert report.layers["0/norm"].new_mean.shape == (4, 2)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_haiku_on_devices_in_both_formats(data_format):
    hk = pytest.importorskip("haiku")
    layer = lambda x: hk.BatchNorm(False, False, 0.9, data_format=data_format, cross_replica_axis="devices")(x, True)
    net = hk.without_apply_rng(hk.transform_with_state(layer))
    x = np.random.default_rng(0).normal(2, 3, (2, 4, 5, 6)).astype(np.float32)
    _, state = jax.vmap(net.init, in_axes=(None, 0), axis_name="devices", out_axes=None)(None, x)
    call = lambda state, x: jax.pmap(net.apply, axis_name="devices", in_axes=(None, None, 0))({}, state, x)[0]
    y, moments = jaxbn.capture_moments(call)(state, x)
    reduced = (0, 1, 2) if data_format == "channels_last" else (0, 1, 3)
    rows = np.float64(x)
    np.testing.assert_allclose(moments["batch_norm"].mean.ravel(), rows.mean(reduced), rtol=1e-5)
    np.testing.assert_allclose(moments["batch_norm"].var.ravel(), rows.var(reduced), rtol=1e-5)
    mean, std = rows.mean(reduced, keepdims=True), rows.std(reduced, keepdims=True)
    np.testing.assert_allclose(y, (rows - mean) / std, rtol=1e-3, atol=1e-3)


def test_layers_that_are_not_in_the_tree_run_as_they_do():
    """Haiku's interceptor leaves a teacher alone."""
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, True)))
    teacher, bn = net.init(None, data()), jaxbn.batch_norm()
    params, state = bn.init(CHANNELS)

    def call(state, x):
        y, after = net.apply(*teacher, x)
        return bn.eval(params, state, y), after

    outputs, moments = jaxbn.capture_moments(call, mode="eval")(state, data())
    assert list(moments) == [""]
    chex.assert_trees_all_close(outputs, call(state, data()), rtol=1e-6)


def test_immutable_states_of_haiku():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, True)))
    params, state = net.init(None, data())
    state = hk.data_structures.to_immutable_dict(state)
    new, _ = jaxbn.postproc(lambda state, x: net.apply(params, state, x)[0], state, [data()])
    chex.assert_trees_all_equal_structs(new, state)
    np.testing.assert_allclose(new["batch_norm/~/mean_ema"]["average"][0], data().mean(0), rtol=1e-5)
