"""Mixed statistics in evaluation: the formulas in float64, every method in both frameworks, and whole models."""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax import nnx
from meshes import AXIS, DEVICES, run

import jaxbn
import jaxbn.linen
import jaxbn.nnx

N, SPACE, C = 16, 3, 4
PARAMS = {"scale": np.array([0.5, 1.0, 1.5, 2.0]), "bias": np.array([0.0, -1.0, 0.5, 1.0])}
METHODS = {case.factory: case for case in reversed(CASES) if not case.arguments.get("share_affine")}
FRAMEWORKS = {"linen": jaxbn.linen, "nnx": jaxbn.nnx}

every_method = pytest.mark.parametrize("case", METHODS.values(), ids=lambda case: case.factory.__name__)
every_framework = pytest.mark.parametrize("framework", FRAMEWORKS)
every_rule = pytest.mark.parametrize("rule", ["linear", "raw"])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def images():
    return 3 + 2 * normal(N, SPACE, C)


def mixed(rule, b, stored, found):
    """The two formulas: mean and variance between those stored and those found."""
    mean = (1 - b) * stored["mean"] + b * found["mean"]
    var = (1 - b) * stored["var"] + b * found["var"]
    return {"mean": mean, "var": var + (rule == "raw") * b * (1 - b) * (stored["mean"] - found["mean"]) ** 2}


def layer_of(case, framework):
    """(adapted and evaluated as the frameworks do it, params, state): calls of one layer with changed variables."""
    transform = case.transform()
    params, state = transform.init(C)
    params = jax.tree.map(lambda p, v: jnp.broadcast_to(jnp.float32(v), p.shape), params, jaxbn.NormParams(**PARAMS))
    centred = "moving_average" in case.name  # whose mean is 0
    mean = state.mean if centred else state.mean + 0.5 + jnp.arange(state.mean.size).reshape(state.mean.shape) / 8
    state = state._replace(mean=mean, var=state.var * 1.5)
    leaves = [{k: v for k, v in part._asdict().items() if v is not None} for part in (params, state)]
    if framework == "linen":
        net, variables = case.linen_module(), dict(zip(("params", "batch_stats"), leaves, strict=True))

        def call(variables, x):
            return net.apply(variables, x, True, **case.where(x))

        return call, variables, params, state
    model = case.nnx_module(C)
    for name, leaf in (leaves[0] | leaves[1]).items():
        getattr(model, name)[...] = leaf
    return lambda model, x: model(x, True, **case.where(x)), model, params, state


def as_arrays(fields):
    return {name: np.float64(leaf) for name, leaf in fields._asdict().items() if leaf is not None}


def rows(x):
    return np.float64(x).reshape(-1, C)


def compiled(framework, call):
    return jax.jit(call) if framework == "linen" else nnx.jit(call)


# --- The formulas -----------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("b", [0.0, 0.3, 1.0])
def test_mix_follows_the_formula(rule, b):
    x = images()
    state = jaxbn.BatchNormState(jnp.float32(normal(C)), jnp.float32(normal(C, seed=1)) ** 2)
    found = jaxbn.mix(state, jaxbn.batch_moments(x), b, rule=rule)
    expected = mixed(rule, b, as_arrays(state), {"mean": rows(x).mean(0), "var": rows(x).var(0)})
    np.testing.assert_allclose(found.mean, expected["mean"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.var, expected["var"], rtol=1e-6)


def test_raw_moments_are_those_of_source_and_batch_together():
    """Stored statistics of N values, mixed with weight n / (N + n), are those of all N + n values."""
    source, batch = 1e3 + normal(40, C), 1e3 + 2 + normal(10, C, seed=1)
    state = jaxbn.BatchNormState(*(jnp.float32(f(np.float64(source), 0)) for f in (np.mean, np.var)))
    found = jaxbn.mix(state, jaxbn.batch_moments(batch), 10 / 50, rule="raw")
    together = np.float64(np.concatenate([source, batch]))
    np.testing.assert_allclose(found.mean, together.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.var, together.var(0), rtol=1e-4)  # 1e3 is known to 6e-5, as a float32
    linear = jaxbn.mix(state, jaxbn.batch_moments(batch), 10 / 50)
    gap = 0.2 * 0.8 * np.square(np.float64(source).mean(0) - np.float64(batch).mean(0))
    np.testing.assert_allclose(found.var - linear.var, gap, rtol=1e-3)


def test_what_weighs_nothing_may_be_anything():
    state = jaxbn.BatchNormState(jnp.ones(2), jnp.full(2, 4.0))
    batch = jaxbn.Moments(jnp.array([0.0, 8.0]), jnp.array([0.0, jnp.nan]), jnp.array([0.0, jnp.nan]))
    for weight, rule in ((jnp.array([0.5, 0.0]), "linear"), (0.0, "raw")):
        found = jaxbn.mix(state, batch, weight, rule=rule)
        np.testing.assert_array_equal(found.mean, state.mean)
    with pytest.raises(ValueError, match="rule='mean' is none of 'linear', 'raw'"):
        jaxbn.mix(state, batch, 0.5, rule="mean")


# --- Every method, in both frameworks


@pytest.mark.sample(every=3)
@every_framework
@every_method
def test_a_prior_count_follows_the_formula(case, framework):
    """The batch's own statistics are those that a pass over it would install; n counts examples, by domain."""
    call, model, params, state = layer_of(case, framework)
    x = images()
    batch = case.postproc(as_arrays(state), rows(x))
    ids = case.where(x).get("domain")
    n = N if ids is None else np.bincount(ids, minlength=3)[:, None]
    adapt = FRAMEWORKS[framework].adapt
    found = compiled(framework, lambda m, x: [adapt(call, prior_count=5, rule=rule)(m, x) for rule in (None, "raw")])(
        model, x
    )
    for y, rule in zip(found, ("linear", "raw"), strict=True):
        stored = as_arrays(state)
        expected = case.evaluate(rows(x), as_arrays(params), stored | mixed(rule, n / (5 + n), stored, batch))
        np.testing.assert_allclose(rows(y), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.sample(every=3)
@every_framework
@every_method
def test_an_example_weighs_in_its_own_statistics(case, framework):
    call, model, params, state = layer_of(case, framework)
    x, stored = images(), as_arrays(state)
    adapted = FRAMEWORKS[framework].adapt(call, example_weight=0.3)
    y = compiled(framework, adapted)(model, x)
    for i in range(N):
        own = rows(x[i])
        if "domain" in case.where(x):
            found = {"mean": own.mean(0), "var": own.var(0)}
        else:
            found = case.postproc(stored, own)
        given = stored | mixed("raw", 0.3, stored, found)
        expected = case.evaluate(own, as_arrays(params), given)
        np.testing.assert_allclose(rows(y[i]), expected, rtol=1e-5, atol=1e-5)
    one = compiled(framework, adapted)(model, x[:1])  # whatever its batch
    np.testing.assert_allclose(one, y[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.sample(every=3)
@every_framework
@every_method
def test_the_ends_are_evaluation_and_the_statistics_of_the_batch(case, framework):
    call, model, _, _ = layer_of(case, framework)
    package, x = FRAMEWORKS[framework], images()

    def ends(model, x):
        evaluated = [package.adapt(call, **given)(model, x) for given in ({"prior_count": math.inf},
            {"prior_count": math.inf, "rule": "raw"}, {"example_weight": 0.0})]  # fmt: skip
        of_batch = [package.adapt(call, prior_count=0, rule=rule)(model, x) for rule in ("linear", "raw")]
        return evaluated, call(model, x), of_batch, package.capture_moments(call)(model, x)[0]

    before = jax.tree.map(np.asarray, nnx.state(model) if framework == "nnx" else model)
    evaluated, expected, of_batch, captured = compiled(framework, ends)(model, x)
    for y in evaluated:
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    for y in of_batch:
        np.testing.assert_allclose(y, captured, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(before, jax.tree.map(np.asarray, nnx.state(model) if framework == "nnx" else model))


# --- Whole models, stock layers ---------------------------------------------------------------------------------------


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, name="first")(nn.Conv(4, (2,), name="conv")(x))
        return nn.BatchNorm(not train, name="second")(nn.Conv(5, (2,), name="top")(nn.relu(x)))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv, self.top = nnx.Conv(C, 4, (2,), rngs=rngs), nnx.Conv(4, 5, (2,), rngs=rngs)
        self.first, self.second = nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)

    def __call__(self, x):
        return self.second(self.top(nnx.relu(self.first(self.conv(x)))))


def by_hand(x, convs, rule, prior_count):
    """Both layers in float64, the second behind the first with its mixed statistics. Stored are mean 0, variance 1."""
    b = len(x) / (prior_count + len(x))
    for i, (kernel, bias) in enumerate(convs):
        padded = np.pad(np.float64(x), ((0, 0), (0, 1), (0, 0)))
        x = sum(padded[:, k : k + SPACE] @ np.float64(kernel[k]) for k in range(2)) + np.float64(bias)
        found = {"mean": x.mean((0, 1)), "var": x.var((0, 1))}
        given = mixed(rule, b, {"mean": 0.0, "var": 1.0}, found)
        x = (x - given["mean"]) / np.sqrt(given["var"] + 1e-5)
        x = np.maximum(x, 0) if i == 0 else x
    return x


@every_rule
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_stock_models_of_linen_whatever_flag_they_pass(rule, train):
    x = images()
    variables = jax.jit(Linen().init)(jax.random.key(0), x)
    call = lambda v, x: Linen().apply(v, x, train)
    y = jax.jit(jaxbn.linen.adapt(call, prior_count=8, rule=rule))(variables, x)
    convs = [(p["kernel"], p["bias"]) for p in (variables["params"]["conv"], variables["params"]["top"])]
    np.testing.assert_allclose(y, by_hand(x, convs, rule, 8), rtol=1e-5, atol=2e-5)


@every_rule
def test_stock_models_of_nnx(rule):
    x, model = images(), Nnx()
    y = nnx.jit(jaxbn.nnx.adapt(prior_count=8, rule=rule))(model, x)
    convs = [(layer.kernel[...], layer.bias[...]) for layer in (model.conv, model.top)]
    np.testing.assert_allclose(y, by_hand(x, convs, rule, 8), rtol=1e-5, atol=2e-5)


def test_weights_leave_out_what_fills_up_a_batch():
    x = images()
    variables = jax.jit(Linen().init)(jax.random.key(0), x)
    padded = {"x": np.concatenate([x, 100 * x[:3]]), "valid": np.arange(N + 3) < N}
    call = lambda v, b: Linen().apply(v, b["x"])
    y = jax.jit(jaxbn.linen.adapt(call, prior_count=8, weights=lambda b: b["valid"]))(variables, padded)
    expected = jax.jit(jaxbn.linen.adapt(call, prior_count=8))(variables, {"x": x})
    np.testing.assert_allclose(y[:N], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["jit", "vmap"])
def test_devices_equal_one_device(way):
    net = jaxbn.linen.BatchNorm(use_running_average=True, axis_name=AXIS if way == "vmap" else None)
    x = images()
    variables = net.init(jax.random.key(0), x)
    adapted = jaxbn.linen.adapt(net.apply, prior_count=7)
    _, found = run(way, lambda v, x: (0.0, adapted(v, x)), variables, x)
    expected = mixed("linear", N / (7 + N), {"mean": 0.0, "var": 1.0}, {"mean": rows(x).mean(0), "var": rows(x).var(0)})
    expected = (x - expected["mean"]) / np.sqrt(expected["var"] + 1e-5)
    assert N % DEVICES == 0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("way", ["shard_map", "shard_map unchecked", "pmap"])
def test_layers_that_synchronize_mix_with_the_statistics_of_all_devices(way):
    class Net(nn.Module):
        axis_name: str | None = None

        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.relu(jaxbn.linen.BatchNorm(True, axis_name=self.axis_name)(nn.Dense(C)(x)))
            return x

    x = 1 + 2 * normal(4 * DEVICES, 3)
    variables = Net().init(jax.random.key(0), x)
    one = jaxbn.linen.adapt(Net().apply, prior_count=16)(variables, x)
    many = jaxbn.linen.adapt(Net(AXIS).apply, prior_count=16)
    _, found = run(way, lambda variables, x: ({}, many(variables, x)), variables, x)
    np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-6)


def test_one_image_is_enough_and_one_value_is_not():
    net = nn.BatchNorm(use_running_average=True)
    image, row = images()[:1], images()[:1, 0]
    variables = net.init(jax.random.key(0), image)
    given = mixed("linear", 0.5, {"mean": 0.0, "var": 1.0}, {"mean": rows(image).mean(0), "var": rows(image).var(0)})
    expected = (image - given["mean"]) / np.sqrt(given["var"] + 1e-5)
    y = jaxbn.linen.adapt(net.apply, prior_count=1)(variables, image)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"one value per channel in all.*Use a larger batch"):
        jaxbn.linen.adapt(net.apply, prior_count=1)(variables, row)
    with pytest.raises(ValueError, match=r"one value per channel in an example.*freeze_layers"):
        jaxbn.linen.adapt(net.apply, example_weight=0.5)(variables, images()[:, 0])
    evaluated = net.apply(variables, row)
    for given in ({"prior_count": math.inf}, {"example_weight": 0}):
        np.testing.assert_allclose(jaxbn.linen.adapt(net.apply, **given)(variables, row), evaluated, rtol=1e-6)


def test_frozen_layers_keep_their_statistics():
    net = nn.BatchNorm(use_running_average=True)
    variables = net.init(jax.random.key(0), images())
    call = jaxbn.linen.freeze_layers(net.apply, "")
    y = jaxbn.linen.adapt(call, prior_count=1)(variables, images())
    np.testing.assert_array_equal(y, net.apply(variables, images()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "not neither"),
        ({"prior_count": 1, "example_weight": 0.5}, "not both"),
        ({"prior_count": -1}, "0 or more, or infinity"),
        ({"prior_count": math.nan}, "0 or more, or infinity"),
        ({"example_weight": 1.5}, r"outside \[0, 1\]"),
        ({"prior_count": 1, "rule": "mean"}, "none of 'linear', 'raw'"),
    ],
)
def test_numbers_that_make_no_sense_are_errors(given, message):
    for framework in FRAMEWORKS.values():
        with pytest.raises(ValueError, match=message):
            framework.adapt(lambda model, batch: batch, **given)
