"""Conversions, saving and loading copy arrays, so their source may be written to afterwards."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving

C = 8


def aligned(value, *shape):
    """An array that JAX on the CPU would use without a copy: one aligned to 64 bytes."""
    size = int(np.prod(shape or (C,)))
    memory = np.zeros(4 * size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + 4 * size].view(np.float32).reshape(shape or (C,))
    array[...] = value
    return array


def stats():
    return {"mean": aligned(1), "var": aligned(2)}


def linen_variables():
    return {"params": {"scale": aligned(3), "bias": aligned(4)}, "batch_stats": stats()}


def moments():
    return {"": jaxbn.Moments(aligned(9), aligned(5), aligned(6))}


def of_nnx(model):
    return nnx.to_pure_dict(nnx.state(model))


def nnx_model(sources=None):
    model = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    if sources is not None:
        for name, value in sources.items():
            getattr(model, name).set_value(value)
    return model


def state_dict():
    weights = {"weight": aligned(1), "bias": aligned(2), "running_mean": aligned(3), "running_var": aligned(4)}
    return {f"norm.{name}": array for name, array in weights.items()} | {"dense.weight": aligned(5, C, C)}


class Net(nnx.Module):
    def __init__(self):
        self.norm = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))
        self.dense = nnx.Linear(C, C, use_bias=False, rngs=nnx.Rngs(0))


def convert(values):
    return of_nnx(jaxbn.serving.match(values, Net()).convert(values))


def haiku_state():
    return {
        f"batch_norm/~/{part}_ema": {"average": aligned(7, 1, C), "hidden": 0, "counter": 0} for part in ("mean", "var")
    }


def from_equinox(mode):
    def function(source):
        layer = types.SimpleNamespace(
            mode=mode, ema_state_index=0, batch_state_index=0, batch_counter=1, momentum=0.9, **source["layer"]
        )
        return jaxbn.serving.from_equinox(layer, {0: (source["mean"], source["var"]), 1: 0})

    return function


def to_haiku(variables):
    state = {f"batch_norm/~/{p}_ema": {"average": np.ones((1, C)), "counter": np.int32(0)} for p in ("mean", "var")}
    params = {"batch_norm": {"scale": np.ones((1, C)), "offset": np.ones((1, C))}}
    return jaxbn.serving.to_haiku(variables, params, state)


def to_equinox(variables):
    class State(dict):
        def set(self, index, value):
            return State({**self, index: value})

    layer = types.SimpleNamespace(weight=None, bias=None, mode="ema", ema_state_index=0, ema_first_time_index=1)
    return dict(jaxbn.serving.to_equinox(variables, layer, State())[1])


def through_a_file(save, load):
    def function(variables, folder):
        save(folder / "network", jaxbn.Frozen(variables, jaxbn.Info((), ())))
        return load(folder / "network").variables

    return function


equinox_source = lambda: {"layer": {"weight": aligned(1), "bias": aligned(2)}, "mean": aligned(3), "var": aligned(4)}
BORDERS = {
    "match.convert": (state_dict, convert),
    "match.convert, arrays of NNX": (
        lambda: {"scale": aligned(1), "bias": aligned(2), "mean": aligned(3), "var": aligned(4)},
        lambda arrays: of_nnx((m := jaxbn.serving.match(nnx_model(arrays), nnx_model())).convert(m.source.given)),
    ),
    "match.convert_back": (
        lambda: {"scale": aligned(1), "bias": aligned(2), "mean": aligned(3), "var": aligned(4)},
        lambda arrays: jaxbn.serving.match(
            {"weight": np.ones(C), "bias": np.ones(C), "running_mean": np.ones(C), "running_var": np.ones(C)},
            nnx_model(),
        ).convert_back(nnx_model(arrays)),
    ),
    "from_keras": (
        lambda: {name: aligned(1) for name in ("gamma", "beta", "moving_mean", "moving_variance")},
        lambda source: jaxbn.serving.from_keras(types.SimpleNamespace(**source)),
    ),
    "from_haiku": (
        lambda: ({"batch_norm": {"scale": aligned(1, 1, C), "offset": aligned(2, 1, C)}}, haiku_state()),
        lambda source: jaxbn.serving.from_haiku(*source),
    ),
    "from_equinox, ema": (equinox_source, from_equinox("ema")),
    "from_equinox, batch": (equinox_source, from_equinox("batch")),
    "to_keras": (linen_variables, jaxbn.serving.to_keras),
    "to_haiku": (linen_variables, to_haiku),
    "to_equinox": (linen_variables, to_equinox),
    "linen.freeze": (linen_variables, lambda v: jaxbn.linen.freeze(v).variables),
    "nnx.freeze": (
        lambda: {"scale": aligned(1), "bias": aligned(2), "mean": aligned(3), "var": aligned(4)},
        lambda arrays: jaxbn.nnx.freeze(nnx_model(arrays)).variables,
    ),
    "nnx.install_frozen": (
        lambda: {"scale": aligned(1), "bias": aligned(2), "mean": aligned(3), "var": aligned(4)},
        lambda arrays: of_nnx(jaxbn.nnx.install_frozen(nnx_model(), jaxbn.Frozen(arrays, jaxbn.Info((), ())))),
    ),
    "Frozen": (linen_variables, lambda v: jaxbn.Frozen(v, jaxbn.Info((), ())).variables),
    "linen.install_moments": (moments, lambda m: jaxbn.linen.install_moments(linen_variables(), m)["batch_stats"]),
    "nnx.install_moments": (moments, lambda m: of_nnx(jaxbn.nnx.install_moments(nnx_model(), m))),
    "postproc of a transform": (
        lambda: moments()[""],
        lambda m: jaxbn.batch_norm().postproc(jaxbn.batch_norm().init(C)[1], m),
    ),
}


@pytest.mark.parametrize("make, cross", BORDERS.values(), ids=BORDERS.keys())
def test_the_source_may_change_afterwards(make, cross):
    source = make()
    found = cross(source)
    before = jax.tree.map(np.array, found)
    for array in jax.tree.leaves(source):
        if isinstance(array, np.ndarray):
            array += 1
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("name", ["save", "save_sharded"])
def test_files(name, tmp_path):
    """Loaded arrays do not change when the file does."""
    variables = {"params": {"kernel": aligned(1, C, C)}}
    getattr(jaxbn.serving, name)(tmp_path / "network", jaxbn.Frozen(variables, jaxbn.Info((), ())))
    found = getattr(jaxbn.serving, name.replace("save", "load"))(tmp_path / "network").variables["params"]["kernel"]
    variables["params"]["kernel"] += 1
    for file in [tmp_path / "network", *tmp_path.rglob("*")]:
        if file.is_file():
            file.write_bytes(bytes(file.stat().st_size))
    np.testing.assert_array_equal(found, np.ones((C, C)))


def test_the_result_may_change_afterwards():
    """Converting back copies too, since PyTorch trains arrays in place."""
    variables = jax.tree.map(jnp.asarray, linen_variables())
    weights = jaxbn.serving.to_keras(variables)
    before = jax.tree.map(np.array, variables)
    for array in weights:
        array += 1
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_a_pytorch_model_trains_on_and_loads_the_converted_state():
    """Tensors are replaced by tensors of the same dtype, for `load_state_dict`, and NumPy arrays by NumPy arrays."""
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(
        torch.nn.Linear(C, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, C).to(torch.bfloat16)
    )
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(C, 64, rngs=rngs), jaxbn.nnx.BatchNorm(64, rngs=rngs), nnx.Linear(64, C, rngs=rngs)
    )
    found = jaxbn.serving.match(net.state_dict(), model)
    converted = found.convert(net.state_dict())
    before = jax.tree.map(np.array, of_nnx(converted))
    old = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor += 1
    jax.tree.map(np.testing.assert_array_equal, of_nnx(converted), before)
    back = found.convert_back(converted)
    net.load_state_dict(back)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, old[name]) and tensor.dtype == old[name].dtype, name
        back[name] += 1
    jax.tree.map(np.testing.assert_array_equal, of_nnx(converted), before)
    with pytest.raises(TypeError, match=r"Sequential is not a model .* model\.state_dict\(\) for PyTorch"):
        jaxbn.serving.match(net, model)
