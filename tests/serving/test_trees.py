"""Each tree of arrays of linen and NNX is restored from each kind of file, or rejected by name when it is saved."""

import collections
import dataclasses
from typing import NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax import nnx
from flax.core import FrozenDict
from own_method import mixed_norm

import jaxbn
import jaxbn.nnx
import jaxbn.serving
from jaxbn._src.serving.arrays import DTYPES, shapes_of

INFO = jaxbn.Info((), ())
# Without 64-bit dtypes, which other tests cover.
NARROW = sorted(DTYPES - {"int64", "uint64", "float64", "complex128"})
KEYS = ["", "a", "kernel", "größe", "a/b", "..", "list", "float32", "0", "__class__"]


def leaf(rng, dtypes=NARROW):
    """An array of any dtype, sometimes empty, of NumPy or on a device."""
    dtype = jnp.dtype(str(rng.choice(dtypes)))
    shape = tuple(rng.choice([0, 1, 2, 3], rng.integers(4), p=[0.1, 0.3, 0.3, 0.3]).tolist())
    array = rng.integers(0, 2, shape) if dtype.name in ("bool", "int2", "uint2") else rng.integers(0, 7, shape)
    array = np.asarray(array).astype(np.float32).astype(dtype)
    return jax.device_put(array) if rng.random() < 0.5 else array


def tree(rng, depth=3, leaf=leaf):
    """Nested dicts, lists, tuples, frozen dicts and None; some are empty."""
    kind = rng.integers(8) if depth else 7
    if kind > 4:
        return leaf(rng) if rng.random() < 0.95 else None
    values = [tree(rng, depth - 1, leaf) for _ in range(rng.integers(4))]
    names = rng.permutation(KEYS)[: len(values)].tolist()
    if kind == 2:
        return dict(zip(rng.permutation(9)[: len(values)].tolist(), values, strict=True))
    return {0: list, 1: tuple}.get(kind, {3: FrozenDict}.get(kind, dict))(
        values if kind < 2 else zip(names, values, strict=True)
    )


def variables_of(seed, leaf=leaf):
    rng = np.random.default_rng(seed)
    return {"params": {name: tree(rng, leaf=leaf) for name in ("one", "other")}, "more": tree(rng, leaf=leaf)}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def check(name, seeds, folder):
    for seed in seeds:
        frozen, path = jaxbn.Frozen(variables_of(seed), INFO), folder / f"{seed}"
        getattr(jaxbn.serving, name)(path, frozen)
        found = getattr(jaxbn.serving, name.replace("save", "load"))(path, like=frozen.variables)
        assert_same(found.variables, frozen.variables)


def test_trees_in_a_file(tmp_path):
    check("save", range(60), tmp_path)


def test_trees_in_a_folder(tmp_path):
    check("save_sharded", range(6), tmp_path)


@pytest.mark.parametrize("name", ["save", "save_sharded"])
def test_trees_without_an_array(name, tmp_path):
    for i, variables in enumerate(
        [{}, {"params": {}, "more": [(), None]}, {"params": {"a": np.ones((0, 3), np.int8)}}]
    ):
        getattr(jaxbn.serving, name)(tmp_path / f"{i}", jaxbn.Frozen(variables, INFO))
        found = getattr(jaxbn.serving, name.replace("save", "load"))(tmp_path / f"{i}")
        assert_same(found.variables, variables)


@pytest.mark.slow
def test_more_trees_in_a_folder(tmp_path):
    check("save_sharded", range(6, 100), tmp_path)


def test_every_dtype_in_a_folder(tmp_path):
    """Sharded and whole arrays of random bits."""
    bits = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    arrays = {name: bits.view(name) for name in NARROW if name not in ("bool", "float4_e2m1fn") and name[:3] != "int"}
    arrays |= {name: (bits % 2).astype(name) for name in NARROW if name not in arrays}
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("x",), (jax.sharding.AxisType.Auto,)), jax.P("x"))
    mask = {"uint2": 3, "uint4": 15}
    arrays |= {name: (bits & mask[name]).view(name) for name in mask}
    variables = {"host": arrays, "spread": jax.tree.map(lambda a: jax.device_put(a, everywhere), arrays)}
    jaxbn.serving.save_sharded(tmp_path / "network", frozen := jaxbn.Frozen(variables, INFO))
    found = jaxbn.serving.load_sharded(tmp_path / "network")
    assert_same(found.variables, frozen.variables)
    found = jaxbn.serving.load_sharded(tmp_path / "network", like=variables)
    assert_same(found.variables, frozen.variables)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_trees_in_a_program(seed, tmp_path):
    """With the dtypes that XLA supports on CPU."""
    plain = "bool int8 int32 uint8 uint16 bfloat16 float16 float32 complex64".split()
    variables = variables_of(seed, lambda rng: leaf(rng, plain))
    call = lambda variables, x: (x * 2, jax.tree.leaves(variables))
    jaxbn.serving.export(tmp_path / "program", call, variables, np.ones((2, 3), np.float32))
    _, found = jaxbn.serving.load_program(tmp_path / "program")(np.ones((5, 3), np.float32))
    assert_same(found, jax.tree.leaves(variables))


class Lists(nn.Module):
    """A parameter of linen may be any tree."""

    @nn.compact
    def __call__(self, x):
        weights = self.param("weights", lambda _: [jnp.ones((1, 3)), (jnp.zeros(3), {1: jnp.full((1, 3), 2.0)})])
        return jaxbn.linen.BatchNorm(use_running_average=True)(x * weights[0] + weights[1][1][1])


class Variables(nnx.Module):
    """A variable of NNX may be any tree."""

    def __init__(self, start=0.0):
        self.weights = nnx.Param([jnp.full((1, 3), start), (jnp.zeros(3), {1: jnp.full((1, 3), 2 * start), 2: {}})])
        self.parts = nnx.List(
            [jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Dict(a=nnx.Linear(3, 1, rngs=nnx.Rngs(0)))]
        )

    def __call__(self, x):
        weights = self.weights.get_value()
        return self.parts[1].a(self.parts[0](x * weights[0] + weights[1][1][1]))


@pytest.mark.parametrize("name", ["save", "save_sharded"])
def test_parameters_that_are_trees(name, tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    save, load = getattr(jaxbn.serving, name), getattr(jaxbn.serving, name.replace("save", "load"))
    variables, report = jaxbn.linen.postproc(Lists().apply, Lists().init(jax.random.key(0), x), [x])
    save(tmp_path / "linen", jaxbn.linen.freeze(variables, report))
    found = load(tmp_path / "linen", like=variables)
    np.testing.assert_array_equal(Lists().apply(found.variables, x), Lists().apply(variables, x))
    model, report = jaxbn.nnx.postproc(Variables(1.0), [x])
    model.eval()
    save(tmp_path / "nnx", jaxbn.nnx.freeze(model, report))
    served = jaxbn.nnx.install_frozen(Variables(), load(tmp_path / "nnx", like=nnx.eval_shape(Variables)))
    np.testing.assert_array_equal(served(x), model(x))
    with pytest.raises(ValueError, match=r"'params/weights/1/1/1' is \(1, 3\) in the frozen network and \(4,\) in"):
        wrong = jax.tree.map(lambda leaf: leaf, variables)
        wrong["params"]["weights"][1][1][1] = jnp.ones(4)
        load(tmp_path / "linen", like=wrong)


@pytest.mark.parametrize("name", ["save", "save_sharded"])
def test_trees_of_plain_functions(name, tmp_path):
    """The NamedTuples of jaxbn are restored as what they are; those of a method of your own are not known here."""
    save, load = getattr(jaxbn.serving, name), getattr(jaxbn.serving, name.replace("save", "load"))
    layers = {case.name: case.factory(**case.arguments).init(2) for case in CASES}
    model = jax.tree.map(lambda leaf: leaf + 1, {"kernels": [jnp.ones(3)], "layers": layers})
    frozen = jaxbn.freeze(model)
    save(tmp_path / "network", frozen)
    found = load(tmp_path / "network", like=jax.eval_shape(lambda: model))
    assert_same(found.variables, model)
    assert found.info == frozen.info
    with pytest.raises(ValueError, match=r"'layers/batch_norm/1/mean' is missing in the frozen network"):
        save(tmp_path / "other", jaxbn.Frozen({**model, "layers": {}}, INFO))
        load(tmp_path / "other", like={**model, "layers": {"batch_norm": (None, layers["batch_norm"][1])}})
    save(tmp_path / "own", jaxbn.Frozen({"norm": layers["batch_norm"]}, INFO))
    with pytest.raises(TypeError, match="'norm/0' is <class 'own_method.MixedParams'>"):
        save(tmp_path / "own", jaxbn.Frozen({"norm": mixed_norm().init(2)}, INFO))


@pytest.mark.parametrize("described", [["BatchNormState", [["float32", [1]]]], ["BatchNormState", "ab"], ["Pair", []]])
def test_forged_named_tuples(described):
    with pytest.raises((TypeError, ValueError)):
        shapes_of(described)


class Pair(NamedTuple):
    one: object
    other: object


@flax.struct.dataclass
class Struct:
    value: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    value: object


ONE = np.ones(2, np.float32)
REFUSED = {
    "named tuple": Pair(ONE, ONE),
    "flax.struct": Struct(ONE),
    "dataclass": Data(ONE),
    "ordered dict": collections.OrderedDict(a=ONE),
    "default dict": collections.defaultdict(list, a=ONE),
    "other keys": {(1, 2): ONE},
    "float keys": {0.5: ONE},
    "booleans as keys": {True: ONE},
    "box": nn.Partitioned(ONE, ("x",)),
    "variable": nnx.Param(ONE),
    "function": print,
    "a number": 3,
}


@pytest.mark.parametrize("name", ["save", "save_sharded"])
@pytest.mark.parametrize("node", REFUSED.values(), ids=REFUSED.keys())
def test_unsupported_nodes_are_rejected_by_name(node, name, tmp_path):
    frozen = jaxbn.Frozen({"params": {"layer": [{"odd": node}]}}, INFO)
    with pytest.raises(
        TypeError, match="^'params/layer/0/odd' is <class .*; a frozen network holds arrays of numbers with"
    ):
        getattr(jaxbn.serving, name)(tmp_path / "network", frozen)
    assert not list(tmp_path.iterdir())
