"""Folding in linen: what goes where, what stays and why, and that nothing but rounding changes."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from folding import assert_same_outputs, moved, primitives_of, rows_of
from programs import load_program

import jaxbn
import jaxbn.linen
import jaxbn.serving

EVALUATION = {"use_running_average": True}
OURS = functools.partial(jaxbn.linen.BatchNorm, **EVALUATION)
STOCK = functools.partial(nn.BatchNorm, **EVALUATION)


def started(net, *inputs):
    """Variables none of which has its initial value."""
    return moved(jax.eval_shape(net.init, jax.random.key(0), *inputs))


def fold(net, x, variables=None, call=None, largest_error=1e-5):
    """(call, variables, folded call, folded variables, report); its error is tested to be what it says."""
    variables = started(net, x) if variables is None else variables
    call = call or net.apply
    folded, new, report = jaxbn.linen.fold(call, variables, x)
    assert report.error <= largest_error
    return call, variables, folded, new, report


def images(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# --- Layers and normalizations ----------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Each kind of layer, with a normalization behind it; of images `[N, H, W, 4]`."""

    @nn.compact
    def __call__(self, x):
        flat = x.reshape(x.shape[0], -1, 4)
        return [
            OURS(name="conv_norm")(nn.Conv(6, (3, 3), strides=2, feature_group_count=2, use_bias=False)(x)),
            STOCK(name="mask_norm")(nn.Conv(2, (2, 2), mask=jnp.ones((2, 2, 4, 2)).at[0].set(0))(x)),
            OURS(name="up_norm")(nn.ConvTranspose(6, (3, 3), strides=(2, 2))(x)),
            STOCK(name="flipped_norm")(nn.ConvTranspose(6, (3, 3), transpose_kernel=True, use_bias=False)(x)),
            OURS(name="dense_norm", use_scale=False)(nn.Dense(5)(flat)),
            STOCK(name="dense_general_norm", use_bias=False)(nn.DenseGeneral((2, 3), axis=(2, 1), use_bias=False)(x)),
            OURS(name="batch_norm", axis=(0, -1))(nn.DenseGeneral(3, axis=-1, batch_dims=(0,))(flat)),
            OURS(name="heads_norm", axis=(-2, -1))(nn.DenseGeneral((2, 3))(flat)),
            OURS(name="einsum_norm", axis=(1, 3))(nn.Einsum((4, 2, 3), "...nc,chd->...hnd")(flat)),
        ]


@pytest.mark.slow
def test_every_kind_of_layer_takes_what_is_behind_it():
    x = images(2, 4, 4, 4)
    call, variables, folded, new, report = fold(Layers(), x)
    assert len(set(rows_of(report).values())) == len(report.folded) == len(report.layers) == 9
    assert_same_outputs(call, variables, folded, new, x)
    assert set(new) == {"params"}


class Before(nn.Module):
    """Normalizations in front of layers that can take them, and of layers that cannot."""

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, 3, (3, 3))
        flat = x.reshape(x.shape[0], -1, 4)
        return [
            conv(padding="VALID", feature_group_count=1, name="valid")(OURS(name="norm_valid")(x)),
            nn.Conv(4, (2, 2), padding=0, feature_group_count=2, name="groups")(STOCK(name="norm_groups")(x)),
            conv(padding="CIRCULAR", use_bias=False, name="circular")(STOCK(name="norm_circular")(x)),
            nn.Conv(3, (1, 1), name="point")(OURS(name="norm_point")(x)),
            nn.DenseGeneral((2, 3), axis=(-1, 1), use_bias=False, name="general")(STOCK(name="norm_general")(x)),
            nn.Einsum((3, 4, 5), "...nc,hcd->...hnd", name="heads")(OURS(name="norm_heads")(flat)),
            conv(padding="SAME", name="padded")(OURS(name="norm_padded")(x)),
            conv(padding=((0, 0), (1, 0)), name="left")(STOCK(name="norm_left")(x)),
            nn.ConvTranspose(3, (3, 3), strides=(2, 2), name="up")(OURS(name="norm_up")(x)),
            nn.Einsum((4, 5), "bnc,cd->bd", name="total")(OURS(name="norm_total")(flat)),
            # A shift of 0 reaches the padding: it is 0 there too.
            conv(padding="SAME", name="no_shift")(
                jaxbn.linen.MovingAverageBatchNorm(**EVALUATION, use_bias=False, name="norm_no_shift")(x)
            ),
        ]


@pytest.mark.slow
def test_layers_take_what_is_before_them_unless_they_pad():
    x = images(2, 5, 6, 4)
    variables = started(Before(), x)
    statistics = variables["batch_stats"]["norm_no_shift"]
    statistics["mean"] = jnp.zeros_like(statistics["mean"])  # as that method keeps it
    call, variables, folded, new, report = fold(Before(), x, variables)
    stays = {path: layer.reason for path, layer in report.layers.items() if not layer.folded}
    assert rows_of(report) == {f"norm_{name}": name for name in LAYERS_BEFORE} | dict.fromkeys(stays)
    for name, reason in {
        "padded": "'padded' pads its input with zeros, to which the shift does not apply",
        "left": "'left' pads its input with zeros, to which the shift does not apply",
        "up": "'up' is transposed",
        "total": "'total' sums over an axis of its input that is not in its kernel",
    }.items():
        assert reason in stays.pop(f"norm_{name}")
    assert not stays


LAYERS_BEFORE = "valid groups circular point general heads no_shift".split()


class Method(nn.Module):
    """A layer of each method behind a layer, with an activation and a residual."""

    activation: Any = nn.silu

    @nn.compact
    def __call__(self, x):
        outputs = {}
        for i, case in enumerate(CASES):
            y = nn.Dense(3, name=f"dense_{i}")(x)
            layer = case.linen_module(**EVALUATION, activation=self.activation, name=f"norm_{i}")
            outputs[case.name] = layer(y, residual=jnp.flip(y), **case.where(y)) if i % 2 else layer(y, **case.where(y))
        return outputs


def test_every_method_is_folded_and_keeps_its_activation_and_residual():
    x = images(8, 4)
    call, variables, folded, new, report = fold(Method(), x)
    for i, case in enumerate(CASES):
        layer = report.layers[f"norm_{i}"]
        residual = i % 2  # which uses the output of the dense layer too
        if case.factory is jaxbn.domain_batch_norm:
            assert layer == (False, None, "its statistics depend on the domain of each example")
        elif residual:
            assert not layer.folded and f"the output of 'dense_{i}' also goes into `rev`" in layer.reason
        else:
            assert layer.into == f"dense_{i}"


# --- What stays ---------------------------------------------------------------------------------------------------


class Standardized(nn.Conv):
    """Computes with another kernel than its parameter."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return jaxbn.standardize_kernel(value) if name == "kernel" else value


def squashed_batch_norm(*, momentum=0.99, epsilon=1e-5):
    """A method whose evaluation is not an affine map."""
    base = jaxbn.batch_norm(momentum=momentum, epsilon=epsilon)
    return base._replace(eval=lambda *args, **kwargs: jnp.tanh(base.eval(*args, **kwargs)))


class Squashed(jaxbn.linen.Norm):
    factory = staticmethod(squashed_batch_norm)


class Tied(nn.Module):
    """A kernel that serves twice."""

    def setup(self):
        self.dense, self.norm = nn.Dense(4), OURS()

    def __call__(self, x):
        return self.norm(self.dense(x)) @ self.dense.variables["params"]["kernel"].T


class Stays(nn.Module):
    """Reasons to fold nothing; the name of each normalization says which."""

    @nn.compact
    def __call__(self, x):
        def dense(name):
            return nn.Dense(4, name=f"dense_{name}")

        used = dense("used")(x)
        reshaped = dense("reshaped")(x).reshape(-1, 2, 4)
        shared = dense("shared")
        twice = STOCK(name="twice")
        after_relu = nn.Dense(3, name="behind_relu")(nn.relu(OURS(name="relu_behind")(x + 1)))
        inside = nn.Dense(3, name="behind_inside")(OURS(name="activation_inside", activation=nn.relu)(x))
        self.sow("intermediates", "unused", dense("sown")(x).mean())
        flipped = OURS(name="wrong_axis", axis=0)(dense("wrong_axis")(x))
        own = nn.Dense(4, dot_general=jax.lax.dot_general, name="dense_own")
        return [
            OURS(name="used_elsewhere")(used), used.sum(),
            OURS(name="reshaped")(reshaped),
            OURS(name="activation")(nn.tanh(dense("activation")(x))),
            OURS(name="shared_layer")(shared(x)), shared(2 * x),
            twice(dense("twice_1")(x)), twice(dense("twice_2")(x)),
            after_relu, inside, flipped,
            OURS(name="output")(x),
            OURS(name="subclass")(Standardized(4, (1,), name="standardized")(x[:, None])),
            OURS(name="own_product")(own(x)),
            Tied(name="tied")(x),
            Squashed(**EVALUATION, name="squashed")(dense("squashed")(x)),
            OURS(name="mapped_1")(nn.SpectralNorm(dense("mapped_1"))(x, update_stats=False)),
            OURS(name="mapped_2")(nn.WeightNorm(dense("mapped_2"))(x)),
            nn.BatchNorm(use_running_average=False, name="trains")(dense("trains")(x)),
        ]  # fmt: skip


REASONS = {
    "used_elsewhere": "the output of 'dense_used' also goes into `reduce_sum`; its output is the output of the model",
    "reshaped": "its input is made by `reshape`",
    "activation": "its input is made by an activation (tanh)",
    "shared_layer": "'dense_shared' is called 2 times",
    "twice": "it is called 2 times",
    "relu_behind": "its input is made by `add`; its output goes into an activation (relu), not directly into a layer",
    "activation_inside": "its own activation or residual comes before the next layer",
    "wrong_axis": "its features are along axes (0,), those of 'dense_wrong_axis' along (1,)",
    "output": "its input is the input of the model, or a constant; its output is the output of the model",
    "subclass": "'standardized' is a Standardized, which fold does not support",
    "own_product": "'dense_own' uses a custom dot_general",
    "tied/norm": "the variables of 'tied/dense' are also used elsewhere",
    "squashed": "its evaluation is not an affine map of its input",
    "mapped_1": "'dense_mapped_1' computes with other values than its variables",
    "mapped_2": "'dense_mapped_2' computes with other values than its variables",
    "trains": "it normalizes with the statistics of its batch",
}


def test_what_would_change_the_result_stays_and_the_report_says_why():
    x = images(4, 4)
    variables = started(Stays(), x)
    call = lambda variables, x: Stays().apply(variables, x, mutable=["batch_stats"])[0]
    folded, new, report = jaxbn.linen.fold(call, variables, x)
    assert set(report.layers) == set(REASONS) and not report.folded and report.error == 0
    for path, reason in REASONS.items():
        assert reason in report.layers[path].reason, path
    chex.assert_trees_all_equal(new, {name: variables[name] for name in ("params", "batch_stats")})


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(OURS(name="norm")(nn.Dense(4, name="dense")(x)))


class Transformed(nn.Module):
    """The block under transformations, of which some leave it as it is and some do not."""

    @nn.compact
    def __call__(self, x):
        over = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        x = nn.jit(Block)(name="jit")(x)
        x = nn.remat(Block)(name="remat")(x)
        x = jax.jit(nn.relu)(x)
        x = nn.vmap(Block, in_axes=None, axis_size=2, **over)(name="vmap")(x).mean(0)
        x, _ = nn.scan(lambda block, x, _: (block(x), None), length=2, **over)(Block(name="scan"), x, None)
        return nn.cond(True, lambda block, x: block(x), lambda block, x: 2 * block(x), Block(name="cond"), x)


def test_transformations_are_seen_through_or_refused():
    x = images(4, 4)
    call, variables, folded, new, report = fold(Transformed(), x)
    assert set(report.folded) == {"jit/norm", "remat/norm"}
    for name in ("vmap", "scan", "cond"):
        assert report.layers[f"{name}/norm"].reason == f"it runs inside `{name}`, which fold cannot trace"
    # A program that was compiled for one of the two is not taken for the other.
    before = jax.jit(call)(variables, x)
    np.testing.assert_allclose(jax.jit(folded)(new, x), before, rtol=1e-5)
    np.testing.assert_array_equal(jax.jit(call)(variables, x), before)


def test_a_teacher_of_the_same_paths_is_left_alone():
    net, x = Block(), images(4, 4)
    variables, teacher = started(net, x), moved(jax.tree.map(lambda leaf: leaf * 2, started(net, x)))
    both = lambda variables, x: (net.apply(variables, x), net.apply(teacher, x))
    _, new, report = jaxbn.linen.fold(both, variables, x)
    assert "another network" in report.layers["norm"].reason
    chex.assert_trees_all_equal(new, variables)
    # And one that runs beside the folded network, where only the test of what is there tells them apart.
    folded, new, _ = jaxbn.linen.fold(net.apply, variables, x)
    np.testing.assert_array_equal(folded(teacher, x), net.apply(teacher, x))


# --- Networks -----------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    norm: Any = OURS

    @nn.compact
    def __call__(self, x):
        for width in (5, 6, 7):
            x = nn.Dense(width, use_bias=self.norm is None)(x)
            x = nn.gelu(x if self.norm is None else self.norm()(x))
        return nn.Dense(3)(x)


class MobileNet(nn.Module):
    """Depthwise separable convolutions, as in MobileNet v2, with its linear bottlenecks and residuals."""

    norm: Any = STOCK

    def conv(self, x, features, size, stride=1, groups=1):
        x = nn.Conv(features, (size, size), stride, feature_group_count=groups, use_bias=self.norm is None)(x)
        return x if self.norm is None else self.norm()(x)

    @nn.compact
    def __call__(self, x):
        x = nn.relu6(self.conv(x, 4, 3, 2))
        for stride in (2, 1):
            y = nn.relu6(self.conv(x, 8, 1))
            y = nn.relu6(self.conv(y, 8, 3, stride, groups=8))
            y = self.conv(y, 4, 1)
            x = x + y if stride == 1 else y
        return nn.Dense(3)(x.mean((1, 2)))


class DenseNet(nn.Module):
    """Normalizations before their convolutions, with and without an activation in between."""

    norm: Any = OURS
    activation: Any = nn.relu

    @nn.compact
    def __call__(self, x):
        act = self.activation or (lambda x: x)
        for i in range(2):
            y = nn.Conv(8, (1, 1), use_bias=False, name=f"bottleneck_{i}")(act(self.norm(name=f"norm_{i}_1")(x)))
            y = nn.Conv(4, (3, 3), use_bias=False, name=f"conv_{i}")(act(self.norm(name=f"norm_{i}_2")(y)))
            x = jnp.concatenate([x, y], -1)
        x = nn.Conv(6, (1, 1), use_bias=False, name="transition")(act(self.norm(name="norm_transition")(x)))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.mark.slow
def test_all_of_an_mlp_is_folded():
    x = images(4, 4)
    call, variables, folded, new, report = fold(MLP(), x)
    assert rows_of(report) == {f"BatchNorm_{i}": f"Dense_{i}" for i in range(3)}


@pytest.mark.parametrize("norm", [STOCK, pytest.param(OURS, marks=pytest.mark.slow)], ids=["stock", "jaxbn"])
def test_all_of_a_mobile_net_is_folded_and_no_arithmetic_is_left(norm):
    """The program is, equation by equation, that of the network without normalizations whose layers have biases."""
    x = images(2, 8, 8, 3)
    call, variables, folded, new, report = fold(MobileNet(norm), x)
    assert rows_of(report) == {f"BatchNorm_{i}": f"Conv_{i}" for i in range(7)}
    assert_same_outputs(call, variables, folded, new, x)
    bare = MobileNet(None)
    chex.assert_trees_all_equal_shapes(new, jax.eval_shape(bare.init, jax.random.key(0), x))
    assert primitives_of(folded, new, x) == primitives_of(bare.apply, new, x)
    assert primitives_of(call, variables, x)["rsqrt"] == 7


@pytest.mark.slow
def test_a_dense_net_keeps_what_is_before_an_activation():
    x = images(2, 8, 8, 4)
    call, variables, folded, new, report = fold(DenseNet(), x)
    # Those that are behind a convolution too, and the only ones to use its output, go into that.
    assert rows_of(report) == {
        "norm_0_1": None, "norm_0_2": "bottleneck_0", "norm_1_1": None, "norm_1_2": "bottleneck_1",
        "norm_transition": None,
    }  # fmt: skip
    for path in set(report.layers) - set(report.folded):
        assert "its output goes into an activation (relu)" in report.layers[path].reason
    assert "by `concatenate`" not in report.layers["norm_0_1"].reason


class PaddedDenseNet(nn.Module):
    """A DenseNet without activations whose features are normalized before each convolution."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            y = nn.Conv(4, (1, 1), use_bias=False, name=f"point_{i}")(OURS(name=f"norm_{i}_1")(x))
            z = nn.Conv(4, (3, 3), use_bias=False, name=f"padded_{i}")(OURS(name=f"norm_{i}_3")(x))
            x = jnp.concatenate([x, y, z], -1)
        return nn.Conv(4, (3, 3), padding="VALID", name="valid")(OURS(name="norm_valid")(x))


@pytest.mark.slow
def test_a_dense_net_without_activations_keeps_what_is_before_padding():
    x = images(2, 6, 6, 3)
    call, variables, folded, new, report = fold(PaddedDenseNet(), x)
    assert rows_of(report) == {
        "norm_0_1": "point_0", "norm_0_3": None, "norm_1_1": "point_1", "norm_1_3": None, "norm_valid": "valid",
    }  # fmt: skip
    for i in range(2):
        assert f"'padded_{i}' pads its input with zeros" in report.layers[f"norm_{i}_3"].reason


@pytest.mark.slow
def test_all_of_a_resnet_50_is_folded():
    """Activation and residual are inside the layers, and stay."""
    resnet = load_program("resnet.py")
    net, x = resnet.LinenResNet(num_classes=5, width=4, dtype=jnp.float32), images(2, 32, 32, 3)
    call = functools.partial(net.apply, train=False)
    variables = moved(jax.eval_shape(functools.partial(net.init, train=False), jax.random.key(0), x))
    # Kernels that keep the size of what goes through them.
    variables["params"] = jax.tree.map(lambda leaf: leaf / np.sqrt(leaf[..., 0].size), variables["params"])
    _, _, folded, new, report = fold(net, x, variables, call)
    assert len(report.folded) == len(report.layers) == 53
    assert all(layer.into == path.replace("norm", "conv") for path, layer in report.layers.items())
    assert_same_outputs(call, variables, folded, new, x)
    left = primitives_of(folded, new, x)
    assert not left["rsqrt"] and not left["sub"] and not left["mul"]
    assert left["add"] == 53 + 16 + 1  # biases, residuals, and the bias of the head


# --- Values, dtypes, what is given and what is refused ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_the_kernel_is_that_of_the_formula_rounded_once(dtype):
    net = nn.Sequential([nn.Conv(3, (2, 2), use_bias=False, param_dtype=dtype), OURS(epsilon=1e-3)])
    with jax.numpy_dtype_promotion("standard"):
        _, variables, folded, new, report = fold(net, images(2, 4, 4, 5), largest_error=2e-2)
    scale, bias = (np.float64(variables["params"]["layers_1"][name]) for name in ("scale", "bias"))
    mean, var = (np.float64(variables["batch_stats"]["layers_1"][name]) for name in ("mean", "var"))
    multiplier = scale / np.sqrt(var + 1e-3)
    kernel = np.float64(variables["params"]["layers_0"]["kernel"]) * multiplier
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(dtype)}
    rounding = 2.0**-24 if dtype == jnp.float32 else 2.0**-8
    few = 8 * 2.0**-24  # of float32, in which it is computed
    np.testing.assert_allclose(np.float64(new["params"]["layers_0"]["kernel"]), kernel, rtol=rounding + few)
    shift = bias - mean * multiplier
    np.testing.assert_allclose(np.float64(new["params"]["layers_0"]["bias"]), shift, rtol=rounding + 4 * few)
    assert report.tolerance == (1e-4 if dtype == jnp.float32 else 0.1) and report.error <= report.tolerance


@pytest.mark.slow
def test_kernels_are_those_of_pytorch():
    """Of `fuse_conv_bn_eval`, for a plain, a grouped and a transposed convolution."""
    torch = pytest.importorskip("torch")
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    nets = {
        "plain": (nn.Conv(6, (3, 3)), torch.nn.Conv2d(4, 6, 3), (3, 2, 0, 1)),
        "grouped": (nn.Conv(6, (3, 3), feature_group_count=2), torch.nn.Conv2d(4, 6, 3, groups=2), (3, 2, 0, 1)),
        # PyTorch has the input first, and the kernel flipped in space.
        "transposed": (nn.ConvTranspose(6, (3, 3)), torch.nn.ConvTranspose2d(4, 6, 3), (2, 3, 0, 1)),
    }
    for conv, theirs, order in nets.values():
        _, variables, _, new, _ = fold(nn.Sequential([conv, OURS()]), images(2, 5, 5, 4))
        params, statistics = variables["params"], variables["batch_stats"]["layers_1"]
        norm = torch.nn.BatchNorm2d(6)
        with torch.no_grad():
            for theirs_, ours in (
                (theirs.weight, params["layers_0"]["kernel"].transpose(order)),
                (theirs.bias, params["layers_0"]["bias"]),
                (norm.weight, params["layers_1"]["scale"]),
                (norm.bias, params["layers_1"]["bias"]),
                (norm.running_mean, statistics["mean"]),
                (norm.running_var, statistics["var"]),
            ):
                theirs_.copy_(torch.tensor(np.array(ours)))
            fused = fuse_conv_bn_eval(theirs.eval(), norm.eval(), transpose=theirs.transposed)
        kernel, bias = (new["params"]["layers_0"][name] for name in ("kernel", "bias"))
        np.testing.assert_allclose(kernel.transpose(order), fused.weight.detach().numpy(), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(bias, fused.bias.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_bfloat16_network_gives_what_it_gave_but_for_the_rounding():
    norm = functools.partial(OURS, dtype=jnp.bfloat16, activation=nn.relu)
    net = nn.Sequential([nn.Dense(6, dtype=jnp.bfloat16), norm(), nn.Dense(3, dtype=jnp.bfloat16), norm()])
    x = images(8, 4)
    _, variables, folded, new, report = fold(net, x, largest_error=2e-2)
    assert len(report.folded) == 2
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(jnp.float32)}


def test_maps_of_kernels_are_folded_too():
    """The layer then computes with the folded kernel as it is."""
    mapped = jaxbn.linen.map_kernel
    conv = nn.Conv(4, (3, 3), use_bias=False, promote_dtype=mapped(jaxbn.centralize_kernel))
    other = nn.Conv(3, (3, 3), promote_dtype=mapped(jaxbn.standardize_kernel))
    net = nn.Sequential([conv, jaxbn.linen.MovingAverageBatchNorm(**EVALUATION), nn.relu, other, OURS()])
    x = images(2, 5, 5, 3)
    call, variables, folded, new, report = fold(net, x)
    assert len(report.folded) == 2
    left = primitives_of(folded, new, x)
    assert not left["rsqrt"] and not left["sub"] and not left["reduce_sum"]


def test_chains_are_folded_as_a_whole():
    net = nn.Sequential([OURS(), nn.Dense(4), OURS(), OURS(use_bias=False), nn.relu])
    x = images(4, 3)
    call, variables, folded, new, report = fold(net, x)
    assert set(rows_of(report).values()) == {"layers_1"}
    assert set(new) == {"params"} and set(new["params"]) == {"layers_1"}


def test_a_frozen_network_gives_a_frozen_network(tmp_path):
    net, x = nn.Sequential([nn.Dense(4), OURS(), nn.relu, OURS()]), images(4, 3)
    frozen = jaxbn.linen.freeze(started(net, x))
    folded, new, report = jaxbn.linen.fold(net.apply, frozen, x)
    assert report.folded == ("layers_1",) and [path for path, _ in new.info.layers] == ["layers_3"]
    jaxbn.serving.save(tmp_path / "folded", new)
    served = jaxbn.serving.load(tmp_path / "folded")
    np.testing.assert_allclose(folded(served.variables, x), net.apply(frozen.variables, x), rtol=1e-5, atol=1e-5)
    assert "layers_3" in jaxbn.linen.summary(served)


def test_what_differs_by_more_than_the_tolerance_is_refused():
    """Where the mean is 1e7 standard deviations, float32 does not hold the shift beside the output."""
    net, x = nn.Sequential([nn.Dense(4), OURS()]), images(4, 3)
    variables = started(net, x)
    variables["params"]["layers_0"]["bias"] += 1e7
    variables["batch_stats"]["layers_1"]["mean"] += 1e7
    before = jax.tree.map(np.copy, variables)
    with pytest.raises(ValueError, match="pass a larger tolerance= if the difference is acceptable"):
        jaxbn.linen.fold(net.apply, variables, x)
    chex.assert_trees_all_equal(variables, before)
    folded, new, report = jaxbn.linen.fold(net.apply, variables, x, tolerance=10)
    expected, found = np.float64(net.apply(variables, x)), np.float64(folded(new, x))
    assert report.error > 1e-4 and report.tolerance == 10
    np.testing.assert_allclose(report.error, np.abs(found - expected).max() / np.abs(expected).max(), rtol=1e-2)
    with pytest.raises(ValueError, match="no statistics of a normalization layer"):
        jaxbn.linen.fold(net.apply, {"params": variables["params"]}, x)


def test_the_report_is_a_table_and_a_dict():
    _, _, _, _, report = fold(nn.Sequential([nn.Dense(4), OURS(), nn.relu, OURS()]), images(4, 3))
    report = jaxbn.FoldReport(report.layers, 1.25e-7, 1e-4)
    assert str(report).splitlines() == [
        "1 of 2 normalization layers folded; outputs on the example differ by 1.2e-7",
        "layer     folded  where to, or why not",
        "layers_1  yes     into 'layers_0' before it",
        "layers_3  no      its input is made by an activation (relu); its output is the",
        "                  output of the model",
    ]
    assert report.to_dict() == {
        "layers": {path: layer._asdict() for path, layer in report.layers.items()}, "error": 1.25e-7, "tolerance": 1e-4,
    }  # fmt: skip
