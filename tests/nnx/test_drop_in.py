"""`jaxbn.nnx.BatchNorm` is `flax.nnx.BatchNorm`, up to the closed list of deviations, which comes last.

Stock Flax is the oracle. It runs with JAX's standard dtype promotion, as it needs; ours runs with the strict one.
"""

import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import layers
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from layers import normal
from meshes import AXIS, DEVICES, mesh, run, shards

import jaxbn
import jaxbn.nnx

STOCK, OURS = nnx.BatchNorm, jaxbn.nnx.BatchNorm
# The numbers of float32 data of order 1, computed in another order: a few units in the last place.
ROUNDING = 2e-6

NORMAL = nnx.initializers.normal(0.2)
both = functools.partial(layers.both, stock=STOCK, ours=OURS)
RANDOM = {"scale_init": lambda *arguments: 1 + NORMAL(*arguments), "bias_init": NORMAL}


def trained(norm, features=4, **fields):
    """A layer whose variables are not the initial ones."""
    layer = norm(features, rngs=nnx.Rngs(0), **RANDOM | fields)
    mean, var = 0.2 * normal(2, features, seed=3)
    layer.mean[...], layer.var[...] = jnp.asarray(0.3 + mean), jnp.asarray(1.7 + var)
    return layer


def values(model, *filters):
    return nnx.to_pure_dict(nnx.state(model, *filters))


def stats(model):
    return values(model, nnx.BatchStat)


@nnx.jit(static_argnames="use_running_average")
def call(layer, x, use_running_average=None, mask=None):
    return layer(x, use_running_average, mask=mask)


def train(layer, x, mask=None):
    """(y, new statistics) of one training call."""
    y = call(layer, x, use_running_average=False, mask=mask)
    return y, stats(layer)


def evaluate(layer, x):
    return call(layer, x, use_running_average=True)


def dtypes_of(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


# --- Signatures, attributes, variables --------------------------------------------------------------------------------


def test_constructor_has_flax_names_order_and_defaults():
    ours, stock = (list(inspect.signature(norm.__init__).parameters.values()) for norm in (OURS, STOCK))
    assert [(p.name, p.kind) for p in ours[: len(stock)]] == [(p.name, p.kind) for p in stock]
    assert stock[-1].name == "scale_metadata"
    for our_one, stock_one in zip(ours, stock, strict=False):
        if not stock_one.name.endswith("_init"):
            assert our_one.default == stock_one.default, our_one.name
    *added, of_method = ours[len(stock) :]
    assert [p.name for p in added] == ["activation", "allow_single_value", "autodiff"]
    assert all(p.kind is p.KEYWORD_ONLY for p in added) and of_method.kind is of_method.VAR_KEYWORD


def test_call_has_the_signature_of_flax_with_a_residual_and_a_domain():
    ours, stock = (list(inspect.signature(norm.__call__).parameters.values()) for norm in (OURS, STOCK))
    assert [(p.name, p.default, p.kind) for p in ours[:4]] == [(p.name, p.default, p.kind) for p in stock]
    assert [p.name for p in ours[4:]] == ["residual", "domain"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_scale": False},
        {"use_bias": False},
        {"use_scale": False, "use_bias": False},
        {"param_dtype": jnp.bfloat16, "dtype": jnp.float16},
        {"axis": 1, "momentum": 0.9, "epsilon": 1e-3, "use_fast_variance": False, "axis_name": "i"},
        {"use_running_average": None},
        {"scale_metadata": {"note": "gamma"}, "bias_metadata": {"note": "beta"}},
    ],
    ids=lambda fields: ", ".join(fields),
)
def test_attributes_and_variables_are_identical(fields):
    ours, stock = both(lambda norm: norm(4, rngs=nnx.Rngs(7), **RANDOM, **fields))
    for name in inspect.signature(STOCK).parameters:
        if hasattr(stock, name) and name not in ("scale", "bias"):
            assert getattr(ours, name) == getattr(stock, name), name
    for name in ("mean", "var", "scale", "bias"):
        our_variable, stock_variable = getattr(ours, name), getattr(stock, name)
        assert type(our_variable) is type(stock_variable), name
        if stock_variable is not None:
            assert our_variable.get_metadata() == stock_variable.get_metadata()
    chex.assert_trees_all_equal(values(ours), values(stock), strict=True)
    assert isinstance(ours.mean, nnx.BatchStat) and isinstance(ours.var, nnx.BatchStat)


@pytest.mark.parametrize("fields, keys", [({}, 2), ({"use_scale": False}, 1), ({"use_bias": False}, 1)], ids=str)
def test_keys_are_drawn_for_the_scale_first_and_then_for_the_bias(fields, keys):
    def drawn(norm):
        rngs, seen = nnx.Rngs(params=3), []
        note = lambda key, shape, dtype: seen.append(jax.random.key_data(key)) or jnp.zeros(shape, dtype)
        norm(4, rngs=rngs, scale_init=note, bias_init=note, **fields)
        return seen, rngs.params.count[...]

    ours, stock = both(drawn)
    chex.assert_trees_all_equal(ours, stock)
    assert ours[1] == keys == len(ours[0])


def test_partitioned_params_keep_their_metadata():
    boxed = {name: nnx.with_partitioning(NORMAL, ("model",)) for name in RANDOM}
    with jax.set_mesh(jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
        ours, stock = both(lambda norm: nnx.state(norm(4, rngs=nnx.Rngs(0), **boxed)))
        assert nnx.get_partition_spec(ours) == nnx.get_partition_spec(stock)
        assert nnx.get_partition_spec(ours)["scale"].get_value() == P("model")


@pytest.mark.parametrize("number", [np.int64(4), np.int32(4)], ids=repr)
def test_number_of_features_may_be_a_numpy_integer(number):
    ours, stock = both(lambda norm: values(norm(number, rngs=nnx.Rngs(0))))
    chex.assert_trees_all_equal(ours, stock, strict=True)


@pytest.mark.parametrize("momentum", [np.float32(0.9), jnp.float32(0.9)], ids=["NumPy", "array"])
def test_momentum_may_be_an_array(momentum):
    ours, stock = both(lambda norm: train(trained(norm, momentum=momentum, use_fast_variance=False), normal(8, 4)))
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)


def test_eval_shape_makes_an_abstract_layer():
    def abstract(norm):
        return values(nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), trained(norm))))

    ours, stock = both(abstract)
    assert jax.tree.map(str, ours) == jax.tree.map(str, stock)
    assert isinstance(ours["layers"][1]["mean"], jax.ShapeDtypeStruct)


def test_float_dtypes_only():
    for norm in (OURS, STOCK):
        with pytest.raises(ValueError, match="inexact"):
            norm(4, dtype=jnp.int32, rngs=nnx.Rngs(0))(normal(8, 4))


def test_table_of_a_layer():
    """Flax overwrites the public methods of a class for this, and puts them back."""

    def table(norm):
        class BatchNorm(norm):  # so that a failure harms no other test
            pass

        layer = BatchNorm(4, rngs=nnx.Rngs(0))
        text = nnx.tabulate(layer, jnp.ones((8, 4)), console_kwargs={"width": 200, "force_terminal": False})
        layer(normal(8, 4))
        return text

    ours, stock = both(table)
    assert ours == stock


# --- Flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [OURS, STOCK], ids=["ours", "flax"])
@pytest.mark.parametrize("argument", [None, True, False])
@pytest.mark.parametrize("attribute", [True, False])
def test_flag_of_the_call_wins_over_the_attribute(norm, attribute, argument):
    layer = norm(4, use_running_average=attribute, rngs=nnx.Rngs(0))
    layer(normal(8, 4), use_running_average=argument)
    assert (layer.mean[...] == 0).all() == (attribute if argument is None else argument)


@pytest.mark.parametrize("norm", [OURS, STOCK], ids=["ours", "flax"])
def test_train_eval_and_view_set_the_attribute(norm):
    model = nnx.Sequential(norm(4, use_running_average=None, rngs=nnx.Rngs(0)))
    layer = model.layers[0]
    model.eval()
    assert layer.use_running_average is True
    model.train()
    assert layer.use_running_average is False
    view = nnx.view(model, use_running_average=True)
    assert (layer.use_running_average, view.layers[0].use_running_average) == (False, True)
    view(normal(8, 4))
    assert (layer.mean[...] == 0).all()
    nnx.view(view, use_running_average=False)(normal(8, 4))  # views share their variables
    assert (layer.mean[...] != 0).all()
    with pytest.raises(ValueError, match="Unused keys"):
        nnx.view(model, use_running_mean=True)


@pytest.mark.parametrize("norm", [OURS, STOCK], ids=["ours", "flax"])
def test_flag_given_nowhere_is_an_error_that_names_the_ways(norm):
    layer = norm(4, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"(?s)No `use_running_average`.*constructor.*call.*nnx\.view"):
        layer(normal(8, 4))


def test_missing_rngs_are_an_error():
    for norm in (OURS, STOCK):
        with pytest.raises(TypeError, match="rngs"):
            norm(4)


# --- Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.sample(every=4)
@pytest.mark.parametrize(
    "shape, fields, masked",
    [
        ((16, 4), {}, False),
        ((16, 4), {}, True),
        ((4, 3, 5, 4), {}, True),
        ((16, 4), {"use_scale": False}, False),
        ((16, 4), {"use_bias": False}, False),
        ((16, 4), {"use_scale": False, "use_bias": False}, True),
        ((8, 4, 5), {"axis": 1}, False),
        ((8, 5, 4, 2), {"axis": -2}, True),
        ((16, 4), {"epsilon": 0.1, "momentum": 0.0}, False),
    ],
    ids=str,
)
def test_training_gives_the_numbers_of_flax(shape, fields, masked):
    """Outputs, gradients and statistics in both of our forms, against Flax's two-pass variance."""
    x, target = normal(*shape), normal(*shape, seed=1)
    mask = normal(*shape, seed=2) > -1 if masked else None

    def step(norm, fast=False):
        graphdef, params, rest = nnx.split(trained(norm, use_fast_variance=fast, **fields), nnx.Param, ...)

        @jax.jit
        def step(params, x):
            def loss(params, x):
                layer = nnx.merge(graphdef, params, rest, copy=True)
                y = layer(x, mask=mask)
                return (jnp.tanh(y) * target).sum(), (y, stats(layer))

            (dparams, dx), aux = jax.grad(loss, (0, 1), has_aux=True)(params, x)
            return dx, jax.tree.map(lambda g: g / np.sqrt(x.size), nnx.to_pure_dict(dparams)), aux  # all of order 1

        return step(params, x)

    ours, stock = both(step)
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_close(step(OURS, fast=True), stock, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_equal_dtypes(ours, stock)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fields", [{}, {"use_scale": False}, {"use_bias": False}], ids=str)
def test_evaluation_is_equal_to_the_last_bit(fields, dtype, jit):
    x = jnp.asarray(3 + 2 * normal(64, 4), dtype)
    layers = both(lambda norm: trained(norm, **fields))

    def evaluate(layers, x):  # of both, in one program: two would round as they like
        return [layer(x, use_running_average=True) for layer in layers]

    with jax.numpy_dtype_promotion("standard"):  # which Flax's layer needs
        ours, stock = (nnx.jit(evaluate) if jit else evaluate)(layers, x)
    chex.assert_trees_all_equal(ours, stock, strict=True)


@pytest.mark.parametrize("convert", [np.int32, np.bool_, np.float64], ids=lambda t: t.__name__)
def test_input_of_any_type_is_normalized_in_float32(convert):
    x = np.asarray(5 * normal(16, 4)).astype(convert)
    x = x if convert is np.float64 else jnp.asarray(x)
    ours, stock = both(lambda norm: train(trained(norm, use_fast_variance=False), x))
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_equal_dtypes(ours, stock)


def test_complex_input_is_evaluated_as_in_flax():
    x = (normal(16, 4) + 1j * normal(16, 4, seed=1)).astype(np.complex64)
    ours, stock = both(lambda norm: evaluate(trained(norm), x))
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)


def test_complex_training_is_that_of_linen():
    """Complex mean and real variance; Flax's NNX layer cannot store such a mean."""
    x = (normal(16, 4) + 1j * normal(16, 4, seed=1)).astype(np.complex64)
    y, found = train(OURS(4, param_dtype=jnp.complex64, rngs=nnx.Rngs(0)), x)
    linen = nn.BatchNorm(False, param_dtype=jnp.complex64, use_fast_variance=False)
    with jax.numpy_dtype_promotion("standard"):
        expected, updates = linen.apply(linen.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    chex.assert_trees_all_close((y, found), (expected, updates["batch_stats"]), rtol=ROUNDING, atol=ROUNDING)
    assert dtypes_of(found) == {"mean": jnp.complex64, "var": jnp.float32}
    with pytest.raises(TypeError, match="complex"):
        train(OURS(4, rngs=nnx.Rngs(0)), x)


@pytest.mark.parametrize("shape", [(8, 1), (8, 4), (1, 4), (4,), ()], ids=str)
def test_mask_of_booleans(shape):
    mask = normal(*shape, seed=2) > -0.5 if 8 in shape else np.ones(shape, bool)
    ours, stock = both(lambda norm: train(trained(norm, use_fast_variance=False), normal(8, 4), mask))
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("mask", [np.arange(8)[:, None] > 3, np.zeros((1, 1), bool), np.ones(8, bool)], ids=np.shape)
def test_mask_is_ignored_in_evaluation(mask):
    """Even one that does not fit."""
    ours, stock = both(lambda norm: call(trained(norm), normal(8, 4), True, mask=mask))
    np.testing.assert_array_equal(ours, stock)


@pytest.mark.parametrize("norm", [OURS, STOCK], ids=["ours", "flax"])
@pytest.mark.parametrize("shape", [(8,), (1, 8, 4), (3, 4)], ids=str)
def test_mask_that_does_not_broadcast_is_an_error(norm, shape):
    with pytest.raises(ValueError, match="broadcast"):
        norm(4, rngs=nnx.Rngs(0))(normal(8, 4), mask=np.ones(shape, bool))


# --- Devices ----------------------------------------------------------------------------------------------------------


def functional(layer, **arguments):
    """`step(state, x) -> (new statistics, y)` and the state: the form that jax's own transformations take."""
    graphdef, state = nnx.split(layer)

    def step(state, x):
        layer = nnx.merge(graphdef, state, copy=True)
        y = layer(x, **arguments)
        return stats(layer), y

    return step, state


@pytest.mark.parametrize("way", ["pmap", "shard_map", "shard_map unchecked", "vmap"])
def test_axis_name_spreads_the_batch(way):
    x = normal(16, 4)
    ours, stock = both(lambda norm: run(way, *functional(trained(norm, axis_name=AXIS, use_fast_variance=False)), x))
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_close(ours, train(trained(OURS), x)[::-1], rtol=ROUNDING, atol=ROUNDING)


def test_axis_index_groups_under_pmap():
    groups = ((0, 1, 2, 3), (4, 5, 6, 7))  # Flax's layer could not be split if these were lists

    def step(norm):
        step, state = functional(trained(norm, axis_name=AXIS, axis_index_groups=groups, use_fast_variance=False))
        return jax.pmap(lambda x: step(state, x), axis_name=AXIS)(shards(normal(16, 4)))

    ours, stock = both(step)
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("norm", [OURS, STOCK], ids=["ours", "flax"])
def test_an_unbound_axis_is_an_error_in_training_alone(norm):
    layer = norm(4, axis_name="nowhere", rngs=nnx.Rngs(0))
    layer(normal(8, 4), use_running_average=True)
    with pytest.raises(NameError, match="unbound axis name: nowhere"):
        layer(normal(8, 4))


# --- Inside other modules and transformations -------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, norm, *, rngs, **fields):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = norm(4, rngs=rngs, use_fast_variance=False, **RANDOM, **fields)

    def __call__(self, x):
        return jnp.tanh(self.norm(self.linear(x)))


def make_stack(norm):
    return nnx.vmap(lambda rngs: Block(norm, rngs=rngs))(nnx.Rngs(0).split(3))


# How a model is run: (model, x) -> y.
def run_plainly(model, x):
    return model(x)


def run_split_and_merged(model, x):
    graphdef, state = nnx.split(model)

    @jax.checkpoint
    def pure(state, x):
        merged = nnx.merge(graphdef, state)
        y = merged(x)
        return y, nnx.state(merged)

    y, state = pure(state, x)
    nnx.update(model, state)
    return y


def run_as_layers(stack, x):
    return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack)


def run_as_ensemble(stack, x):
    return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(stack, x)


def run_as_ensemble_by_kind(stack, x):
    axes = nnx.StateAxes({nnx.Param: 0, nnx.BatchStat: 0, ...: None})
    return nnx.vmap(lambda block, x: block(x), in_axes=(axes, None))(stack, x)


def run_over_an_axis(model, x):
    axes = nnx.StateAxes({...: None})
    spread = nnx.vmap(lambda block, x: block(x), in_axes=(axes, 0), axis_name="rows")
    return spread(model, x.reshape(4, -1, 4))


# How it is made and run.
WRAPPERS = {
    "sequential": (lambda norm: nnx.Sequential(Block(norm, rngs=nnx.Rngs(0)), nnx.relu), run_plainly),
    "jit": (lambda norm: Block(norm, rngs=nnx.Rngs(0)), nnx.jit(run_plainly)),
    "remat": (lambda norm: Block(norm, rngs=nnx.Rngs(0)), nnx.remat(run_plainly)),
    "split and merge": (lambda norm: Block(norm, rngs=nnx.Rngs(0)), run_split_and_merged),
    "cond": (
        lambda norm: Block(norm, rngs=nnx.Rngs(0)),
        lambda model, x: nnx.cond(x.sum() < 1e6, run_plainly, lambda model, x: x, model, x),
    ),
    "view": (
        lambda norm: Block(norm, rngs=nnx.Rngs(0)),
        lambda model, x: nnx.view(model, use_running_average=model.norm.use_running_average)(x),
    ),
    "scan over layers": (make_stack, run_as_layers),
    "ensemble": (make_stack, run_as_ensemble),
    "ensemble by kind": (make_stack, run_as_ensemble_by_kind),
    "vmap with axis name": (lambda norm: Block(norm, rngs=nnx.Rngs(0), axis_name="rows"), run_over_an_axis),
}


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("make, forward", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_works_in(make, forward):
    x = jnp.asarray(normal(16, 4))

    def steps(norm):
        model = make(norm)
        start = values(model)

        @nnx.jit
        def step(model, x):
            def loss(model):
                y = forward(model, x)
                return jnp.square(y - 0.3).mean(), y

            (_, y), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
            return y, nnx.to_pure_dict(gradients)

        result = step(model, x)
        model.eval()
        return start, (result, values(model), forward(model, x))

    ours, stock = both(steps)
    chex.assert_trees_all_equal(ours[0], stock[0], strict=True)
    # Rounding grows through the layers that are stacked.
    chex.assert_trees_all_close(ours[1], stock[1], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal_dtypes(ours, stock)
    moved = [(a != b).any() for a, b in zip(*map(jax.tree.leaves, (ours[0], ours[1][1])), strict=True)]
    assert any(moved)


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        self.convs = nnx.List([nnx.Conv(i, 4, (3, 3), rngs=rngs) for i in (1, 4)])
        self.norms = nnx.List([norm(4, use_fast_variance=False, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def test_unchanged_training_loop_has_the_losses_of_flax():
    images, labels = normal(5, 8, 6, 6, 1), np.random.default_rng(1).integers(0, 3, (5, 8))

    def loop(norm):
        model = Net(norm, nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
        traces = []

        @nnx.jit
        def step(model, optimizer, x, labels):
            traces.append(None)

            def loss(model):
                return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

            value, gradients = nnx.value_and_grad(loss)(model)
            optimizer.update(model, gradients)
            return value

        losses = [step(model, optimizer, x, y) for x, y in zip(images, labels, strict=True)]
        model.eval()
        return np.asarray(losses), model(images[0]), len(traces)

    ours, stock = both(loop)
    assert ours[2] == stock[2] == 1
    np.testing.assert_allclose(ours[0], stock[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], stock[1], rtol=1e-4, atol=1e-5)
    assert np.ptp(ours[0]) > 0.05


@pytest.mark.parametrize("source, target", [(STOCK, OURS), (OURS, STOCK)], ids=["from Flax", "to Flax"])
def test_state_is_transferred(source, target):
    x = normal(8, 6, 6, 1)
    with jax.numpy_dtype_promotion("standard"):
        given, taken = Net(source, nnx.Rngs(0)), Net(target, nnx.Rngs(1))
        given(x)
        state = nnx.state(given)
        kinds = [[(path, type(v)) for path, v in nnx.to_flat_state(nnx.state(net))] for net in (given, taken)]
        assert kinds[0] == kinds[1]
        nnx.update(taken, state)
        outputs = [jax.jit(run_plainly)(nnx.view(net, use_running_average=True), x) for net in (taken, given)]
    np.testing.assert_array_equal(*outputs)


def test_split_merge_and_update_round_trip():
    layer, x = trained(OURS), normal(8, 4)
    graphdef, params, rest = nnx.split(layer, nnx.Param, nnx.BatchStat)
    merged = nnx.merge(graphdef, params, rest, copy=True)
    assert nnx.graphdef(merged) == graphdef
    y, after = train(merged, x)
    assert (layer.mean[...] != after["mean"]).all()
    nnx.update(layer, nnx.state(merged, nnx.BatchStat))
    chex.assert_trees_all_equal(values(layer), values(merged))
    np.testing.assert_array_equal(evaluate(layer, x), evaluate(merged, x))


# --- Graphs -----------------------------------------------------------------------------------------------------------

ARGUMENTS = [
    {},
    {"momentum": 0.9},
    {"momentum": None},
    {"axis": [1, 2]},
    {"activation": jax.nn.relu},
    {"axis_name": "i", "axis_index_groups": [[0, 1], [2, 3]]},
    {"epsilon": 1e-3},
    {"autodiff": True},
    {"allow_single_value": True},
    {"use_running_average": True},
]
AVERAGES = [
    lambda: jaxbn.constant(0.9, debias=True),
    lambda: jaxbn.constant(0.8, debias=True),
    jaxbn.cumulative,
    lambda: jaxbn.horizon(100),
    lambda: jaxbn.scheduled(half),
]


def half(step):
    return 0.5 + 0 * step


MAKERS = [functools.partial(OURS, 4, **arguments) for arguments in ARGUMENTS]
MAKERS += [lambda rngs, make=make: OURS(4, momentum=make(), rngs=rngs) for make in AVERAGES]


def test_graphs_are_equal_for_equal_arguments_and_for_no_others():
    graphs = [[nnx.graphdef(make(rngs=nnx.Rngs(0))) for make in MAKERS] for _ in range(2)]
    for i, first in enumerate(graphs[0]):
        for j, second in enumerate(graphs[1]):
            assert (first == second) == (i == j), (i, j)
        assert hash(first) == hash(graphs[1][i])


@pytest.mark.parametrize("make", [MAKERS[0], MAKERS[4], *MAKERS[len(ARGUMENTS) :]])
def test_equal_models_share_a_compiled_program(make):
    traces = []

    @nnx.jit
    def step(layer, x):
        traces.append(None)
        return layer(x)

    for _ in range(2):
        step(make(rngs=nnx.Rngs(0)), normal(8, 4))
    assert len(traces) == 1


# --- The closed list of deviations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False], ids=["one-pass", "two-pass"])
def test_deviation_1_variance_far_from_zero_keeps_its_digits(fast):
    x = 1e4 + normal(256, 4)
    ours, stock = both(lambda norm: train(trained(norm, momentum=0.0, use_fast_variance=fast), x)[1]["var"])
    exact = np.float64(x).var(0)
    np.testing.assert_allclose(ours, exact, rtol=1e-5)
    assert fast == (np.abs(stock / exact - 1).max() > 0.1)


@pytest.mark.parametrize("convert", [np.float32, np.int32, np.ndarray.tolist], ids=["float", "int", "list"])
def test_deviation_2_mask_may_weigh(convert):
    x, weights = normal(8, 4), np.array([2, 1, 1, 0, 3, 1, 1, 1])
    repeated = np.repeat(x, weights, 0)
    layer = OURS(4, momentum=0.0, rngs=nnx.Rngs(0))
    layer(x, mask=convert(weights[:, None]))
    np.testing.assert_allclose(layer.mean[...], repeated.mean(0), atol=1e-6)
    np.testing.assert_allclose(layer.var[...], repeated.var(0), rtol=1e-5)
    with pytest.raises(ValueError, match="boolean"):
        STOCK(4, rngs=nnx.Rngs(0))(x, mask=jnp.asarray(weights[:, None]))


@pytest.mark.parametrize("way", ["pmap", "shard_map", "vmap"])
def test_deviation_2_masked_counts_are_summed_over_devices(way):
    x, valid = normal(2 * DEVICES, 4), np.arange(2 * DEVICES)[:, None] % 3 > 0
    valid[:2] = False  # a shard without a valid row
    subset = x[valid[:, 0]]
    graphdef, state = nnx.split(trained(OURS, momentum=0.0, axis_name=AXIS))

    def step(state, batch):
        layer = nnx.merge(graphdef, state)
        y = layer(batch[0], mask=batch[1])
        return stats(layer), y

    found, y = run(way, step, state, (x, valid))
    np.testing.assert_allclose(found["mean"], subset.mean(0), atol=1e-6)
    np.testing.assert_allclose(found["var"], subset.var(0), rtol=1e-5)
    np.testing.assert_allclose(y[valid[:, 0]], train(trained(OURS), subset)[0], atol=1e-5)


def test_deviation_2_batch_that_is_masked_altogether_changes_nothing():
    x, nothing = normal(8, 4), np.zeros((8, 1), bool)
    (y, ours), (y_stock, stock) = both(lambda norm: train(trained(norm), x, nothing))
    chex.assert_trees_all_equal(ours, stats(trained(OURS)))
    np.testing.assert_allclose(y, evaluate(trained(OURS), x), atol=ROUNDING)
    assert np.isnan(y_stock).all() and np.isnan(stock["mean"]).all()


@pytest.mark.parametrize("rows, fields", [((1, 4), {}), ((4,), {})], ids=str)
def test_deviation_3_one_value_per_channel_is_an_error_in_training_alone(rows, fields):
    x = normal(*rows)
    with pytest.raises(ValueError, match="allow_single_value=True"):
        trained(OURS)(x)
    (y, found), (y_stock, stock) = both(
        lambda norm: train(trained(norm, **({"allow_single_value": True} if norm is OURS else {})), x)
    )
    np.testing.assert_allclose(y, y_stock, atol=ROUNDING)
    chex.assert_trees_all_close(found, stock, rtol=ROUNDING)
    np.testing.assert_array_equal(*both(lambda norm: evaluate(trained(norm), x)))


@pytest.mark.parametrize("use_running_average", [True, False], ids=["eval", "train"])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16], ids=["", "params bfloat16"])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16], ids=["", "to float32", "to bfloat16"])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_deviation_4_dtypes_of_all_results_are_those_of_linen(x_dtype, dtype, param_dtype, use_running_average):
    for affine in (False, True):
        fields = {"use_scale": affine, "use_bias": affine, "dtype": dtype, "param_dtype": param_dtype}
        fields |= {"use_running_average": use_running_average}

        def ours(x, fields=fields):
            layer = OURS(4, rngs=nnx.Rngs(0), **fields)
            y = layer(x)
            return y, stats(layer), values(layer, nnx.Param)

        def linen(x, fields=fields):
            y, variables = nn.BatchNorm(**fields).init_with_output(jax.random.key(0), x)
            return y, variables["batch_stats"], variables.get("params", {})

        x = jax.ShapeDtypeStruct((8, 4), x_dtype)
        with jax.numpy_dtype_promotion("standard"):
            expected = jax.eval_shape(linen, x)
        assert jax.tree.map(str, jax.eval_shape(ours, x)) == jax.tree.map(str, expected)


def test_deviation_4_stored_statistics_are_not_rounded():
    """With dtype=bfloat16 Flax's NNX layer evaluates with a mean of 8 bits, and linen and ours with one of 24."""
    x = normal(8, 4)

    def evaluated(norm):
        layer = norm(4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        layer.mean[...] = jnp.full(4, 100.3)
        return np.float64(evaluate(layer, x + np.float32(100.3)))

    ours, stock = both(evaluated)
    exact = np.float64(x) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(ours, exact, rtol=2**-8, atol=1e-4)
    assert np.abs(stock - exact).max() > 0.1


def test_deviation_4_statistics_are_those_of_the_input_as_it_is():
    x = 100 + normal(64, 4)
    ours, stock = both(lambda norm: train(trained(norm, dtype=jnp.bfloat16, momentum=0.0), x))
    exact = np.float64(x)
    np.testing.assert_allclose(ours[1]["mean"], exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(ours[1]["var"], exact.var(0), rtol=1e-5)
    assert ours[0].dtype == stock[0].dtype == jnp.bfloat16
    assert np.abs(stock[1]["var"] / exact.var(0) - 1).max() > 1e-3


def test_deviation_4_half_precision_without_params_stays_half_precision():
    x, fields = jnp.asarray(normal(8, 4), jnp.bfloat16), {"use_scale": False, "use_bias": False}
    ours, stock = both(lambda norm: evaluate(trained(norm, **fields), x))
    assert (ours.dtype, stock.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(ours, stock.astype(jnp.bfloat16))


def test_deviation_5_no_gradient_flows_into_the_statistics():
    x = normal(8, 4)
    layer = trained(OURS)
    step, state = functional(layer)
    evaluated, _ = functional(layer, use_running_average=True)
    statistics = nnx.state(layer, nnx.BatchStat)

    def stored(statistics, x):
        return sum(leaf.sum() for leaf in jax.tree.leaves(step(nnx.merge_state(state, statistics), x)[0]))

    def output(statistics):
        return jnp.square(evaluated(nnx.merge_state(state, statistics), x)[1]).sum()

    for gradient in jax.tree.leaves((jax.grad(stored, (0, 1))(statistics, x), jax.grad(output)(statistics))):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_deviation_5_statistics_that_are_not_finite_are_not_stored(bad):
    x = normal(8, 4)
    clean = train(trained(OURS), x)[1]
    x[3, 2] = bad
    (y, ours), (_, stock) = both(lambda norm: train(trained(norm), x))
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf[2], stats(trained(OURS))[name][2])
        np.testing.assert_allclose(np.delete(leaf, 2), np.delete(clean[name], 2), rtol=1e-6)
    assert np.isnan(y[:, 2]).all() and np.isfinite(np.delete(y, 2, 1)).all()
    assert not np.isfinite(stock["var"][2])


def test_deviation_6_forward_mode_needs_autodiff():
    x, direction = normal(8, 4), normal(8, 4, seed=1)

    def tangent(norm, **fields):
        step, state = functional(trained(norm, use_fast_variance=False, **fields))
        return jax.jvp(lambda x: step(state, x)[1], (x,), (direction,))[1]

    with pytest.raises(TypeError, match="forward-mode"):
        tangent(OURS)
    ours, stock = both(lambda norm: tangent(norm, **({"autodiff": True} if norm is OURS else {})))
    np.testing.assert_allclose(ours, stock, atol=ROUNDING)


def test_deviation_7_statistics_keep_the_dtype_they_are_stored_in():
    layer = trained(OURS)
    exact = train(trained(OURS), normal(8, 4))[1]
    for variable in (layer.mean, layer.var):
        variable.set_value(variable[...].astype(jnp.bfloat16))
    _, found = train(layer, normal(8, 4))
    for name, leaf in found.items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(leaf), exact[name], rtol=2**-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_deviation_7_nan_in_masked_positions_harms_no_gradient(bad):
    x, valid = normal(8, 4), np.arange(8)[:, None] < 6
    graphdef, params, rest = nnx.split(trained(OURS), nnx.Param, ...)

    def loss(params, x):
        y = nnx.merge(graphdef, params, rest, copy=True)(x, mask=valid)
        return jnp.where(valid, jnp.square(y - 0.3), 0).mean()

    gradients = jax.jit(jax.grad(loss, (0, 1)))
    clean, harmed = gradients(params, x), gradients(params, np.where(valid, x, np.float32(bad)))
    chex.assert_trees_all_close(harmed[0], clean[0], rtol=1e-6)
    np.testing.assert_allclose(harmed[1][:6], clean[1][:6], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_deviation_7_groups_given_as_lists_work_under_shard_map():
    groups, x = [[0, 2, 4, 6], [1, 3, 5, 7]], normal(2 * DEVICES, 4)
    step, state = functional(trained(OURS, axis_name=AXIS, axis_index_groups=groups))
    mapped = jax.shard_map(lambda x: step(state, x)[1], mesh=mesh(), in_specs=P(AXIS), out_specs=P(AXIS))
    y = np.asarray(mapped(x)).reshape(DEVICES, 2, 4)
    for group in groups:
        expected = train(trained(OURS), x.reshape(DEVICES, 2, 4)[group])[0]
        np.testing.assert_allclose(y[group], expected, rtol=ROUNDING, atol=ROUNDING)
