"""Arrays of one model in another of the same architecture give its outputs, and train on as it does."""

import functools
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_network
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.serving import match

KEY = jax.random.key(0)
PAD = ((1, 1), (1, 1))
ZEROS = nnx.initializers.zeros_init()
# As PyTorch's, whose momentum is 0.1.
AVERAGE = {"momentum": jaxbn.constant(0.9, unbiased=True)}


class Block(nn.Module):
    norm: type = jaxbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(self.norm, use_running_average=not train)
        y = nn.relu(norm()(nn.Conv(4, (3, 3), padding=PAD, feature_group_count=2, use_bias=False)(x)))
        return nn.relu(norm()(nn.Conv(4, (3, 3), padding=PAD, use_bias=False)(y)) + x)


class Net(nn.Module):
    """The network of the file in linen; `turned` makes a kernel that is turned around already."""

    norm: type = functools.partial(jaxbn.linen.BatchNorm, **AVERAGE)
    turned: bool = False

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(self.norm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(4, (3, 3), 2, padding=PAD)(x)))
        x = Block(self.norm)(x, train)
        x = nn.relu(nn.ConvTranspose(4, (4, 4), (2, 2), transpose_kernel=self.turned)(x))
        return nn.Dense(5)(norm()(nn.Dense(5)(x.reshape(len(x), -1))))


class NNXBlock(nnx.Module):
    def __init__(self, norm, rngs):
        conv = functools.partial(nnx.Conv, 4, 4, (3, 3), padding=PAD, use_bias=False, kernel_init=ZEROS, rngs=rngs)
        self.conv1, self.bn1 = conv(feature_group_count=2), norm(4, rngs=rngs)
        self.conv2, self.bn2 = conv(), norm(4, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.bn2(self.conv2(y)) + x)


class NNXNet(nnx.Module):
    """The network of the file in NNX, with names that do not come in the order of the layers."""

    def __init__(self):
        rngs, norm = nnx.Rngs(1), functools.partial(jaxbn.nnx.BatchNorm, use_running_average=True)
        start = {"kernel_init": ZEROS, "rngs": rngs}
        self.stem, self.norm = nnx.Conv(3, 4, (3, 3), 2, padding=PAD, **start), norm(4, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(norm, rngs)])
        self.grow = nnx.ConvTranspose(4, 4, (4, 4), (2, 2), **start)
        self.dense, self.last_norm = nnx.Linear(64, 5, **start), norm(5, rngs=rngs)
        self.answer = nnx.Linear(5, 5, **start)

    def __call__(self, x):
        x = self.blocks[0](nnx.relu(self.norm(self.stem(x))))
        x = nnx.relu(self.grow(x))
        return self.answer(self.last_norm(self.dense(x.reshape(len(x), -1))))


class File:
    """What PyTorch computed, with images as Flax has them."""

    def __init__(self):
        found = json.loads(torch_network.FILE.read_text())
        self.rate = found["rate"]
        self.before, self.after = (
            {name: np.float32(array) for name, array in found[when].items()} for when in ("before", "after")
        )
        self.batches = [jnp.asarray(images(batch), jnp.float32) for batch in found["batches"]]
        self.outputs_before, self.outputs_after = (np.float32(found[f"outputs_{w}"]) for w in ("before", "after"))


def images(array):
    return np.moveaxis(np.asarray(array), 1, -1)


@pytest.fixture(scope="module")
def file():
    return File()


def init(net=None):
    return lambda: (net or Net()).init(KEY, jnp.ones((2, 4, 4, 3)), False)


FLATTENED = {"linen": {"Dense_1": (4, 4, 4)}, "nnx": {"dense": (4, 4, 4)}}


@pytest.mark.slow
def test_linen_goes_on_where_pytorch_was(file):
    """Evaluation, two steps of training, and evaluation; all arrays after it, statistics too."""
    found = match(file.before, init(), flattened=FLATTENED["linen"])
    variables, net = found.convert(file.before), Net()
    evaluate = jax.jit(lambda variables: net.apply(variables, file.batches[0], False))
    assert evaluate(variables) == pytest.approx(file.outputs_before, abs=1e-5)

    @jax.jit
    def step(variables, x):
        def loss(params):
            y, updates = net.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return jnp.mean((y - 1) ** 2), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        return {"params": jax.tree.map(lambda p, g: p - file.rate * g, variables["params"], grads), **updates}

    for batch in file.batches:
        variables = step(variables, batch)
    assert evaluate(variables) == pytest.approx(file.outputs_after, abs=1e-4)
    back = found.convert_back(variables)
    assert list(back) == list(file.before)
    for name, array in file.after.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(back[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_nnx_gives_the_outputs_of_pytorch_and_the_way_back_the_same_arrays(file):
    model = NNXNet()
    found = match(file.before, model, flattened=FLATTENED["nnx"])
    converted = found.convert(file.before)
    assert nnx.jit(converted)(file.batches[0]) == pytest.approx(file.outputs_before, abs=1e-5)
    chex.assert_trees_all_equal(found.convert_back(converted), file.before)
    assert found.names["blocks/0/conv2"] == "3.conv2" and found.names["last_norm"] == "8"
    assert not model.dense.kernel[...].any()  # the one given is as it was


@pytest.mark.parametrize("turned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_linen_and_nnx_and_jaxbn_and_stock(file, turned):
    """Between stock linen, in either form of the transposed convolution, and jaxbn's NNX, there and back."""
    net = Net(nn.BatchNorm, turned)
    variables = match(file.before, init(net), flattened=FLATTENED["linen"]).convert(file.before)
    found = match(init(net), NNXNet())
    model = found.convert(variables)
    expected = jax.jit(net.apply, static_argnums=2)(variables, file.batches[0], False)
    assert expected == pytest.approx(file.outputs_before, abs=1e-5)
    np.testing.assert_allclose(nnx.jit(model)(file.batches[0]), expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(found.convert_back(model), variables)
    assert found.names["grow"] == "ConvTranspose_0"


def test_counters_of_equal_methods_go_along():
    target = lambda: jaxbn.linen.BatchRenorm(use_running_average=True).init(KEY, jnp.ones((4, 2)))
    found = match(jaxbn.nnx.BatchRenorm(2, rngs=nnx.Rngs(0)), target)
    found.source.given.step[...] += 7
    assert found.convert(found.source.given)["batch_stats"]["step"] == 7
    found.source.given.step.set_value(jnp.zeros(2))
    with pytest.raises(ValueError, match=r"'batch_stats/step' is \(2,\) in one model and \(\) in the other"):
        found.convert(found.source.given)


def test_a_cumulative_average_goes_on():
    """PyTorch's momentum of None; counters are whole numbers there."""
    values = {"weight": conv(2), "bias": conv(2), "running_mean": conv(2), "running_var": conv(2) + 1}
    values |= {"num_batches_tracked": np.array(9)}
    net = jaxbn.linen.BatchNorm(use_running_average=False, momentum=jaxbn.cumulative())
    found = match(values, lambda: net.init(KEY, jnp.ones((4, 2))))
    variables = found.convert(values)
    assert variables["batch_stats"]["count"] == 9
    variables["batch_stats"]["count"] += 1
    back = found.convert_back(variables)["num_batches_tracked"]
    assert back == 10 and back.dtype == np.int64


def test_unbiased_variances_by_the_values_of_a_batch(file):
    """By the layer, or for all; rounded once each way."""
    found = match(file.before, init(), flattened=FLATTENED["linen"])
    names = [layer.path for layer in found.target.layers if layer.kind == "norm"]
    plain, biased = (found.convert(file.before, batch_values=n) for n in (None, dict.fromkeys(names, 24)))
    for name in names:
        one, other = (functools.reduce(dict.get, name.split("/"), v["batch_stats"])["var"] for v in (plain, biased))
        np.testing.assert_allclose(other, one * 23 / 24, rtol=1e-6)
    back = found.convert_back(biased, batch_values=24)
    chex.assert_trees_all_close(back, file.before, rtol=1e-6)
    for wrong, message in ((1, "needs at least 2 values"), ({"Conv_0": 24}, "'Conv_0' has no running variance")):
        with pytest.raises(ValueError, match=message):
            found.convert(file.before, batch_values=wrong)
    with pytest.raises(ValueError, match="neither model is PyTorch's"):
        match(init(), NNXNet()).convert(plain, batch_values=24)


def conv(*shape):
    return np.zeros(shape, np.float32)


def linen_of(*names):
    """Three convolutions of equal shape but for the first, called in this order."""

    class Convs(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in names:
                x = nn.Conv(3 if name == "a" else 2, (1, 1), use_bias=False, name=name)(x) if name != "a" else x
            return nn.Conv(3, (1, 1), use_bias=False, name="a")(x)

    return lambda: Convs().init(KEY, jnp.ones((1, 1, 1, 2)))


TORCH = {"first.weight": conv(3, 2, 1, 1), "x.weight": conv(2, 2, 1, 1), "y.weight": conv(2, 2, 1, 1)}


def test_what_order_and_names_do_not_tell_is_asked_for():
    """There the layer of another shape comes first, here last: the others may be in any order."""
    target = linen_of("c", "b")
    with pytest.raises(ValueError, match=r"Name the pairs, .* names=\{'c': 'x' or 'y', 'b': 'x' or 'y'\}"):
        match(TORCH, target)
    assert match(TORCH, target, names={"b": "x"}).names == {"c": "y", "b": "x", "a": "first"}
    assert match(TORCH, linen_of("x", "y")).names == {"x": "x", "y": "y", "a": "first"}  # by their names


def test_a_branch_that_is_called_first_is_asked_for():
    """By order alone the norm of the branch would be taken for the last one of the block."""

    class Residual(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(4, (3, 3), name="conv1")(x)
            x = nn.LayerNorm(name="shortcut_norm")(nn.Conv(4, (1, 1), name="shortcut")(x))
            return nn.LayerNorm(name="norm1")(y) + x

    net = nn.Sequential([Residual(), nn.Dense(2)])
    target = lambda: net.init(KEY, jnp.ones((1, 1, 1, 2)))
    shapes = {"0.conv": (4, 2, 3, 3), "0.bn": (4,), "0.down.0": (4, 2, 1, 1), "0.down.1": (4,), "head": (2, 4)}
    values = {f"{path}.weight": conv(*shape) for path, shape in shapes.items()}
    values |= {f"{path}.bias": conv(shape[0]) for path, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"=\{'layers_0/shortcut_norm': '0.bn' or '0.down.1', 'layers_0/norm1'"):
        match(values, target)
    found = match(values, target, names={"layers_0/norm1": "0.bn"})
    assert found.names["layers_0/shortcut_norm"] == "0.down.1" and found.names["layers_0/shortcut"] == "0.down.0"


def test_what_does_not_fit_is_named(file):
    target = linen_of("x", "y")
    with pytest.raises(ValueError, match=r"no layer 'z' in the target; there are x, y, a"):
        match(TORCH, target, names={"z": "x"})
    with pytest.raises(ValueError, match=r"no layer 'z' in the source; there are first, x, y"):
        match(TORCH, target, names={"x": "z"})
    with pytest.raises(ValueError, match=r"'x' has weight \(2, 2, 1, 1\), and 'first' has weight \(3, 2, 1, 1\)"):
        match(TORCH, target, names={"x": "first"})
    with pytest.raises(ValueError, match="'x' is given for several"):
        match(TORCH, target, names={"x": "x", "y": "x"})
    with pytest.raises(ValueError, match=r"architectures differ.* in the source 'z' \(weight \(5,\)\)\.$"):
        match({**TORCH, "z.weight": conv(5)}, target)
    with pytest.raises(ValueError, match=r"write flattened=\{'Dense_1': \(4, H, W\)\} .* H W = 16"):
        match(file.before, init())
    with pytest.raises(ValueError, match="takes 64 features, and .* are 32"):
        match(file.before, init(), flattened={"Dense_1": (2, 4, 4)})
    with pytest.raises(ValueError, match="flatten images alike"):
        match(TORCH, TORCH, flattened={"x": (2, 1, 1)})
    with pytest.raises(ValueError, match="no Dense layer 'Conv_0'; there are Dense_1, Dense_0"):
        match(file.before, init(), flattened={"Conv_0": (2, 4, 4)})
    with pytest.raises(TypeError, match=r"lambda: net.init\(key, x\)"):
        match(file.before, jax.eval_shape(init()))
    for checkpoint in ({"model": file.before}, {"model": file.before, "epoch": 3}):
        with pytest.raises(TypeError, match="pass the state dict alone"):
            match(checkpoint, init())
    with pytest.raises(TypeError, match="Net is not a model that jaxbn can match"):
        match(file.before, Net())
    jitted = jax.jit(lambda: nn.Dense(1).init(KEY, jnp.ones((1, 1))))
    jax.eval_shape(jitted)
    with pytest.raises(ValueError, match="pass the init itself, not jitted"):
        match(file.before, jitted)


def test_parameters_outside_of_layers_and_parts_under_jit():
    """Each time anew, whatever `nn.jit` has compiled before."""

    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(nn.Embed(7, 3)(x) + self.param("shift", nn.initializers.zeros, (1, 3)))

    net = nn.Sequential([nn.jit(Tokens)(), nn.Dense(2)])
    target = lambda: net.init(KEY, jnp.zeros((2,), int))
    values = {"shift": conv(1, 3) + 1, "embed.weight": conv(7, 3) + 2, "norm.weight": conv(3) + 3}
    values |= {"norm.bias": conv(3) + 4, "head.weight": conv(2, 3) + 5, "head.bias": conv(2) + 6}
    for _ in range(2):
        found = match(values, target)
        params = found.convert(values)["params"]
        assert params["layers_0"]["shift"][0, 0] == 1 and params["layers_0"]["LayerNorm_0"]["bias"][0] == 4
        chex.assert_trees_all_equal(found.convert_back({"params": params}), values)


def test_the_file_is_what_pytorch_computes():
    torch = pytest.importorskip("torch")
    found = torch_network.plain(torch_network.record(torch))
    expected = json.loads(torch_network.FILE.read_text())
    del found["version"], expected["version"]
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_tensors_and_bfloat16():
    torch = pytest.importorskip("torch")
    net = torch.nn.Linear(3, 2).to(torch.bfloat16)
    found = match(net.state_dict(), nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    converted = found.convert(net.state_dict())
    np.testing.assert_array_equal(converted.kernel[...].T, net.weight.detach().float().numpy())
