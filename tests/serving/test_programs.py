"""Exported programs: outputs in a process without the code of the model, and rejected models and files."""

import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from flax import nnx
from nets import LAYERS, LINEN, NNX, forward, in_float64

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving

DATA = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.program"


class Norm(nn.Module):
    """One layer, which evaluates by default."""

    momentum: float | None = 0.99

    @nn.compact
    def __call__(self, x, train=False):
        return jaxbn.linen.BatchNorm(use_running_average=not train, momentum=self.momentum, name="norm")(x)


def frozen():
    """Variables with the statistics of all data."""
    params = {"scale": np.ones(3, "f4"), "bias": np.zeros(3, "f4")}
    return jaxbn.linen.freeze(
        {"params": {"norm": params}, "batch_stats": {"norm": {"mean": DATA.mean(0), "var": DATA.var(0)}}}
    )


@functools.cache
def written():
    with tempfile.TemporaryDirectory() as folder:
        jaxbn.serving.export(path := Path(folder, "program"), Norm().apply, frozen(), DATA)
        return path.read_bytes()


@pytest.fixture
def exported(path):
    path.write_bytes(written())
    return path


# --- Outputs ----------------------------------------------------------------------------------------------------------

# A server: it has the files and jaxbn, but not the code of the models.
SERVER = """
import sys
import numpy as np
import jaxbn.serving

assert not {"nets", "cases", "pytest"} & set(sys.modules)
answers = {}
for path in sys.argv[3:]:
    program = jaxbn.serving.load_program(path)
    with np.load(sys.argv[1]) as batches:
        answers |= {f"{path} {name}": program(batches[name]) for name in batches}
    print(program, program.info.layers)
np.savez(sys.argv[2], **answers)
"""
KINDS = {layer: jaxbn.LayerInfo("batch_norm", 1e-5, "as given", None) for layer in LAYERS}


def random_variables():
    """Arrays of the dense network of `nets`, with names that both frameworks share."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda x: LINEN.net().init(jax.random.key(0), x, train=False), np.ones((2, 3), "f4"))
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype("f4"), shapes)


@pytest.mark.slow
def test_a_fresh_process_answers_batches_of_any_size(tmp_path):
    """Compared with float64, for batches of one too; for a Frozen, folded or not, and an NNX model."""
    variables, x = random_variables(), np.random.default_rng(1).normal(2, 3, (7, 3)).astype("f4")
    known = jaxbn.Frozen(variables, jaxbn.Info(tuple(KINDS.items()), ()))
    call = lambda variables, x: LINEN.net().apply(variables, x, train=False)
    folded_call, folded, _ = jaxbn.linen.fold(call, known, x)
    merged = {name: leaves | variables["batch_stats"].get(name, {}) for name, leaves in variables["params"].items()}
    abstract = nnx.eval_shape(lambda: NNX.net(rate=0.5))
    model = jaxbn.nnx.install_frozen(abstract, dataclasses.replace(known, variables=merged))
    paths = [tmp_path / name for name in ("linen", "folded", "nnx")]
    jaxbn.serving.export(paths[0], call, known, x)
    jaxbn.serving.export(paths[1], folded_call, folded, x)
    jaxbn.serving.export(paths[2], lambda model, x: model(x), model, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    sent = {"all": slice(7), "one": slice(1)}
    np.savez(tmp_path / "sent.npz", **{name: x[rows] for name, rows in sent.items()})
    command = [sys.executable, "-W", "error", "-c", SERVER, tmp_path / "sent.npz", tmp_path / "back.npz", *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    signature = "Program(float32[b, 3] -> float32[b, 1])"
    assert done.stdout.splitlines() == [f"{signature} {known.info.layers}", f"{signature} ()", f"{signature} ()"]
    compute = in_float64(lambda variables, x: forward(variables["params"], x, variables["batch_stats"])[0])
    expected = compute(variables, x)
    with np.load(tmp_path / "back.npz") as answers:
        for path in paths:
            for name, rows in sent.items():
                np.testing.assert_allclose(answers[f"{path} {name}"], expected[rows], rtol=1e-5)


METHODS = {case.factory: case for case in CASES}.values()


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
def test_the_number_of_examples_is_dynamic_for_every_method(case, path, rng):
    """Domains are another array of the batch."""
    layer = case.linen_module(use_running_average=True)
    x = rng.normal(size=(6, 3, 4)).astype(np.float32)
    batch = {"x": x, **jax.tree.map(np.asarray, case.where(x))}
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), **batch))
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1, leaf.shape).astype("f4"), shapes)
    jaxbn.serving.export(path, lambda variables, batch: {"y": layer.apply(variables, **batch)}, variables, batch)
    program = jaxbn.serving.load_program(path)
    params, state = (jax.tree.map(np.float64, variables[name]) for name in ("params", "batch_stats"))
    expected = case.evaluate(x.reshape(-1, 4).astype(np.float64), params, state).reshape(x.shape)
    for rows in (1, 6):
        outputs = program({name: part[:rows] for name, part in batch.items()})
        np.testing.assert_allclose(outputs["y"], expected[:rows], rtol=1e-5, atol=1e-6)


def test_it_is_for_all_platforms_and_holds_its_arrays_once(path):
    kernel = np.random.default_rng(0).standard_normal((500, 400)).astype("f4")
    call = lambda variables, x: x @ variables["kernel"] @ variables["kernel"].T
    jaxbn.serving.export(path, call, {"kernel": kernel}, jax.ShapeDtypeStruct((1, 500), jnp.float32))
    header = json.loads(path.read_bytes().split(b"\n")[0])
    assert header["platforms"] == ["cpu", "cuda", "tpu"] and set(header["versions"]) == {"jaxbn", "jax", "flax"}
    assert kernel.nbytes < path.stat().st_size < kernel.nbytes + 10_000


class Parts(nnx.Module):
    """Several inputs and outputs, several dtypes, and a random stream that evaluation does not use."""

    def __init__(self, rngs):
        self.table = nnx.Param(jnp.arange(6, dtype=jnp.bfloat16).reshape(3, 2))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, batch):
        rows = self.dropout(self.table[...][batch["ids"]])
        return {"rows": rows, "pair": (batch["x"] * 2, [rows.argmax(-1)])}


def test_batches_and_outputs_of_several_arrays(path):
    model = Parts(nnx.Rngs(0))
    model.eval()
    batch = {"ids": np.array([2, 0]), "x": np.ones((2, 1, 1), np.uint8)}
    jaxbn.serving.export(path, lambda model, batch: model(batch), model, batch)
    program = jaxbn.serving.load_program(path)
    outputs = program({"ids": jnp.array([1]), "x": np.full((1, 1, 1), 3, np.uint8)})
    assert outputs["rows"].dtype == jnp.bfloat16 and outputs["rows"].tolist() == [[2, 3]]
    assert outputs["pair"][0].tolist() == [[[6]]] and outputs["pair"][1][0].tolist() == [1]
    assert str(program) == (
        "Program({'ids': int32[b], 'x': uint8[b, 1, 1]} -> "
        "{'pair': (uint8[b, 1, 1], [int32[b]]), 'rows': bfloat16[b, 2]})"
    )
    assert program.inputs["x"].dtype == np.uint8 and program.outputs["rows"].shape[1] == 2


def test_it_may_be_called_inside_jit_and_on_sharded_batches(exported):
    program, x = jaxbn.serving.load_program(exported), np.ones((8, 3), np.float32)
    expected = program(x)
    np.testing.assert_allclose(jax.jit(lambda x: program(x))(x), expected, rtol=1e-6)  # rounded otherwise
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    np.testing.assert_allclose(program(spread), expected, rtol=1e-6)


# --- Errors -----------------------------------------------------------------------------------------------------------

BATCHES = {
    "features": (np.ones((2, 4), "f4"), r"takes float32\[b, 3\] for the batch; got float32\[2, 4\]"),
    "rank": (np.ones(3, "f4"), r"takes float32\[b, 3\] for the batch; got float32\[3\]"),
    "no axis": (np.float32(1), r"takes float32\[b, 3\] for the batch; got float32\[\]"),
    "dtype": (np.ones((2, 3), "i4"), r"takes float32\[b, 3\] for the batch; got int32\[2, 3\]"),
    "a dict": ({"x": np.ones((2, 3), "f4")}, r"takes float32\[b, 3\]; got {'x': float32\[2, 3\]}"),
    "a list": ([[1.0, 2.0, 3.0]], r"takes float32\[b, 3\]; got \[\[float32\[\], float32\[\], float32\[\]\]\]"),
}


def test_batches_that_it_does_not_take(exported):
    program = jaxbn.serving.load_program(exported)
    for batch, message in BATCHES.values():
        with pytest.raises(ValueError, match=message):
            program(batch)
    assert program(np.ones((2, 3), np.float64)).dtype == np.float32  # as everywhere in JAX


def test_arrays_of_a_batch_are_named_and_counted(path):
    batch = {"a": np.ones((2, 3), "f4"), "b": np.ones(2, "f4")}
    jaxbn.serving.export(path, lambda _, batch: batch["a"] + batch["b"][:, None], {}, batch)
    program = jaxbn.serving.load_program(path)
    with pytest.raises(ValueError, match=r"takes float32\[b\] for 'b'; got float32\[2, 1\]"):
        program(batch | {"b": np.ones((2, 1), "f4")})
    with pytest.raises(ValueError, match="A batch has one number of examples"):
        program(batch | {"b": np.ones(3, "f4")})


TRAINING = {
    "linen": (lambda v, x: Norm().apply(v, x, True, mutable=["batch_stats"])[0], frozen, "'norm' normalizes"),
    "linen, no average": (
        lambda v, x: Norm(None).apply(v, x, train=True),
        lambda: frozen().variables,
        "'norm' normalizes",
    ),
    "nnx": (lambda model, x: model(x), lambda: jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), r"Evaluate,.*model\.eval\(\)"),
    "nnx, no average": (
        lambda model, x: model(x),
        lambda: jaxbn.nnx.BatchNorm(3, momentum=None, rngs=nnx.Rngs(0)),
        r"Evaluate,.*model\.eval\(\)",
    ),
    "nnx, stock": (
        lambda model, x: model.layers[0](x),
        lambda: nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0))),
        r"'layers/0' normalizes.*model\.eval\(\)",
    ),
}


@pytest.mark.parametrize("call, network, message", TRAINING.values(), ids=TRAINING.keys())
def test_training_is_refused(call, network, message, path):
    with pytest.raises(ValueError, match=message):
        jaxbn.serving.export(path, call, network(), DATA)
    assert not path.exists()


def test_frozen_layers_do_not_train(path):
    held = jaxbn.linen.freeze_layers(lambda v, x: Norm().apply(v, x, True), "norm")
    jaxbn.serving.export(path, held, frozen().variables, DATA)
    expected = (DATA - DATA.mean(0, keepdims=True)) / np.sqrt(DATA.var(0, keepdims=True) + 1e-5)
    np.testing.assert_allclose(jaxbn.serving.load_program(path)(DATA), expected, rtol=1e-5, atol=1e-6)


EXAMPLES = {
    "no axis": ({"x": np.float32(1)}, "'x' has no axis of examples"),
    "bare": (np.float32(1), "'The example' has no axis of examples"),
    "numbers": ([DATA, DATA[:2]], r"must have one number of examples.*\[float32\[4, 3\], float32\[2, 3\]\]"),
    "nothing": ({}, "must have one number of examples; got {}"),
}


@pytest.mark.parametrize("example, message", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_invalid_examples(example, message, path):
    with pytest.raises(ValueError, match=message):
        jaxbn.serving.export(path, lambda _, batch: batch, {}, example)


@pytest.mark.parametrize("call", [lambda _, x: x.reshape(-1, 6), lambda _, x: x if x.shape[0] > 4 else -x, len])
def test_models_that_need_the_number_of_examples(call, path):
    call = (lambda _, x: x * len(x)) if call is len else call
    with pytest.raises(ValueError, match=r"x\.shape\[0\], as in x\.reshape\(x\.shape\[0\], -1\)"):
        jaxbn.serving.export(path, call, {}, DATA)


def test_leaves_that_are_not_arrays(path):
    with pytest.raises(TypeError, match="'rate' is <class 'float'>"):
        jaxbn.serving.export(path, lambda v, x: x * v["rate"], {"rate": 0.5}, DATA)


# --- Dynamic axes and empty batches -----------------------------------------------------------------------------------


class Images(nn.Module):
    """Halves height and width, and takes the mean over both."""

    @nn.compact
    def __call__(self, x):
        x = jaxbn.linen.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3), strides=2)(x))
        return nn.Dense(3)(x.mean((1, 2)))


@functools.cache
def images():
    """Variables with estimated statistics."""
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 2)).astype("f4")
    variables = Images().init(jax.random.key(0), x)
    return jaxbn.linen.postproc(Images().apply, variables, [x])[0]


def named(axes, **more):
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape(axes, **more), jnp.float32)


def test_height_and_width_may_be_dynamic(path):
    jaxbn.serving.export(path, Images().apply, images(), named("n, h, w, 2", constraints=["mod(h, 2) == 0"]))
    program = jaxbn.serving.load_program(path)
    assert str(program) == "Program(float32[n, h, w, 2] -> float32[n, 3])"
    for shape in ((1, 8, 8, 2), (3, 6, 5, 2)):
        x = np.random.default_rng(1).normal(size=shape).astype("f4")
        np.testing.assert_allclose(program(x), Images().apply(images(), x), rtol=1e-5, atol=1e-6)
    assert program(np.ones((0, 4, 6, 2), "f4")).shape == (0, 3)
    with pytest.raises(ValueError, match=r"exported for other sizes of its named axes: it takes float32\[n, h, w, 2\]"):
        program(np.ones((2, 7, 8, 2), "f4"))
    with pytest.raises(ValueError, match=r"takes float32\[n, h, w, 2\] for the batch; got float32\[2, 8, 8, 3\]"):
        program(np.ones((2, 8, 8, 3), "f4"))


def test_axes_of_one_name_are_of_one_size(path):
    shapes = jax.export.symbolic_shape("b, t, 3")
    batch = {"x": jax.ShapeDtypeStruct(shapes, jnp.float32), "mask": jax.ShapeDtypeStruct(shapes[:2], jnp.float32)}
    jaxbn.serving.export(path, lambda _, batch: batch["x"] * batch["mask"][..., None], {}, batch)
    program = jaxbn.serving.load_program(path)
    x = np.ones((2, 5, 3), "f4")
    assert program({"x": x, "mask": x[..., 0]}).shape == (2, 5, 3)
    with pytest.raises(ValueError, match=r"A batch has one size 't'; got {'mask': float32\[2, 4\]"):
        program({"x": x, "mask": x[:, 1:, 0]})


def test_an_empty_batch_gives_empty_outputs(exported, path):
    program = jaxbn.serving.load_program(exported)
    empty = np.ones((0, 3), np.float32)
    for found in (program(empty), jax.jit(program.__call__)(empty)):
        assert (found.shape, found.dtype) == ((0, 3), np.float32)
    jaxbn.serving.export(path, lambda _, x: {"turned": x.T, "mean": x.mean(0)}, {}, DATA)
    with pytest.raises(ValueError, match=r"'mean' is float32\[3\], without an axis of examples"):
        jaxbn.serving.load_program(path)(empty)


# --- Common mistakes --------------------------------------------------------------------------------------------------


class NNXImages(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.norm(self.conv(x)).mean((1, 2)))


def test_an_example_without_its_axis(path):
    """The model accepts it with an additional first axis."""
    call, x = lambda model, x: model(x), np.ones((4, 8, 8, 2), np.float32)
    model = NNXImages()
    model.norm.mean.set_value(jnp.ones(4))
    cases = [
        (Images().apply, images(), x[0]),
        (call, model, x[0]),
        (lambda _, x: x @ np.ones((3, 2), "f4"), {}, DATA[0]),
    ]
    for call, network, example in cases:
        with pytest.raises(
            ValueError, match=r"does not accept the example, float32\[.*\], but accepts it with an additional first"
        ):
            jaxbn.serving.export(path, call, network, example)
    assert not path.exists()


def test_statistics_that_were_never_estimated(path):
    """They are rejected as by `freeze`, and so are statistics that are not finite."""
    x = np.ones((4, 8, 8, 2), np.float32)
    initial = Images().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="The statistics of 'BatchNorm_0' were never estimated"):
        jaxbn.serving.export(path, Images().apply, initial, x)
    with pytest.raises(ValueError, match="The statistics of 'norm' were never estimated"):
        jaxbn.serving.export(path, lambda model, x: model(x), NNXImages(), x)
    infinite = {**images(), "batch_stats": {"BatchNorm_0": {"mean": np.ones(4, "f4"), "var": np.full(4, np.inf, "f4")}}}
    with pytest.raises(ValueError, match="statistics of 'BatchNorm_0' are not finite"):
        jaxbn.serving.export(path, Images().apply, infinite, x)
    assert not path.exists()


def test_a_frozen_network_of_nnx_with_a_call_of_linen(path):
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 2)).astype("f4")
    model, report = jaxbn.nnx.postproc(NNXImages(), [x])
    network = jaxbn.nnx.freeze(model, report)
    for call in (lambda model, x: model(x), Images().apply):
        with pytest.raises(ValueError, match=r"is of an NNX model.*jaxbn\.nnx\.install_frozen\(model, frozen\)"):
            jaxbn.serving.export(path, call, network, x)
    served = jaxbn.nnx.install_frozen(NNXImages(), network)
    jaxbn.serving.export(path, lambda model, x: model(x), served, x)
    np.testing.assert_allclose(jaxbn.serving.load_program(path)(x), served(x), rtol=1e-5, atol=1e-6)


# --- Files ------------------------------------------------------------------------------------------------------------


def refusal(path, content):
    """Returns the message of the error for a file, which names the file."""
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        jaxbn.serving.load_program(path)
    assert type(raised.value) is ValueError and str(path) in str(raised.value)
    return str(raised.value)


def test_files_that_are_damaged_or_others(exported):
    content = exported.read_bytes()
    for position in range(0, len(content), 41):
        refusal(exported, content[:position])
        refusal(exported, content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    assert "is damaged or incomplete" in refusal(exported, content[:-1])
    jaxbn.serving.save(exported, frozen())
    assert "is not a program of jaxbn" in refusal(exported, exported.read_bytes())
    with pytest.raises(ValueError, match="is not a frozen network of jaxbn"):
        jaxbn.serving.load((exported.write_bytes(content), exported)[1])
    with pytest.raises(FileNotFoundError):
        jaxbn.serving.load_program(exported.with_name("nowhere"))


def test_programs_of_other_versions(exported, monkeypatch):
    """Other versions of the file format, and of the serialization of JAX."""
    content = exported.read_bytes()
    later = content.replace(b'"format_version":1', b'"format_version":2')
    assert "has format 2, but this version of jaxbn reads format 1. It was written with {'jaxbn':" in refusal(
        exported, later
    )
    exported.write_bytes(content)

    def fails(data):
        raise ValueError("Serialization version 99")

    monkeypatch.setattr(jax.export, "deserialize", fails)
    message = f"was written with .*whose programs JAX {jax.__version__} cannot read.* Serialization version 99"
    with pytest.raises(ValueError, match=message):
        jaxbn.serving.load_program(exported)
