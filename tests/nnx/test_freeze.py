"""Frozen layers of an NNX model in training, against stock Flax in evaluation; and frozen networks, installed."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from meshes import AXIS, NAMED, WAYS, gathered, spread

import jaxbn
import jaxbn.nnx

OURS = jaxbn.nnx.BatchNorm
every_norm = pytest.mark.parametrize("norm", [nnx.BatchNorm, OURS], ids=["stock", "jaxbn"])
EPSILON = 1e-5
AFFINE = ("scale", "bias")


class Block(nnx.Module):
    """Two normalizations around a residual connection; the model runs those in `held` in evaluation."""

    def __init__(self, norm, held, rngs):
        self.first_map, self.second_map = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
        self.first, self.second = (norm(4, momentum=0.9, rngs=rngs) for _ in range(2))
        self.held = held

    def __call__(self, x, given=None):
        for name in ("first", "second"):
            y = getattr(self, f"{name}_map")(x)
            if given is not None:
                given[f"block/{name}"] = np.float64(y)
            x = x + jnp.tanh(getattr(self, name)(y, True if name in self.held else None))
        return x


def run(block, x):
    return block(x)


def through_split_and_merge(block, x):
    graphdef, params, statistics, rest = nnx.split(block, nnx.Param, nnx.BatchStat, ...)

    @jax.checkpoint
    def inner(params, statistics, x):
        merged = nnx.merge(graphdef, params, statistics, rest)
        return merged(x), nnx.state(merged, nnx.BatchStat)

    y, statistics = inner(params, statistics, x)
    nnx.update(block, statistics)
    return y


HOW = {
    "plain": run,
    "nnx.jit": nnx.jit(run),
    "nnx.remat": nnx.remat(run),
    "nnx.vmap": lambda block, x: nnx.vmap(run, in_axes=(0, None))(block, x).mean(0),
    "nnx.scan": lambda block, x: nnx.scan(lambda x, b: b(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, block),
    "split and merge": through_split_and_merge,
    "called twice": lambda block, x: block(block(x)),
}
STACKED = ("nnx.vmap", "nnx.scan")


class Net(nnx.Module):
    """A block, called in one of these ways, a normalization and a head."""

    def __init__(self, norm=nnx.BatchNorm, how="plain", held=()):
        rngs = nnx.Rngs(0)
        make = lambda rngs: Block(norm, held, rngs)
        self.block = nnx.vmap(make)(rngs.split(3)) if how in STACKED else make(rngs)
        self.last, self.head = norm(4, momentum=0.9, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.how, self.held = how, held

    def __call__(self, x):
        x = HOW[self.how](self.block, x)
        return self.head(self.last(x, True if "last" in self.held else None))


def data(rows=24, seed=0):
    return (1 + 2 * np.random.default_rng(seed).standard_normal((rows, 4))).astype(np.float32)


X = data()


def started(model):
    """With statistics and parameters that are not the initial ones."""
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))):
        variable[...] += rng.uniform(0.1, 0.4, variable.shape).astype(np.float32)
    return model


def values(model, *kinds):
    """The arrays of a model, or of a state of it, by path."""
    state = nnx.state(model, nnx.Any(*kinds)) if kinds else model
    return {"/".join(map(str, path)): np.array(v[...]) for path, v in nnx.to_flat_state(state)}


def statistics(model):
    return values(model, nnx.BatchStat)


def moved(before, after):
    """The layers of which something differs between two `values`."""
    assert before.keys() == after.keys()
    return {path.rsplit("/", 1)[0] for path in before if not np.array_equal(before[path], after[path])}


@nnx.jit
def with_gradients(model, x):
    def loss(model, x):
        y = model(x)
        return jnp.sin(y).mean(), y

    (of_model, of_x), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(model, x)
    return y, of_model, of_x


# --- What a frozen layer does -----------------------------------------------------------------------------------------


@functools.cache
def stock_step(how, held):
    """Outputs, gradients and new statistics of a stock model after one training call."""
    model = started(Net(how=how, held=held))
    y, of_model, of_x = with_gradients(model, X)
    return y, values(of_model), of_x, statistics(model)


@pytest.mark.sample(every=3)
@every_norm
@pytest.mark.parametrize(
    "how", [how if how in ("plain", *STACKED) else pytest.param(how, marks=pytest.mark.slow) for how in HOW]
)
def test_a_frozen_layer_keeps_its_statistics_and_uses_them_in_training(how, norm):
    """Outputs, statistics and gradients are those of stock Flax whose layer is told `use_running_average=True`."""
    model = started(Net(norm, how))
    before, graph = values(model, nnx.Param, nnx.BatchStat), nnx.graphdef(model)
    frozen = jaxbn.nnx.freeze_layers(model, "block/first")
    frozen.train()  # does not thaw it
    y, of_model, of_x = with_gradients(frozen, X)
    expected = stock_step(how, ("first",))
    chex.assert_trees_all_close((y, values(of_model), of_x, statistics(frozen)), expected, rtol=1e-5, atol=1e-5)
    assert moved(statistics(model), statistics(frozen)) == {"block/second", "last"}
    chex.assert_trees_all_equal(values(model, nnx.Param, nnx.BatchStat), before, strict=True)
    assert nnx.graphdef(model) == graph


@every_norm
def test_a_whole_model_that_is_frozen_is_the_model_in_evaluation(norm):
    model = started(Net(norm))
    frozen = jaxbn.nnx.freeze_layers(model, "")
    for call in (nnx.jit(run), lambda model, x: nnx.view(model, use_running_average=False)(x)):
        y = call(frozen, X)
        np.testing.assert_allclose(y, nnx.view(model, use_running_average=True)(X), rtol=1e-6, atol=1e-6)
    assert not moved(statistics(model), statistics(frozen))


@every_norm
def test_gradients_flow_through_a_frozen_layer_by_its_formula(norm):
    layer = jaxbn.nnx.freeze_layers(started(norm(4, rngs=nnx.Rngs(0))), "")
    weights = np.random.default_rng(2).standard_normal(X.shape).astype(np.float32)
    of_layer, of_x = nnx.grad(lambda layer, x: (layer(x) * weights).sum(), argnums=(0, 1))(layer, X)
    mean, var, scale = (np.float64(variable[...]) for variable in (layer.mean, layer.var, layer.scale))
    std = np.sqrt(var + EPSILON)
    np.testing.assert_allclose(of_x, weights * scale / std, rtol=1e-5)
    np.testing.assert_allclose(of_layer["scale"][...], (weights * (X - mean) / std).sum(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_layer["bias"][...], np.float64(weights).sum(0), rtol=1e-5, atol=1e-5)


@every_norm
def test_a_frozen_layer_may_be_asked_in_every_way(norm):
    layer = jaxbn.nnx.freeze_layers(started(norm(4, rngs=nnx.Rngs(0))), "")
    expected = started(nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)))(X)
    for arguments in ((), (False,), (None,), (True,)):
        np.testing.assert_array_equal(layer(X, *arguments), expected)
    np.testing.assert_array_equal(layer(X, use_running_average=False, mask=np.zeros((24, 1), bool)), expected)


def test_residual_and_activation_stay_in_a_frozen_layer():
    layer = started(OURS(4, activation=nnx.relu, rngs=nnx.Rngs(0)))
    evaluated = started(nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)))(X)
    y = jaxbn.nnx.freeze_layers(layer, "")(X, residual=data(seed=3))
    np.testing.assert_allclose(y, np.maximum(evaluated + data(seed=3), 0), rtol=1e-6, atol=1e-6)


@every_norm
def test_subclasses_that_call_super_are_frozen(norm):
    class Doubled(norm):
        def __call__(self, x, **arguments):
            return super().__call__(2 * x, **arguments) + 5

    frozen = jaxbn.nnx.freeze_layers(started(Doubled(4, rngs=nnx.Rngs(0))), "")
    expected = started(nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)))(2 * X) + 5
    np.testing.assert_array_equal(frozen(X), expected)


# --- Which layers -----------------------------------------------------------------------------------------------------


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = (nnx.BatchNorm(4, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return 1 + 2 * self.second(1 + 2 * self.first(x))


def pairs():
    return nnx.Dict(blocks=nnx.List([Pair(nnx.Rngs(0)) for _ in range(11)]), head=nnx.BatchNorm(4, rngs=nnx.Rngs(0)))


EACH = [*(f"blocks/{number}/{layer}" for number in range(11) for layer in ("first", "second")), "head"]


@pytest.mark.parametrize(
    "paths, frozen",
    [
        ("blocks/1", EACH[2:4]),
        ("blocks/1/second", EACH[3:4]),
        (["head", "blocks/10/first"], ["blocks/10/first", "head"]),
        (("blocks/1", "blocks/1/first", "blocks/1"), EACH[2:4]),
        ("blocks", EACH[:-1]),
        ("", EACH),
        ([], []),
    ],
    ids=["module", "layer", "several", "one twice", "list", "all", "none"],
)
def test_a_path_means_all_layers_below_it_and_no_other(paths, frozen):
    model = jaxbn.nnx.freeze_layers(pairs(), paths)
    before = statistics(model)
    x = X
    for block in model["blocks"]:
        x = block(x)
    model["head"](x)
    assert moved(before, statistics(model)) == set(EACH) - set(frozen)
    mask = jaxbn.nnx.affine_mask(model, paths)
    held = {"/".join(map(str, path)) for path, value in nnx.to_flat_state(mask) if value}
    assert held == {f"{layer}/{name}" for layer in frozen for name in AFFINE}
    assert nnx.to_flat_state(mask).paths == nnx.to_flat_state(nnx.state(model, nnx.Param)).paths


@pytest.mark.parametrize("path", ["blocks/11", "block", "first", "head/", "head/mean", "blocks/1/fir"])
@pytest.mark.parametrize("function", [jaxbn.nnx.freeze_layers, jaxbn.nnx.affine_mask])
def test_a_path_that_leads_nowhere_is_told_which_there_are(function, path):
    with pytest.raises(ValueError) as error:
        function(pairs(), ["head", path])
    listed = ", ".join(repr(layer) for layer in EACH)
    assert str(error.value) == f"No normalization layer is at {path!r} or below it; there are {listed}."


class Shared(nnx.Module):
    """A layer with two names."""

    def __init__(self, norm):
        self.one = self.two = norm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.two(3 * self.one(x) + 1)


@every_norm
def test_shared_layers_are_frozen_once_for_all_their_names(norm):
    model = started(Shared(norm))
    frozen = jaxbn.nnx.freeze_layers(model, "one")
    assert frozen.one is frozen.two
    np.testing.assert_allclose(frozen(X), nnx.view(model, use_running_average=True)(X), rtol=1e-6)
    assert not moved(statistics(model), statistics(frozen))
    with pytest.raises(ValueError, match="at 'two' or below it; there are 'one'"):
        jaxbn.nnx.freeze_layers(model, "two")


@pytest.mark.sample(every=2)
@every_norm
def test_models_may_be_frozen_twice_and_be_thawed(norm):
    model = started(Net(norm))
    freeze = jaxbn.nnx.freeze_layers
    once = freeze(model, ["block/first", "last"])
    for twice in (freeze(freeze(model, "block/first"), "last"), freeze(freeze(model, "last"), ["block/first", "last"])):
        assert nnx.graphdef(twice) == nnx.graphdef(once)
        with_gradients(twice, X)
        assert moved(statistics(model), statistics(twice)) == {"block/second"}
    nnx.update(model, nnx.state(twice))
    assert not moved(statistics(model), statistics(twice))
    with_gradients(model, X)
    assert moved(statistics(model), statistics(twice)) == {"block/first", "block/second", "last"}


# --- Training ---------------------------------------------------------------------------------------------------------

HELD = ("block/first", "last")
WHAT = {"statistics": (HELD, ()), "affine": ((), HELD), "both": (HELD, HELD)}
RATE, DECAY = 0.1, 0.02


@every_norm
@pytest.mark.parametrize("what", WHAT)
def test_training_moves_all_but_what_is_frozen(what, norm):
    """Three steps, against stock Flax and the formula of SGD with weight decay."""
    of_statistics, of_affine = WHAT[what]
    first = started(Net(norm))
    model = jaxbn.nnx.freeze_layers(first, of_statistics)
    mask = jaxbn.nnx.affine_mask(model, of_affine)
    decay = optax.add_decayed_weights(DECAY, mask=jax.tree.map(operator.not_, mask))
    chain = optax.chain(decay, optax.sgd(RATE), optax.masked(optax.set_to_zero(), mask))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    oracle = started(Net(held=tuple(path.removeprefix("block/") for path in of_statistics)))
    held = {f"{layer}/{name}" for layer in of_affine for name in AFFINE}
    for seed in range(3):
        optimizer.update(model, with_gradients(model, data(seed=seed))[1])
        slopes = values(with_gradients(oracle, data(seed=seed))[1])
        for path, variable in nnx.to_flat_state(nnx.state(oracle, nnx.Param)):
            name = "/".join(map(str, path))
            if name not in held:
                variable[...] -= RATE * (slopes[name] + DECAY * variable[...])
    everything = (nnx.Param, nnx.BatchStat)
    chex.assert_trees_all_close(values(model, *everything), values(oracle, *everything), rtol=1e-5, atol=1e-5)
    layers = {"block/first", "block/second", "last"}
    assert moved(statistics(first), statistics(model)) == layers - set(of_statistics)
    assert moved(values(first, nnx.Param), values(model, nnx.Param)) & layers == layers - set(of_affine)


@every_norm
def test_layers_may_be_frozen_from_a_step_on_inside_jit(norm):
    """One trace; before that step as without freezing, and from it on as with."""
    model, traces = started(Net(norm)), []
    plain, frozen = nnx.graphdef(model), nnx.graphdef(jaxbn.nnx.freeze_layers(model, "block"))

    def call(graphdef, state, x):
        merged = nnx.merge(graphdef, state)
        return merged(x), nnx.state(merged)

    @jax.jit
    def step(state, x, number):
        traces.append(None)
        branches = (functools.partial(call, graphdef) for graphdef in (frozen, plain))
        return jax.lax.cond(number >= 2, *branches, state, x)

    alone, state = jax.jit(call, static_argnums=0), nnx.state(model)
    for number in range(4):
        y, new = step(state, data(seed=number), number)
        expected, other = alone(frozen if number >= 2 else plain, state, data(seed=number))
        layers = {"last"} if number >= 2 else {"block/first", "block/second", "last"}
        assert moved(values(state), values(new)) == layers
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(values(new), values(other), rtol=1e-5, atol=1e-6)
        state = new
    assert len(traces) == 1


@every_norm
def test_compiled_programs_with_and_without_frozen_layers_are_kept_apart(norm):
    """One function with `nnx.jit` around it, plain, frozen and captured in turns; each is traced once."""
    traces = []

    @nnx.jit
    def call(model, x):
        traces.append(None)
        return model(x)

    for _ in range(2):
        model = started(Net(norm))
        frozen = jaxbn.nnx.freeze_layers(model, "block")
        before = statistics(model)
        captured, _ = jaxbn.nnx.capture_moments(call)(model, X)
        y, z = call(model, X), call(frozen, X)
        assert moved(before, statistics(model)) == {"block/first", "block/second", "last"}
        assert moved(before, statistics(frozen)) == {"last"}
        np.testing.assert_allclose(captured, y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(z, stock_step("plain", ("first", "second"))[0], rtol=1e-5, atol=1e-5)
        assert not np.allclose(y, z, rtol=1e-2)
    assert len(traces) == 3


# --- The pass, and capture --------------------------------------------------------------------------------------------


@functools.cache
def given_to_layers(held):
    """What the layers of a stock block are given in a training call, in float64."""
    given = {}
    started(Net(held=held)).block(X, given)
    return given


@every_norm
def test_a_pass_leaves_frozen_layers_alone_and_estimates_the_others_downstream_of_them(norm):
    model = jaxbn.nnx.freeze_layers(started(Net(norm)), "block/first")
    new, report = jaxbn.nnx.postproc(model, [X])
    assert report.not_reached == ("block/first",)
    assert "not reached or frozen, with unchanged statistics: 'block/first'" in str(report)
    assert moved(statistics(model), statistics(new)) == {"block/second", "last"}
    assert nnx.graphdef(new) == nnx.graphdef(model)  # and so is still frozen
    given, without = (given_to_layers(held)["block/second"] for held in (("first",), ()))
    np.testing.assert_allclose(new.block.second.mean[...], given.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.block.second.var[...], given.var(0), rtol=1e-5)
    assert not np.allclose(without.var(0), given.var(0), rtol=1e-2)  # what would be estimated if nothing were frozen
    info = jaxbn.nnx.freeze(new, report).info
    assert info.layer("block/first") == jaxbn.LayerInfo("batch_norm", EPSILON, "as given", None)
    assert info.layer("last") == jaxbn.LayerInfo("batch_norm", EPSILON, "pooled", 24.0)


@every_norm
@pytest.mark.parametrize("mode", ["batch", "eval", "as_called"])
def test_capture_measures_all_but_frozen_layers(mode, norm):
    model = jaxbn.nnx.freeze_layers(started(Net(norm)), "block/first")
    call = lambda model, x: (model(x), model)
    (y, returned), moments = nnx.jit(jaxbn.nnx.capture_moments(call, mode=mode))(model, X)
    if mode == "eval":
        expected = started(nnx.view(Net(), use_running_average=True))(X)
    else:
        expected, given = stock_step("plain", ("first",))[0], given_to_layers(("first",))["block/second"]
        np.testing.assert_allclose(moments["block/second"].mean, given.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(moments["block/second"].var, given.var(0), rtol=1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    counts = {path: float(found.count.max()) for path, found in moments.items()}
    assert counts == {"block/first": 0, "block/second": 24, "last": 24}
    assert type(returned.block.first) is type(model.block.first)
    asked = {"block/second", "last"} if mode == "as_called" else set()
    assert moved(statistics(model), statistics(returned)) == asked


# --- Over devices -----------------------------------------------------------------------------------------------------

COLLECTIVES = ("all-reduce", "all-gather", "collective-permute")


def result_and_program(way, model, x):
    """The statistics and outputs of a training call, and the compiled program."""
    graphdef, state = nnx.split(model)

    def call(state, x):
        merged = nnx.merge(graphdef, state)
        y = merged(x)
        return nnx.to_pure_dict(nnx.state(merged, nnx.BatchStat)), y

    mapped, arguments = spread(way, call, state, x)
    compiled = mapped.lower(*arguments).compile()
    found, y = gathered(way, compiled(*arguments))
    nnx.update(model, found)
    return y, statistics(model), compiled.as_text()


@pytest.mark.sample(every=4)
@pytest.mark.parametrize(
    "way, norm",
    [*((way, OURS) for way in WAYS), *((way, nnx.BatchNorm) for way in ("jit", "shard_map", "pmap"))],
    ids=[*(f"{way} jaxbn" for way in WAYS), "jit stock", "shard_map stock", "pmap stock"],
)
def test_frozen_layers_over_devices(way, norm):
    """As on one device; and a frozen layer needs no collective, even if it has an axis name."""
    norm, x = functools.partial(norm, axis_name=AXIS) if way in NAMED else norm, data(rows=64)
    model = started(Net(norm))
    oracle = started(Net(held=("first",)))
    expected = oracle(x)
    y, new, program = result_and_program(way, jaxbn.nnx.freeze_layers(model, "block/first"), x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(new, statistics(oracle), rtol=1e-5, atol=1e-5)
    assert moved(statistics(model), new) == {"block/second", "last"}
    # The lanes of vmap lie on one device.
    assert any(name in program for name in COLLECTIVES) == (way != "vmap")

    y, new, program = result_and_program(way, jaxbn.nnx.freeze_layers(model, ""), x)
    np.testing.assert_allclose(y, started(nnx.view(Net(), use_running_average=True))(x), rtol=1e-5, atol=1e-5)
    assert not moved(statistics(model), new)
    assert not any(name in program for name in COLLECTIVES)


# --- Frozen networks, installed ---------------------------------------------------------------------------------------


class Ensemble(nnx.Module):
    """Of all that a model may hold: a list, a layer with two names, dropout, members side by side and in a row."""

    def __init__(self, norm, features=4, epsilon=1e-3):
        rngs = nnx.Rngs(0, dropout=1)
        layer = lambda rngs: norm(features, epsilon=epsilon, rngs=rngs)
        self.maps = nnx.List([nnx.Linear(4, features, rngs=rngs), nnx.Linear(features, features, rngs=rngs)])
        self.one = self.two = layer(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.beside, self.behind = (nnx.vmap(layer)(rngs.split(3)) for _ in range(2))

    def __call__(self, x):
        for linear in self.maps:
            x = self.dropout(self.two(2 * self.one(linear(x))))
        x = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.beside, x).mean(0)
        return nnx.scan(lambda x, layer: 2 * layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.behind)


@functools.cache
def trained():
    """A stock model after some calls, which moved its statistics, and its frozen network."""
    model = Ensemble(nnx.BatchNorm)
    call = nnx.jit(run)
    for seed in range(2):
        call(model, data(seed=seed))
    return model, jaxbn.nnx.freeze(model)


INTO = {
    "stock": lambda: Ensemble(nnx.BatchNorm),
    "jaxbn": lambda: Ensemble(OURS),
    "stock, shapes alone": lambda: nnx.eval_shape(lambda: Ensemble(nnx.BatchNorm)),
    "jaxbn, shapes alone": lambda: nnx.eval_shape(lambda: Ensemble(OURS)),
    "jaxbn, frozen": lambda: jaxbn.nnx.freeze_layers(Ensemble(OURS), "beside"),
}


@pytest.mark.parametrize("make", INTO.values(), ids=INTO.keys())
def test_a_frozen_network_goes_into_any_model_of_its_structure(make):
    source, frozen = trained()
    model = make()
    graph, leaves = nnx.graphdef(model), jax.tree.leaves(nnx.state(model))
    served = jaxbn.nnx.install_frozen(model, frozen)
    assert nnx.graphdef(model) == graph
    assert all(a is b for a, b in zip(jax.tree.leaves(nnx.state(model)), leaves, strict=True))
    assert type(served.one) is type(model.one) and served.one is served.two
    assert served.dropout.deterministic and served.one.use_running_average and served.behind.use_running_average
    assert not model.dropout.deterministic and not model.one.use_running_average
    everything = (nnx.Param, nnx.BatchStat)
    chex.assert_trees_all_equal(values(served, *everything), values(source, *everything), strict=True)
    call, evaluating = nnx.jit(run), nnx.view(source, deterministic=True, use_running_average=True)
    np.testing.assert_array_equal(call(served, X), call(evaluating, X))
    np.testing.assert_allclose(call(served, X[:1]), call(served, X)[:1], rtol=1e-5, atol=1e-5)


def test_a_served_model_may_be_trained_on():
    """Its random streams have values too, even if those of the model had shapes alone."""
    _, frozen = trained()
    served = jaxbn.nnx.install_frozen(INTO["jaxbn, shapes alone"](), frozen)
    served.train()
    before = statistics(served)
    nnx.jit(run)(served, X)
    assert moved(before, statistics(served)) == {"one", "beside", "behind"}
    chex.assert_trees_all_equal(values(trained()[0], nnx.BatchStat), before)  # and what was frozen stays


def without_scale(norm):
    model = Ensemble(norm)
    model.one.scale = nnx.data(None)
    return model


def with_one_more(norm):
    model = Ensemble(norm)
    model.maps.append(nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0)))
    return model


HINT = "; build the model with the arguments with which it was frozen."
UNFIT = {
    "shape": (lambda n: Ensemble(n, features=5), r"'behind/bias' is \(3, 4\) in .* \(3, 5\) in the model"),
    "extra": (without_scale, r"'one/scale' is \(4,\) in the frozen network and missing in the model"),
    "missing": (with_one_more, r"'maps/2/kernel' is missing in the frozen network and \(4, 4\) in the model"),
    "epsilon": (lambda n: Ensemble(n, epsilon=1e-5), "was frozen with epsilon=0.001, but the model has epsilon=1e-05"),
}


@every_norm
@pytest.mark.parametrize("make, message", UNFIT.values(), ids=UNFIT.keys())
def test_a_model_that_a_frozen_network_does_not_fit_is_told_where(make, message, norm):
    with pytest.raises(ValueError, match=f"{message}{HINT}"):
        jaxbn.nnx.install_frozen(make(norm), trained()[1])


def test_a_layer_that_counts_needs_a_network_that_counts():
    frozen = jaxbn.nnx.freeze(started(OURS(4, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match=r"'count' is missing in the frozen network and \(\) in the model"):
        jaxbn.nnx.install_frozen(OURS(4, momentum=jaxbn.cumulative(), rngs=nnx.Rngs(0)), frozen)
    with pytest.raises(ValueError, match="the model itself was frozen with epsilon=1e-05, but the model has epsilon"):
        jaxbn.nnx.install_frozen(OURS(4, epsilon=0.1, rngs=nnx.Rngs(0)), frozen)
    with pytest.raises(TypeError, match="Expected a jaxbn.Frozen"):
        jaxbn.nnx.install_frozen(OURS(4, rngs=nnx.Rngs(0)), frozen.variables)


def test_what_a_frozen_network_holds_of_a_model():
    """All but random states and what was sown."""
    model = Ensemble(nnx.BatchNorm)
    expected = values(model, nnx.Param, nnx.BatchStat).keys()
    model.cache, model.sown = nnx.Cache(jnp.ones(2)), nnx.Intermediate((X, X))
    for seed in range(2):
        model(data(seed=seed))
    frozen = jaxbn.nnx.freeze(model)
    paths = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(frozen)}
    assert paths == {f"variables/{path}" for path in expected | {"cache"}}
    np.testing.assert_array_equal(jaxbn.nnx.install_frozen(model, frozen).cache[...], np.ones(2))
