"""Sums of fixed size over many devices: the merge itself on 8 devices, and all of it on 64 in another process."""

import json
import math
import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AXIS, DEVICES, NAMED, run, spread

import jaxbn
from jaxbn._src.numerics import collectives

TABLE = [(0, 1), (10, 0.01), (100, 0.1), (100, 0.01), (1e3, 1), (1e3, 0.1), (3e3, 1), (1e4, 1), (1e4, 0.1), (1e4, 0.01)]
SPREADS = ["jit", "jit explicit", "shard_map", "shard_map unchecked", "pmap", "vmap"]
GROUPS = [[0, 3, 5, 6], [1, 2, 4, 7]]


@pytest.fixture(autouse=True)
def sums(monkeypatch):
    """From two devices on, statistics are summed and not gathered."""
    monkeypatch.setattr(collectives, "_GATHERED", 1)


def data(mean, std, rows=4096):
    return (mean + std * np.random.default_rng(0).standard_normal((rows, 4))).astype(np.float32)


def error(var, x):
    return float(np.abs(np.float64(var) / np.float64(x).var(0) - 1).max())


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("mean, std", [(0, 1), (1e4, 1), (1e4, 0.01)])
@pytest.mark.parametrize("way", SPREADS)
def test_variance_with_an_empty_shard(mean, std, way):
    x, valid = data(mean, std), np.ones((4096, 1), bool)
    valid[:512] = valid[3000:3500] = False
    name = AXIS if way in NAMED else None

    def step(_, batch):
        return jaxbn.batch_moments(batch["x"], mask=batch["mask"], axis_name=name), batch["mask"]

    moments, _ = run(way, step, 0, {"x": np.where(valid, x, np.nan).astype(np.float32), "mask": valid})
    assert error(moments.var, x[valid[:, 0]]) < 2e-6
    np.testing.assert_array_equal(moments.count, valid.sum())
    np.testing.assert_allclose(moments.mean, np.float64(x[valid[:, 0]]).mean(0), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("way", ["shard_map", "shard_map unchecked", "pmap", "vmap"])
def test_groups_of_devices(way):
    """Forward, and the derivative through the sums."""
    x = data(1e3, 1, 32)

    def step(_, x):
        def loss(x):
            moments = jaxbn.batch_moments(x, axis_name=AXIS, axis_index_groups=GROUPS)
            return (moments.m2 * jnp.arange(4.0)).sum() / 4  # every device of the group has this term

        var = jaxbn.batch_moments(x, axis_name=AXIS, axis_index_groups=GROUPS).var
        return 0, (jnp.broadcast_to(var, x.shape), jax.grad(loss)(x))

    _, (var, dx) = run(way, step, 0, x)
    for group in GROUPS:
        rows = np.concatenate([np.arange(32).reshape(DEVICES, 4)[device] for device in group])
        assert error(var[rows[0]], x[rows]) < 2e-6
        np.testing.assert_array_equal(var[rows], np.broadcast_to(var[rows[:1]], (16, 4)))
        centred = np.float64(x[rows]) - np.float64(x[rows]).mean(0)
        np.testing.assert_allclose(dx[rows], 2 * centred * np.arange(4.0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("way", NAMED)
def test_merge_over_devices(way):
    x = data(100, 1, 16)
    moments, _ = run(way, lambda _, x: (jaxbn.merge_over(jaxbn.batch_moments(x), AXIS), x), 0, x)
    assert error(moments.var, x) < 6e-6  # of the rounded means of the parts


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_two_axes(kind):
    x = data(1e3, 0.1).reshape(16, -1, 8)
    on = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    with jax.set_mesh(on):
        moments = jax.jit(jaxbn.batch_moments)(jax.device_put(x, NamedSharding(on, P("a", None, "b"))))
    assert error(moments.var, x.reshape(-1, 8)) < 2e-6


METHODS = {
    "batch_norm": lambda **fields: jaxbn.batch_norm(**fields),
    "batch_renorm": lambda **fields: jaxbn.batch_renorm(**fields),
    "moving_average_batch_norm": lambda **fields: jaxbn.moving_average_batch_norm(**fields),
    "ghost_batch_norm": lambda **fields: jaxbn.ghost_batch_norm(ghost_size=2, **fields),
    "ghost_batch_norm over devices": lambda **fields: jaxbn.ghost_batch_norm(ghost_size=8, **fields),
    "ghost_batch_norm pooled": lambda **fields: jaxbn.ghost_batch_norm(ghost_size=8, running="pooled", **fields),
}


@pytest.mark.sample(every=3)
@pytest.mark.parametrize(
    "method, way",
    [
        (method, way)
        for method in METHODS
        for way in ["jit", "jit explicit", "shard_map", "shard_map unchecked", "pmap"]
        # Rows of an Explicit mesh cannot be cut into groups over devices.
        if way != "jit explicit" or method not in ("ghost_batch_norm over devices", "ghost_batch_norm pooled")
    ],
)
def test_a_training_step_equals_that_of_one_device(method, way):
    """Its collectives carry at most 16 floats for each channel, forward and backward."""
    x = data(3, 2, 32 * 5).reshape(32, 5, 4)
    batch = {"x": x, "mask": np.arange(32 * 5).reshape(32, 5, 1) % 7 > 0}

    def step(transform, batch):
        def loss(x):
            y, after = transform.train(*transform.init(4), x, mask=batch["mask"])
            return jnp.sin(y).sum(), (after, y)

        dx, (after, y) = jax.grad(loss, has_aux=True)(batch["x"])
        return after, (y, dx)

    one, many = METHODS[method](), METHODS[method](axis_name=AXIS if way in NAMED else None)
    expected = jax.jit(lambda batch: step(one, batch))(batch)
    mapped, arguments = spread(way, lambda _, batch: step(many, batch), np.zeros(()), batch)
    found = run(way, lambda _, batch: step(many, batch), np.zeros(()), batch)

    chex.assert_trees_all_close(found, jax.tree.map(np.asarray, expected), rtol=1e-5, atol=1e-5)
    assert carried(mapped.lower(*arguments).compile().as_text()) <= 16 * 4 * (2 if method.startswith("ghost") else 1)


def carried(text):
    """The number of values that leave the collectives of a compiled program."""
    found = re.findall(
        r"= (.*?) (?:all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    )
    shapes = [shape for types in found for shape in re.findall(r"\w+\[([\d,]*)\]", types)]
    return sum(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)


PROGRAM = """
import json, sys
sys.path[:0] = {paths}
import jax, meshes, numpy as np, jaxbn
meshes.DEVICES = 64
errors = {{}}
for way in meshes.WAYS:
    for mean, std in {table}:
        x = (mean + std * np.random.default_rng(0).standard_normal((8192, 4))).astype(np.float32)
        name = meshes.AXIS if way in meshes.NAMED else None
        moments, _ = meshes.run(way, lambda _, x: (jaxbn.batch_moments(x, axis_name=name), x), 0, x)
        errors[f"{{way}} {{mean}} {{std}}"] = float(np.abs(np.float64(moments.var) / np.float64(x).var(0) - 1).max())
print(json.dumps(errors))
"""


@pytest.mark.slow
def test_variance_over_64_devices():
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    environment = os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=64".strip()}
    program = PROGRAM.format(paths=[path for path in sys.path if path], table=TABLE)
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    errors = json.loads(ran.stdout.splitlines()[-1])
    assert len(errors) == len(SPREADS) * len(TABLE)
    assert max(errors.values()) < 2e-6, errors
