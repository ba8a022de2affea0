"""Tests of benchmarks/compiled_cost.py without compilers: networks, tables, and messages about missing packages."""

import json

import jax
import jax.numpy as jnp
import pytest
from programs import EXAMPLES, load_program


@pytest.fixture(scope="module")
def benchmark():
    """The program as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES / "benchmarks"))
        yield load_program("benchmarks/compiled_cost.py")


@pytest.mark.slow
def test_the_network_is_resnet_50(benchmark):
    program = benchmark.eval_program(benchmark.FORMS["fused"], jnp.float32, 2)

    assert sum(leaf.size for leaf in jax.tree.leaves(program.variables["params"])) == 25_557_032
    assert len(jax.tree.leaves(program.variables["batch_stats"])) == 2 * 53


@pytest.fixture
def group(benchmark):
    """The settings of one table."""
    return benchmark.Group("v5e-2x4", "layer-relu", "bfloat16", 256)


def costs_of(benchmark, **moved):
    made = {name: benchmark.Cost(4 * n, n, n, {"all-reduce": n // 10}, None) for name, n in moved.items()}
    return {name: cost if cost.moved else None for name, cost in made.items()}


def test_numbers_and_their_ratios(benchmark, group):
    unit, size = group.unit
    made = benchmark.table(group, costs_of(benchmark, none=100, flax=200, jaxbn=150, fused=0))

    assert (unit, size) == ("N = 51.4 MB", 256 * 28 * 28 * 128 * 2)
    assert [column.header for column in made.columns] == [
        *["Norm", "moved", "x", "by norm", "x", "temporary", "x", "kernels", "x", "all-reduce"]
    ]
    assert list(made.columns[0].cells) == ["none", "flax", "jaxbn", "fused"]
    assert [list(column.cells)[2] for column in made.columns[2::2]] == ["0.75", "0.50", "0.75", "0.75"]
    assert list(made.columns[7].cells) == ["100", "200", "150", "-"]
    assert list(made.columns[9].cells) == ["10", "20", "15", "-"]
    column = benchmark.COLUMNS[0]
    assert list(benchmark.cells(column, costs_of(benchmark, jaxbn=150), 1e2)) == [("6.00", "-")]


def test_compilers_that_are_not_installed_are_named(benchmark, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark.chips, "is_installed", lambda device: False)

    assert benchmark.main(["--no-progress", "--json", str(tmp_path / "costs.json")]) == {}

    out, err = capsys.readouterr()
    assert out.splitlines()[:3] == [
        "h100 is skipped: jax-cuda12-plugin is not installed.",
        "v5e is skipped: libtpu is not installed.",
        "v5e-2x4 is skipped: libtpu is not installed.",
    ]
    assert not err
    written = json.loads((tmp_path / "costs.json").read_text())
    assert written["costs"] == [] and written["versions"]["jax"] == jax.__version__


def test_tables_are_printed_whole_and_written(benchmark, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(benchmark.chips, "is_installed", lambda device: device == "h100")
    monkeypatch.setattr(
        benchmark, "cost_of", lambda group, form: costs_of(benchmark, any=len(form) * 10**9 % (9 * 10**9))["any"]
    )

    found = benchmark.main(["--what", "eval", "layer", "--batch", "2", "8", "--json", str(tmp_path / "costs.json")])

    assert [(group.what, group.batch) for group in found] == [("eval", 2), ("eval", 8), ("layer", 2), ("layer", 8)]
    differ = [name for name, form in benchmark.FORMS.items() if not form.policy]
    layers = ["none", "flax", "flax-safe", "flax-nnx", "jaxbn", "jaxbn-nnx"]
    assert [list(costs) for costs in found.values()] == 2 * [differ] + 2 * [layers]
    out = capsys.readouterr().out
    assert "H100, ResNet-50 evaluation, bfloat16, 8 examples (GB)" in out and "…" not in out
    assert out.count("flax-safe does not fit into the memory of the device.") == 4
    written = json.loads((tmp_path / "costs.json").read_text())["costs"]
    assert written[0] == {
        **{"device": "h100", "what": "eval", "dtype": "bfloat16", "batch": 2, "norm": "none"},
        "cost": benchmark.Cost(16 * 10**9, 4 * 10**9, 4 * 10**9, {"all-reduce": 4 * 10**8}, None)._asdict(),
    }


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--device", "a100"], ["--norms", "flax", "layer_norm"]])
def test_bad_options_end_before_the_work(benchmark, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments)

    assert "error" in capsys.readouterr().err
