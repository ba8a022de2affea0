"""Tests of benchmarks/postproc.py on small networks: programs, ratios and output."""

import sys

import jax
import numpy as np
import pytest
from flax import nnx
from programs import load_program

import jaxbn.linen

SMALL = "--batches 2 --batch-size 4 --width 2 --blocks 1 --repeats 2 --no-progress".split()
PROGRAMS = ["forward", "Flax loop", "postproc", "stages", "on host"]
PEERS = ["update_bn", "fvcore"]


@pytest.fixture(scope="module")
def benchmark():
    """The program as a module."""
    return load_program("benchmarks/postproc.py")


@pytest.fixture
def run(benchmark, capsys, monkeypatch):
    """Runs the program in 80 columns; returns its result and the printed lines."""

    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "80")
        measured = benchmark.main([*SMALL, *arguments])
        out, err = capsys.readouterr()
        assert not err.strip()
        return *measured, out.splitlines()

    return run


def cells(lines):
    """The rows of all tables without headers."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


@pytest.mark.slow
def test_linen_is_measured_and_what_is_not_installed_is_skipped(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)

    times, ratios, lines = run("--api", "linen", "--compiled")

    networks = ["linen, jaxbn", "linen, stock"]
    keys = [(network, name) for network in networks for name in PROGRAMS]
    assert list(times) == keys
    assert all(first > 0 and wall.shape == (2,) for first, (wall, _) in times.values())
    assert all((wall > 0).all() and (cpu > 0).all() for _, (wall, cpu) in times.values())
    assert [(ratio.over, ratio.under[1], ratio.goal) for ratio in ratios] == [
        (("linen, jaxbn", "postproc"), "forward", 1.05),
        (("linen, jaxbn", "postproc"), "Flax loop", 1.0),
        (("linen, jaxbn", "stages"), "forward", 1.2),
        (("linen, jaxbn", "on host"), "forward", None),
        (("linen, stock", "postproc"), "forward", 1.15),
        (("linen, stock", "postproc"), "Flax loop", 1.0),
        (("linen, stock", "stages"), "forward", 1.2),
        (("linen, stock", "on host"), "forward", None),
    ]

    rows = cells(lines)
    timed, skipped, compared, compiled = rows[:10], rows[10:12], rows[12:20], rows[20:]
    assert [tuple(row[:2]) for row in timed] == keys
    assert [tuple(row[:2]) for row in compiled] == [key for key in keys if key[1] in PROGRAMS[:3]]
    assert skipped == [["PyTorch", peer, "skipped", "", ""] for peer in PEERS]
    assert [row[:2] for row in compared] == [[", ".join(ratio.over), ratio.under[1]] for ratio in ratios]
    assert all(float(number) > 0 for row in compared for number in row[2:5])
    assert all(float(number) > 0 for row in compiled for number in row[2:])
    assert lines[-2:] == [
        "update_bn is skipped: torch for the cpu is not installed.",
        "fvcore is skipped: fvcore for the cpu is not installed.",
    ]
    assert len({len(line) for line in lines if line.startswith("│")}) <= 3
    assert max(map(len, lines)) <= 80


@pytest.mark.slow
def test_nnx_is_measured(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)

    times, ratios, lines = run("--api", "nnx")

    assert list(times) == [(network, name) for network in ("NNX, jaxbn", "NNX, stock") for name in PROGRAMS]
    assert [row[:2] for row in cells(lines)[12:]] == [[", ".join(ratio.over), ratio.under[1]] for ratio in ratios]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch, where fvcore is imported
def test_peers_are_measured_where_they_are_installed(benchmark):
    torch = pytest.importorskip("torch")
    pytest.importorskip("fvcore")
    images = list(jax.random.normal(jax.random.key(0), (2, 4, *benchmark.IMAGE)))

    programs = benchmark.torch_programs((2, 1), images)

    assert list(programs) == ["forward", *PEERS]
    for program in programs.values():
        program.run(2)
    ours = jaxbn_parameters(benchmark, (16, 3))
    assert sum(p.numel() for p in benchmark.torch_net(torch, (16, 3)).parameters()) == ours


def jaxbn_parameters(benchmark, shape):
    """The number of parameters of the linen network."""
    net = benchmark.LinenNet(jaxbn.linen.BatchNorm, shape)
    variables = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=True), np.zeros((1, *benchmark.IMAGE)))
    assert len(jax.tree.leaves(variables["batch_stats"])) == 2 * (1 + 3 * shape[1])
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def test_the_networks_of_both_frameworks_are_the_same(benchmark):
    model = nnx.eval_shape(lambda: benchmark.NnxNet(nnx.BatchNorm, (16, 3), nnx.Rngs(0)))

    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))

    assert sum(leaf.size for leaf in parameters) == jaxbn_parameters(benchmark, (16, 3))


def test_times_of_one_round_are_divided_and_the_median_decides(benchmark):
    def times(*wall):
        return benchmark.Found(1.0, benchmark.Times(np.array(wall), 2 * np.array(wall)))

    measured = {
        ("linen, stock", "forward"): times(1.0, 10.0, 1.0),
        ("linen, stock", "Flax loop"): times(2.0, 2.0, 2.0),
        ("linen, stock", "postproc"): times(1.1, 11.0, 5.0),
        ("PyTorch", "forward"): times(4.0, 4.0, 4.0),
        ("PyTorch", "update_bn"): times(5.0, 5.0, 5.0),
    }

    rows = list(benchmark.ratio_rows(benchmark.compare(measured)))

    assert rows == [
        ("linen, stock, postproc", "forward", "1.10", "5.00", "1.10", "1.15 met"),
        ("linen, stock, postproc", "Flax loop", "2.50", "5.50", "2.50", "1.00 missed"),
        ("linen, stock, postproc", "update_bn", "1.00", "2.20", "1.00", ""),
        ("update_bn", "forward", "1.25", "1.25", "1.25", ""),
    ]


@pytest.mark.parametrize("arguments", [["--batches", "0"], ["--repeats", "-1"], ["--api", "haiku"]])
def test_bad_options_end_before_the_work(benchmark, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)

    assert "error" in capsys.readouterr().err
