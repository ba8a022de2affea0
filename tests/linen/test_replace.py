"""Replaced layers compute what a model written with these layers computes, wherever the call of a layer is met."""

import functools
import re
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES
from layers import normal

import jaxbn
import jaxbn.linen
from jaxbn._src.linen.capture import capture
from jaxbn.linen import BatchRenorm, GhostBatchNorm, replace

KEY = jax.random.key(0)
RENORM = functools.partial(BatchRenorm, r_max=lambda step: 1.5 + step, d_max=lambda step: 0.1 * step)


class Block(nn.Module):
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x)
        return self.norm(use_running_average=not train, momentum=0.9, epsilon=1e-3, name="BatchNorm_0")(x), None


class Net(nn.Module):
    """The layer plain, shared, in a field that is bound before any call, and under the transformations of linen."""

    norm: type = nn.BatchNorm

    def setup(self):
        self.shared = self.norm(momentum=0.5, epsilon=1e-3)
        self.jitted = nn.jit(Block, static_argnames=("train",))(self.norm)
        self.recomputed = nn.remat(Block, static_argnums=(2,))(self.norm)
        axes = {"params": 0, "batch_stats": 0}
        self.scanned = nn.scan(Block, axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=2)(self.norm)

    def __call__(self, x, train):
        x = self.shared(x, use_running_average=not train)
        x, _ = self.jitted(x, train=train)
        x, _ = self.recomputed(x, train)
        x, _ = self.scanned(x, train)
        return self.shared(x, use_running_average=not train)


@pytest.fixture(scope="module")
def x():
    return 1 + 2 * normal(8, 4)


def run(net):
    """(variables, those of a training call), traced anew each time."""

    def both(x):
        variables = net.init(KEY, x, False)
        return variables, net.apply(variables, x, True, mutable=["batch_stats"])

    return both


def test_the_model_is_the_one_that_is_written_with_the_layer(x):
    """The same program, to the letter."""
    plain, written = Net(), Net(RENORM)
    replaced = replace(plain, RENORM)
    before = jax.eval_shape(run(plain), x)
    found, shapes = jax.make_jaxpr(run(replaced), return_shape=True)(x)
    expected, wanted = jax.make_jaxpr(run(written), return_shape=True)(x)
    assert anonymous(found) == anonymous(expected)
    assert shapes == wanted != before == jax.eval_shape(run(plain), x)  # nothing that nn.jit keeps is mistaken
    assert isinstance(replaced, Net) and replaced.norm is nn.BatchNorm


def anonymous(program):
    """Without the addresses of functions."""
    return re.sub("0x[0-9a-f]+", "", str(program))


@pytest.mark.parametrize("in_field", [False, True])
def test_two_replacements_are_not_mistaken_for_each_other(x, in_field):
    net = nn.jit(Block, static_argnames=("train",))()
    net = nn.Sequential([net]) if in_field else net
    variables = jax.eval_shape(lambda: net.init(KEY, x, train=False))

    def program(net):
        return str(jax.make_jaxpr(lambda v: net.apply(v, x, train=True, mutable=["batch_stats"])[0])(variables))

    sizes = [replace(net, functools.partial(GhostBatchNorm, ghost_size=size)) for size in (2, 4)]
    assert "f32[4,1,4]" in program(sizes[0]) and "f32[4,1,4]" not in program(sizes[1])  # means of groups of 2 of 8 rows


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True])
def test_the_pass_and_the_steps_see_the_new_layers(x, nested):
    """Also where the replaced model stands in another."""

    class Outer(nn.Module):
        net: nn.Module

        @nn.compact
        def __call__(self, x, train):
            x, _ = self.net(x, train)
            return nn.BatchNorm(use_running_average=not train)(x)

    net = Outer(replace(Block(), RENORM, "BatchNorm_0")) if nested else replace(Outer(Block()), RENORM, "net")
    steps = jaxbn.linen.make_steps(net, lambda y, x: (jnp.mean(y**3), {}), optax.sgd(0.1), inputs=lambda x: x)
    state = steps.init(KEY, x)
    frozen, _ = steps.finalize(state, jax.jit(steps.postproc_step)(state, steps.start(state, x), x))
    assert {path: layer.method for path, layer in frozen.info.layers} == {
        "net/BatchNorm_0": "batch_renorm",
        "BatchNorm_0": "batch_norm",
    }
    y = steps.eval_step(frozen, x)
    np.testing.assert_allclose(net.bind(frozen.variables)(x, False), y, rtol=1e-6, atol=1e-6)
    held = jaxbn.linen.freeze_layers(net.apply, "net")(frozen.variables, x, True, mutable=["batch_stats"])[1]
    chex.assert_trees_all_equal(held["batch_stats"]["net"], frozen.variables["batch_stats"]["net"])


LINEN = {case.linen: case for case in CASES if "domain" not in case.name}


@pytest.mark.parametrize("case", LINEN.values(), ids=lambda case: case.name)
def test_variables_fit_the_replaced_model_and_the_one_that_names_layers_by_their_class(x, case):
    """With counters that say 7: those of a window start anew with it."""
    layer = functools.partial(case.linen, **case.arguments)
    old, new = (nn.Sequential([Named(norm)]) for norm in (BatchRenorm, layer))
    trained = jax.tree.map(lambda leaf: leaf + 7, old.init(KEY, x))
    like = new.init(KEY, x)
    converted = jaxbn.linen.convert_norms(trained, like=like)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, like)
    expected = old.apply(trained, x)
    np.testing.assert_allclose(
        replace(new, functools.partial(layer, epsilon=1e-3)).apply(converted, x), expected, rtol=1e-5
    )
    (statistics,) = converted["batch_stats"]["layers_0"].values()
    assert statistics.get("step", 0) == (7 if case.linen is BatchRenorm else 0)


def test_captures_see_the_new_layers(x):
    """In the place of a stock layer that they meet first."""
    net = replace(Block(), RENORM)
    call = lambda variables, x: net.apply(variables, x, False)
    variables = jax.eval_shape(lambda: net.init(KEY, x, False))
    for mode in ("batch", "eval", "as_called"):
        kinds = jax.eval_shape(capture(call, mode=mode), variables, x)[1].kinds
        assert kinds == (("BatchNorm_0", ("batch_renorm", 1e-3)),)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables)
    assert "batch_renorm" in jaxbn.linen.summary(variables, call, x)


class Named(nn.Module):
    norm: Callable

    @nn.compact
    def __call__(self, x):
        return self.norm(use_running_average=True)(x)


class Coder(nn.Module):
    """Called by its methods, of which one is static, with a function for a field."""

    act: Callable = jnp.tanh

    def setup(self):
        self.norm = nn.BatchNorm(use_running_average=False)

    @staticmethod
    def half(x):
        return x / 2

    def encode(self, x):
        return self.act(self.half(self.norm(x)))


@pytest.mark.parametrize("method", ["encode", Coder.encode, lambda coder, x: coder.encode(x)])
def test_methods_by_any_name(x, method):
    coder = replace(Coder(), RENORM)
    variables = jax.eval_shape(lambda: coder.init(KEY, x, method=method))
    assert "step" in variables["batch_stats"]["norm"]
    jax.eval_shape(lambda v: coder.apply(v, x, method=method, mutable=["batch_stats"]), variables)


FIELDS = {
    "axis": (1, -1), "momentum": 0.5, "epsilon": 0.1, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16,
    "use_bias": False, "scale_init": nn.initializers.constant(2.0), "axis_name": "devices",
    "axis_index_groups": ((0, 1), (2, 3)), "use_fast_variance": False,
}  # fmt: skip


def test_settings_are_carried_over_and_those_given_go_before():
    made = []

    class Spy(jaxbn.linen.BatchNorm):
        def __post_init__(self):
            super().__post_init__()
            made.append(self)

    old = nn.BatchNorm(True, **FIELDS)
    x = normal(4, 4, 3)
    variables = jax.eval_shape(lambda: replace(old, Spy).init(KEY, x))
    with jax.numpy_dtype_promotion("standard"):
        assert variables == jax.eval_shape(lambda: old.init(KEY, x))
    assert {name: getattr(made[-1], name) for name in FIELDS} == FIELDS
    jax.eval_shape(lambda: replace(old, functools.partial(Spy, epsilon=0.2, momentum=None)).init(KEY, x))
    assert (made[-1].epsilon, made[-1].momentum, made[-1].axis) == (0.2, None, FIELDS["axis"])


def test_the_way_back(x):
    ours = jaxbn.linen.BatchNorm(use_running_average=False, momentum=0.5)
    stock = nn.BatchNorm(use_running_average=False, momentum=0.5, use_fast_variance=True)
    back = replace(replace(ours, RENORM), nn.BatchNorm)  # the last one counts
    variables = jax.eval_shape(lambda: stock.init(KEY, x))
    assert jax.eval_shape(lambda: back.init(KEY, x)) == variables
    found, expected = (
        anonymous(jax.make_jaxpr(lambda v, net=net: net.apply(v, x, mutable=["batch_stats"]))(variables))
        for net in (back, stock)
    )
    assert found == expected


def test_what_cannot_be_replaced_is_said(x):
    net = Block()
    variables = jax.eval_shape(lambda: net.init(KEY, x, True))
    with pytest.raises(ValueError, match="is at 'Conv_0' or below it; there are 'BatchNorm_0'"):
        jax.eval_shape(lambda v: replace(net, RENORM, "Conv_0").apply(v, x, False), variables)
    for wrong in (nn.Dense, nn.BatchNorm(), lambda **fields: BatchRenorm(**fields), 3):
        with pytest.raises(TypeError, match="pass one such as BatchRenorm"):
            replace(net, wrong)
    inside = jaxbn.linen.BatchNorm(use_running_average=True, activation=nn.relu)
    with pytest.raises(ValueError, match="has an activation, which the new layer"):
        replace(inside, nn.BatchNorm).init(KEY, x)
