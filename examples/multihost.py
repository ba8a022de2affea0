"""Population statistics on several processes: each reads its own part of the data, and all end with the same bits.

    python examples/multihost.py

starts two processes on this machine, with two CPU devices each. They give the pass batches of both kinds:

- global arrays over the devices of all processes, as training has them: all run one program, and a batch counts once.
- batches of their own, each with its replica of the parameters, and not equally many: the pass needs no padding and no
  agreement on the number of batches.

Process 0 then compares the statistics with those of all the data in float64.

On a pod start the same file once on every host, with `--pod`: JAX finds the others by itself there.
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
    """Two normalized layers, of Flax's own kind."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for _ in range(2):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x)))
        return nn.Dense(4)(x)


def predict(variables: dict, batch: np.ndarray) -> jax.Array:
    """The network in use."""
    return Net().apply(variables, batch, train=False)


def data_of(process: int) -> np.ndarray:
    """What a process reads: process 0 five batches of its own, process 1 two and a half, with another mean."""
    rows = BATCH * 5 // (process + 1)
    return np.random.default_rng(process).normal(loc=3 * process, size=(rows, FEATURES)).astype(np.float32)


def in_float64(variables: dict, x: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and variance of each layer's input over all data, under the statistics of all data; from the formulas."""
    found, params = {}, jax.tree.map(np.float64, jax.device_get(variables["params"]))
    for i in range(2):
        dense, norm = params[f"Dense_{i}"], params[f"BatchNorm_{i}"]
        x = x @ dense["kernel"] + dense["bias"]
        found[f"BatchNorm_{i}"] = mean, var = x.mean(0), x.var(0)
        x = np.maximum((x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"], 0)
    return found


def global_batches(data: Sequence[np.ndarray]) -> list[jax.Array]:
    """Batches that lie over the devices of all processes, of each of which this one gives its share."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return [jax.make_array_from_process_local_data(rows, part) for part in data]


def report_error(title: str, variables: dict, everything: np.ndarray) -> None:
    """Prints how far statistics are from those of all data."""
    off = max(
        np.abs(np.asarray(variables["batch_stats"][path]["mean"]) - mean).max() / np.sqrt(var.min())
        for path, (mean, var) in in_float64(variables, everything.astype(np.float64)).items()
    )
    print(f"{title}: all agree to the last bit, and with float64 to {off:.0e} standard deviations.")


def work() -> None:
    """What every process does."""
    processes, process = range(jax.process_count()), jax.process_index()
    variables = Net().init(jax.random.key(0), data_of(0), train=False)  # the same key, the same parameters

    # As on a pod: batches are global arrays, and each process reads an equal share of every one.
    share, fewest = BATCH // len(processes), min(len(data_of(i)) for i in processes)
    shares = [slice(start, start + share) for start in range(0, fewest, share)]
    batches = global_batches([data_of(process)[rows] for rows in shares])
    found, report = jaxbn.linen.postproc(predict, variables, batches, consistent=True)
    jaxbn.check_replicas(found)
    if process == 0:
        print(report)
        report_error("Global batches", found, np.concatenate([data_of(i)[:fewest] for i in processes]))

    # Each process by itself, with as many batches as it has; over the devices of this process.
    mine = data_of(process)
    own = [mine[start : start + BATCH] for start in range(0, len(mine), BATCH)]
    mesh = jax.make_mesh((jax.local_device_count(),), ("data",), (AxisType.Auto,), devices=jax.local_devices())
    found, report = jaxbn.linen.postproc(predict, variables, own, consistent=True, mesh=mesh)
    jaxbn.check_replicas(found)
    if process == 0:
        print(report)
        report_error("Batches of their own", found, np.concatenate([data_of(i) for i in processes]))


def start_processes() -> int:
    """Starts the processes on this machine and waits; the first exit code that is not 0."""
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
    """Runs the program, as the one that starts the others or as one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pod", action="store_true", help="this is one process of a pod")
    parser.add_argument("--address", help="of process 0; used by the program itself")
    parser.add_argument("--process", type=int, help="index of this process; used by the program itself")
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
