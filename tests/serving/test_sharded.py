"""Saving and loading sharded networks: devices, rejected folders, failures and kills."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving
from jaxbn._src.serving import atomic_files, sharded

INFO = jaxbn.Info((("norm", jaxbn.LayerInfo("batch_norm", 1e-5, "pooled", 20.0)),), (("jaxbn", "0.1"),))
MANIFEST = "manifest.jaxbn"
WORKER = Path(__file__).with_name("worker.py")
SECONDS = 900  # so that none waits for ever; for all that other processes have to do, on a busy machine


def mesh(*shape):
    return jax.make_mesh(shape, ("x", "y")[: len(shape)], (AxisType.Auto,) * len(shape))


def network(seed=0):
    """A network with several dtypes, whose kernel and bias are spread over all devices."""
    rng, everywhere = np.random.default_rng(seed), NamedSharding(mesh(8), P("x"))
    kernel, bias = rng.standard_normal((16, 6)).astype("f4"), rng.standard_normal(8).astype(jnp.bfloat16)
    params = {"kernel": jax.device_put(kernel, everywhere), "bias": jax.device_put(bias, everywhere), "none": {}}
    stats = {"mean": jnp.arange(3.0) + seed, "var": rng.uniform(1, 2, 3).astype("f4"), "count": np.float32(7)}
    others = {"step": np.int32(seed), "flag": np.array(True), "empty": np.zeros((0, 3), "f4")}
    return jaxbn.Frozen({"params": params, "batch_stats": {"norm": stats}, "others": others}, INFO)


def assert_same(found, expected):
    """Checks that two networks have the same bits, dtypes, names and information."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "network"


@pytest.fixture
def saved(folder):
    jaxbn.serving.save_sharded(folder, network())
    return folder


def steps(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir())


def test_whole_on_the_default_device(saved):
    found = jaxbn.serving.load_sharded(str(saved))
    assert_same(found, network())
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(found))
    assert found.variables["params"]["none"] == {}


def test_onto_other_devices(saved):
    """Shapes with a sharding give the devices; other arrays are loaded onto the default device."""
    spread, whole = NamedSharding(mesh(4, 2), P("y")), NamedSharding(mesh(4, 2), P())
    one = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    like = jax.eval_shape(lambda: network().variables)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    like["params"]["kernel"] = place(like["params"]["kernel"], NamedSharding(mesh(2, 4), P(None, "x")))
    like["params"]["bias"] = place(like["params"]["bias"], one)
    like["batch_stats"] = jax.tree.map(lambda leaf: place(leaf, whole), like["batch_stats"])
    like["others"]["empty"] = place(like["others"]["empty"], spread)
    found = jaxbn.serving.load_sharded(saved, like=like)
    assert_same(found, network())
    for leaf, wanted in zip(jax.tree.leaves(found.variables), jax.tree.leaves(like), strict=True):
        expected = wanted.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)


def test_onto_the_devices_of_an_nnx_model(folder):
    """Committed arrays give the devices; uncommitted ones do not."""
    make = lambda: nnx.List([jaxbn.nnx.BatchNorm(8, rngs=nnx.Rngs(0))])
    model, like, spread = make(), make(), NamedSharding(mesh(8), P("x"))
    model[0].mean.set_value(jnp.arange(8.0) + 1)
    like[0].mean.set_value(jax.device_put(like[0].mean[...], spread))
    frozen = jaxbn.nnx.freeze(model)
    jaxbn.serving.save_sharded(folder, frozen)
    found = jaxbn.serving.load_sharded(folder, like=like)
    assert_same(found, frozen)
    stats = found.variables["0"]
    assert stats["mean"].sharding.is_equivalent_to(spread, 1) and stats["mean"].committed
    assert not stats["var"].committed


def test_each_save_is_a_step_and_the_previous_one_is_kept(folder):
    for seed in range(4):
        jaxbn.serving.save_sharded(folder, network(seed))
        assert_same(jaxbn.serving.load_sharded(folder), network(seed))
        assert len(steps(folder)) == min(seed + 1, 2)
    assert set(os.listdir(folder)) == {MANIFEST, *(step.name for step in steps(folder))}


def refusal(folder):
    with pytest.raises(ValueError) as raised:
        jaxbn.serving.load_sharded(folder)
    return str(raised.value)


def test_damage_is_found_and_the_file_named(saved):
    files = [path for path in steps(saved)[0].rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (flipped, content[:-1], content + b"\n"):
            path.write_bytes(damaged)
            assert refusal(saved).startswith(f"{path} is damaged or incomplete: its content does not have the")
        path.unlink()
        assert refusal(saved).startswith(f"{path} is missing")
        path.write_bytes(content)
    content = (saved / MANIFEST).read_bytes()
    for position in range(0, len(content), 29):
        (saved / MANIFEST).write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert str(saved / MANIFEST) in refusal(saved)
    (saved / MANIFEST).write_bytes(content)
    assert_same(jaxbn.serving.load_sharded(saved), network())


def test_a_manifest_that_names_other_folders(saved):
    """Old steps are deleted; a forged manifest, with a correct checksum, cannot delete other folders."""
    elsewhere = saved.parent / "elsewhere"
    elsewhere.mkdir()
    header = json.loads((saved / MANIFEST).read_bytes())
    del header["sha256"]
    atomic_files.write(saved / MANIFEST, sharded.KIND, header | {"before": "../elsewhere"})
    assert refusal(saved) == (
        f"{saved / MANIFEST} is not a manifest of a network written by jaxbn: it names '../elsewhere', which is not a "
        f"step of a network."
    )
    jaxbn.serving.save_sharded(saved, network())
    assert elsewhere.is_dir()


def test_other_folders_and_models(saved, tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path} does not hold a network: there is no {MANIFEST} in it")
    with pytest.raises(FileNotFoundError):
        jaxbn.serving.load_sharded(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere to save here in"):
        jaxbn.serving.save_sharded(tmp_path / "nowhere" / "here", network())
    like = jax.tree.map(np.asarray, network().variables)
    like["params"]["kernel"] = np.ones((16, 7))
    with pytest.raises(
        ValueError, match=r"'params/kernel' is \(16, 6\) in the frozen network and \(16, 7\) in the model"
    ):
        jaxbn.serving.load_sharded(saved, like=like)
    with pytest.raises(TypeError, match="`like` must be the variables of a linen model"):
        jaxbn.serving.load_sharded(saved, like=nn.BatchNorm())


def test_invalid_networks_change_nothing(saved):
    with pytest.raises(TypeError, match="Expected a jaxbn.Frozen"):
        jaxbn.serving.save_sharded(saved, network().variables)
    with pytest.raises(TypeError, match="'rate' is <class 'float'>"):
        jaxbn.serving.save_sharded(saved, jaxbn.Frozen({"rate": 0.5}, INFO))
    assert len(steps(saved)) == 1
    assert_same(jaxbn.serving.load_sharded(saved), network())


@pytest.mark.parametrize("owner, name", [(ocp.Checkpointer, "save"), (os, "fsync"), (os, "replace")])
def test_a_save_that_fails_leaves_the_old_network(owner, name, saved, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(OSError, match="No space left"):
        jaxbn.serving.save_sharded(saved, network(1))
    monkeypatch.undo()
    assert_same(jaxbn.serving.load_sharded(saved), network())
    assert len(steps(saved)) == 1 or name != "save"
    jaxbn.serving.save_sharded(saved, network(1))
    assert_same(jaxbn.serving.load_sharded(saved), network(1))


# --- Several processes ------------------------------------------------------------------------------------------------


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def environment():
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder in which two processes have run all scenarios of worker.py, and their results."""
    here = tmp_path_factory.mktemp("processes")
    jaxbn.serving.save_sharded(here / "of one", network(5))
    jaxbn.serving.save_sharded(here / "damaged", network(5))
    (damaged,) = steps(here / "damaged")
    content = (damaged / "arrays" / "_METADATA").read_bytes()
    (damaged / "arrays" / "_METADATA").write_bytes(content[:-1])
    address = free_address()
    started = [
        subprocess.Popen([sys.executable, WORKER, address, str(i), here], env=environment(), stderr=subprocess.PIPE)
        for i in range(2)
    ]
    try:
        errors = [process.communicate(timeout=SECONDS)[1].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    return here, [json.loads((here / f"{i}.json").read_text()) for i in range(2)]


@pytest.mark.slow
def test_two_processes_save_and_load_arrays_spread_over_both(shared):
    """Loads whole, resharded and on one device; one process loads the network of two, and the reverse."""
    here, results = shared
    for name in ("save", "load whole", "load spread", "load on one device", "load of one process", "save again"):
        assert [result[name] for result in results] == ["done"] * 2, name
    assert_same(jaxbn.serving.load_sharded(here / "network"), jaxbn.Frozen(plain(2), INFO))
    assert len(steps(here / "network")) == 2


FAILURES = {
    "one has no network": ("RuntimeError: Process 1 failed: TypeError: Expected a", "TypeError: Expected a jaxbn"),
    "one has another folder": (
        "RuntimeError: Process 1 failed: ValueError: Process 1 cannot",
        "ValueError: Process 1 cannot",
    ),
    "one has another model": ("RuntimeError: Process 1 failed: ValueError: 'kernel' is", "ValueError: 'kernel' is (8,"),
    "nowhere": ("FileNotFoundError: ", "RuntimeError: Process 0 failed: FileNotFoundError"),
    "damaged": ("ValueError: ", "ValueError: "),
}


@pytest.mark.slow
def test_a_failure_in_one_process_is_an_error_in_all(shared):
    _, results = shared
    for name, messages in FAILURES.items():
        for result, message in zip(results, messages, strict=True):
            assert message in result[name], name
    assert all("_METADATA is damaged or incomplete" in result["damaged"] for result in results)


def plain(seed):
    """The network of worker.py in one process."""
    kernel = np.random.default_rng(seed).standard_normal((8, 4)).astype("f4")
    return {"kernel": kernel, "mean": np.arange(4, dtype="f4") + seed, "step": np.int32(seed)}


# Imports jaxbn once, and for each line of its input forks that many processes, which save two networks in turns until
# they are killed.
SAVER = """
import os, sys
import jax, numpy as np
import jaxbn, jaxbn.serving
from jax.sharding import NamedSharding, PartitionSpec

folder, sizes = sys.argv[1], (200_000, 4)

def save(process, count, address):
    os.dup2(2, 1)  # to where Gloo may write
    jax.config.update("jax_num_cpu_devices", 2)
    if count > 1:
        jax.distributed.initialize(address, count, process)
    mesh = jax.make_mesh((jax.device_count(),), ("x",), (jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("x"))
    networks = []
    for seed in range(2):
        whole = np.random.default_rng(seed).standard_normal(sizes).astype("f4")
        kernel = jax.make_array_from_callback(sizes, spread, whole.__getitem__)
        networks.append(jaxbn.Frozen({"kernel": kernel, "bias": whole[:9]}, jaxbn.Info((), ())))
    while True:
        for frozen in reversed(networks):
            jaxbn.serving.save_sharded(folder, frozen)

for line in sys.stdin:
    count, address = line.split()
    children = []
    for process in range(int(count)):
        children.append(os.fork())
        if not children[-1]:
            save(process, int(count), address)
    print(*children, flush=True)
    for child in children:
        os.waitpid(child, 0)
    print("over", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes, kills", [(1, 20), (2, 10)])
def test_kills_at_random_moments_leave_the_old_network_or_the_new_one(processes, kills, tmp_path):
    """They save two networks in turns; of two processes, one is killed first, and then the other."""
    rng, left, unfinished = np.random.default_rng(processes), [], 0
    kernels = [np.random.default_rng(seed).standard_normal((200_000, 4)).astype("f4") for seed in range(2)]
    known = {kernel.tobytes(): seed for seed, kernel in enumerate(kernels)}
    folder = tmp_path / "network"
    jaxbn.serving.save_sharded(folder, jaxbn.Frozen({"kernel": kernels[0], "bias": kernels[0][:9]}, INFO))
    command = [sys.executable, "-c", SAVER, folder]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes, text=True, env=environment()) as saver:
        while len(left) < kills or set(left) != {0, 1} or unfinished < 3:
            print(processes, free_address(), file=saver.stdin, flush=True)
            children = [int(child) for child in saver.stdout.readline().split()]
            before = (folder / MANIFEST).stat().st_mtime_ns
            while (folder / MANIFEST).stat().st_mtime_ns == before and len(left) % 2:  # every other one from the start
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.6))
            for child in rng.permutation(children):
                os.kill(child, signal.SIGKILL)
                time.sleep(rng.uniform(0, 0.05))
            assert saver.stdout.readline() == "over\n"
            found = jaxbn.serving.load_sharded(folder).variables
            left.append(known[np.asarray(found["kernel"]).tobytes()])
            np.testing.assert_array_equal(found["bias"], kernels[left[-1]][:9])
            header = json.loads((folder / MANIFEST).read_bytes())
            begun = [step for step in steps(folder) if step.name not in (header["step"], header["before"])]
            unfinished += bool(begun)
            for step in begun:
                shutil.rmtree(step)
            assert len(left) < 5 * kills
        saver.stdin.close()
    print(f"{len(left)} kills: {left}, {unfinished} within a save")
