"""A multi-host statistics pass: several processes, one network, and statistics that are identical on all of them.

    python examples/multihost.py

This starts two processes on this machine, with two CPU devices each, and shows two ways to run the pass:

- Global arrays over the devices of all processes, as in training on a pod: this is the main way. Parameters are sharded
  over the devices as in FSDP, and stay so; all processes run one program, and each batch counts once.
- Local batches: each process has a replica of the parameters and its own batches. The numbers of batches may differ;
  no padding is needed.

Process 0 then compares the statistics with those of all data in float64.

On a pod, start this file once per host with `--pod`; JAX finds the other processes.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxbn
import jaxbn.linen

PROCESSES, DEVICES = 2, 2
BATCH, FEATURES = 32, 8


class Net(nn.Module):
    """A network with two of Flax's own BatchNorm layers; the statistics pass supports them without changes."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for _ in range(2):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x)))
        return nn.Dense(4)(x)


def predict(variables: dict, batch: np.ndarray) -> jax.Array:
    """The network in evaluation mode."""
    return Net().apply(variables, batch, train=False)


def data_of(process: int) -> np.ndarray:
    """The data of a process: five batches for process 0; two and a half for process 1, with another mean."""
    rows = BATCH * 5 // (process + 1)
    return np.random.default_rng(process).normal(loc=3 * process, size=(rows, FEATURES)).astype(np.float32)


def in_float64(variables: dict, x: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of each layer's input over all data, where earlier layers normalize with all data as well."""
    found, params = {}, jax.tree.map(np.float64, jax.device_get(variables["params"]))
    for i in range(2):
        dense, norm = params[f"Dense_{i}"], params[f"BatchNorm_{i}"]
        x = x @ dense["kernel"] + dense["bias"]
        found[f"BatchNorm_{i}"] = mean, var = x.mean(0), x.var(0)
        x = np.maximum((x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"], 0)
    return found


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """A mesh with one axis, over which data and parameters are sharded."""
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def init(key: jax.Array) -> dict:
    """The variables of the network; the same key gives the same variables everywhere."""
    return Net().init(key, np.zeros((1, FEATURES), np.float32), train=False)


def init_sharded(mesh: Mesh) -> dict:
    """The variables, sharded over all processes as in FSDP from the start: no device ever holds a whole kernel."""

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        divides = leaf.ndim > 0 and leaf.shape[0] % mesh.size == 0
        return NamedSharding(mesh, PartitionSpec("data") if divides else PartitionSpec())

    key = jax.random.key(0)
    return jax.jit(init, out_shardings=jax.tree.map(sharding, jax.eval_shape(init, key)))(key)


def with_global_arrays() -> None:
    """The main way: parameters and batches are arrays over the devices of all processes."""
    mesh = mesh_of(jax.devices())
    variables = init_sharded(mesh)
    # Each process reads an equal share of each batch.
    processes = range(jax.process_count())
    share, fewest = BATCH // len(processes), min(len(data_of(i)) for i in processes)
    mine, rows = data_of(jax.process_index()), NamedSharding(mesh, PartitionSpec("data"))
    batches = [
        jax.make_array_from_process_local_data(rows, mine[start : start + share]) for start in range(0, fewest, share)
    ]
    # All processes run this program on the same global batches; no merge is needed afterwards.
    found, report = jaxbn.linen.postproc(predict, variables, batches, consistent=True)
    assert jax.tree.all(jax.tree.map(lambda new, old: new.sharding == old.sharding, found, variables))
    jaxbn.check_replicas(found)
    whole = process_allgather(found, tiled=True)  # for the comparison only
    if jax.process_index() == 0:
        print(report)
        report_error("Global batches", whole, np.concatenate([data_of(i)[:fewest] for i in processes]))


def with_local_batches() -> None:
    """The second way: each process runs its own batches on its own devices, and the accumulators are merged."""
    variables, mine = init(jax.random.key(0)), data_of(jax.process_index())
    batches = [mine[start : start + BATCH] for start in range(0, len(mine), BATCH)]
    mesh = mesh_of(jax.local_devices())
    found, report = jaxbn.linen.postproc(predict, variables, batches, consistent=True, mesh=mesh)
    jaxbn.check_replicas(found)
    if jax.process_index() == 0:
        print(report)
        report_error("Local batches", found, np.concatenate([data_of(i) for i in range(jax.process_count())]))


def report_error(title: str, variables: dict, everything: np.ndarray) -> None:
    """Prints the largest difference between the statistics and those of all data."""
    off = max(
        np.abs(np.asarray(variables["batch_stats"][path]["mean"]) - mean).max() / np.sqrt(var.min())
        for path, (mean, var) in in_float64(variables, everything.astype(np.float64)).items()
    )
    print(f"{title}: all processes agree bit for bit, and with float64 to {off:.0e} std.")


def start_processes() -> int:
    """Starts the processes on this machine and waits; returns the largest exit code."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    started = [
        subprocess.Popen([sys.executable, __file__, "--address", address, "--process", str(i)], env=environment)
        for i in range(PROCESSES)
    ]
    return max(process.wait() for process in started)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program: starts the processes, or runs as one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pod", action="store_true", help="run as one process of a pod")
    parser.add_argument("--address", help="address of process 0 (internal)")
    parser.add_argument("--process", type=int, help="index of this process (internal)")
    args = parser.parse_args(argv)
    if args.pod:
        jax.distributed.initialize()
    elif args.address:
        jax.config.update("jax_num_cpu_devices", DEVICES)
        jax.distributed.initialize(args.address, PROCESSES, args.process)
    else:
        return start_processes()
    with_global_arrays()
    with_local_batches()
    jax.distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
