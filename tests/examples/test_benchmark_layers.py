"""Tests of benchmarks/layers.py on small inputs: all libraries agree, and the printed numbers are the measured ones."""

import importlib
import json

import jax
import numpy as np
import pytest
from programs import load_program

SMALL = "--inputs 7x7x512 --batch 1 --rounds 2 --seconds 0 --no-progress".split()
PEERS = {"haiku": "haiku", "equinox": "equinox", "keras": "keras", "torch": "torch"}
FLAX, OURS = ["flax fast", "flax safe", "flax NNX"], ["jaxbn", "jaxbn NNX", "jaxbn fused", "jaxbn NNX fused"]


@pytest.fixture(scope="module")
def layers():
    """The program as a module."""
    return load_program("benchmarks/layers.py")


@pytest.fixture
def run(layers, capsys, monkeypatch):
    """Runs the program in 80 columns; returns its result and the printed lines."""

    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "80")
        found = layers.main([*SMALL, *arguments])
        out, err = capsys.readouterr()
        assert not err.strip()
        assert max(map(len, out.splitlines())) <= 80
        return found, out.splitlines()

    return run


def results(layers, name, shape, *, dtype="float32", relu=True):
    """The output of a layer in training, and the gradient of its input."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(3, 2, shape).astype(np.float32), rng.normal(size=shape).astype(np.float32)
    return layers.program_of(name, layers.Case(shape, dtype, relu=relu, train=True), x, dy).results()


def expected(shape, relu):
    """The same from the formulas in float64."""
    rng, axes = np.random.default_rng(0), tuple(range(len(shape) - 1))
    x, dy = (v.astype(np.float32).astype(np.float64) for v in (rng.normal(3, 2, shape), rng.normal(size=shape)))
    s = np.sqrt(x.var(axes) + 1e-5)
    z = (x - x.mean(axes)) / s
    dz = dy * (z > 0) if relu else dy
    return np.maximum(z, 0) if relu else z, (dz - dz.mean(axes) - z * (dz * z).mean(axes)) / s


@pytest.mark.parametrize(
    "name", ["jaxbn fused", *(pytest.param(name, marks=pytest.mark.slow) for name in [*FLAX, *OURS[:2]])]
)
def test_layers_of_flax_and_ours_do_the_same(layers, name):
    for result, truth in zip(results(layers, name, (4, 3, 3, 5)), expected((4, 3, 3, 5), relu=True), strict=True):
        np.testing.assert_allclose(result, truth, atol=5e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the other libraries
@pytest.mark.parametrize("shape", [(4, 3, 3, 5), (6, 5)])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", PEERS)
def test_layers_of_other_libraries_do_the_same(layers, name, relu, shape, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytest.importorskip(PEERS[name])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = results(layers, name, shape, relu=relu)
    for result, truth in zip(found, expected(shape, relu), strict=True):
        np.testing.assert_allclose(result, truth, atol=5e-6)


@pytest.mark.slow
def test_two_layers_are_measured(run, tmp_path):
    norms, file = ["flax fast", "jaxbn fused"], tmp_path / "found.json"

    found, lines = run("--what", "train-relu", "--dtype", "float32", "--norms", *norms, "--json", str(file))

    ((group, inputs),) = found.items()
    assert group == ("train-relu", "float32")
    seconds = inputs["7x7x512"]
    assert list(seconds) == norms
    assert all(s.shape == (2,) and (s > 0).all() for s in seconds.values())
    written = json.loads(file.read_text())["results"]
    assert [(r["norm"], r["seconds"]) for r in written] == [(name, s.tolist()) for name, s in seconds.items()]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert [row[:2] for row in rows] == [[key, name] for key in ("7x7x512", "mean") for name in norms]
    ratio = np.median(seconds["jaxbn fused"] / seconds["flax fast"])
    assert [row[3].split(" ")[0] for row in rows] == ["1.00", f"{ratio:.2f}"] * 2


@pytest.mark.slow
def test_all_that_is_installed_is_measured_and_drawn(layers, run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for package in PEERS.values():
        monkeypatch.setitem(importlib.sys.modules, package, None)

    with jax.numpy_dtype_promotion("standard"):  # Flax mixes bfloat16 and float32
        found, lines = run("--plot", str(tmp_path / "found.png"))

    assert list(found) == [(what, dtype) for what in layers.WHAT for dtype in ("float32", "bfloat16")]
    for (what, _), inputs in found.items():
        assert list(inputs["7x7x512"]) == [*FLAX, *(OURS if "relu" in what else OURS[:2])]
    assert [line.split(" ")[:3] for line in lines[:4]] == [[name, "is", "skipped:"] for name in PEERS]
    assert (tmp_path / "found.png").stat().st_size > 10_000


def test_a_gpu_shows_how_near_to_a_copy_it_is(layers):
    args = layers.parse(["--norms", "flax fast", "jaxbn", "--batch", "10"])
    args.bandwidth = 8 * 10 * 7 * 7 * 512 * 2.0  # bytes a second: a training step in bfloat16, at best
    group = layers.Group("train", "bfloat16")
    seconds = {"flax fast": np.array([4.0, 2.0, 2.0]), "jaxbn": np.array([2.0, 1.0, 1.6])}

    rows = list(layers.rows(group, {"7x7x512": seconds}, args))

    assert rows == [
        ("7x7x512", "flax fast", "2000.000", "1.00 (1.00-1.00)", "0.50"),
        ("7x7x512", "jaxbn", "1600.000", "0.50 (0.50-0.80)", "0.62"),
        ("mean", "flax fast", "", "1.00 (1.00-1.00)", ""),
        ("mean", "jaxbn", "", "0.50 (0.50-0.80)", ""),
    ]


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--norms", "x"], ["--norms", "jaxbn", "--plot", "x.png"]])
def test_bad_options_end_before_the_work(layers, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        layers.main(arguments)

    assert "error" in capsys.readouterr().err
