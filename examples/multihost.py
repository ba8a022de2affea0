"""A multi-host statistics pass: each process reads its part of the data, and all processes get identical statistics.

    python examples/multihost.py

This starts two processes on this machine, with two CPU devices each, and runs the statistics pass on both kinds of
batches:

- Global arrays over the devices of all processes, as in training: all processes run one program, and each batch counts
  once.
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
from jax.sharding import AxisType, NamedSharding, PartitionSpec

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


def global_batches(data: Sequence[np.ndarray]) -> list[jax.Array]:
    """Makes global batches that are sharded over the devices of all processes, from the shares of this process."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return [jax.make_array_from_process_local_data(rows, part) for part in data]


def report_error(title: str, variables: dict, everything: np.ndarray) -> None:
    """Prints the largest difference between the statistics and those of all data."""
    off = max(
        np.abs(np.asarray(variables["batch_stats"][path]["mean"]) - mean).max() / np.sqrt(var.min())
        for path, (mean, var) in in_float64(variables, everything.astype(np.float64)).items()
    )
    print(f"{title}: all processes agree bit for bit, and with float64 to {off:.0e} standard deviations.")


def work() -> None:
    """Runs both statistics passes in one process."""
    processes, process = range(jax.process_count()), jax.process_index()
    variables = Net().init(jax.random.key(0), data_of(0), train=False)  # the same key, the same parameters

    # As on a pod: batches are global arrays, and each process reads an equal share of each.
    share, fewest = BATCH // len(processes), min(len(data_of(i)) for i in processes)
    shares = [slice(start, start + share) for start in range(0, fewest, share)]
    batches = global_batches([data_of(process)[rows] for rows in shares])
    # All processes run this program on the same global batches; no merge is needed afterwards.
    found, report = jaxbn.linen.postproc(predict, variables, batches, consistent=True)
    jaxbn.check_replicas(found)
    if process == 0:
        print(report)
        report_error("Global batches", found, np.concatenate([data_of(i)[:fewest] for i in processes]))

    # Each process runs its own batches on its own devices; the pass merges the accumulators once per sweep.
    mine = data_of(process)
    own = [mine[start : start + BATCH] for start in range(0, len(mine), BATCH)]
    mesh = jax.make_mesh((jax.local_device_count(),), ("data",), (AxisType.Auto,), devices=jax.local_devices())
    found, report = jaxbn.linen.postproc(predict, variables, own, consistent=True, mesh=mesh)
    jaxbn.check_replicas(found)
    if process == 0:
        print(report)
        report_error("Local batches", found, np.concatenate([data_of(i) for i in processes]))


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
    work()
    jax.distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
