"""Frozen layers of a linen model in training, against layers of stock Flax that the model runs in evaluation."""

import functools
import operator
from typing import Any, NamedTuple

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from meshes import AXIS, NAMED, WAYS, gathered, spread

import jaxbn
import jaxbn.linen

OURS = jaxbn.linen.BatchNorm
every_norm = pytest.mark.parametrize("norm", [nn.BatchNorm, OURS], ids=["stock", "jaxbn"])
EPSILON = 1e-5
AFFINE = ("scale", "bias")


class Block(nn.Module):
    """Two normalizations around a residual connection; the model runs those in `held` in evaluation."""

    norm: Any
    train: bool
    held: tuple = ()

    @nn.compact
    def __call__(self, x):
        for name in ("first", "second"):
            y = nn.Dense(4, name=f"{name}_map")(x)
            self.sow("inputs", f"{name}_input", y)
            held = not self.train or name in self.held
            x = x + nn.tanh(self.norm(use_running_average=held, momentum=0.9, name=name)(y))
        return x


OVER_LAYERS = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
HOW = {
    "plain": lambda block, x: block(x),
    "nn.jit": nn.jit(lambda block, x: block(x)),
    "nn.remat": nn.remat(lambda block, x: block(x)),
    "nn.vmap": lambda block, x: nn.vmap(lambda b, x: b(x), in_axes=None, axis_size=3, **OVER_LAYERS)(block, x).mean(0),
    "nn.scan": lambda block, x: nn.scan(lambda b, x, _: (b(x), None), length=3, **OVER_LAYERS)(block, x, None)[0],
    "called twice": lambda block, x: block(block(x)),
}


class Net(nn.Module):
    """A block, called in one of these ways, a normalization and a head."""

    norm: Any = nn.BatchNorm
    how: str = "plain"
    held: tuple = ()

    @nn.compact
    def __call__(self, x, train):
        x = HOW[self.how](Block(self.norm, train, self.held, name="block"), x)
        held = not train or "last" in self.held
        return nn.Dense(2, name="head")(self.norm(use_running_average=held, momentum=0.9, name="last")(x))


def data(rows=24, seed=0):
    return (1 + 2 * np.random.default_rng(seed).standard_normal((rows, 4))).astype(np.float32)


X = data()


@functools.cache
def started(net):
    """Variables whose statistics and parameters are not the initial ones; of stock layers, and so of ours."""
    variables = jax.jit(lambda key: net.init(key, X, True))(jax.random.key(0))
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda a: a + rng.uniform(0.1, 0.4, a.shape).astype(a.dtype), variables)
    return {name: moved[name] for name in ("params", "batch_stats")}


def training(net):
    """A call that trains, as the user of a model writes it."""
    return functools.partial(net.apply, train=True, mutable=["batch_stats"])


@functools.cache
def with_gradients(net, paths=()):
    """Outputs, updates and gradients of a training call with these layers frozen, jitted."""
    call = jaxbn.linen.freeze_layers(training(net), paths) if paths else training(net)

    @jax.jit
    def run(variables, x):
        def loss(params, x):
            y, updates = call(variables | {"params": params}, x)
            return jnp.sin(y).mean(), (y, updates)

        gradients, (y, updates) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
        return y, updates, gradients

    return run


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def moved(before, after):
    """The layers of which something differs between two trees of statistics or parameters."""
    before, after = flat(before), flat(after)
    assert before.keys() == after.keys()
    return {path.rsplit("/", 1)[0] for path in before if not np.array_equal(before[path], after[path])}


# --- What a frozen layer does -----------------------------------------------------------------------------------------


@pytest.mark.sample(every=3)
@every_norm
@pytest.mark.parametrize(
    "how", [how if how in ("plain", "nn.vmap", "nn.scan") else pytest.param(how, marks=pytest.mark.slow) for how in HOW]
)
def test_a_frozen_layer_keeps_its_statistics_and_uses_them_in_training(how, norm):
    """Outputs, updates and gradients are those of stock Flax with `use_running_average=True` written into the layer."""
    variables = started(Net(how=how))
    before = jax.tree.map(np.copy, variables)
    y, updates, gradients = with_gradients(Net(norm, how), ("block/first",))(variables, X)
    expected = with_gradients(Net(how=how, held=("first",)))(variables, X)
    chex.assert_trees_all_close((y, updates, gradients), expected, rtol=1e-5, atol=1e-5)
    assert moved(before["batch_stats"], updates["batch_stats"]) == {"block/second", "last"}
    chex.assert_trees_all_equal(variables, before, strict=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates["batch_stats"], variables["batch_stats"])


@every_norm
def test_a_whole_model_that_is_frozen_is_the_model_in_evaluation(norm):
    net, variables = Net(norm), started(Net())
    y, updates = jax.jit(jaxbn.linen.freeze_layers(training(net), ""))(variables, X)
    np.testing.assert_allclose(y, jax.jit(lambda v, x: net.apply(v, x, False))(variables, X), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"], strict=True)


def layer_started(layer):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: a + 0.3 * rng.random(a.shape).astype(np.float32), layer.init(jax.random.key(0), X))


@every_norm
def test_gradients_flow_through_a_frozen_layer_by_its_formula(norm):
    layer = norm(use_running_average=False)
    variables, weights = layer_started(layer), np.random.default_rng(2).standard_normal(X.shape).astype(np.float32)

    def loss(params, x):
        call = jaxbn.linen.freeze_layers(layer.apply, "")
        y, _ = call(variables | {"params": params}, x, mutable=["batch_stats"])
        return (y * weights).sum()

    of_params, of_x = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], X)
    mean, var, scale = (
        np.float64(variables[kind][name])
        for kind, name in (("batch_stats", "mean"), ("batch_stats", "var"), ("params", "scale"))
    )
    std = np.sqrt(var + EPSILON)
    np.testing.assert_allclose(of_x, weights * scale / std, rtol=1e-5)
    np.testing.assert_allclose(of_params["scale"], (weights * (X - mean) / std).sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_params["bias"], np.float64(weights).sum(0), rtol=1e-5, atol=1e-5)


@every_norm
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_frozen_layer_of_low_precision_rounds_as_in_evaluation(dtype, norm):
    layer, stock = norm(use_running_average=False, dtype=dtype), nn.BatchNorm(use_running_average=True, dtype=dtype)
    variables = layer_started(stock)
    with jax.numpy_dtype_promotion("standard"):
        y, _ = jaxbn.linen.freeze_layers(layer.apply, "")(variables, X, mutable=["batch_stats"])
        expected = stock.apply(variables, X)
    assert y.dtype == expected.dtype == dtype
    np.testing.assert_array_equal(y, expected)


def test_residual_and_activation_stay_in_a_frozen_layer():
    layer = OURS(use_running_average=False, activation=nn.relu)
    variables, residual = layer_started(layer), data(seed=3)
    call = functools.partial(layer.apply, residual=residual, mask=np.zeros((24, 1), bool), mutable=["batch_stats"])
    y, updates = jaxbn.linen.freeze_layers(call, "")(variables, X)
    evaluated = nn.BatchNorm(use_running_average=True).apply(variables, X)
    np.testing.assert_allclose(y, np.maximum(evaluated + residual, 0), rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])


@every_norm
def test_subclasses_that_call_super_are_frozen(norm):
    class Doubled(norm):
        def __call__(self, x, **arguments):
            return super().__call__(2 * x, **arguments) + 5

    layer = Doubled(use_running_average=False)
    variables = layer_started(layer)
    y, _ = jaxbn.linen.freeze_layers(layer.apply, "")(variables, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, nn.BatchNorm(use_running_average=True).apply(variables, 2 * X) + 5)


# --- Which layers -----------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        for name in ("first", "second"):
            x = 1 + 2 * nn.BatchNorm(use_running_average=not self.train, name=name)(x)
        return nn.Dense(4, name="first_map")(x)


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for number in (1, 2, 10):
            x = Pair(train, name=f"Block_{number}")(x)
        return x


EACH = [f"Block_{number}/{layer}" for number in (1, 2, 10) for layer in ("first", "second")]


@pytest.mark.parametrize(
    "paths, frozen",
    [
        ("Block_1", EACH[:2]),
        ("Block_1/second", EACH[1:2]),
        (["Block_2", "Block_10/first"], EACH[2:5]),
        (("Block_1", "Block_1/first", "Block_1"), EACH[:2]),
        ("", EACH),
        ([], []),
    ],
    ids=["module", "layer", "several", "one twice", "all", "none"],
)
def test_a_path_means_all_layers_below_it_and_no_other(paths, frozen):
    net = Blocks()
    variables = started(net)
    _, updates = jax.jit(jaxbn.linen.freeze_layers(training(net), paths))(variables, X)
    assert moved(variables["batch_stats"], updates["batch_stats"]) == set(EACH) - set(frozen)
    mask = jaxbn.linen.affine_mask(variables, paths)
    assert {path for path, held in flat(mask).items() if held} == {f"{layer}/{p}" for layer in frozen for p in AFFINE}
    assert jax.tree.structure(mask) == jax.tree.structure(variables["params"])


@pytest.mark.parametrize("path", ["Block_3", "Block", "first", "Block_1/", "Block_1/first/mean", "Block_1/first_map"])
def test_a_path_that_leads_nowhere_is_told_which_there_are(path):
    net = Blocks()
    variables = started(net)
    listed = ", ".join(repr(layer) for layer in EACH)
    for function in (
        lambda: jaxbn.linen.freeze_layers(training(net), ["Block_2", path])(variables, X),
        lambda: jaxbn.linen.affine_mask(variables, path),
    ):
        with pytest.raises(ValueError) as error:
            function()
        assert str(error.value) == f"No normalization layer is at {path!r} or below it; there are {listed}."


# --- Training ---------------------------------------------------------------------------------------------------------

HELD = ("block/first", "last")
WHAT = {"statistics": (HELD, ()), "affine": ((), HELD), "both": (HELD, HELD)}
RATE, DECAY = 0.1, 0.02


def sgd_with_decay(mask):
    """Of which neither part touches what the mask holds."""
    decay = optax.add_decayed_weights(DECAY, mask=jax.tree.map(operator.not_, mask))
    return optax.chain(decay, optax.sgd(RATE), optax.masked(optax.set_to_zero(), mask))


@pytest.mark.sample(every=2)
@every_norm
@pytest.mark.parametrize("what", WHAT)
def test_training_moves_all_but_what_is_frozen(what, norm):
    """Three steps, against stock Flax and the formula of SGD with weight decay."""
    statistics, affine = WHAT[what]
    variables = expected = first = started(Net())
    optimizer = sgd_with_decay(jaxbn.linen.affine_mask(variables, affine))
    state = optimizer.init(variables["params"])
    run = with_gradients(Net(norm), statistics)
    oracle = with_gradients(Net(held=tuple(path.removeprefix("block/") for path in statistics)))
    held = {f"{layer}/{name}" for layer in affine for name in AFFINE}
    for seed in range(3):
        _, updates, (gradients, _) = run(variables, data(seed=seed))
        steps, state = jax.jit(optimizer.update)(gradients, state, variables["params"])
        variables = {"params": optax.apply_updates(variables["params"], steps)} | updates

        _, updates, (gradients, _) = oracle(expected, data(seed=seed))
        slopes, params = flat(gradients), flat(expected["params"])
        params = {p: a if p in held else a - RATE * (slopes[p] + DECAY * a) for p, a in params.items()}
        expected = {"params": flax.traverse_util.unflatten_dict(params, sep="/")} | updates
    chex.assert_trees_all_close(variables, expected, rtol=1e-5, atol=1e-5)
    layers = {"block/first", "block/second", "last"}
    assert moved(first["batch_stats"], variables["batch_stats"]) == layers - set(statistics)
    assert moved(first["params"], variables["params"]) & layers == layers - set(affine)


@every_norm
def test_layers_may_be_frozen_from_a_step_on_inside_jit(norm):
    """One trace; before that step as without freezing, and from it on as with."""
    net, traces = Net(norm), []
    plain = training(net)
    frozen = jaxbn.linen.freeze_layers(plain, "block")
    variables = started(Net())

    @jax.jit
    def step(variables, x, number):
        traces.append(None)
        y, updates = jax.lax.cond(number >= 2, frozen, plain, variables, x)
        return y, variables | updates

    steps = {False: jax.jit(plain), True: jax.jit(frozen)}
    for number in range(4):
        other, updates = steps[number >= 2](variables, data(seed=number))
        y, new = step(variables, data(seed=number), number)
        assert moved(variables["batch_stats"], new["batch_stats"]) == (
            {"last"} if number >= 2 else {"block/first", "block/second", "last"}
        )
        np.testing.assert_allclose(y, other, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(new, variables | updates, rtol=1e-5, atol=1e-6)
        variables = new
    assert len(traces) == 1


# --- The pass, and capture --------------------------------------------------------------------------------------------


@functools.cache
def stock_training(held):
    """The outputs of a stock net in training, and what its layers are given, in float64."""
    run = jax.jit(functools.partial(Net(held=held).apply, train=True, mutable=["inputs", "batch_stats"]))
    y, found = run(started(Net()), X)
    return y, {path.removesuffix("_input"): np.float64(values[0]) for path, values in flat(found["inputs"]).items()}


@every_norm
def test_a_pass_leaves_frozen_layers_alone_and_estimates_the_others_downstream_of_them(norm):
    net, variables = Net(norm), started(Net())
    evaluating = lambda v, x: net.apply(v, x, False)
    new, report = jaxbn.linen.postproc(jaxbn.linen.freeze_layers(evaluating, "block/first"), variables, [X])
    assert report.not_reached == ("block/first",)
    assert "not reached or frozen, with unchanged statistics: 'block/first'" in str(report)
    assert moved(variables["batch_stats"], new["batch_stats"]) == {"block/second", "last"}
    second = new["batch_stats"]["block"]["second"]
    given = stock_training(held=("first",))[1]["block/second"]
    np.testing.assert_allclose(second["mean"], given.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second["var"], given.var(0), rtol=1e-5)
    without = stock_training(held=())[1]["block/second"]
    assert not np.allclose(without.var(0), given.var(0), rtol=1e-2)  # what would be estimated if nothing were frozen
    info = jaxbn.linen.freeze(new, report).info
    assert info.layer("block/first").estimator == "as given" and info.layer("last").estimator == "pooled"


@pytest.mark.sample(every=3)
@every_norm
@pytest.mark.parametrize(
    "mode, outside", [("batch", "capture"), ("eval", "capture"), ("as_called", "capture"), ("batch", "freeze")]
)
def test_capture_measures_all_but_frozen_layers(mode, outside, norm):
    variables, call = started(Net()), training(Net(norm))
    if outside == "capture":
        captured = jaxbn.linen.capture_moments(jaxbn.linen.freeze_layers(call, "block/first"), mode=mode)
    else:
        captured = jaxbn.linen.freeze_layers(jaxbn.linen.capture_moments(call, mode=mode), "block/first")
    (y, updates), moments = jax.jit(captured)(variables, X)
    if mode == "eval":
        expected = Net().apply(variables, X, False)
    else:
        expected, given = stock_training(held=("first",))
        given = given["block/second"]
        np.testing.assert_allclose(moments["block/second"].mean, given.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(moments["block/second"].var, given.var(0), rtol=1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    counts = {path: float(found.count.max()) for path, found in moments.items()}
    assert counts == {"block/first": 0, "block/second": 24, "last": 24}
    asked = {"block/second", "last"} if mode == "as_called" else set()
    assert moved(variables["batch_stats"], updates["batch_stats"]) == asked


def test_calls_may_be_frozen_twice():
    net = Net()
    variables = started(Net())
    freeze, call = jaxbn.linen.freeze_layers, training(net)
    expected = jax.jit(freeze(call, ["block/first", "last"]))(variables, X)
    assert moved(variables["batch_stats"], expected[1]["batch_stats"]) == {"block/second"}
    for twice in (freeze(freeze(call, "block/first"), "last"), freeze(freeze(call, "last"), ["block/first", "last"])):
        chex.assert_trees_all_equal(jax.jit(twice)(variables, X), expected, strict=True)


# --- Nothing is left behind -------------------------------------------------------------------------------------------


class Holder(NamedTuple):
    statistics: Any
    other: Any


OPTIMIZER = optax.sgd(0.1)
HOLDERS = {
    "dict": lambda v: v,
    "FrozenDict": flax.core.freeze,
    "NamedTuple": lambda v: Holder(v["batch_stats"], [{"a": (v,)}, None]),
    "TrainState": lambda v: TrainState.create(apply_fn=None, params=v, tx=OPTIMIZER),
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS.keys())
def test_outputs_that_hold_the_variables_come_back_without_the_marker(hold):
    variables = started(Net())
    outputs = jaxbn.linen.freeze_layers(lambda v, x: hold(v), "")(variables, X)
    chex.assert_trees_all_equal_structs(outputs, hold(variables))


@every_norm
def test_compiled_programs_with_and_without_frozen_layers_are_kept_apart(norm):
    """One jitted function with `nn.jit` inside, plain, frozen and captured in turns; each is traced once."""
    traces = []

    class Traced(Net):
        @nn.compact
        def __call__(self, x, train):
            traces.append(None)
            return super().__call__(x, train)

    variables = started(Net())
    apply = jax.jit(training(Traced(norm, "nn.jit")))
    frozen = jaxbn.linen.freeze_layers(apply, "block")
    captured = jaxbn.linen.capture_moments(apply, mode="batch")
    for _ in range(2):
        (y, updates), (z, held) = apply(variables, X), frozen(variables, X)
        assert moved(variables["batch_stats"], updates["batch_stats"]) == {"block/first", "block/second", "last"}
        assert moved(variables["batch_stats"], held["batch_stats"]) == {"last"}
        np.testing.assert_allclose(z, stock_training(held=("first", "second"))[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(captured(variables, X)[0][0], y, rtol=1e-5, atol=1e-5)
        assert not np.allclose(y, z, rtol=1e-2)
    assert len(traces) == 3


@every_norm
def test_frozen_dicts_and_boxes_go_in_and_boxes_come_out(norm):
    layer = norm(use_running_average=False, scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)))
    variables = layer.init(jax.random.key(0), X)
    box = lambda leaf: nn.Partitioned(leaf, names=("model",))
    variables["batch_stats"] = jax.tree.map(box, variables["batch_stats"])
    call = jaxbn.linen.freeze_layers(functools.partial(layer.apply, mutable=["batch_stats"]), "")
    y, updates = call(variables, X)
    np.testing.assert_allclose(y, X / np.sqrt(1 + EPSILON), rtol=1e-6)
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])
    chex.assert_trees_all_equal(call(flax.core.freeze(variables), X), (y, updates))
    mask = jaxbn.linen.affine_mask(variables, "")  # of one layer, which is the model itself
    optimizer = optax.masked(optax.set_to_zero(), mask)
    steps, _ = optimizer.update(variables["params"], optimizer.init(variables["params"]))
    assert jax.tree.structure(steps) == jax.tree.structure(variables["params"])
    assert not any(leaf.any() for leaf in jax.tree.leaves(steps))


# --- Over devices -----------------------------------------------------------------------------------------------------

COLLECTIVES = ("all-reduce", "all-gather", "collective-permute")


def result_and_program(way, call, variables, x):
    mapped, arguments = spread(way, call, variables, x)
    compiled = mapped.lower(*arguments).compile()
    return gathered(way, compiled(*arguments)), compiled.as_text()


@functools.cache
def stock_on_one_device(rows, held):
    return jax.jit(training(Net(held=held)))(started(Net()), data(rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, norm",
    [*((way, OURS) for way in WAYS), *((way, nn.BatchNorm) for way in ("jit", "shard_map", "pmap"))],
    ids=[*(f"{way} jaxbn" for way in WAYS), "jit stock", "shard_map stock", "pmap stock"],
)
def test_frozen_layers_over_devices(way, norm):
    """As on one device; and a frozen layer needs no collective, even if it has an axis name."""
    net = Net(functools.partial(norm, axis_name=AXIS) if way in NAMED else norm)
    variables, x = started(Net()), data(rows=64)

    def statistics_and_outputs(paths):
        return lambda v, x: jaxbn.linen.freeze_layers(training(net), paths)(v, x)[::-1]

    (updates, y), program = result_and_program(way, statistics_and_outputs("block/first"), variables, x)
    expected, new = stock_on_one_device(64, ("first",))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(updates, new, rtol=1e-5, atol=1e-5)
    assert moved(variables["batch_stats"], updates["batch_stats"]) == {"block/second", "last"}
    # The lanes of vmap lie on one device.
    assert any(name in program for name in COLLECTIVES) == (way != "vmap")

    (updates, y), program = result_and_program(way, statistics_and_outputs(""), variables, x)
    np.testing.assert_allclose(y, Net().apply(variables, x, False), rtol=1e-5, atol=1e-5)
    assert not moved(variables["batch_stats"], updates["batch_stats"])
    assert not any(name in program for name in COLLECTIVES)


def test_a_model_of_frozen_layers_does_not_need_their_axis():
    net, variables = Net(functools.partial(OURS, axis_name=AXIS)), started(Net())
    with pytest.raises(NameError, match="unbound axis name"):
        training(net)(variables, X)
    y, _ = jaxbn.linen.freeze_layers(training(net), "")(variables, X)
    np.testing.assert_allclose(y, Net().apply(variables, X, False), rtol=1e-5, atol=1e-5)


# --- Frozen networks --------------------------------------------------------------------------------------------------


@pytest.mark.sample(every=3)
@pytest.mark.parametrize(
    "how, norm",
    [("nn.jit", nn.BatchNorm), ("nn.remat", OURS), ("nn.vmap", OURS), ("nn.scan", nn.BatchNorm)],
    ids=["nn.jit stock", "nn.remat jaxbn", "nn.vmap jaxbn", "nn.scan stock"],
)
def test_a_pass_brings_out_the_epsilon_of_layers_inside_transformations(how, norm):
    """The variables do not tell; only a run of the model does."""
    net = Net(functools.partial(norm, epsilon=3e-4), how)
    new, report = jaxbn.linen.postproc(lambda v, x: net.apply(v, x, False), started(Net(how=how)), [X])
    info = jaxbn.LayerInfo("batch_norm", 3e-4, "pooled", 24.0)
    assert jaxbn.linen.freeze(new, report).info.layers == tuple(
        (path, info) for path in ("block/first", "block/second", "last")
    )


def test_frozen_dicts_and_boxed_variables_are_frozen_as_plain_dicts_of_arrays():
    net = Net()
    variables = started(net)
    expected = jaxbn.linen.freeze(variables)
    chex.assert_trees_all_equal(jaxbn.linen.freeze(flax.core.freeze(variables)), expected, strict=True)
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, names=(None,) * leaf.ndim), variables)
    structure = jax.tree.structure(boxed)
    frozen = jaxbn.linen.freeze(boxed)
    assert jax.tree.structure(boxed) == structure != jax.tree.structure(variables)
    assert jax.tree.structure(frozen) == jax.tree.structure(expected)
    chex.assert_trees_all_equal(frozen, expected, strict=True)
    np.testing.assert_array_equal(net.apply(frozen.variables, X, False), net.apply(boxed, X, False))
