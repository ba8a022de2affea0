"""Replaced layers compute what a model made with these layers computes, and hold what the old ones held."""

import functools

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax import nnx
from layers import normal

import jaxbn
import jaxbn.nnx
from jaxbn.nnx import BatchRenorm, replace

RENORM = functools.partial(BatchRenorm, r_max=lambda step: 1.5 + step, d_max=lambda step: 0.1 * step)


class Net(nnx.Module):
    """The layer in a list, once more as an attribute, and stacked."""

    def __init__(self, norm=nnx.BatchNorm, copies=2):
        rngs = nnx.Rngs(0)
        fields = {"momentum": 0.5, "epsilon": 1e-3, "use_bias": False}
        first = norm(4, **fields, scale_metadata={"column": 3}, rngs=rngs)
        self.layers = nnx.List([first])
        self.again = first
        self.stack = norm(4, **fields, rngs=rngs)
        for _, variable in nnx.to_flat_state(nnx.state(self.stack)):
            variable.set_value(np.stack(copies * [variable[...]]))

    def __call__(self, x):
        for layer in (*self.layers, self.again):
            x = layer(x)
        return nnx.vmap(lambda norm, x: norm(x), in_axes=(0, None))(self.stack, x)


@nnx.jit
def run(model, x):
    return model(x)


def test_the_model_is_the_one_that_is_made_with_the_layer():
    x, plain, made = 1 + 2 * normal(8, 4), Net(), Net(RENORM)
    replaced = replace(plain, RENORM)
    assert nnx.graphdef(replaced) == nnx.graphdef(made)
    assert replaced.again is replaced.layers[0] and type(plain.again) is nnx.BatchNorm
    np.testing.assert_allclose(run(replaced, x), run(made, x), rtol=1e-6)
    chex.assert_trees_all_close(nnx.state(replaced), nnx.state(made), rtol=1e-6)
    np.testing.assert_array_equal(replaced.stack.step[...], [1, 1])
    assert replaced.again.step[...] == 2 and plain.again.mean[...].max() == 0
    back = replace(replaced, nnx.BatchNorm)
    assert nnx.graphdef(back) == nnx.graphdef(plain)
    for one, other in ((back.again, replaced.again), (back.stack, replaced.stack)):
        np.testing.assert_array_equal(one.var[...], other.var[...])


ONE_OF_EACH = {case.nnx: case.arguments for case in CASES if "domain" not in case.name}


@pytest.mark.parametrize(("layer", "arguments"), ONE_OF_EACH.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_evaluation_stays_as_it_is_with_every_method(layer, arguments):
    """The window of MovingAverageBatchNorm starts anew with its counters, whatever the old layer has counted."""
    x, old = normal(6, 4), BatchRenorm(4, use_running_average=True, rngs=nnx.Rngs(0))
    old.mean[...], old.var[...], old.step[...] = jnp.arange(4.0), 1 + jnp.arange(4.0), jnp.float32(7)
    old.scale[...], old.bias[...] = 2 + jnp.arange(4.0), 3 - jnp.arange(4.0)  # learned, and not those of a new layer
    new = replace(old, functools.partial(layer, **arguments))
    np.testing.assert_allclose(new(x), old(x), rtol=1e-5)
    assert new.epsilon == old.epsilon
    if hasattr(new, "step"):
        assert new.step[...] == (7 if layer is BatchRenorm else 0)


def test_paths_select_and_arguments_go_before():
    model = nnx.Sequential(*(nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0)) for _ in range(2)))
    replaced = replace(model, functools.partial(jaxbn.nnx.BatchNorm, momentum=None), "layers/1")
    assert [type(layer) for layer in replaced.layers] == [nnx.BatchNorm, jaxbn.nnx.BatchNorm]
    assert replaced.layers[1].momentum is None


def test_what_cannot_be_replaced_is_said():
    class Own(nnx.BatchNorm):
        def __call__(self, x):
            return super().__call__(x) + 1

    norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    for model in (Own(2, rngs=nnx.Rngs(0)), jaxbn.nnx.freeze_layers(norm, "")):
        with pytest.raises(ValueError, match="whose call is its own"):
            replace(model, BatchRenorm)
    with pytest.raises(ValueError, match="is at 'conv' or below it"):
        replace(norm, BatchRenorm, "conv")
    with pytest.raises(TypeError, match="pass one such as BatchRenorm"):
        replace(norm, nnx.Linear)
    with pytest.raises(ValueError, match="has an activation, which the new layer"):
        replace(jaxbn.nnx.BatchNorm(2, activation=nnx.relu, rngs=nnx.Rngs(0)), nnx.BatchNorm)
