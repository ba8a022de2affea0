"""Saving and loading a frozen network: round trips, rejected files, and the effects of damage, full disks and kills."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving

LAYER = jaxbn.LayerInfo("batch_norm", 1e-5, "pooled", 20.0)
INFO = jaxbn.Info((("block/norm", LAYER), ("last", LAYER._replace(rows=None))), (("jaxbn", "0.1"), ("jax", "0.10")))


def network(**variables):
    return jaxbn.Frozen(variables, INFO)


def tiny():
    """A network with a short file: a dense layer and a normalization of two channels."""
    rng = np.random.default_rng(1)
    params = {"map": rng.standard_normal((9, 5)).astype("f4"), "scale": np.float32([1, 2])}
    return network(params=params, batch_stats={"mean": np.float32([3, 4]), "var": np.float32([5, 6])}, step=np.int32(7))


def assert_same(found, expected):
    """Checks that two networks have the same bits, dtypes, names and information."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.jaxbn"


@pytest.fixture
def saved(path):
    jaxbn.serving.save(path, tiny())
    return path


# --- A trained network, loaded elsewhere ------------------------------------------------------------------------------

IMAGES = (1 + 2 * np.random.default_rng(0).standard_normal((8, 6, 6, 3))).astype(np.float32)
LABELS = np.arange(8) % 3


class LinenNet(nn.Module):
    """Convolutions, a residual connection and three normalizations."""

    norm: type
    dtype: type | None = None

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(self.norm, use_running_average=not train, momentum=0.9, epsilon=1e-3)
        x = nn.relu(norm(dtype=self.dtype)(nn.Conv(4, (3, 3), dtype=self.dtype)(x)))
        y = nn.relu(norm(dtype=self.dtype)(nn.Conv(4, (3, 3), use_bias=False, dtype=self.dtype)(x)))
        x = nn.relu(x + norm(dtype=self.dtype, use_scale=False)(nn.Conv(4, (1, 1), dtype=self.dtype)(y)))
        return nn.Dense(3, dtype=self.dtype)(x.mean((1, 2)))


class NNXNet(nnx.Module):
    def __init__(self, norm, dtype=None):
        rngs = nnx.Rngs(0)
        norm = functools.partial(norm, 4, momentum=0.9, epsilon=1e-3, dtype=dtype, rngs=rngs)
        conv = functools.partial(nnx.Conv, dtype=dtype, rngs=rngs)
        self.convs = nnx.List([conv(3, 4, (3, 3)), conv(4, 4, (3, 3), use_bias=False), conv(4, 4, (1, 1))])
        self.norms = nnx.List([norm(), norm(), norm(use_scale=False)])
        self.head = nnx.Linear(4, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        first, second, third = (lambda x, c=c, n=n: n(c(x)) for c, n in zip(self.convs, self.norms, strict=True))
        x = nnx.relu(first(x))
        x = nnx.relu(x + third(nnx.relu(second(x))))
        return self.head(x.mean((1, 2)))


def loss_of(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), LABELS).mean()


@functools.cache
def trained_in_linen(dtype):
    """Variables of a stock model after a few steps."""
    net = LinenNet(nn.BatchNorm, dtype)

    @jax.jit
    def step(variables):
        def loss(params):
            logits, updates = net.apply(variables | {"params": params}, IMAGES, True, mutable=["batch_stats"])
            return loss_of(logits), updates

        gradients, updates = jax.grad(loss, has_aux=True)(variables["params"])
        return updates | {"params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)}

    with jax.numpy_dtype_promotion("standard"):
        variables = jax.jit(lambda key: net.init(key, IMAGES, False))(jax.random.key(0))
        for _ in range(4):
            variables = step(variables)
    return variables


@functools.cache
def trained_in_nnx(dtype):
    """A stock model after a few steps."""
    model = NNXNet(nnx.BatchNorm, dtype)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: loss_of(model(IMAGES)))(model))

    with jax.numpy_dtype_promotion("standard"):
        for _ in range(4):
            step(model, optimizer)
    return model


def predict_in_linen(norm, dtype, variables):
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(lambda v: LinenNet(norm, dtype).apply(v, IMAGES, False))(variables)


def predict_in_nnx(model):
    model = nnx.view(model, use_running_average=True)
    with jax.numpy_dtype_promotion("standard"):
        return nnx.jit(lambda model: model(IMAGES))(model)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_model_trained_in_stock_linen_is_served_by_our_layers_to_the_last_bit(dtype, path):
    variables = trained_in_linen(dtype)
    jaxbn.serving.save(path, jaxbn.linen.freeze(variables))
    frozen = jaxbn.serving.load(path, like=variables)
    assert_same(frozen.variables, variables)
    expected = predict_in_linen(nn.BatchNorm, dtype, variables)
    found = predict_in_linen(jaxbn.linen.BatchNorm, dtype, frozen.variables)
    assert np.isfinite(np.float32(expected)).all() and len(np.unique(np.float32(expected))) > 12
    assert_same(found, expected)


def test_a_model_trained_in_stock_nnx_is_served_by_our_layers_to_the_last_bit(path):
    model = trained_in_nnx(None)
    jaxbn.serving.save(path, jaxbn.nnx.freeze(model))
    empty = nnx.eval_shape(lambda: NNXNet(jaxbn.nnx.BatchNorm))
    served = jaxbn.nnx.install_frozen(empty, jaxbn.serving.load(path, like=empty))
    assert_same(predict_in_nnx(served), predict_in_nnx(model))


def test_in_low_precision_our_layers_of_nnx_give_what_stock_linen_gives(path):
    """Stock NNX rounds the running statistics to the dtype of the layer; ours does not (deviation 4)."""
    model = trained_in_nnx(jnp.bfloat16)
    jaxbn.serving.save(path, jaxbn.nnx.freeze(model))
    frozen = jaxbn.serving.load(path)
    served = predict_in_nnx(jaxbn.nnx.install_frozen(NNXNet(jaxbn.nnx.BatchNorm, jnp.bfloat16), frozen))
    stock = predict_in_nnx(model)
    assert not np.array_equal(served, stock)
    np.testing.assert_allclose(np.float32(served), np.float32(stock), atol=0.03)
    # The same variables, with the names of linen.
    renamed = {"params": {}, "batch_stats": {}}
    for path, leaf in flax.traverse_util.flatten_dict(frozen.variables).items():
        layer = {"convs": "Conv_", "norms": "BatchNorm_", "head": "Dense_0"}[path[0]] + "".join(path[1:-1])
        kind = "batch_stats" if path[-1] in ("mean", "var") else "params"
        renamed[kind].setdefault(layer, {})[path[-1]] = leaf
    assert_same(served, predict_in_linen(nn.BatchNorm, jnp.bfloat16, renamed))


FRESH_PROCESS = """
import sys, flax.linen as nn, jax, numpy as np
from flax import nnx
import jaxbn.linen, jaxbn.nnx, jaxbn.serving

folder = sys.argv[1]
x = np.load(folder + "/x.npy")
net = nn.Sequential([nn.Dense(4), jaxbn.linen.BatchNorm(use_running_average=True), nn.tanh, nn.Dense(2)])
frozen = jaxbn.serving.load(folder + "/linen", like=jax.eval_shape(net.init, jax.random.key(0), x))
np.save(folder + "/linen.npy", jax.jit(net.apply)(frozen.variables, x))

def make():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), jaxbn.nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))

model = nnx.eval_shape(make)
model = jaxbn.nnx.install_frozen(model, jaxbn.serving.load(folder + "/nnx", like=model))
np.save(folder + "/nnx.npy", nnx.jit(lambda model, x: model(x))(model, x))
print(jaxbn.linen.summary(frozen))
"""


def environment():
    """The environment of a process that imports this jaxbn."""
    return os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(jaxbn.__file__))}


def test_a_fresh_process_predicts_the_same(tmp_path):
    """The network has stock layers here, and layers of jaxbn in the other process."""
    x = IMAGES.reshape(-1, 3)
    np.save(tmp_path / "x.npy", x)
    net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.tanh, nn.Dense(2)])
    variables, report = jaxbn.linen.postproc(net.apply, net.init(jax.random.key(1), x), [x])
    frozen = jaxbn.linen.freeze(variables, report)
    jaxbn.serving.save(tmp_path / "linen", frozen)
    rngs = nnx.Rngs(2)
    layers = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
    model, report = jaxbn.nnx.postproc(nnx.Sequential(*layers), [x])
    jaxbn.serving.save(tmp_path / "nnx", jaxbn.nnx.freeze(model, report))
    told = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, tmp_path], check=True, capture_output=True, text=True, env=environment()
    )
    model.eval()
    assert_same(np.load(tmp_path / "linen.npy"), jax.jit(net.apply)(frozen.variables, x))
    assert_same(np.load(tmp_path / "nnx.npy"), nnx.jit(lambda model, x: model(x))(model, x))
    assert told.stdout.strip() == jaxbn.linen.summary(frozen)


# --- Round trips ------------------------------------------------------------------------------------------------------

DTYPES = "float32 bfloat16 float16 float8_e4m3fn int32 uint32 int8 uint8 int4 bool complex64".split()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 3)], ids=["array", "number", "empty"])
def test_arrays_are_restored_to_the_last_bit(shape, dtype, path):
    values = np.random.default_rng(0).integers(-4, 4, (2, *shape)).astype(np.float32)
    array = np.asarray(values[0] + (1j * values[1] if dtype == "complex64" else 0)).astype(jnp.dtype(dtype))
    frozen = network(on_device=jnp.asarray(array), on_host={"array": array})
    jaxbn.serving.save(path, frozen)
    found = jaxbn.serving.load(path)
    assert_same(found, frozen)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


def test_nan_and_infinity_are_restored_to_the_last_bit(path):
    odd = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    odd = np.append(odd, np.uint32([0x7FC00001, 0xFFC12345]).view(np.float32))  # NaN with a payload
    jaxbn.serving.save(path, network(odd=odd))
    assert_same(jaxbn.serving.load(path), network(odd=odd))


def test_arrays_in_any_memory_order_and_scalars_of_numpy_are_restored(path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    jaxbn.serving.save(path, network(a=array.T, b=array[:, ::-1], c=np.float32(7), d=np.asfortranarray(array)))
    expected = network(a=array.T.copy(), b=array[:, ::-1].copy(), c=np.array(7, np.float32), d=array)
    assert_same(jaxbn.serving.load(path), expected)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.complex128])
def test_wide_numbers_need_x64(dtype, path):
    wide = network(block={"wide": np.array([1 / 3, 2], dtype)})
    with jax.enable_x64(True):
        jaxbn.serving.save(path, jax.tree.map(jnp.asarray, wide))
        assert_same(jaxbn.serving.load(path), wide)
    name = np.dtype(dtype).name
    with pytest.raises(ValueError, match=f"^'block/wide' is {name}, which JAX would round: set jax_enable_x64 before"):
        jaxbn.serving.load(path)


def test_any_names_are_restored(path):
    array = np.ones(2, np.float32)
    names = {"": array, "größe Ω 層 🙂": {"": {"a/b": array + 1, "a": {"b": array + 2}}}, '"\n\\': array}
    info = jaxbn.Info(tuple((name, jaxbn.LayerInfo(None, None, "as given", None)) for name in names), ())
    jaxbn.serving.save(path, jaxbn.Frozen(names, info))
    assert_same(jaxbn.serving.load(path), jaxbn.Frozen(names, info))


def test_a_network_without_variables_is_restored(path):
    for frozen in (network(), network(params={}), jaxbn.Frozen({"params": {"a": {}}}, jaxbn.Info((), ()))):
        jaxbn.serving.save(path, frozen)
        assert_same(jaxbn.serving.load(path), frozen)


EPSILONS = [1e-5, 0.1, 1 / 3, 5e-324, 1.1]


def test_the_information_is_restored_exactly(path):
    layers = tuple((f"norm_{e}", jaxbn.LayerInfo("batch_norm", e, "mean_of_batches", 1e15 / 3)) for e in EPSILONS)
    info = jaxbn.Info((*layers, ("", jaxbn.LayerInfo(None, None, "as given", None))), (("jax", "1"), ("a", "2")))
    jaxbn.serving.save(path, jaxbn.Frozen({}, info))
    assert jaxbn.serving.load(path).info == info


# --- The file ---------------------------------------------------------------------------------------------------------


def test_the_first_line_says_what_the_file_is(saved):
    line = subprocess.run(["head", "-1", saved], check=True, capture_output=True, text=True).stdout
    header = json.loads(line)
    assert (header["format"], header["format_version"]) == ("jaxbn-frozen", 1)
    expected = {"method": "batch_norm", "epsilon": 1e-5, "estimator": "pooled", "rows": 20.0}
    assert header["layers"] == {"block/norm": expected, "last": expected | {"rows": None}}
    assert header["versions"] == {"jaxbn": "0.1", "jax": "0.10"}
    assert header.keys() == {"format", "format_version", "layers", "versions", "arrays", "sha256"}
    assert header["arrays"]["params"] == {"map": ["float32", [9, 5]], "scale": ["float32", [2]]}


def parts(file):
    """Reads the header and the bytes of the arrays without jaxbn."""
    line, arrays = file.read_bytes().split(b"\n", 1)
    return json.loads(line), arrays


def write(file, header, arrays):
    """Writes a file with a correct checksum: SHA-256 of the header line without the checksum, and of the arrays."""
    line = lambda header: json.dumps(header, separators=(",", ":")).encode() + b"\n"
    digest = hashlib.sha256(line({k: v for k, v in header.items() if k != "sha256"}) + arrays).hexdigest()
    file.write_bytes(line(header | {"sha256": digest}) + arrays)
    return digest


def test_the_checksum_covers_everything_else(saved, tmp_path):
    header, arrays = parts(saved)
    assert write(tmp_path / "again", header, arrays) == header["sha256"]
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()
    stats, params = np.frombuffer(arrays, "<f4", 4), np.frombuffer(arrays, "<f4", 47, 16)
    assert stats.tolist() == [3, 4, 5, 6] and params[45:].tolist() == [1, 2]


def test_a_later_format_is_an_error(saved):
    header, arrays = parts(saved)
    write(saved, header | {"format_version": 2, "more": []}, arrays + b"more")
    with pytest.raises(ValueError) as error:
        jaxbn.serving.load(saved)
    assert str(error.value) == (
        f"{saved} has format 2, but this version of jaxbn reads format 1. It was written with "
        "{'jaxbn': '0.1', 'jax': '0.10'}: install these versions."
    )


def test_nothing_is_unpickled(saved, monkeypatch):
    """No function of pickle is called, and a file with dtype object and a correct checksum is rejected."""

    def reached(*args, **kwargs):
        raise AssertionError("unpickled")

    expected = jaxbn.serving.load(saved)
    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, reached)
    assert_same(jaxbn.serving.load(saved), expected)
    header, _ = parts(saved)
    for dtype in ("object", "|O", "str32", "S8", "datetime64[D]", "void64", "float128", ">f4"):
        write(saved, header | {"arrays": {"a": [dtype, [1]]}}, pickle.dumps(print)[:8])
        assert "is not a frozen network written by jaxbn" in refusal(saved)


NO_ARRAYS = {
    "objects": (np.array([1, None], object), "object"),
    "text": (np.array(["a", "b"]), "<U1"),
    "times": (np.array(["2020-01-01"], "datetime64[D]"), r"datetime64\[D\]"),
    "records": (np.zeros(2, [("x", "f4")]), r"\[\('x', '<f4'\)\]"),
    "other byte order": (np.arange(3).astype(">f4"), ">f4"),
    "a key": (jax.random.key(0), "key<fry>"),
    "keys": (jax.random.split(jax.random.key(0, impl="rbg")), "key<rbg>"),
    "a number": (1.5, "<class 'float'>"),
    "a string": ("text", "<class 'str'>"),
    "shapes alone": (jax.ShapeDtypeStruct((2,), np.float32), "<class 'jax.*ShapeDtypeStruct'>"),
}


@pytest.mark.parametrize("leaf, shown", NO_ARRAYS.values(), ids=NO_ARRAYS.keys())
def test_leaves_that_are_not_arrays_of_numbers_are_rejected_by_name(leaf, shown, path):
    with pytest.raises(TypeError, match=f"^'block/0/leaf' is {shown}; a frozen network holds arrays of numbers with"):
        jaxbn.serving.save(path, network(block={"0": {"leaf": leaf}}))
    assert not list(path.parent.iterdir())


def test_only_frozen_networks_are_saved(path):
    for given in (tiny().variables, None, nnx.BatchNorm(2, rngs=nnx.Rngs(0))):
        with pytest.raises(TypeError, match="Expected a jaxbn.Frozen"):
            jaxbn.serving.save(path, given)
    assert not list(path.parent.iterdir())


# --- A model that it must fit -----------------------------------------------------------------------------------------


def changed(variables, **leaves):
    flat = flax.traverse_util.flatten_dict(variables, sep="/")
    flat |= {name.replace("__", "/"): leaf for name, leaf in leaves.items()}
    return flax.traverse_util.unflatten_dict({name: a for name, a in flat.items() if a is not None}, sep="/")


SMALL = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.Dense(3)])


def initialized():
    return SMALL.init(jax.random.key(0), np.ones((2, 3), np.float32))


@functools.cache
def variables_of_small():
    return jax.tree.map(lambda leaf: leaf + 1, jax.jit(initialized)())


@pytest.fixture
def small(path):
    jaxbn.serving.save(path, jaxbn.linen.freeze(variables_of_small()))
    return path


LIKE = {
    "variables": lambda v: v,
    "shapes": lambda v: jax.eval_shape(initialized),
    "FrozenDict": flax.core.freeze,
    "boxes": lambda v: jax.tree.map(lambda a: nn.Partitioned(a, names=(None,) * a.ndim), v),
}


@pytest.mark.parametrize("like", LIKE.values(), ids=LIKE.keys())
def test_variables_that_it_fits(like, small):
    variables = variables_of_small()
    assert_same(jaxbn.serving.load(small, like=like(variables)).variables, variables)


UNFIT = {
    "wider": ({"params__layers_2__kernel": np.ones((5, 3))}, "'params/layers_2/kernel' is (4, 3) in .* and (5, 3) in"),
    "other rank": ({"batch_stats__layers_1__var": np.ones(())}, "'batch_stats/layers_1/var' is (4,) .* and () in"),
    "one more": ({"params__more": np.ones(2)}, "'params/more' is missing in the frozen network and (2,) in the model"),
    "one less": ({"params__layers_0__bias": None}, "'params/layers_0/bias' is (4,) in .* missing in the model"),
    "a count": ({"batch_stats__layers_1__count": np.ones(())}, "'batch_stats/layers_1/count' is missing in"),
}


@pytest.mark.parametrize("changes, message", UNFIT.values(), ids=UNFIT.keys())
def test_variables_that_it_does_not_fit(changes, message, small):
    message = "^" + message.replace("(", r"\(").replace(")", r"\)") + ".*; build the model with the arguments"
    with pytest.raises(ValueError, match=message):
        jaxbn.serving.load(small, like=changed(variables_of_small(), **changes))


def test_nnx_models_that_it_fits_and_does_not(path):
    make = lambda: nnx.List([nnx.BatchNorm(4, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))])
    trained = make()
    for layer, features in zip(trained, (4, 3), strict=True):
        layer(np.arange(2.0 * features, dtype=np.float32).reshape(2, features))
    jaxbn.serving.save(path, jaxbn.nnx.freeze(trained))
    for model in (make(), nnx.eval_shape(make)):
        assert jaxbn.serving.load(path, like=model).info.layer("1").method == "batch_norm"
        model.pop()
        with pytest.raises(ValueError, match=r"^'1/bias' is \(3,\) in the frozen network and missing in the model"):
            jaxbn.serving.load(path, like=model)


def test_like_is_variables_or_a_model(saved):
    for like in (jaxbn.linen.BatchNorm(), tiny(), 3):
        with pytest.raises(
            TypeError, match="`like` must be the variables of a linen model, an NNX model, or a pytree with states"
        ):
            jaxbn.serving.load(saved, like=like)


# --- Where it is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(umask, mode, path):
    before = os.umask(umask)
    try:
        for _ in range(2):  # a new file, and one that is replaced
            jaxbn.serving.save(path, tiny())
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_a_file_that_is_replaced_keeps_its_permissions(mode, path):
    jaxbn.serving.save(path, tiny())
    path.chmod(mode)
    jaxbn.serving.save(path, network())
    assert path.stat().st_mode & 0o7777 == mode
    assert_same(jaxbn.serving.load(path), network())


def test_a_symbolic_link_is_followed(path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "other"
    other.write_bytes(b"some text")
    other.chmod(0o600)
    path.symlink_to(other.relative_to(tmp_path))
    for frozen in (tiny(), network()):
        jaxbn.serving.save(str(path), frozen)
        assert path.is_symlink() and not other.is_symlink() and other.stat().st_mode & 0o777 == 0o600
        assert_same(jaxbn.serving.load(str(path)), frozen)
        assert_same(jaxbn.serving.load(other), frozen)
    other.unlink()  # a link that leads to where nothing is
    jaxbn.serving.save(path, tiny())
    assert path.is_symlink() and other.is_file()
    assert os.listdir(tmp_path / "elsewhere") == ["other"] and set(os.listdir(tmp_path)) == {path.name, "elsewhere"}


def test_the_folder_must_exist_and_a_folder_is_no_file(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        jaxbn.serving.save(tmp_path / "nowhere" / "network", tiny())
    with pytest.raises(FileNotFoundError):
        jaxbn.serving.load(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for call in (lambda path: jaxbn.serving.save(path, tiny()), jaxbn.serving.load):
        with pytest.raises(IsADirectoryError):
            call(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"] and not os.listdir(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    jaxbn.serving.save("network", tiny())
    assert_same(jaxbn.serving.load("network"), tiny())


# --- Faults -----------------------------------------------------------------------------------------------------------


def refusal(path):
    """Returns the message of the ValueError for a file, or None if it is loaded; raises other errors."""
    try:
        jaxbn.serving.load(path)
    except ValueError as error:
        assert type(error) is ValueError and str(path) in str(error)
        return str(error)
    return None


def outcome(path, content):
    path.write_bytes(content)
    return refusal(path)


def test_every_flipped_bit_is_found(saved):
    """Flips each bit of the file, and each whole byte."""
    content, messages = saved.read_bytes(), []
    with open(saved, "r+b", buffering=0) as file:
        for position, byte in enumerate(content):
            for flip in (*(1 << bit for bit in range(8)), 0xFF):
                os.pwrite(file.fileno(), bytes([byte ^ flip]), position)
                messages.append(refusal(saved))
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert_same(jaxbn.serving.load(saved), tiny())  # as it was, it is read
    assert len(messages) == 9 * len(content) and len(content) > 600
    assert None not in messages


def test_every_truncation_is_found(saved):
    content = saved.read_bytes()
    messages = [outcome(saved, content[:length]) for length in range(len(content))]
    assert None not in messages and len(messages) > 600
    cut_in_arrays = messages[len(content) - 10 :]
    assert all("damaged or incomplete: its content does not have the recorded" in message for message in cut_in_arrays)


DEEP = 100_000
OTHER_FILES = {
    "empty": b"",
    "a line": b"\n",
    "random bytes": np.random.default_rng(0).bytes(5000),
    "random bytes in a line": np.random.default_rng(0).bytes(5000).replace(b"\n", b"") + b"\n",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "a pickle": pickle.dumps({"format": "jaxbn-frozen"}),
    "deep lists": b"[" * DEEP,
    "deep lists in a line": b"[" * DEEP + b"]" * DEEP + b"\n",
    "deep lists in a header": b'{"format":"jaxbn-frozen","layers":' + b"[" * DEEP + b"]" * DEEP + b"}\n",
    "a long number": b"1" * 10_000 + b"\n",
    **{
        f"JSON {text}": text.encode() + b"\n"
        for text in (
            "{}",
            "[]",
            "1",
            "null",
            '"jaxbn-frozen"',
            "NaN",
            '{"format":"other"}',
            '{"format":["jaxbn-frozen"]}',
        )
    },
    "UTF-16": '{"format":"jaxbn-frozen"}\n'.encode("utf-16"),
    "a number that is none": b'{"format":"jaxbn-frozen","rows":NaN}\n',
}


@pytest.mark.parametrize("content", OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_other_files_are_rejected(content, path):
    assert outcome(path, content) == f"{path} is not a frozen network of jaxbn, or its first line is damaged."


def test_incomplete_headers_are_rejected(path):
    name, version = '{"format":"jaxbn-frozen"', '"format_version":1'
    assert "has format None, but this version of jaxbn reads format 1" in outcome(path, f"{name}}}\n".encode())
    for rest in ("", ',"sha256":null', ',"sha256":""', ',"layers":{}'):
        assert "its content does not have the recorded checksum" in outcome(
            path, f"{name},{version}{rest}}}\n".encode()
        )


@pytest.mark.parametrize("more", [b"\0", b"\n", b"garbage" * 100, None], ids=["zero", "line", "garbage", "itself"])
def test_appended_bytes_are_found(more, saved):
    content = saved.read_bytes()
    assert "checksum" in outcome(saved, content + (content if more is None else more))
    assert outcome(saved, (more or content) + content)


def test_arrays_of_one_file_under_the_header_of_another_are_found(saved, path):
    _, arrays = parts(saved)
    jaxbn.serving.save(path, jax.tree.map(lambda leaf: leaf + 1, tiny()))
    line, others = path.read_bytes().split(b"\n", 1)
    assert len(others) == len(arrays) and others != arrays
    assert "checksum" in outcome(path, line + b"\n" + arrays)


def fails(error):
    def function(*args, **kwargs):
        raise error

    return function


FULL = OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def small_files(limit):
    """Limits the size of the files of this process, so that a write fails half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("existing", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize(
    "function, error", [("fsync", FULL), ("replace", FULL), ("fsync", KeyboardInterrupt()), (None, None)],
    ids=["fsync", "replace", "interrupted", "write"],
)  # fmt: skip
def test_a_save_that_fails_leaves_the_old_file_and_no_other(function, error, existing, path, monkeypatch):
    if existing:
        jaxbn.serving.save(path, tiny())
    big = network(a=np.ones(100_000, np.float32))
    if function:
        monkeypatch.setattr(os, function, fails(error))
        with pytest.raises(type(error)):
            jaxbn.serving.save(path, big)
        monkeypatch.undo()
    else:
        with small_files(200_000), pytest.raises(OSError, match="File too large"):
            jaxbn.serving.save(path, big)
    assert os.listdir(path.parent) == [path.name] * existing
    if existing:
        assert_same(jaxbn.serving.load(path), tiny())
    jaxbn.serving.save(path, big)
    assert_same(jaxbn.serving.load(path), big)


# --- Kills ------------------------------------------------------------------------------------------------------------

# Imports jaxbn once, and forks a child for each line of its input. A child saves two networks in turns until it is
# killed, or saves the second and kills itself at a call of a function of os. JAX starts no threads in it.
SAVER = """
import os, signal, sys
import numpy as np
import jaxbn, jaxbn.serving

path, *files = sys.argv[1:]
networks = [jaxbn.Frozen(dict(np.load(file)), jaxbn.Info((), ())) for file in files]

def in_turns():
    while True:
        for network in networks:
            jaxbn.serving.save(path, network)

def until(name, count):
    original, calls = getattr(os, name), []
    def counted(*args):
        calls.append(args)
        if len(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)
    setattr(os, name, counted)
    jaxbn.serving.save(path, networks[1])

for line in sys.stdin:
    child = os.fork()
    if not child:
        until(*line.split()) if line.strip() else in_turns()
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def kill(tmp_path_factory):
    """`kill(line, seconds)` returns the network that is left, old (0) or new (1), and the number of other files."""
    here, rng = tmp_path_factory.mktemp("kills"), np.random.default_rng(0)
    networks = [network(weights=rng.standard_normal((128, 4096)).astype("f4")) for _ in range(2)]  # of 2 MB
    for number, frozen in enumerate(networks):
        np.savez(here / f"{number}.npz", **frozen.variables)
    (here / "folder").mkdir()
    path = here / "folder" / "network.jaxbn"
    command = [sys.executable, "-W", "ignore", "-c", SAVER, path, here / "0.npz", here / "1.npz"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:

        def kill(line, seconds=None):
            jaxbn.serving.save(path, networks[0])
            print(line, file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            if seconds is not None:
                time.sleep(seconds)
                os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == f"{-signal.SIGKILL}\n"
            found = np.asarray(jaxbn.serving.load(path).variables["weights"]).tobytes()
            (left,) = (n for n, frozen in enumerate(networks) if frozen.variables["weights"].tobytes() == found)
            beside = [name for name in os.listdir(path.parent) if name != path.name]
            for name in beside:
                assert name.endswith(".unfinished")
                (path.parent / name).unlink()
            return left, len(beside)

        yield kill
        process.stdin.close()


@pytest.mark.slow
def test_kills_at_random_moments_leave_the_old_network_or_the_new_one(kill):
    """At least 20 kills, while a process saves two networks in turns to the same file."""
    rng, left, beside = np.random.default_rng(0), [], []
    # Until each network was left once, and some kills came between creating and renaming the temporary file.
    while len(left) < 20 or set(left) != {0, 1} or sum(beside) < 3:
        for found, into in zip(kill("", rng.uniform(0.01, 0.1)), (left, beside), strict=True):
            into.append(found)
        assert len(left) < 200


@pytest.mark.parametrize(
    "line, left, beside",
    [("fsync 1", 0, 1), ("replace 1", 0, 1), ("fsync 2", 1, 0)],
    ids=["written, not flushed", "before the rename", "after the rename"],
)
def test_a_kill_at_each_step_of_a_save(line, left, beside, kill):
    assert kill(line) == (left, beside)
