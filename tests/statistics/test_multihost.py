"""The pass on two real processes: they end with the same bits, or all with an error, and never wait for ever."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

WORKER = Path(__file__).with_name("worker.py")
EXAMPLE = Path(__file__).parents[2] / "examples" / "multihost.py"
SECONDS = 900  # so that none waits for ever; for all that two processes have to do, on a busy machine


sys.path.insert(0, str(WORKER.parent))  # as where the worker is started
import global_worker  # noqa: E402  from there


@pytest.fixture(scope="module")
def worker():
    """The scenarios, to be run in this process."""
    spec = importlib.util.spec_from_file_location("worker_of_processes", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_processes(folder, *names):
    """What each of two processes says of the scenarios, all of them where none is named."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    paths = [folder / f"{i}.json" for i in range(2)]
    # XLA takes flags that start with a space for the name of a file.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]).strip()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, address, str(i), path, *names], env=environment, stderr=subprocess.PIPE
        )
        for i, path in enumerate(paths)
    ]
    try:
        errors = [process.communicate(timeout=SECONDS)[1].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    return [json.loads(path.read_text()) for path in paths]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes says of each scenario."""
    return of_processes(tmp_path_factory.mktemp("processes"))


def of_all(worker, parts, **options):
    """What one process makes of all the batches, in the order of the processes."""
    batches = [batch for process, count in enumerate(parts) for batch in worker.batches_of(process, count)]
    return worker.statistics(batches, **options)


# What every run of the tests looks at; the slow ones look at every scenario.
AGREE = ("sharded parameters", "nnx, sharded parameters", "without the devices")
FAIL = ("far fewer on one", "global on one", "own after global on one", "one cannot read")


@pytest.fixture(scope="module")
def in_short(tmp_path_factory):
    """What each of two processes says of a few scenarios."""
    shared = [f"global: {name}" for name in (*AGREE, *FAIL)]
    return of_processes(tmp_path_factory.mktemp("processes"), *shared, "one breaks", "three and two")


def test_two_processes_end_with_the_same_statistics_or_both_with_an_error(worker, in_short):
    first, second = in_short
    assert first["three and two"] == second["three and two"]
    expected = of_all(worker, (3, 2))["leaves"]
    for found, wanted in zip(first["three and two"]["result"]["leaves"], expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert [result["one breaks"]["error"] for result in (first, second)] == ["RuntimeError", "OSError"]


@pytest.mark.parametrize("name", AGREE)
def test_global_batches_count_once(name, in_short):
    check_global(name, in_short)


@pytest.mark.slow
@pytest.mark.parametrize("name", global_worker.AGREE)
def test_all_global_batches_count_once(name, results):
    check_global(name, results)
    for one in results:
        assert one["global: again"] == one["global: pooled"]


def check_global(name, results):
    """As in one process that has all devices: batches, values, statistics and standard errors."""
    first, second = (one[f"global: {name}"] for one in results)
    assert "result" in first, first
    assert first == second  # to the last bit
    assert_close(first["result"], json.loads(json.dumps(global_worker.AGREE[name]())))


@pytest.mark.parametrize("name", FAIL)
def test_global_batches_that_fail_in_one_fail_in_all(name, in_short):
    check_failed(name, in_short)


@pytest.mark.slow
@pytest.mark.parametrize("name", global_worker.FAIL)
def test_all_global_batches_that_fail_in_one_fail_in_all(name, results):
    check_failed(name, results)


def check_failed(name, results):
    for one, message in zip(results, global_worker.FAIL[name][1], strict=True):
        with pytest.raises(AssertionError, match=f"^{message}"):
            raise AssertionError("{error}: {message}".format(**one[f"global: {name}"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, parts, options",
    [
        ("five and none", (5, 0), {}),
        ("none and five", (0, 5), {}),
        ("three and two", (3, 2), {}),
        ("on two devices each", (3, 2), {}),
        ("consistent", (3, 2), {"consistent": True}),
        ("moving average", (3, 2), {"estimator": jaxbn.moving_average()}),
        ("mean of batches", (3, 2), {"estimator": jaxbn.mean_of_batches()}),
        ("nan left out", (3, 2), {}),
        ("the same again", (3, 2), {}),
    ],
)
def test_processes_agree_with_one_that_has_all_batches(name, parts, options, results, worker):
    first, second = (result[name]["result"] for result in results)
    assert first == second  # to the last bit
    expected = of_all(worker, parts, **options)
    for found, wanted in zip(first["leaves"], expected["leaves"], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert first["skipped"] == (name == "nan left out")
    assert first["batches"] == sum(parts) + first["skipped"]
    assert [kind[0] for kind in first["kinds"].values()] == ["batch_norm", "batch_norm"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, process, count, options",
    [
        ("stopped", 1, None, {}),
        ("stopped, one runs out", 1, 10, {}),
        ("stopped, consistent", 0, 9, {"consistent": True}),
    ],
)
def test_processes_stop_together(name, process, count, options, results, worker):
    """After a decision on what all have seen; the one with `count` batches has read all of them, and the other more."""
    first, second = (result[name]["result"] for result in results)
    assert first == second and first["stopped"]
    other = first["batches"] // 2 if count is None else first["batches"] - count
    assert other in (12, 18, 27)
    parts = [other if count is None else count, other] if process == 0 else [other, other if count is None else count]
    expected = of_all(worker, parts, **options)
    for found, wanted in zip(first["leaves"], expected["leaves"], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_parameters_may_be_spread_over_both(results, worker):
    expected = of_all(worker, (3, 2))["leaves"]
    nnx_model = worker.linear_and_norm()
    rows = np.concatenate([*worker.batches_of(0, 3), *worker.batches_of(1, 2)]).astype(np.float64)
    z = rows @ np.float64(nnx_model.layers[0].kernel[...]) + np.float64(nnx_model.layers[0].bias[...])
    for name, wanted in (("sharded over both", expected), ("sharded over both, nnx", [z.mean(0), z.var(0)])):
        first, second = (result[name]["result"] for result in results)
        assert first == second
        for found, value in zip(first, wanted, strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_nnx_models_too(results, worker):
    rows = np.concatenate([*worker.batches_of(0, 3), *worker.batches_of(1, 2)]).astype(np.float64)
    assert results[0]["nnx"] == results[1]["nnx"]
    mean, var = results[0]["nnx"]["result"]
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(var, rows.var(0), rtol=1e-6)


@pytest.mark.slow
def test_processes_diagnose_what_all_have_seen(results, worker):
    first, second = (result["diagnose"]["result"] for result in results)
    assert first == second == results[0]["diagnose, all on one"]["result"]
    batches = [*worker.batches_of(0, 3), *worker.batches_of(1, 2)]
    assert_close(first, json.loads(json.dumps(worker.diagnosed(batches))))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, errors, messages",
    [
        ("one breaks", ["RuntimeError", "OSError"], ["Process 1 failed.*OSError: batch 3 cannot be read", "batch 3"]),
        ("one breaks at once", ["RuntimeError", "OSError"], ["Process 1 failed", "batch 0 cannot be read"]),
        (
            "one breaks after a decision",
            ["RuntimeError", "OSError"],
            ["Process 1 failed.*OSError: batch 10 cannot be read", "batch 10"],
        ),
        ("diagnose, one breaks", ["RuntimeError", "OSError"], ["Process 1 failed: OSError: batch 1 ", "batch 1 "]),
        ("none", ["ValueError", "ValueError"], ["There was no batch"] * 2),
        ("nan", ["RuntimeError", "ValueError"], ["Process 1 failed.*Batch 1", "Batch 1 .*'BatchNorm_0'"]),
        ("other models", ["RuntimeError"] * 2, ["run different models"] * 2),
        ("one has a stage more", ["RuntimeError"] * 2, ["run different models"] * 2),
        (
            "one has params alone",
            ["RuntimeError", "ValueError"],
            ["Process 1 failed", "no statistics of a normalization"],
        ),
        ("other variables", ["ValueError"] * 2, ["'b/c' on process 1 differs from its copy on process 0"] * 2),
    ],
)
def test_what_fails_in_one_fails_in_all(name, errors, messages, results):
    assert [result[name]["error"] for result in results] == errors
    for result, message in zip(results, messages, strict=True):
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(result[name]["message"])


@pytest.mark.slow
def test_every_scenario_is_looked_at(results, worker):
    assert [list(result) for result in results] == [list(worker.SCENARIOS)] * 2


def assert_close(found, wanted, path=""):
    """Equal but for the rounding of the numbers."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), path
        for key in wanted:
            assert_close(found[key], wanted[key], f"{path}/{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), path
        for i, pair in enumerate(zip(found, wanted, strict=True)):
            assert_close(*pair, f"{path}/{i}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6), path
    else:
        assert found == wanted, path


def test_replicas_of_one_process_that_differ_are_named():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shards = [jax.device_put(jnp.full(3, float(i == 5)), device) for i, device in enumerate(jax.devices())]
    broken = jax.make_array_from_single_device_arrays((3,), replicated, shards)
    whole = jax.device_put(jnp.zeros(3), replicated)
    jaxbn.check_replicas({"net": [whole, np.zeros(2)], "step": 3})
    with pytest.raises(ValueError, match="'net/1' on cpu:5 differs"):
        jaxbn.check_replicas({"net": [whole, broken]})


def test_shards_are_compared_where_they_are_copies():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    devices = spread.devices_indices_map((8,))
    shards = [jax.device_put(jnp.arange(8.0)[index], device) for device, index in devices.items()]
    jaxbn.check_replicas(jax.make_array_from_single_device_arrays((8,), spread, shards))
    shards[3] = shards[3] + 1
    with pytest.raises(ValueError, match="differs from its copy"):
        jaxbn.check_replicas({"a": jax.make_array_from_single_device_arrays((8,), spread, shards)})


@pytest.mark.slow
def test_the_example_runs_as_a_user_runs_it(tmp_path):
    done = subprocess.run([sys.executable, EXAMPLE], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()  # among those of Gloo, in which the processes may cut each other short
    for title, batches in (("Global batches", 5), ("Local batches", 8)):
        assert any(line.startswith(f"pooled statistics from {batches} batches, in 2 stages") for line in lines)
        agrees = f"{title}: all processes agree bit for bit, and with float64"
        (result,) = (line for line in lines if line.startswith(agrees))
        assert float(result.split()[-2]) < 1e-5
