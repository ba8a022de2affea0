"""Tests of benchmarks/overhead.py on small networks: counts, output, and that the compilation cache is restored."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import load_program


@pytest.fixture(scope="module")
def overhead():
    """The program as a module."""
    return load_program("benchmarks/overhead.py")


@pytest.mark.slow
def test_every_program_is_made(overhead, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    before, file = jax.config.jax_enable_compilation_cache, tmp_path / "found.json"

    equations, seconds, imports = overhead.main(["--layers", "1", "--rounds", "1", "--json", str(file)])

    out, err = capsys.readouterr()
    assert not err.strip()
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    keys = [(what, name) for name in overhead.NORMS for what in ("forward", "step")]
    assert set(equations) == set(seconds) == set(keys)
    assert all(equations["step", name] > equations["forward", name] > 20 for name in overhead.NORMS)
    assert all(s.shape == (1, 3) and (s > 0).all() for s in seconds.values())
    assert imports.shape == (1, 2) and (imports > 0).all()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert [row[0] for row in rows] == 4 * list(overhead.NORMS)
    assert [row[1] for row in rows[:6]] == [str(equations["forward", name]) for name in overhead.NORMS]
    assert len(json.loads(file.read_text())["results"]["programs"]) == len(keys)
    assert jax.config.jax_enable_compilation_cache == before


@pytest.mark.slow
def test_both_frameworks_make_the_same_network(overhead):
    """They have the same number of parameters and the same output shape."""
    sizes = {
        name: [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in overhead.programs_of(norm, 2)["step"][1]]
        for name, norm in overhead.NORMS.items()
    }

    assert set(map(tuple, sizes.values())) == {(2 * (9 * 16 * 16 + 2 * 16), 2 * 2 * 16, 8 * 8 * 8 * 16)}


def test_equations_are_counted_inside_of_others_too(overhead):
    def inner(x):
        return jnp.sin(jnp.cos(x))

    def outer(x):
        return jax.jit(inner)(x) + jax.jit(inner)(x)  # 2 x (1 + 2) and the sum

    assert overhead.count_equations(jax.make_jaxpr(outer)(1.0)) == 7


def test_numbers_are_multiples_of_flax_of_the_same_framework(overhead):
    found = {(what, name): np.full(3, 1.0 + i) for i, name in enumerate(overhead.NORMS) for what in overhead.WHAT}

    rows = list(overhead.rows(found, overhead.show_seconds))

    assert [row[1:3] for row in rows] == [
        ("1.00", "1.00 (1.00-1.00)"),
        ("2.00", "2.00 (2.00-2.00)"),
        ("3.00", "3.00 (3.00-3.00)"),
        ("4.00", "1.00 (1.00-1.00)"),
        ("5.00", "1.25 (1.25-1.25)"),
        ("6.00", "1.50 (1.50-1.50)"),
    ]
    assert overhead.show_counts(30, 20) == ("30", "1.50")


@pytest.mark.parametrize("arguments", [["--layers", "0"], ["--rounds", "-1"]])
def test_bad_options_end_before_the_work(overhead, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        overhead.main(arguments)

    assert "error" in capsys.readouterr().err
