"""Tests of benchmarks/train_step.py on small networks: programs, output, and the search for the largest batch."""

import json
import math

import jax
import numpy as np
import pytest
from programs import load_program

SMALL = "--networks tiny --size 32 --width 2 --batch 4 --rounds 2 --seconds 0 --no-progress".split()


@pytest.fixture(scope="module")
def train_step():
    """The program as a module, with an additional network of one block."""
    module = load_program("benchmarks/train_step.py")
    module.NETWORKS["tiny"] = {"block": module.BasicBlock, "stages": (1,)}
    return module


@pytest.fixture
def run(train_step, capsys, monkeypatch):
    """Runs the program in 80 columns; returns its result and the printed lines."""

    def run(*arguments):
        monkeypatch.setenv("COLUMNS", "80")
        found = train_step.main([*SMALL, *arguments])
        out, err = capsys.readouterr()
        assert not err.strip()
        assert max(map(len, out.splitlines())) <= 80
        return found, out.splitlines()

    return run


def cells(lines):
    """The rows of all tables without headers."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


@pytest.mark.slow
def test_every_norm_is_measured(train_step, run, tmp_path):
    file = tmp_path / "found.json"

    found, lines = run("--largest", "--json", str(file))

    ((setting, costs),) = found.items()
    assert setting == ("tiny", "float32", 32, 2, 4)
    assert list(costs) == train_step.NORMS
    assert all(cost.seconds.shape == (2,) and cost.memory > 0 and cost.largest is None for cost in costs.values())
    rows = cells(lines)
    assert [row[0] for row in rows] == train_step.NORMS
    assert rows[0][3] == "-" and rows[1][2] == "1.00 (1.00-1.00)"
    assert lines[0] == "--largest is skipped: this device does not report its memory."
    assert [record["norm"] for record in json.loads(file.read_text())["results"]] == train_step.NORMS


@pytest.mark.slow
def test_reported_device_memory_is_used(train_step, run, monkeypatch):
    monkeypatch.setattr(train_step, "memory_stats", lambda: {"bytes_limit": 10**10})
    monkeypatch.setattr(
        train_step, "apart", lambda what, *_: {"peak_memory": 3 * 10**9, "largest_batch": 96}[what.__name__]
    )

    found, lines = run("--largest", "--norms", "none", "flax")

    ((_, costs),) = found.items()
    assert [(cost.memory, cost.largest) for cost in costs.values()] == [(3 * 10**9, 96)] * 2
    # Rows wrap if the share of the norm, which is mostly noise here, is a long text.
    rows = [row[4:] for row in cells(lines) if row[0]]
    assert rows == [["3.00", "1.00", "96"]] * 2
    assert "GB: peak memory of the device." in lines


@pytest.mark.slow
def test_steps_continue_from_the_previous_step(train_step):
    step = train_step.Step("fused", train_step.Setting("tiny", "float32", 32, 2, 4))

    losses = [float(step.run(1)) for _ in range(3)]

    assert losses[0] > losses[2] > 0 and losses[1] > 0


def test_initial_values(train_step):
    like = jax.ShapeDtypeStruct
    shapes = {
        "kernel": like((3, 3, 100, 100), "float32"),
        "scale": like((4,), "float32"),
        "bias": like((4,), "float32"),
    }

    values = train_step.values_like(shapes)

    assert math.isclose(values["kernel"].std(), math.sqrt(2 / 900), rel_tol=0.02)
    assert values["scale"].tolist() == [1] * 4 and values["bias"].tolist() == [0] * 4


@pytest.mark.parametrize("limit", [3, 8, 9, 100, 1000])
def test_the_largest_batch_is_found_to_one_in_sixteen(train_step, limit):
    tried = []

    found = train_step.search_largest(lambda batch: tried.append(batch) or batch <= limit, 4)

    if limit < 4:
        assert found == 0 and tried == [4]
    else:
        assert found <= limit <= found + max(1, found // 16)
        assert len(tried) < 2 + 2 * math.log2(limit)


def test_rows_show_ratios_and_the_share_of_the_norm(train_step):
    args = train_step.parse(["--largest"])
    costs = {
        "none": train_step.Cost(np.array([1.0, 1.0, 2.0]), 10**9, 100),
        "flax": train_step.Cost(np.array([4.0, 4.0, 4.0]), 2 * 10**9, 50),
        "fused": train_step.Cost(np.array([2.0, 2.0, 2.0]), 5 * 10**8, 0),
    }

    assert list(train_step.rows(costs, args)) == [
        ("none", "1000.0", "0.25 (0.25-0.50)", "-", "1.00", "0.50", "100"),
        ("flax", "4000.0", "1.00 (1.00-1.00)", "75 % (50-75)", "2.00", "1.00", "50"),
        ("fused", "2000.0", "0.50 (0.50-0.50)", "50 % (0-50)", "0.500", "0.25", "-"),
    ]


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--norms", "x"], ["--networks", "x"]])
def test_bad_options_are_errors_before_any_work(train_step, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_step.main(arguments)

    assert "error" in capsys.readouterr().err
