"""What `jaxbn.linen.BatchNorm` has beyond Flax's layer: fields, averages and errors of its own."""

import functools
import inspect
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import AVERAGES, batch_without_statistics, every_activation, every_average, input_that_does_not_fit, normal
from meshes import AXIS, DEVICES, run

import jaxbn
import jaxbn.linen
from jaxbn.linen import BatchNorm

KEY = jax.random.key(0)


def train(layer, variables, x, **arguments):
    """(y, new variables) of one training call."""

    @jax.jit
    def train(variables, x):
        return layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"], **arguments)

    y, updates = train(variables, x)
    return y, {**variables, **updates}


def init(layer, shape=(8, 4)):
    return layer.init(KEY, jnp.ones(shape), use_running_average=True)


# --- Activation and residual ------------------------------------------------------------------------------------------


@pytest.mark.sample(every=5)
@pytest.mark.parametrize("use_running_average", [True, False], ids=["eval", "train"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@every_activation
def test_activation_and_residual_are_what_flax_does_in_three_lines(activation, with_residual, use_running_average):
    x, target = normal(16, 4), normal(16, 4, seed=2)
    residual = normal(16, 4, seed=1) if with_residual else None
    params = {"scale": 1 + 0.2 * normal(4), "bias": 0.3 * normal(4, seed=1)}
    stats = {"mean": np.full(4, 0.2, np.float32), "var": np.full(4, 1.5, np.float32)}

    def step(call):
        def loss(params, x, residual):
            y, updates = call({"params": params, "batch_stats": stats}, x, residual)
            return (y * target).sum(), (y, updates)

        arguments = (0, 1, 2) if with_residual else (0, 1)
        return jax.jit(jax.grad(loss, arguments, has_aux=True))(params, x, residual)

    def ours(variables, x, residual):
        layer = BatchNorm(use_running_average, activation=activation)
        return layer.apply(variables, x, residual=residual, mutable=["batch_stats"])

    def stock(variables, x, residual):
        layer = nn.BatchNorm(use_running_average, use_fast_variance=False)
        with jax.numpy_dtype_promotion("standard"):
            y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        y = y if residual is None else y + residual
        return y if activation is None else activation(y), updates

    # Gradients of the parameters are sums of 16 terms of order 1.
    chex.assert_trees_all_close(step(ours), step(stock), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_residual_takes_part_in_the_dtype_of_the_result(dtype):
    layer = BatchNorm(use_running_average=True, use_scale=False, use_bias=False)
    x = jnp.ones((8, 4), jnp.bfloat16)
    y, _ = layer.init_with_output(KEY, x, residual=jnp.ones((8, 4), dtype))
    assert y.dtype == dtype


def test_an_activation_is_a_function():
    with pytest.raises(TypeError, match=r"jax\.nn\.relu"):
        init(BatchNorm(activation="relu"))


# --- Running averages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.99, 0.0, jaxbn.constant(0.9), None], ids=str)
def test_a_plain_number_and_none_keep_the_variables_of_flax(momentum):
    variables = init(BatchNorm(momentum=momentum))
    assert variables["batch_stats"].keys() == {"mean", "var"}
    assert train(BatchNorm(momentum=momentum), variables, normal(8, 4))[1].keys() == variables.keys()


@every_average
def test_any_other_average_counts(momentum):
    layer = BatchNorm(momentum=momentum)
    variables = init(layer)
    assert variables["batch_stats"].keys() == {"mean", "var", "count"}
    chex.assert_trees_all_equal(variables["batch_stats"]["count"], jnp.zeros((), jnp.float32), strict=True)
    x = normal(8, 4)
    _, variables = train(layer, variables, x)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], x.mean(0), atol=1e-6)  # of one batch: that batch
    np.testing.assert_allclose(variables["batch_stats"]["var"], x.var(0), rtol=1e-5)
    _, variables = train(layer, variables, x)
    assert variables["batch_stats"]["count"] == (2 * 8 if momentum == AVERAGES["horizon"] else 2)


def test_a_count_that_a_state_lacks_is_an_error_that_names_it():
    layer, variables = BatchNorm(momentum=jaxbn.cumulative()), init(BatchNorm())
    _, variables = train(layer, variables, normal(8, 4))  # mutable: the variable is made, as Flax makes mean and var
    assert variables["batch_stats"]["count"] == 1
    with pytest.raises(nn.module.errors.ScopeVariableNotFoundError, match="count"):
        layer.apply(init(BatchNorm()), normal(8, 4), use_running_average=True)


def test_without_an_average_training_needs_nothing_mutable_and_leaves_the_statistics_alone():
    layer, x = BatchNorm(momentum=None), normal(8, 4)
    variables = init(layer)
    y = layer.apply(variables, x, use_running_average=False)
    np.testing.assert_allclose(y, train(BatchNorm(), variables, x)[0], atol=1e-6)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    _, after = train(layer, variables, x)
    chex.assert_trees_all_equal(after, variables)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [1.0, -0.1, 1.5])
def test_momentum_outside_its_range_is_an_error(momentum):
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        init(BatchNorm(momentum=momentum))


@pytest.mark.parametrize("momentum", [0.1, 0.49])
def test_momentum_that_looks_like_that_of_pytorch_warns(momentum):
    with pytest.warns(UserWarning, match=f"pass {1 - momentum:g}"):
        init(BatchNorm(momentum=momentum))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, None, jaxbn.cumulative()], ids=str)
def test_other_momenta_do_not_warn(momentum):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        init(BatchNorm(momentum=momentum))


def test_epsilon_must_not_be_negative():
    with pytest.raises(ValueError, match="must not be negative"):
        init(BatchNorm(epsilon=-1e-5))


@pytest.mark.parametrize("use_running_average", [True, False], ids=["eval", "train"])
@input_that_does_not_fit
def test_input_that_does_not_fit_is_an_error_before_anything_changes(
    x, fields, arguments, message, use_running_average
):
    raises_and_leaves_the_state(x, fields, arguments, message, use_running_average)


@batch_without_statistics
def test_batch_that_has_no_statistics_is_an_error_before_anything_changes(x, arguments, message):
    raises_and_leaves_the_state(x, {}, arguments, message, use_running_average=False)


def raises_and_leaves_the_state(x, fields, arguments, message, use_running_average):
    variables = init(BatchNorm())
    bound = BatchNorm(**fields).bind(variables, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=message):
        bound(x, use_running_average, **arguments)
    chex.assert_trees_all_equal(bound.variables, variables, strict=True)


def test_a_complex_mask_is_an_error():
    with pytest.raises(TypeError, match="real weights"):
        train(BatchNorm(), init(BatchNorm()), normal(8, 4), mask=np.ones((8, 1), np.complex64))


def test_groups_must_cover_the_axis_once():
    with pytest.raises(ValueError, match=r"\[\[0, 1\], \[2, 3\]\]"):
        init(BatchNorm(axis_name="i", axis_index_groups=[[0, 1], [1, 2]]))
    with pytest.raises(ValueError, match="axis_name="):
        init(BatchNorm(axis_index_groups=[[0, 1]]))


# --- Fields -----------------------------------------------------------------------------------------------------------


def test_factory_and_layer_have_the_same_arguments_and_defaults():
    factory = inspect.signature(jaxbn.batch_norm).parameters
    layer = inspect.signature(BatchNorm).parameters
    assert {name: layer[name].default for name in factory} == {name: p.default for name, p in factory.items()}
    assert all(p.kind is p.KEYWORD_ONLY for p in factory.values())
    # What the layer has and the factory has not is about variables.
    about_variables = {"use_running_average", "param_dtype", "bias_init", "scale_init", "force_float32_reductions"}
    assert layer.keys() - factory.keys() == about_variables | {"name", "parent"}


ARGUMENTS = [{}, {"momentum": 0.9, "axis": (1, 2)}, {"activation": jax.nn.relu}] + [
    {"momentum": momentum} for name, momentum in AVERAGES.items() if name != "scheduled"
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: ", ".join(arguments))
def test_layers_of_equal_arguments_are_equal(arguments):
    same = [BatchNorm(**arguments) for _ in range(2)]
    assert same[0] == same[1] and hash(same[0]) == hash(same[1])
    assert same[0] != BatchNorm(**arguments, epsilon=1e-3)


def test_equal_averages_made_twice_make_equal_layers():
    made = [BatchNorm(momentum=jaxbn.constant(0.9, debias=True)) for _ in range(2)]
    assert made[0] == made[1] and hash(made[0]) == hash(made[1])
    assert made[0] != BatchNorm(momentum=jaxbn.constant(0.8, debias=True))


@pytest.mark.parametrize("name, value", [("autodiff", True), ("activation", jax.nn.relu), ("allow_single_value", True)])
def test_fields_of_ours_are_given_by_name_alone(name, value):
    assert getattr(BatchNorm(**{name: value}), name) is value
    defaults = [
        p.default for p in inspect.signature(nn.BatchNorm).parameters.values() if p.name not in ("parent", "name")
    ]
    with pytest.raises(TypeError, match="positional"):
        BatchNorm(*defaults, None, None, value)


# --- Loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.9, *AVERAGES.values()], ids=["constant", *AVERAGES])
def test_one_trace_serves_many_steps_and_a_scan_over_them(momentum):
    layer, batches = BatchNorm(momentum=momentum, use_running_average=False), normal(4, 8, 3)
    traces = []

    def step(variables, x):
        traces.append(None)
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        return {**variables, **updates}, y

    start = init(layer.clone(use_running_average=None), (8, 3))
    jitted, variables = jax.jit(step), start
    for x in batches:
        variables, _ = jitted(variables, x)
    assert len(traces) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, start)
    scanned, ys = jax.jit(functools.partial(jax.lax.scan, step))(start, batches)
    assert len(traces) == 2
    chex.assert_trees_all_close(scanned, variables, rtol=1e-6)
    np.testing.assert_allclose(ys.mean(1), 0, atol=1e-6)


@pytest.mark.parametrize("way", ["pmap", "shard_map", "vmap"])
@pytest.mark.parametrize("momentum", [0.9, AVERAGES["cumulative"]], ids=["constant", "cumulative"])
def test_the_mean_of_the_statistics_over_devices_keeps_their_dtypes(momentum, way):
    """`pmean(batch_stats)`, which loops for Flax do where layers do not synchronize; counts are float for it."""
    layer, x = BatchNorm(momentum=momentum), normal(4 * DEVICES, 3)

    def step(variables, x):
        y, after = train(layer, variables, x)
        return jax.lax.pmean(after["batch_stats"], AXIS), y

    start = init(layer, (8, 3))
    stats, _ = run(way, step, start, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(stats, start["batch_stats"])
    kept = 0.9 if momentum == 0.9 else 0.0
    np.testing.assert_allclose(stats["mean"], (1 - kept) * x.mean(0), atol=1e-6)
    if "count" in stats:
        assert stats["count"] == 1
