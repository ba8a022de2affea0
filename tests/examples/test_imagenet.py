"""Tests of examples/imagenet.py on generated images: networks, schedule, table, and resumption."""

import contextlib
import importlib
import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from programs import in_standard_promotion

import jaxbn.linen
import jaxbn.nnx

EXAMPLES = Path(__file__).parents[2] / "examples"
APIS = ["linen", "nnx"]
# Two epochs of three steps. XLA takes most of the time, for eight devices, and so the network is small.
FAKE = "--fake 24 --batch-size 8 --image-size 32 --epochs 2".split()
SMALL = [*FAKE, *"--stages 1 --width 8 --statistics-batches 2".split()]
ROW = r" +(\d+) +(\d+) +(\d\.\d{4}) +([01]\.\d{4}) +([01]\.\d{4}) +(\d+\.\d)"


@pytest.fixture(scope="module")
def examples():
    """Imports a file of the examples as the examples import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module


@pytest.fixture(scope="module")
def resnet(examples):
    """The networks."""
    return examples("resnet")


@pytest.fixture(scope="module")
def imagenet(examples):
    """The program with an optimizer that works under strict dtype promotion."""
    module = examples("imagenet")
    make = module.make_optimizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "make_optimizer", lambda *args: in_standard_promotion(make(*args)))
        yield module


@pytest.fixture(scope="module")
def run(imagenet):
    """Runs the program; returns the rows of its table and the printed lines."""

    def run(*arguments):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            rows = imagenet.main(arguments)
        assert not err.getvalue().strip()
        return rows, out.getvalue().splitlines()

    return run


@pytest.fixture(scope="module", params=[pytest.param(api, marks=pytest.mark.slow) for api in APIS])
def whole(request, run, tmp_path_factory):
    """An uninterrupted run: its options, rows, lines and checkpoints."""
    options, folder = [*SMALL, "--api", request.param], tmp_path_factory.mktemp(request.param)
    return options, *run(*options, "--checkpoints", str(folder), "--save-every", "1"), folder


def shapes(resnet, api, **options):
    """Shapes of parameters and statistics, and the number of normalization layers."""
    if api == "nnx":
        model = nnx.eval_shape(lambda: resnet.NnxResNet(**options, rngs=nnx.Rngs(0)))
        layers = sum(isinstance(node, jaxbn.nnx.BatchNorm) for _, node in nnx.iter_graph(model))
        return nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat), layers
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    net = resnet.LinenResNet(**options)
    variables = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=True), images)
    paths = [path for path, _ in jax.tree.leaves_with_path(variables["batch_stats"])]
    return variables["params"], variables["batch_stats"], sum(path[-1].key == "mean" for path in paths)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("api", APIS)
def test_resnet_50_is_resnet_50(resnet, api):
    params, stats, layers = shapes(resnet, api)

    assert size(params) == 25_557_032
    assert size(stats) == 2 * 26_560
    assert layers == 53
    assert {leaf.dtype for leaf in jax.tree.leaves((params, stats))} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
def test_other_stages_make_resnet_101(resnet, api):
    assert size(shapes(resnet, api, stages=(3, 4, 23, 3))[0]) == 44_549_160


@pytest.mark.slow
def test_both_frameworks_make_the_same_network(resnet):
    options = {"stages": (2, 1), "num_classes": 5, "width": 4, "dtype": jnp.float32}
    x = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    model = resnet.NnxResNet(**options, rngs=nnx.Rngs(0))
    for norm in (node for _, node in nnx.iter_graph(model) if isinstance(node, jaxbn.nnx.BatchNorm)):
        norm.scale[...] = jnp.linspace(0.5, 1.5, norm.num_features)  # a scale of zero would hide a block
    params, stats = (as_linen(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))
    apply = jax.jit(resnet.LinenResNet(**options).apply, static_argnames=("train", "mutable"))

    y, updates = apply({"params": params, "batch_stats": stats}, x, train=True, mutable="batch_stats")

    assert y.shape == (4, 5) and y.dtype == jnp.float32
    assert_close(nnx.jit(lambda model, x: model(x))(model, x), y)
    assert_close(as_linen(nnx.state(model, nnx.BatchStat)), updates["batch_stats"])


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), a, b)


def as_linen(state):
    """The values of NNX under linen's names."""
    tree = dict(nnx.to_pure_dict(state))
    for i, block in tree.pop("blocks").items():
        shortcut = block.pop("shortcut", {"layers": {}})["layers"]
        names = {0: "shortcut_conv", 1: "shortcut_norm"}
        tree[f"blocks_{i}"] = block | {names[k]: layer for k, layer in shortcut.items()}
    return tree


@pytest.mark.slow
def test_a_block_starts_as_its_shortcut(resnet):
    block = resnet.NnxBlock(16, resnet.Place(4, 1, project=False), jnp.float32, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 16))

    np.testing.assert_array_equal(block(x), jax.nn.relu(x))


def test_activations_have_the_dtype_and_logits_are_float32(resnet):
    model = nnx.eval_shape(lambda: resnet.NnxResNet((1,), 5, 8, rngs=nnx.Rngs(0)))
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

    features = nnx.eval_shape(lambda model, x: model.blocks[0](model.norm(model.conv(x))), model, images)
    logits = nnx.eval_shape(lambda model, x: model(x), model, images)

    assert features.dtype == jnp.bfloat16 and logits.dtype == jnp.float32


def test_the_learning_rate_rises_and_falls(imagenet):
    args = imagenet.parse("--fake 8 --batch-size 512 --epochs 10 --warmup 2 --learning-rate 0.1".split())
    rate = imagenet.schedule(args, 50)

    rates = np.array([float(rate(step)) for step in range(501)])
    np.testing.assert_allclose(rates[:101], np.linspace(0, 0.2, 101), atol=1e-7)  # twice that of a batch of 256
    cosine = 0.1 * (1 + np.cos(np.pi * np.arange(401) / 400))
    np.testing.assert_allclose(rates[100:], cosine, atol=1e-7)
    assert imagenet.parse(["--fake", "8"]).warmup == 5


@pytest.mark.parametrize("api", APIS)
def test_kernels_decay_and_nothing_else_does(imagenet, resnet, api):
    params = jax.tree.map(lambda p: jnp.ones(p.shape), shapes(resnet, api, stages=(1,), width=4)[0])
    optimizer = imagenet.make_optimizer(lambda step: 1.0, 0.1)

    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)

    for path, update in jax.tree.leaves_with_path(updates):
        expected = -0.1 * 1.9 if "kernel" in jax.tree_util.keystr(path) else 0.0  # Nesterov's first step: 1 + momentum
        np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_labels_are_smoothed(imagenet):
    logits = jnp.array([[2.0, 0.0, -1.0, 0.5], [0.0, 1.0, 0.0, 0.0]])
    loss, _ = imagenet.cross_entropy(logits, {"label": jnp.array([0, 1])}, smoothing=0.2)

    logits = np.asarray(logits, np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -(0.8 * logs[[0, 1], [0, 1]] + 0.2 * logs.mean(1)).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_segments_end_with_epochs_and_with_the_run(imagenet):
    assert list(imagenet.segments(0, 8, 3)) == [(0, 0, 3), (1, 0, 3), (2, 0, 2)]
    assert list(imagenet.segments(4, 9, 3)) == [(1, 1, 3), (2, 0, 3)]
    assert list(imagenet.segments(9, 9, 3)) == [(3, 0, 0)]  # nothing to train: an evaluation
    assert list(imagenet.segments(5, 4, 3)) == [(1, 2, 2)]


def test_three_steps_give_a_line_with_both_methods(whole):
    _, rows, (header, *lines), _ = whole

    assert header == "epoch     step     loss  top-1 ONE  top-1 TWO  images/s"
    cells = [re.fullmatch(ROW, line).groups() for line in lines]
    assert [cell[:2] for cell in cells] == [("1", "3"), ("2", "6")]
    for row, cell in zip(rows, cells, strict=True):
        assert list(row) == pytest.approx([float(number) for number in cell], abs=0.1)
        assert 1.0 < row.loss < 2.0  # near log(4), of four classes
        assert (row.top1_one * 6).is_integer() and (row.top1_two * 6).is_integer()  # of six held-out images


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run, whole, tmp_path):
    options, rows, _, folder = whole
    _, lines = run(*options, "--checkpoints", str(tmp_path), "--stop-after", "2")
    assert re.fullmatch(ROW, lines[1])[2] == "2"
    resumed, lines = run(*options, "--checkpoints", str(tmp_path))

    assert lines[0] == f"Resuming from step 2 in {tmp_path}"
    assert [row.step for row in resumed] == [3, 6]
    assert resumed[1].loss == rows[1].loss  # of the second epoch; the first began before the stop
    assert [row[3:5] for row in resumed] == [row[3:5] for row in rows]
    first, second = restored(folder), restored(tmp_path)
    assert int(first["step"]) == 6
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_last_three_checkpoints_are_kept(whole):
    *_, folder = whole

    assert {path.name for path in folder.iterdir() if path.name.isdigit()} == {"4", "5", "6"}


def restored(folder):
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())


def test_checkpoints_of_another_run_are_refused(imagenet, whole):
    options, *_, folder = whole

    with pytest.raises(SystemExit, match="contains checkpoints of a run with width=8, not 16, seed=0, not 1"):
        imagenet.main([*options, "--checkpoints", str(folder), "--width", "16", "--seed", "1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a folder DATA or --fake N"),
        (["images", "--fake", "8"], "either a folder DATA or --fake N"),
        (["--fake", "0"], "--fake must be 1 or more"),
        (["--fake", "8", "--stages", "3", "0"], "--stages must be 1 or more"),
        (["--fake", "8", "--batch-size", "12"], "--batch-size must be a multiple of 8, the number of devices"),
        (["--fake", "8", "--label-smoothing", "1"], "--label-smoothing in [0, 1)"),
        (["--fake", "8", "--warmup", "90"], "--warmup must be 0 or more, and less than --epochs"),
        (["--fake", "8", "--api", "haiku"], "invalid choice: 'haiku'"),
    ],
)
def test_bad_options_end_before_the_work(imagenet, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        imagenet.main(arguments)

    assert message in capsys.readouterr().err


def test_bad_data_ends_before_the_work(imagenet, tmp_path):
    with pytest.raises(SystemExit, match=r"imagenet.py: error: The folder .*train does not exist"):
        imagenet.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="train has 8 images, fewer than --batch-size 16"):
        imagenet.main(["--fake", "8", "--batch-size", "16", "--image-size", "8"])


@pytest.mark.slow
def test_three_steps_of_resnet_50(run):
    """With the default options. The test above compares NNX with linen on a smaller network, which compiles faster."""
    rows, lines = run(*FAKE, "--epochs", "1")

    assert [row.step for row in rows] == [3]
    assert 1.0 < rows[0].loss < 2.0
    assert re.fullmatch(ROW, lines[1])
