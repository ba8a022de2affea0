"""`jaxbn.linen.BatchNorm` is `flax.linen.BatchNorm`, up to the closed list of deviations, which comes last.

Stock Flax is the oracle. It runs with JAX's standard dtype promotion, as it needs; ours runs with the strict one.
"""

import functools
import inspect

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from layers import normal
from meshes import AXIS, DEVICES, mesh, run, shards

import jaxbn.linen

STOCK, OURS = nn.BatchNorm, jaxbn.linen.BatchNorm
KEY = jax.random.key(0)
# The numbers of float32 data of order 1, computed in another order: a few units in the last place.
ROUNDING = 2e-6

NORMAL = nn.initializers.normal(0.2)
both = functools.partial(layers.both, stock=STOCK, ours=OURS)
RANDOM = {"scale_init": lambda *arguments: 1 + NORMAL(*arguments), "bias_init": NORMAL}


def trained(shape=(8, 4), axis=-1):
    """Variables that are not the initial ones, for an input of this shape."""
    features = tuple(shape[a] for a in np.unique(np.arange(len(shape))[np.asarray(axis)]))
    scale, bias, mean, var = 0.2 * normal(4, *features, seed=3)
    return {"params": {"scale": 1 + scale, "bias": bias}, "batch_stats": {"mean": 0.3 + mean, "var": 1.7 + var}}


def train(layer, variables, x, **arguments):
    """(y, new batch_stats) of one training call."""

    @jax.jit
    def train(variables, x):
        return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"], **arguments)

    y, updates = train(variables, x)
    return y, updates["batch_stats"]


def dtypes_of(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


# --- Fields and signatures ------------------------------------------------------------------------------------------


def test_fields_have_flax_names_order_and_defaults():
    ours, stock = (
        [p for p in inspect.signature(norm).parameters.values() if p.name not in ("name", "parent")]
        for norm in (OURS, STOCK)
    )
    described = [[(p.name, p.default, p.kind) for p in fields] for fields in (ours, stock)]
    assert described[0][: len(stock)] == described[1]
    assert stock[-1].name == "force_float32_reductions"
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(stock) :])
    assert ours[-1].name == "autodiff"
    assert {"name", "parent"} <= inspect.signature(OURS).parameters.keys()


def test_fields_may_be_given_by_position():
    values = (False, 1, 0.9, 1e-3, jnp.bfloat16, jnp.float16, False, True, NORMAL, NORMAL, "i", [[0, 1]], False, True)
    layers = both(lambda norm: norm(*values, name="here"))
    for field in inspect.signature(STOCK).parameters:
        assert getattr(layers[0], field) == getattr(layers[1], field), field


def test_call_has_the_signature_of_flax_with_a_residual_and_a_domain():
    ours, stock = (list(inspect.signature(norm.__call__).parameters.values()) for norm in (OURS, STOCK))
    assert [(p.name, p.default, p.kind) for p in ours[:4]] == [(p.name, p.default, p.kind) for p in stock]
    assert [p.name for p in ours[4:]] == ["residual", "domain"]


@pytest.mark.parametrize("given", [(None, None), (True, True), (False, True)], ids=["never", "twice", "contradiction"])
def test_use_running_average_must_be_given_once(given):
    field, argument = given
    messages = []
    for norm in (OURS, STOCK):
        with pytest.raises(ValueError, match="use_running_average") as error:
            norm(use_running_average=field).init(KEY, jnp.ones((8, 4)), use_running_average=argument)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("norm", [OURS, STOCK], ids=["ours", "flax"])
def test_training_needs_mutable_statistics(norm):
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        norm().apply(trained(), normal(8, 4), use_running_average=False)


@pytest.mark.parametrize("norm", [OURS, STOCK], ids=["ours", "flax"])
def test_missing_statistics_are_an_error_unless_mutable(norm):
    params = {"params": trained()["params"]}
    with pytest.raises(flax.errors.ScopeCollectionNotFound):
        norm(use_running_average=True).apply(params, normal(8, 4))
    _, stats = train(norm(), params, normal(8, 4))
    np.testing.assert_allclose(stats["mean"], 0.01 * normal(8, 4).mean(0), atol=1e-7)


def test_float_dtypes_only():
    for norm in (OURS, STOCK):
        with pytest.raises(ValueError, match="inexact"):
            norm(use_running_average=True, dtype=jnp.int32).apply(trained(), normal(8, 4))


# --- Variables --------------------------------------------------------------------------------------------------------


@pytest.mark.sample(every=2)
@pytest.mark.parametrize(
    "shape, fields",
    [
        ((8, 4), {}),
        ((8, 4), {"param_dtype": jnp.bfloat16}),
        ((8, 4), {"use_scale": False}),
        ((8, 4), {"use_bias": False}),
        ((8, 4), {"use_scale": False, "use_bias": False}),
        ((3, 4, 5), {"axis": 1}),
        ((3, 4, 5), {"axis": -2}),
        ((3, 4, 5), {"axis": (2, 1)}),
        ((3, 4, 5), {"axis": [-1, 1]}),
        ((4, 5), {"axis": (0, 1)}),
        ((4,), {}),
    ],
    ids=str,
)
def test_variables_are_identical(shape, fields):
    ours, stock = both(lambda norm: norm(use_running_average=False, **RANDOM, **fields).init(KEY, jnp.ones(shape)))
    chex.assert_trees_all_equal(ours, stock, strict=True)


def test_layers_are_named_as_in_flax():
    ours, stock = both(
        lambda norm: nn.Sequential([nn.Dense(3), norm(True), norm(True), norm(True, name="own")]).init(
            KEY, normal(8, 4)
        )
    )
    chex.assert_trees_all_equal(ours, stock, strict=True)

    class Net(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            return self.norm(True)(self.norm(True)(x))

    variables, _ = both(lambda norm: Net(norm).init(KEY, normal(8, 4)))
    assert set(variables["batch_stats"]) == {"BatchNorm_0", "BatchNorm_1"}


@pytest.mark.parametrize("axis", [np.int64(1), (1, -1), range(1, 2)], ids=repr)
def test_axis_may_be_whatever_flax_takes(axis):
    ours, stock = both(lambda norm: norm(False, axis=axis).init(KEY, normal(8, 4)))
    chex.assert_trees_all_equal(ours, stock, strict=True)


def test_partitioned_params_stay_boxed():
    boxed = {name: nn.with_partitioning(NORMAL, ("model",)) for name in RANDOM}
    ours, stock = both(lambda norm: norm(False, **boxed).init(KEY, normal(8, 4)))
    chex.assert_trees_all_equal(ours, stock, strict=True)
    assert isinstance(ours["params"]["scale"], nn.Partitioned)
    assert nn.get_partition_spec(ours)["params"]["scale"] == P("model")
    (y, _), (y_stock, _) = both(lambda norm: train(norm(use_fast_variance=False), ours, normal(8, 4)))
    np.testing.assert_allclose(y, y_stock, atol=ROUNDING)


def test_partitioned_statistics_stay_boxed():
    variables = trained()
    stats = {name: nn.Partitioned(leaf, names=("model",)) for name, leaf in variables["batch_stats"].items()}
    ours, stock = both(lambda norm: train(norm(), {**variables, "batch_stats": stats}, normal(8, 4))[1])
    assert jax.tree.structure(ours) == jax.tree.structure(stock)


# --- Numbers ----------------------------------------------------------------------------------------------------------

SHAPES = [
    ((16, 4), {}, False),
    ((16, 4), {}, True),
    ((4, 3, 5, 4), {}, True),
    ((16, 4), {"use_scale": False}, False),
    ((16, 4), {"use_bias": False}, False),
    ((16, 4), {"use_scale": False, "use_bias": False}, True),
    ((8, 4, 5), {"axis": 1}, False),
    ((8, 4, 5), {"axis": (1, 2)}, True),
    ((4, 8, 5), {"axis": (-1, 0)}, False),
    ((16, 4), {"epsilon": 0.1, "momentum": 0.0}, False),
]


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("shape, fields, masked", SHAPES, ids=str)
def test_training_gives_the_numbers_of_flax(shape, fields, masked):
    """Outputs, gradients and statistics in both of our forms, against Flax's two-pass variance."""
    x, target, variables = normal(*shape), normal(*shape, seed=1), trained(shape, fields.get("axis", -1))
    mask = normal(*shape, seed=2) > -1 if masked else None

    def step(norm, fast=False):
        layer = norm(use_fast_variance=fast, **fields)

        @jax.jit
        def step(params, x):
            def loss(params, x):
                y, stats = train(layer, {**variables, "params": params}, x, mask=mask)
                return (jnp.tanh(y) * target).sum(), (y, stats)

            (dparams, dx), aux = jax.grad(loss, (0, 1), has_aux=True)(params, x)
            return dx, jax.tree.map(lambda g: g / np.sqrt(x.size), dparams), aux  # all of order 1

        return step(variables["params"], x)

    ours, stock = both(step)
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_close(step(OURS, fast=True), stock, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_equal_dtypes(ours, stock)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fields", [{}, {"dtype": jnp.bfloat16}, {"use_scale": False}, {"use_bias": False}], ids=str)
def test_evaluation_is_equal_to_the_last_bit(fields, dtype, jit):
    x = jnp.asarray(3 + 2 * normal(64, 4), dtype)
    variables = trained()

    def evaluate(variables, x):
        return both(lambda norm: norm(use_running_average=True, **fields).apply(variables, x))

    ours, stock = (jax.jit(evaluate) if jit else evaluate)(variables, x)
    chex.assert_trees_all_equal(ours, stock, strict=True)


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("use_running_average", [True, False], ids=["eval", "train"])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16], ids=["", "params bfloat16"])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16], ids=["", "to float32", "to bfloat16"])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.bool_])
def test_dtypes_of_all_results(x_dtype, dtype, param_dtype, use_running_average):
    for affine in range(4):
        fields = {"use_scale": bool(affine & 1), "use_bias": bool(affine & 2), "dtype": dtype}

        def results(norm, fields=fields):
            layer = norm(param_dtype=param_dtype, **fields)

            def call(x):
                variables = layer.init(KEY, x, use_running_average=True)
                return variables, layer.apply(variables, x, use_running_average, mutable=["batch_stats"])

            return jax.eval_shape(call, jax.ShapeDtypeStruct((8, 4), x_dtype))

        ours, stock = both(results)
        assert jax.tree.map(str, ours) == jax.tree.map(str, stock)


def test_weakly_typed_input_takes_the_dtype_of_the_params():
    ours, stock = both(
        lambda norm: norm(True, param_dtype=jnp.bfloat16).init_with_output(
            KEY, jnp.broadcast_to(jnp.asarray(1.0), (8, 4))
        )[0]
    )
    assert ours.dtype == stock.dtype == jnp.bfloat16


@pytest.mark.parametrize("convert", [np.int32, np.bool_, np.float64, jnp.bfloat16], ids=lambda t: t.__name__)
def test_input_of_any_type_is_normalized_in_float32(convert):
    x = np.asarray(5 * normal(16, 4)).astype(convert)
    x = x if convert is np.float64 else jnp.asarray(x)
    ours, stock = both(lambda norm: train(norm(use_fast_variance=False), trained(), x))
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_equal_dtypes(ours, stock)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", [None, jnp.complex64], ids=["", "complex64"])
def test_complex_input(dtype, masked):
    x = (normal(16, 4) + 1j * normal(16, 4, seed=1)).astype(np.complex64)
    mask = normal(16, 1, seed=2) > -0.5 if masked else None

    def step(norm):
        layer = norm(use_fast_variance=False, dtype=dtype, momentum=0.9)
        variables = layer.init(KEY, x, use_running_average=False)

        @jax.jit
        def loss(params, x):
            y, stats = train(layer, {**variables, "params": params}, x, mask=mask)
            return jnp.square(jnp.abs(y - 1j)).mean(), (y, stats)

        value, gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)
        return value, gradients

    ours, stock = both(step)
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_equal_dtypes(ours, stock)


def test_complex_input_is_evaluated_with_real_statistics():
    """As they stand in what Flax initializes."""
    x = (normal(16, 4) + 1j * normal(16, 4, seed=1)).astype(np.complex64)
    ours, stock = both(lambda norm: norm(use_running_average=True).apply(trained(), x))
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)


def test_momentum_may_be_traced():
    def step(norm):
        layer = jax.jit(lambda m: train(norm(momentum=m, use_fast_variance=False), trained(), normal(8, 4)))
        return layer(0.0), layer(0.7)

    ours, stock = both(step)
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("traced", [False, True], ids=["array", "traced"])
def test_epsilon_may_be_an_array(traced):
    def step(norm):
        def step(epsilon):
            return train(norm(epsilon=epsilon, use_fast_variance=False), trained(), normal(8, 4))

        return (jax.jit(step) if traced else step)(jnp.float32(0.1))

    ours, stock = both(step)
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)


def test_training_normalizes_with_the_batch_and_moves_the_statistics_by_the_biased_variance():
    x = normal(4, 3, 2)
    layer = OURS(momentum=0.9, use_running_average=False)
    y, variables = layer.init_with_output(KEY, x)
    np.testing.assert_allclose(y.mean((0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose(y.var((0, 1)), 1, rtol=1e-4)  # epsilon
    _, stats = layer.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(stats["batch_stats"]["mean"], 0.1 * x.mean((0, 1)), atol=1e-7)
    np.testing.assert_allclose(stats["batch_stats"]["var"], 0.9 + 0.1 * x.var((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("norm", [OURS, STOCK], ids=["ours", "flax"])
def test_layer_called_twice_in_one_apply_moves_twice(norm):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = norm(use_running_average=False, momentum=0.5)
            layer(x)
            return layer(-2 * x)

    x = normal(8, 4)
    variables = Twice().init(KEY, x)
    _, updates = Twice().apply(variables, x, mutable=["batch_stats"])
    expected = (0.25 - 2 * 0.5) * x.mean(0)
    np.testing.assert_allclose(updates["batch_stats"]["BatchNorm_0"]["mean"], expected, atol=1e-7)


# --- Initialization, axis names ---------------------------------------------------------------------------------------


def test_initialization_leaves_the_statistics_alone_and_ignores_the_axis_name():
    """As a layer that is called twice shows, too: both calls give the same output."""

    def outputs(norm):
        class Twice(nn.Module):
            @nn.compact
            def __call__(self, x):
                layer = norm(name="norm", use_running_average=False, axis_name="nowhere", use_fast_variance=False)
                return layer(x), layer(x)

        return Twice().init_with_output(KEY, 5 + normal(8, 4))

    ((first, second), ours), ((expected, _), stock) = both(outputs)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, expected, atol=ROUNDING)
    chex.assert_trees_all_equal(ours, stock, strict=True)


@pytest.mark.parametrize(
    "initialize",
    [
        lambda layer, x: layer.lazy_init(KEY, jax.ShapeDtypeStruct(x.shape, x.dtype)),
        lambda layer, x: jax.jit(layer.init)(KEY, x),
        lambda layer, x: jax.tree.map(lambda s: jnp.zeros(s.shape), jax.eval_shape(layer.init, KEY, x)),
    ],
    ids=["lazy_init", "jit", "eval_shape"],
)
@pytest.mark.parametrize("rows", [0, 1, 8])
def test_initialization_works_on_any_number_of_rows(initialize, rows):
    ours, stock = both(lambda norm: initialize(norm(False, axis_name="nowhere"), jnp.zeros((rows, 4))))
    chex.assert_trees_all_equal(ours, stock, strict=True)


@pytest.mark.parametrize("norm", [OURS, STOCK], ids=["ours", "flax"])
def test_an_unbound_axis_is_an_error_in_training_alone(norm):
    layer = norm(axis_name="nowhere")
    layer.apply(trained(), normal(8, 4), use_running_average=True)
    with pytest.raises(NameError, match="unbound axis name: nowhere"):
        train(layer, trained(), normal(8, 4))


@pytest.mark.parametrize("rows", [0, 1])
def test_evaluation_works_on_any_number_of_rows(rows):
    ours, stock = both(lambda norm: norm(True).apply(trained(), normal(rows, 4)))
    np.testing.assert_array_equal(ours, stock)


@pytest.mark.parametrize("way", ["pmap", "shard_map", "shard_map unchecked", "vmap"])
def test_axis_name_spreads_the_batch(way):
    x, variables = normal(16, 4), trained()

    def step(norm):
        layer = norm(axis_name=AXIS, use_fast_variance=False)
        return run(way, lambda v, x: train(layer, v, x)[::-1], variables, x)

    ours, stock = both(step)
    alone = train(OURS(), variables, x)[::-1]
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)
    chex.assert_trees_all_close(ours, alone, rtol=ROUNDING, atol=ROUNDING)


def test_axis_index_groups_under_pmap():
    groups, variables = [[0, 1, 2, 3], [4, 5, 6, 7]], trained()

    def step(norm):
        layer = norm(axis_name=AXIS, axis_index_groups=groups, use_fast_variance=False)
        return jax.pmap(lambda x: train(layer, variables, x), axis_name=AXIS)(shards(normal(16, 4)))

    ours, stock = both(step)
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)


# --- Masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, convert",
    [((8, 4), np.bool_), ((1, 4), np.bool_), ((4,), np.bool_), ((), np.bool_)]
    + [((8, 1), convert) for convert in (np.bool_, np.int32, np.float32, np.ndarray.tolist)],
    ids=str,
)
def test_mask_of_zeros_and_ones(shape, convert):
    mask = convert(normal(*shape, seed=2) > -0.5 if 8 in shape else np.ones(shape, bool))
    ours, stock = both(lambda norm: train(norm(use_fast_variance=False), trained(), normal(8, 4), mask=mask))
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)


def test_masked_positions_are_normalized_too_and_nan_there_stays_out_of_the_statistics():
    x, valid = normal(4, 3, 2), np.array([[1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1]], bool)[..., None]

    def step(norm, x):
        layer = norm(momentum=0.9, use_running_average=False, use_fast_variance=False)
        y, variables = layer.init_with_output(KEY, x, mask=valid)
        return y, *train(norm(momentum=0.9, use_fast_variance=False), variables, x, mask=valid)

    chex.assert_trees_all_close(*both(lambda norm: step(norm, x)), rtol=ROUNDING, atol=ROUNDING)
    y, _, stats = step(OURS, np.where(valid, x, np.float32(np.nan)))
    np.testing.assert_allclose(np.mean(y, (0, 1), where=valid), 0, atol=1e-6)
    np.testing.assert_allclose(np.var(y, (0, 1), where=valid), 1, rtol=1e-4)
    np.testing.assert_allclose(stats["mean"], 0.1 * x.mean((0, 1), where=valid), atol=1e-7)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var((0, 1), where=valid), rtol=1e-6)


@pytest.mark.parametrize("mask", [np.arange(8)[:, None] > 3, np.zeros((1, 1), bool), np.ones(8, bool)], ids=np.shape)
def test_mask_is_ignored_in_evaluation(mask):
    """Even one that does not fit."""
    ours, stock = both(lambda norm: norm(True).apply(trained(), normal(8, 4), mask=mask))
    np.testing.assert_array_equal(ours, stock)


@pytest.mark.parametrize("norm", [OURS, STOCK], ids=["ours", "flax"])
@pytest.mark.parametrize("shape", [(8,), (1, 8, 4), (3, 4)], ids=str)
def test_mask_that_does_not_broadcast_is_an_error(norm, shape):
    with pytest.raises(ValueError, match="broadcast"):
        train(norm(), trained(), normal(8, 4), mask=np.ones(shape, bool))


# --- Inside other modules and transformations -------------------------------------------------------------------------


# Each wrapper runs inside a compact method: (layer class, x, fields of the layer) -> y.
def in_sequential(norm, x, **fields):
    return nn.Sequential([nn.Dense(4), norm(**fields), nn.relu])(x)


def in_partial(norm, x, **fields):
    make = functools.partial(norm, **fields, momentum=0.9)
    return make()(make(epsilon=1e-3)(x))


def in_setup(norm, x, **fields):
    class Net(nn.Module):
        def setup(self):
            self.dense, self.norm = nn.Dense(4), norm(**fields)

        def __call__(self, x):
            return self.norm(self.dense(x))

    return Net()(x)


def in_jit(norm, x, **fields):
    return nn.jit(norm)(**fields)(x)


def in_remat(norm, x, **fields):
    return nn.remat(norm)(**fields)(nn.Dense(4)(x))


def in_scan_over_layers(norm, x, **fields):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(norm(**fields)(nn.Dense(4)(x))), None

    options = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    return nn.scan(Block, length=3, **options)()(x, None)[0]


def in_scan_over_time(norm, x, **fields):
    layer = norm(**fields)
    if layer.is_initializing():
        return layer(x)
    options = {"variable_broadcast": "params", "variable_carry": "batch_stats", "split_rngs": {"params": False}}
    return nn.scan(lambda layer, _, x: (None, layer(x)), **options)(layer, None, x.reshape(4, -1, 4))[1]


def in_vmap(norm, x, **fields):
    options = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    return nn.vmap(norm, in_axes=None, axis_size=3, **options)(**fields)(x)


def in_vmap_with_axis_name(norm, x, **fields):
    options = {"variable_axes": {"params": None, "batch_stats": None}, "split_rngs": {"params": False}}
    return nn.vmap(norm, axis_name="batch", **options)(**fields, axis_name="batch")(x.reshape(4, -1, 4))


def in_spectral_norm(norm, x, **fields):
    return nn.SpectralNorm(nn.Sequential([nn.Dense(4), norm(**fields)]))(x, update_stats=False)


WRAPPERS = [in_sequential, in_partial, in_setup, in_jit, in_remat, in_scan_over_layers, in_scan_over_time, in_vmap]
WRAPPERS += [in_vmap_with_axis_name, in_spectral_norm]


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda wrapper: wrapper.__name__)
def test_works(wrapper):
    x = jnp.asarray(normal(16, 4))

    def steps(norm):
        class Net(nn.Module):
            train: bool

            @nn.compact
            def __call__(self, x):
                return wrapper(norm, x, use_running_average=not self.train, use_fast_variance=False, **RANDOM)

        variables = jax.jit(Net(True).init)(KEY, x)

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def step(params):
            y, updates = Net(True).apply({**variables, "params": params}, x, mutable=["batch_stats"])
            evaluated, _ = Net(False).apply({**variables, **updates}, x, mutable=["batch_stats"])
            return jnp.square(y - 0.3).mean(), (y, updates, evaluated)

        return variables, step(variables["params"])

    ours, stock = both(steps)
    chex.assert_trees_all_equal(ours[0], stock[0], strict=True)
    # Rounding grows through the layers that are stacked.
    chex.assert_trees_all_close(ours[1], stock[1], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal_dtypes(ours, stock)


def test_works_bound():
    def step(norm):
        bound = norm(use_fast_variance=False).bind(trained(), mutable="batch_stats")
        return bound(normal(8, 4), use_running_average=False), bound.variables

    ours, stock = both(step)
    chex.assert_trees_all_close(ours, stock, rtol=ROUNDING, atol=ROUNDING)


def test_works_inside_nnx():
    def outputs(norm):
        model = nnx.bridge.ToNNX(norm(use_running_average=True, **RANDOM), rngs=nnx.Rngs(0))
        nnx.bridge.lazy_init(model, normal(8, 4))
        return model(normal(8, 4)), nnx.to_pure_dict(nnx.state(model))

    ours, stock = both(outputs)
    chex.assert_trees_all_equal(ours, stock, strict=True)


@pytest.mark.parametrize("options", [{}, {"show_repeated": True}], ids=str)
def test_tables_of_a_model_are_the_same(options):
    ours, stock = both(
        lambda norm: nn.Sequential([nn.Dense(4), norm(False), norm(True)]).tabulate(KEY, jnp.ones((1, 4)), **options)
    )
    assert ours == stock


def test_table_counts_operations():
    OURS(False).tabulate(KEY, jnp.ones((8, 4)), compute_flops=True, compute_vjp_flops=True)


def test_the_call_is_the_only_method_that_others_see():
    """Interceptors and captured intermediates see what they see of Flax's layer."""

    def seen(norm):
        methods = []

        def interceptor(call, arguments, keywords, context):
            methods.append(context.method_name)
            return call(*arguments, **keywords)

        with nn.intercept_methods(interceptor):
            _, found = norm(False).apply(trained(), normal(8, 4), mutable=True, capture_intermediates=lambda *_: True)
        return methods, jax.tree.structure(found)

    ours, stock = both(seen)
    assert ours == stock


# --- The closed list of deviations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False], ids=["one-pass", "two-pass"])
def test_deviation_1_variance_far_from_zero_keeps_its_digits(fast):
    x = 1e4 + normal(256, 4)
    ours, stock = both(lambda norm: train(norm(momentum=0.0, use_fast_variance=fast), trained(), x)[1]["var"])
    exact = np.float64(x).var(0)
    np.testing.assert_allclose(ours, exact, rtol=1e-5)
    assert fast == (np.abs(stock / exact - 1).max() > 0.1)


def test_deviation_1_statistics_are_float32_whatever_force_float32_reductions_says():
    x = jnp.asarray(3 + normal(256, 4), jnp.bfloat16)
    fields = {"param_dtype": jnp.bfloat16, "force_float32_reductions": False}

    def step(norm):
        variables = norm(True, **fields).init(KEY, x)
        return train(norm(momentum=0.0, **fields), variables, x)

    (y, ours), (y_stock, stock) = both(step)
    exact = np.float64(x).mean(0)
    assert y.dtype == y_stock.dtype == jnp.bfloat16
    assert dtypes_of(ours) == {"mean": jnp.float32, "var": jnp.float32}
    assert dtypes_of(stock) == {"mean": jnp.bfloat16, "var": jnp.bfloat16}
    np.testing.assert_allclose(ours["mean"], exact, rtol=1e-6)
    assert np.abs(np.float64(stock["mean"]) / exact - 1).max() > 1e-4


def test_deviation_2_mask_may_weigh():
    x, weights = normal(8, 4), np.array([2.0, 1, 1, 0, 3, 1, 1, 1])
    repeated = np.repeat(x, weights.astype(int), 0)
    mask = weights[:, None].astype(np.float32)
    ours, stock = both(lambda norm: train(norm(momentum=0.0), trained(), x, mask=mask)[1])
    np.testing.assert_allclose(ours["mean"], repeated.mean(0), atol=1e-6)
    np.testing.assert_allclose(ours["var"], repeated.var(0), rtol=1e-5)
    assert np.abs(stock["mean"] - repeated.mean(0)).max() > 0.01


@pytest.mark.parametrize("empty_shard", [False, True], ids=["", "empty shard"])
@pytest.mark.parametrize("way", ["pmap", "shard_map", "vmap"])
def test_deviation_2_masked_counts_are_summed_over_devices(way, empty_shard):
    x, valid = normal(2 * DEVICES, 4), np.arange(2 * DEVICES)[:, None] % 3 > 0
    if empty_shard:
        valid[:2] = False
    variables, subset = trained(), x[valid[:, 0]]

    def step(norm):
        layer = norm(momentum=0.0, axis_name=AXIS)
        return run(way, lambda v, b: train(layer, v, b[0], mask=b[1])[::-1], variables, (x, valid))

    (ours, y), (stock, _) = both(step)
    np.testing.assert_allclose(ours["mean"], subset.mean(0), atol=1e-6)
    np.testing.assert_allclose(ours["var"], subset.var(0), rtol=1e-5)
    np.testing.assert_allclose(y[valid[:, 0]], train(OURS(), variables, subset)[0], atol=1e-5)
    wrong = np.isnan(stock["mean"]) if empty_shard else np.abs(stock["mean"] - subset.mean(0)) > 0.01
    assert wrong.any()


def test_deviation_2_batch_that_is_masked_altogether_changes_nothing():
    variables, x = trained(), normal(8, 4)
    (y, ours), (y_stock, stock) = both(lambda norm: train(norm(), variables, x, mask=np.zeros((8, 1), bool)))
    chex.assert_trees_all_equal(ours, variables["batch_stats"])
    np.testing.assert_allclose(y, OURS(True).apply(variables, x), atol=ROUNDING)
    assert np.isnan(y_stock).all() and np.isnan(stock["mean"]).all()


@pytest.mark.parametrize("shape, fields", [((1, 4), {}), ((4,), {}), ((1, 3, 2), {"axis": (1, 2)})], ids=str)
def test_deviation_3_one_value_per_channel_is_an_error_in_training_alone(shape, fields):
    x, variables = normal(*shape), trained(shape, **fields)
    with pytest.raises(ValueError, match="allow_single_value=True"):
        jax.eval_shape(lambda x: train(OURS(**fields), variables, x), x)
    (y, stats), (y_stock, stock) = both(
        lambda norm: train(norm(**fields, **({"allow_single_value": True} if norm is OURS else {})), variables, x)
    )
    np.testing.assert_allclose(y, y_stock, atol=ROUNDING)
    np.testing.assert_array_equal(y, variables["params"]["bias"].reshape(y.shape))
    chex.assert_trees_all_close(stats, stock, rtol=ROUNDING)
    y, y_stock = both(lambda norm: norm(True, **fields).apply(variables, x))
    np.testing.assert_array_equal(y, y_stock)
    OURS(False, **fields).init(KEY, x)


@pytest.mark.parametrize(
    "fields, fails",
    [
        ({}, True),
        ({"axis_name": AXIS}, False),
        ({"axis_name": AXIS, "axis_index_groups": [[0, 1, 2, 3], [4, 5, 6, 7]]}, False),
        ({"axis_name": AXIS, "axis_index_groups": [[i] for i in range(DEVICES)]}, True),
    ],
    ids=["alone", "together", "groups", "groups of one"],
)
def test_deviation_3_values_are_counted_over_devices_and_groups(fields, fails):
    step = jax.pmap(lambda x: train(OURS(**fields), trained(), x)[0], axis_name=AXIS)
    if fails:
        with pytest.raises(ValueError, match="one value per channel"):
            step(shards(normal(DEVICES, 4)))
    else:
        assert np.abs(step(shards(normal(DEVICES, 4)))).max() > 0.1


def test_deviation_5_no_gradient_flows_into_the_statistics():
    variables, x = trained(), normal(8, 4)

    def gradients(norm):
        def stored(stats, x):
            new = train(norm(), {**variables, "batch_stats": stats}, x)[1]
            return new["mean"].sum() + new["var"].sum()

        def evaluated(stats):
            return jnp.square(norm(True).apply({**variables, "batch_stats": stats}, x)).sum()

        stats = variables["batch_stats"]
        return jax.jit(jax.grad(stored, (0, 1)))(stats, x), jax.jit(jax.grad(evaluated))(stats)

    for ours, stock in zip(*map(jax.tree.leaves, both(gradients)), strict=True):
        np.testing.assert_array_equal(ours, np.zeros_like(ours))
        assert np.abs(stock).max() > 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_deviation_5_statistics_that_are_not_finite_are_not_stored(bad):
    variables, x = trained(), normal(8, 4)
    clean, _ = both(lambda norm: train(norm(), variables, x)[1])
    x[3, 2] = bad
    (y, ours), (y_stock, stock) = both(lambda norm: train(norm(), variables, x))
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf[2], variables["batch_stats"][name][2])
        np.testing.assert_allclose(np.delete(leaf, 2), np.delete(clean[name], 2), rtol=1e-6)
    assert np.isnan(y[:, 2]).all() and np.isfinite(np.delete(y, 2, 1)).all()
    assert not np.isfinite(stock["var"][2])


def test_deviation_6_forward_mode_needs_autodiff():
    variables, x, direction = trained(), normal(8, 4), normal(8, 4, seed=1)

    def tangent(norm, **fields):
        layer = norm(use_fast_variance=False, **fields)
        return jax.jvp(lambda x: train(layer, variables, x), (x,), (direction,))[1][0]

    with pytest.raises(TypeError, match="forward-mode"):
        tangent(OURS)
    ours, stock = both(lambda norm: tangent(norm, **({"autodiff": True} if norm is OURS else {})))
    np.testing.assert_allclose(ours, stock, atol=ROUNDING)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_deviation_6_autodiff_gives_the_same_numbers(masked):
    variables, x, target = trained(), normal(16, 4), normal(16, 4, seed=1)
    mask = normal(16, 1, seed=2) > -0.5 if masked else None

    def step(autodiff):
        def loss(params, x):
            y, stats = train(OURS(autodiff=autodiff), {**variables, "params": params}, x, mask=mask)
            return (jnp.tanh(y) * target).mean(), (y, stats)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables["params"], x)

    chex.assert_trees_all_close(step(True), step(False), rtol=1e-6, atol=1e-6)


def test_deviation_7_statistics_keep_the_dtype_they_are_stored_in():
    variables = trained()
    stats = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["batch_stats"])
    ours, stock = both(lambda norm: train(norm(), {**variables, "batch_stats": stats}, normal(8, 4))[1])
    assert set(dtypes_of(ours).values()) == {jnp.dtype(jnp.bfloat16)}
    assert set(dtypes_of(stock).values()) == {jnp.dtype(jnp.float32)}
    for name in stock:
        np.testing.assert_allclose(np.float32(ours[name]), stock[name], rtol=2**-8)  # half a unit in the last place


def test_deviation_7_complex_statistics_are_complex_from_the_start():
    x = normal(8, 4) + 1j * normal(8, 4, seed=1)

    def dtypes(norm):
        variables = norm(True).init(KEY, x)
        return dtypes_of(variables["batch_stats"]), dtypes_of(train(norm(), variables, x)[1])

    (ours, ours_after), (stock, stock_after) = both(dtypes)
    assert ours == ours_after == stock_after == {"mean": jnp.complex64, "var": jnp.float32}
    assert stock["mean"] == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_deviation_7_nan_in_masked_positions_harms_no_gradient(bad):
    variables, x, valid = trained(), normal(8, 4), np.arange(8)[:, None] < 6

    def gradients(norm, x):
        def loss(params, x):
            y, _ = train(norm(), {**variables, "params": params}, x, mask=valid)
            return jnp.where(valid, jnp.square(y - 0.3), 0).mean()

        return jax.jit(jax.grad(loss, (0, 1)))(variables["params"], x)

    clean, _ = both(lambda norm: gradients(norm, x))
    ours, stock = both(lambda norm: gradients(norm, np.where(valid, x, np.float32(bad))))
    chex.assert_trees_all_close(ours[0], clean[0], rtol=1e-6)
    np.testing.assert_allclose(ours[1][:6], clean[1][:6], rtol=1e-5, atol=1e-7)
    assert np.isnan(stock[1][:6]).all()


def test_deviation_7_groups_of_devices_work_under_shard_map():
    groups, variables, x = [[0, 2, 4, 6], [1, 3, 5, 7]], trained(), normal(2 * DEVICES, 4)

    def step(norm):
        layer = norm(axis_name=AXIS, axis_index_groups=groups)
        step = functools.partial(train, layer, variables)
        return jax.shard_map(lambda x: step(x)[0], mesh=mesh(), in_specs=P(AXIS), out_specs=P(AXIS))

    y = np.asarray(step(OURS)(x)).reshape(DEVICES, 2, 4)
    for group in groups:
        expected = train(OURS(), variables, x.reshape(DEVICES, 2, 4)[group])[0]
        np.testing.assert_allclose(y[group], expected, rtol=ROUNDING, atol=ROUNDING)
    with pytest.raises(NotImplementedError), jax.numpy_dtype_promotion("standard"):
        step(STOCK)(x)
