"""Folding in NNX: what goes where, what stays and why, and that nothing but rounding changes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax import nnx
from folding import assert_same_outputs, moved, primitives_of
from programs import load_program

import jaxbn
import jaxbn.nnx

RNGS = nnx.Rngs(0)
OURS, STOCK = (functools.partial(cls, rngs=RNGS) for cls in (jaxbn.nnx.BatchNorm, nnx.BatchNorm))
Conv, ConvTranspose, Linear, General, Einsum = (
    functools.partial(cls, kernel_init=nnx.initializers.zeros, rngs=RNGS)
    for cls in (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
)


def images(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def started(model):
    """The model in evaluation mode with variables none of which has its initial value."""
    for kind in (nnx.Param, nnx.BatchStat):
        nnx.update(model, moved(nnx.state(model, kind)))
    model.eval()
    return model


def fold(model, x, **options):
    """(folded model, report); the model is left as it is."""
    before = jax.tree.map(np.copy, nnx.split(started(model)))
    folded, report = jaxbn.nnx.fold(model, x, **options)
    chex.assert_trees_all_equal(nnx.split(model), before)
    assert report.error <= 1e-5
    return folded, report


def primitives(model, x):
    """Of what the model does with `x`."""
    graphdef, state = nnx.split(model)
    return primitives_of(lambda state: nnx.merge(graphdef, state)(x), state)


class Pairs(nnx.Module):
    """Lists of modules, each of which is run one after the other, all on the same input."""

    def __init__(self, **pairs):
        self.pairs = nnx.Dict({name: nnx.List(pair) for name, pair in pairs.items()})

    def __call__(self, x):
        return {name: functools.reduce(lambda y, module: module(y), pair, x) for name, pair in self.pairs.items()}


class Flatten(nnx.Module):
    def __call__(self, x):
        return x.reshape(x.shape[0], -1, 4)


def test_every_kind_of_layer_takes_what_is_behind_it():
    model = Pairs(
        conv=[Conv(4, 6, (3, 3), 2, feature_group_count=2, use_bias=False), OURS(6)],
        masked=[Conv(4, 2, (2, 2), mask=jnp.ones((2, 2, 4, 2)).at[0].set(0)), STOCK(2)],
        up=[ConvTranspose(4, 6, (3, 3), (2, 2)), OURS(6)],
        flipped=[ConvTranspose(4, 6, (3, 3), transpose_kernel=True, use_bias=False), STOCK(6)],
        linear=[Linear(4, 5), OURS(5, use_scale=False, activation=jax.nn.silu)],
        general=[General((4, 4), (2, 3), axis=(2, 1), use_bias=False), STOCK(3, use_bias=False)],
        heads=[General(4, (2, 3)), OURS((2, 3), axis=(-2, -1))],
        einsum=[Flatten(), Einsum("...nc,chd->...hnd", (4, 2, 3)), OURS((2, 3), axis=(1, 3))],
        biased=[Flatten(), Einsum("...nc,chd->...hnd", (4, 2, 3), (2, 3)), STOCK(3)],
        mapped=[Conv(4, 3, (2, 2), promote_dtype=jaxbn.nnx.map_kernel(jaxbn.standardize_kernel)), OURS(3)],
    )
    x = images(2, 4, 4, 4)
    folded, report = fold(model, x)
    assert len(report.folded) == len(report.layers) == 10
    assert_same_outputs(lambda model, x: model(x), model, lambda model, x: model(x), folded, x)
    assert not primitives(folded, x)["rsqrt"]


def test_layers_take_what_is_before_them_unless_they_pad():
    model = Pairs(
        valid=[OURS(4), Conv(4, 3, (3, 3), padding="VALID")],
        groups=[STOCK(4), Conv(4, 4, (2, 2), padding=0, feature_group_count=2)],
        circular=[STOCK(4), Conv(4, 3, (3, 3), padding="CIRCULAR", use_bias=False)],
        general=[OURS(4), General((5, 4), (2, 3), axis=(-1, 1))],
        einsum=[Flatten(), OURS(4), Einsum("...nc,hcd->...hnd", (3, 4, 5))],
        padded=[OURS(4), Conv(4, 3, (3, 3))],
        up=[OURS(4), ConvTranspose(4, 3, (3, 3), (2, 2))],
        chain=[OURS(4), Linear(4, 3), OURS(3), STOCK(3)],
    )
    _, report = fold(model, images(2, 5, 6, 4))
    stays = {path: layer.reason for path, layer in report.layers.items() if not layer.folded}
    assert set(stays) == {"pairs/padded/0", "pairs/up/0"}
    assert "'pairs/padded/1' pads its input with zeros" in stays["pairs/padded/0"]
    assert "'pairs/up/1' is transposed" in stays["pairs/up/0"]


class Methods(nnx.Module):
    """A layer of each method behind a layer, with an activation and a residual."""

    def __init__(self):
        self.linears = nnx.List([Linear(4, 3) for _ in CASES])
        self.norms = nnx.List([case.nnx_module(3, activation=nnx.silu) for case in CASES])

    def __call__(self, x):
        pairs = zip(CASES, self.linears, self.norms, strict=True)
        return [norm(linear(x), residual=x[:, :3], **case.where(x)) for case, linear, norm in pairs]


def test_every_method_is_folded_and_keeps_its_activation_and_residual():
    folded, report = fold(Methods(), images(8, 4))
    for i, case in enumerate(CASES):
        layer = report.layers[f"norms/{i}"]
        if case.factory is jaxbn.domain_batch_norm:
            assert layer == (False, None, "its statistics depend on the domain of each example")
        else:
            assert layer.into == f"linears/{i}"


class MobileNet(nnx.Module):
    """Depthwise separable convolutions, as in MobileNet v2, with its linear bottlenecks and residuals."""

    def __init__(self, norm):
        def conv(features_in, features, size, stride=1, groups=1):
            options = {"feature_group_count": groups, "use_bias": norm is None}
            layer = Conv(features_in, features, (size, size), stride, **options)
            return layer if norm is None else nnx.Sequential(layer, norm(features))

        self.stem = conv(3, 4, 3, 2)
        self.blocks = nnx.List(
            nnx.List([conv(4, 8, 1), conv(8, 8, 3, stride, groups=8), conv(8, 4, 1)]) for stride in (2, 1)
        )
        self.head = Linear(4, 3)

    def __call__(self, x):
        x = jax.nn.relu6(self.stem(x))
        for i, (expand, depthwise, project) in enumerate(self.blocks):
            y = project(jax.nn.relu6(depthwise(jax.nn.relu6(expand(x)))))
            x = x + y if i else y
        return self.head(x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [OURS, STOCK], ids=["jaxbn", "stock"])
def test_all_of_a_mobile_net_is_folded_and_no_arithmetic_is_left(norm):
    """The program is, equation by equation, that of the network without normalizations whose layers have biases."""
    x = images(2, 8, 8, 3)
    folded, report = fold(MobileNet(norm), x)
    assert len(report.folded) == len(report.layers) == 7
    assert all(layer.into == f"{path[:-1]}0" for path, layer in report.layers.items())
    assert primitives(folded, x) == primitives(MobileNet(None), x)
    assert not nnx.state(folded, nnx.BatchStat)


@pytest.mark.slow
def test_all_of_a_resnet_50_is_folded():
    """Activation and residual are inside the layers, and stay."""
    resnet = load_program("resnet.py")
    make = lambda: resnet.NnxResNet(num_classes=5, width=4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    net, x = started(nnx.eval_shape(make)), images(2, 32, 32, 3)
    nnx.update(net, jax.tree.map(lambda leaf: leaf / np.sqrt(leaf[..., 0].size), nnx.state(net, nnx.Param)))
    folded, report = jaxbn.nnx.fold(net, x)
    assert len(report.folded) == len(report.layers) == 53
    assert_same_outputs(lambda model, x: model(x), net, lambda model, x: model(x), folded, x)


class Standardized(nnx.Conv):
    """A layer that may do anything."""


class Centred(jaxbn.nnx.BatchNorm):
    """A normalization that does something else besides."""

    def __call__(self, x):
        return super().__call__(x) - 1


class Stays(nnx.Module):
    """Reasons to fold nothing; the name of each normalization says which."""

    def __init__(self):
        for name in ("elsewhere", "behind_relu", "before_relu", "shared", "twice", "trains", "tied", "variable"):
            setattr(self, name, OURS(4))
            setattr(self, f"linear_{name}", Linear(4, 4))
        self.activated = OURS(4, activation=jax.nn.relu)
        self.subclass, self.standardized = OURS(4), Standardized(4, 4, (1,), rngs=RNGS)
        self.product, self.linear_product = (
            OURS(4),
            Linear(4, 4, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)),
        )
        self.centred, self.linear_centred = Centred(4, rngs=RNGS), Linear(4, 4)
        self.mapped, self.weight_norm = OURS(4), nnx.WeightNorm(Linear(4, 4), rngs=RNGS)
        self.other_variable = Linear(4, 4)
        self.other_variable.kernel = self.linear_variable.kernel

    def __call__(self, x):
        used = self.linear_elsewhere(x)
        return [
            self.elsewhere(used), used.sum(),
            self.behind_relu(jax.nn.relu(self.linear_behind_relu(x))),
            self.linear_before_relu(jax.nn.relu(self.before_relu(x))),
            self.shared(self.linear_shared(x)), self.linear_shared(2 * x),
            self.twice(self.linear_twice(x)) + self.twice(x),
            self.trains(self.linear_trains(x), use_running_average=False),
            self.tied(self.linear_tied(x)) @ self.linear_tied.kernel.T,
            self.variable(self.linear_variable(x)), self.other_variable(x),
            self.activated(x), self.subclass(self.standardized(x[:, None])), self.product(self.linear_product(x)),
            self.mapped(self.weight_norm(x)), self.centred(self.linear_centred(x)),
        ]  # fmt: skip


REASONS = {
    "elsewhere": "the output of 'linear_elsewhere' also goes into `reduce_sum`",
    "behind_relu": "its input is made by an activation (relu)",
    "before_relu": "its output goes into an activation (relu), not directly into a layer",
    "shared": "'linear_shared' is called 2 times",
    "twice": "it is called 2 times",
    "trains": "it normalizes with the statistics of its batch",
    "tied": "the variables of 'linear_tied' are also used elsewhere",
    "variable": "the variables of 'linear_variable' are also used elsewhere",
    "activated": "its own activation or residual comes before the next layer",
    "subclass": "'standardized' is a Standardized, which fold does not support",
    "mapped": "'weight_norm/layer_instance' computes with other values than its variables",
    "centred": "it is a Centred, which overrides __call__",
    "product": "'linear_product' uses a custom dot_general",
}


def test_what_would_change_the_result_stays_and_the_report_says_why():
    model = Stays()
    folded, report = fold(model, images(4, 4))
    assert set(report.layers) == set(REASONS) and not report.folded and report.error == 0
    for path, reason in REASONS.items():
        assert reason in report.layers[path].reason, path
    assert nnx.graphdef(folded) == nnx.graphdef(model)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs), jaxbn.nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(self.norm(self.linear(x)))


class Transformed(nnx.Module):
    """The block under transformations, of which some leave it as it is and some do not."""

    def __init__(self):
        self.jit, self.remat = Block(nnx.Rngs(0)), Block(nnx.Rngs(0))
        stacked = nnx.split_rngs(splits=2)(nnx.vmap(Block, in_axes=0, out_axes=0))
        self.vmap, self.scan = stacked(nnx.Rngs(0)), stacked(nnx.Rngs(0))

    def __call__(self, x):
        call = lambda block, x: block(x)
        x = nnx.remat(call)(self.remat, nnx.jit(call)(self.jit, x))
        x = nnx.vmap(call, in_axes=(0, None))(self.vmap, x).mean(0)
        return nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.scan, x)


def test_transformations_are_seen_through_or_refused():
    model, x = Transformed(), images(4, 4)
    folded, report = fold(model, x)
    assert set(report.folded) == {"jit/norm", "remat/norm"}
    for name in ("vmap", "scan"):
        assert report.layers[f"{name}/norm"].reason == f"it runs inside `{name}`, which fold cannot trace"
    assert_same_outputs(lambda model, x: model(x), model, nnx.jit(lambda model, x: model(x)), folded, x)


def test_a_frozen_network_is_folded_in_a_model_and_shared_modules_stay_shared():
    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([Linear(4, 3), OURS(3), nnx.Dropout(0.5, rngs=nnx.Rngs(1))])
            self.same = self.layers[1]

        def __call__(self, x, scale):
            return scale * self.layers[2](self.same(self.layers[0](x)))

    frozen = jaxbn.nnx.freeze(started(Net()))
    model = jaxbn.nnx.install_frozen(Net(), frozen)
    call, x = (lambda model, x: model(x, 2.0)), images(4, 4)
    folded, report = jaxbn.nnx.fold(model, x, call=call)
    assert report.folded == ("layers/1",) and folded.same is folded.layers[1]
    np.testing.assert_allclose(call(folded, x), call(model, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="There is no normalization layer"):
        jaxbn.nnx.fold(folded, x, call=call)
    model.layers[1].mean[...] += 1e7
    model.layers[0].bias[...] += 1e7
    with pytest.raises(ValueError, match="pass a larger tolerance= if the difference is acceptable"):
        jaxbn.nnx.fold(model, x, call=call)
