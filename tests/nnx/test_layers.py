"""What `jaxbn.nnx.BatchNorm` has beyond Flax's layer: fields, averages and errors of its own."""

import inspect

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import AVERAGES, batch_without_statistics, every_activation, every_average, input_that_does_not_fit, normal

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.nnx import BatchNorm


def make(features=4, **fields):
    return BatchNorm(features, rngs=nnx.Rngs(0), **fields)


def values(layer):
    return nnx.to_pure_dict(nnx.state(layer))


# --- Activation and residual ------------------------------------------------------------------------------------------


@pytest.mark.sample(every=5)
@pytest.mark.parametrize("use_running_average", [True, False], ids=["eval", "train"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@every_activation
def test_activation_and_residual_are_what_flax_does_in_three_lines(activation, with_residual, use_running_average):
    x, target = normal(16, 4), normal(16, 4, seed=2)
    residual = normal(16, 4, seed=1) if with_residual else None
    fields = {"scale_init": nnx.initializers.uniform(2.0), "use_running_average": use_running_average}

    def step(layer, forward):
        @nnx.jit
        def step(layer, x, residual):
            def loss(layer, x, residual):
                y = forward(layer, x, residual)
                return (y * target).sum(), y

            arguments = (0, 1, 2) if with_residual else (0, 1)
            gradients, y = nnx.grad(loss, argnums=arguments, has_aux=True)(layer, x, residual)
            return nnx.to_pure_dict(gradients[0]), gradients[1:], y

        return step(layer, x, residual), values(layer)

    def stock(layer, x, residual):
        y = layer(x)
        y = y if residual is None else y + residual
        return y if activation is None else activation(y)

    ours = step(make(activation=activation, **fields), lambda layer, x, residual: layer(x, residual=residual))
    with jax.numpy_dtype_promotion("standard"):
        expected = step(nnx.BatchNorm(4, use_fast_variance=False, rngs=nnx.Rngs(0), **fields), stock)
    # Gradients of the parameters are sums of 16 terms of order 1.
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_an_activation_is_a_function():
    with pytest.raises(TypeError, match=r"jax\.nn\.relu"):
        make(activation="relu")


# --- Running averages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.99, 0.0, jaxbn.constant(0.9), None], ids=str)
def test_a_plain_number_and_none_keep_the_variables_of_flax(momentum):
    layer = make(momentum=momentum)
    layer(normal(8, 4))
    assert values(layer).keys() == {"mean", "var", "scale", "bias"}


@every_average
def test_any_other_average_counts(momentum):
    layer, x = make(momentum=momentum), normal(8, 4)
    assert values(layer).keys() == {"mean", "var", "count", "scale", "bias"}
    assert isinstance(layer.count, nnx.BatchStat)
    chex.assert_trees_all_equal(layer.count[...], jnp.zeros((), jnp.float32), strict=True)
    layer(x)
    np.testing.assert_allclose(layer.mean[...], x.mean(0), atol=1e-6)  # of one batch: that batch
    np.testing.assert_allclose(layer.var[...], x.var(0), rtol=1e-5)
    layer(x)
    assert layer.count[...] == (2 * 8 if momentum == AVERAGES["horizon"] else 2)


def test_without_an_average_the_statistics_stay_even_where_they_could_not_be_written():
    layer, averaging, x = make(momentum=None), make(), normal(8, 4)
    before = values(layer)
    y = jax.jit(lambda x: layer(x))(x)  # a closure, in which a variable must not be mutated
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    chex.assert_trees_all_equal(values(layer), before)
    with pytest.raises(flax.errors.TraceContextError, match="Cannot mutate"):
        jax.jit(lambda x: averaging(x))(x)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [1.0, -0.1, 1.5])
def test_momentum_outside_its_range_is_an_error(momentum):
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        make(momentum=momentum)


def test_momentum_that_looks_like_that_of_pytorch_warns():
    with pytest.warns(UserWarning, match="pass 0.9"):
        make(momentum=0.1)


def test_epsilon_must_not_be_negative():
    with pytest.raises(ValueError, match="must not be negative"):
        make(epsilon=-1e-5)


def test_groups_must_cover_the_axis_once():
    with pytest.raises(ValueError, match=r"\[\[0, 1\], \[2, 3\]\]"):
        make(axis_name="i", axis_index_groups=[[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="axis_name="):
        make(axis_index_groups=[[0, 1]])


@pytest.mark.parametrize("use_running_average", [True, False], ids=["eval", "train"])
@input_that_does_not_fit
def test_input_that_does_not_fit_is_an_error_before_anything_changes(
    x, fields, arguments, message, use_running_average
):
    raises_and_leaves_the_state(x, fields, arguments, message, use_running_average)


@pytest.mark.parametrize("average", [0.99, jaxbn.cumulative()], ids=["constant", "cumulative"])
@batch_without_statistics
def test_batch_that_has_no_statistics_is_an_error_before_anything_changes(x, arguments, message, average):
    raises_and_leaves_the_state(x, {"momentum": average}, arguments, message, use_running_average=False)


def raises_and_leaves_the_state(x, fields, arguments, message, use_running_average):
    layer = make(**fields)
    before = values(layer)
    for call in (BatchNorm.__call__, nnx.jit(BatchNorm.__call__, static_argnums=2)):
        with pytest.raises(ValueError, match=message):
            call(layer, x, use_running_average, **arguments)
    chex.assert_trees_all_equal(values(layer), before, strict=True)


# --- Fields -----------------------------------------------------------------------------------------------------------


def test_factory_and_layers_of_both_frameworks_have_the_same_arguments_and_defaults():
    factory = inspect.signature(jaxbn.batch_norm).parameters
    layer = inspect.signature(BatchNorm.__init__).parameters
    linen = inspect.signature(jaxbn.linen.BatchNorm).parameters
    assert {name: layer[name].default for name in factory} == {name: p.default for name, p in factory.items()}
    assert {name: linen[name].default for name in factory} == {name: p.default for name, p in factory.items()}
    # What the layer has and the factory has not is about variables, or there for Flax.
    assert layer.keys() - factory.keys() == {
        "self", "num_features", "use_running_average", "param_dtype", "bias_init", "scale_init", "promote_dtype",
        "rngs", "bias_metadata", "scale_metadata", "of_method",
    }  # fmt: skip


@pytest.mark.parametrize("axis", [(1, 2), [1, 2], (-1, 1), range(1, 3)], ids=repr)
def test_several_feature_axes(axis):
    layer, x = make((3, 5), axis=axis, momentum=0.0), normal(8, 3, 5)
    y = layer(x)
    assert {leaf.shape for leaf in values(layer).values()} == {(3, 5)}
    np.testing.assert_allclose(layer.mean[...], x.mean(0), atol=1e-6)
    np.testing.assert_allclose(y, layer(x, use_running_average=True), rtol=1e-5, atol=1e-5)


# --- Loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.9, None, *AVERAGES.values()], ids=["constant", "none", *AVERAGES])
def test_one_trace_serves_many_steps_and_a_scan_over_them(momentum):
    batches, traces = normal(4, 8, 3), []
    layer, scanned = make(3, momentum=momentum), make(3, momentum=momentum)
    start = values(layer)

    def step(layer, x):
        traces.append(None)
        return layer(x)

    jitted = nnx.jit(step)
    for x in batches:
        jitted(layer, x)
    assert len(traces) == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(values(layer), start)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def loop(layer, x):
        return layer, step(layer, x)

    _, ys = loop(scanned, batches)
    assert len(traces) == 2
    chex.assert_trees_all_close(values(scanned), values(layer), rtol=1e-6)
    np.testing.assert_allclose(ys.mean(1), 0, atol=1e-6)


def test_no_gradient_flows_into_or_out_of_the_statistics():
    layer, x = make(momentum=AVERAGES["debiased"]), normal(8, 4)

    @nnx.jit
    def gradients(layer, x):
        def into(layer, x):
            layer(x)
            return layer.mean[...].sum() + layer.var[...].sum() + layer.count[...]

        def out_of(layer):
            return jnp.square(layer(x) + layer(x, use_running_average=True)).sum()

        kinds = nnx.DiffState(0, nnx.BatchStat)
        return nnx.grad(into, argnums=(kinds, 1))(layer, x), nnx.grad(out_of, argnums=kinds)(layer)

    for gradient in jax.tree.leaves(gradients(layer, x)):
        np.testing.assert_array_equal(gradient, 0 * gradient)
