"""Time and memory of a ResNet training step with each normalization, on the local device.

    python examples/benchmarks/train_step.py

This trains ResNet-18 and ResNet-50 by gradient descent on generated images, without a norm, with Flax's layers and with
jaxbn's. Networks and norms are those of `compiled_cost.py`; "fused" has the ReLU and the sum of a block inside the
layer. The norms are timed in alternation for `--rounds` rounds; `timing.py` documents the ratios and their 95 %
intervals. The columns are

    ms            time of a step
    / flax        ratio to Flax's default layer; below 1 is faster
    norm's share  the share of the step that the norm takes: the saving if it is left out
    GB            peak device memory during steps in a fresh process, if the device reports it; otherwise the sum of
                  arguments, results and temporaries of the compiled step

`--largest` also searches for the largest batch that fits into memory, if the device reports its memory. Images and
networks are small on a CPU.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory for the processes of --largest

import jax  # noqa: E402  # JAX reads the setting on import, here and in the modules below
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from compiled_cost import CLASSES, FLAX, FORMS, NO_NORM, BasicBlock, Block, train_program  # noqa: E402
from rich.console import Console  # noqa: E402
from timing import (  # noqa: E402
    Interval,
    add_progress_option,
    bars,
    interleave,
    machine_line,
    ratio,
    repeats_for,
    table,
    write_json,
)

NETWORKS: dict[str, dict[str, Any]] = {
    "ResNet-18": {"block": BasicBlock, "stages": (2, 2, 2, 2)},
    "ResNet-50": {"block": Block, "stages": (3, 4, 6, 3)},
}
NORMS = [NO_NORM, FLAX, "flax-safe", "flax-nnx", "jaxbn", "fused"]


class Setting(NamedTuple):
    """The network and data of a table, which all its norms share."""

    network: str
    dtype: str
    size: int  # height and width of an image
    width: int  # features of the first convolution
    batch: int


SMALL, LARGE = {"size": 64, "width": 16, "batch": 32}, {"size": 224, "width": 64, "batch": 256}


class Cost(NamedTuple):
    """The cost of a step with one norm."""

    seconds: np.ndarray  # [rounds]
    memory: int  # bytes
    largest: int | None  # largest batch


def values_like(shapes: Any) -> Any:
    """Initial values: He initialization for kernels, 1 for scales and variances, 0 for all others."""
    rng = np.random.default_rng(0)

    def start(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if len(shape.shape) > 1:
            return jnp.asarray(rng.normal(0, np.sqrt(2 / np.prod(shape.shape[:-1])), shape.shape), shape.dtype)
        return jnp.full(shape.shape, path[-1].key in ("scale", "var"), shape.dtype)

    return jax.tree_util.tree_map_with_path(start, shapes)


class Step:
    """A compiled training step with its variables."""

    def __init__(self, norm: str, setting: Setting):
        network = {"size": setting.size, "width": setting.width} | NETWORKS[setting.network]
        program = train_program(FORMS[norm], jnp.dtype(setting.dtype), setting.batch, **network)
        self.variables = values_like(program.variables)
        images, labels = program.data
        rng = np.random.default_rng(0)
        self.data = (
            jnp.asarray(rng.standard_normal(images.shape, np.float32), images.dtype),
            jnp.asarray(rng.integers(CLASSES, size=labels.shape), labels.dtype),
        )
        self.compiled = jax.jit(program.run, donate_argnums=0).lower(self.variables, *self.data).compile()

    def run(self, count: int) -> jax.Array | None:
        """Takes `count` steps; returns the loss of the last one, without waiting for it."""
        loss = None
        for _ in range(count):
            self.variables, loss = self.compiled(self.variables, *self.data)
        return loss

    @property
    def memory(self) -> int:
        """Bytes according to the compiler."""
        found = self.compiled.memory_analysis()
        # Donated arguments share memory with outputs (alias), so count them once.
        held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return held + found.temp_size_in_bytes


def memory_stats() -> dict[str, int]:
    """The memory statistics of the device; empty on a CPU."""
    return jax.local_devices()[0].memory_stats() or {}


def peak_memory(norm: str, setting: Setting) -> int:
    """The peak memory of this process after three steps, in bytes."""
    jax.block_until_ready(Step(norm, setting).run(3))
    return memory_stats()["peak_bytes_in_use"]


def fits(norm: str, setting: Setting, batch: int) -> bool:
    """Whether steps with this batch fit into memory."""
    try:
        jax.block_until_ready(Step(norm, setting._replace(batch=batch)).run(2))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return False
    return True


def search_largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest batch that fits, to a precision of 1/16: doubles until it does not fit, then bisects."""
    if not fits(start):
        return 0
    low = start
    # Doubling first keeps the number of compilations logarithmic.
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batch(norm: str, setting: Setting) -> int:
    """The largest batch that fits into memory."""
    return search_largest(functools.partial(fits, norm, setting), setting.batch)


def apart(function: Callable[[str, Setting], int], norm: str, setting: Setting) -> int:
    """Calls a function in a fresh process, so that only its own memory counts."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, norm, setting).result()


def measure(setting: Setting, args: argparse.Namespace) -> dict[str, Cost]:
    """Measures memory first, while this process holds none; then times all norms in alternation."""
    stats, largest, memory = memory_stats(), {}, {}
    for norm in args.bar(args.norms if stats else [], f"Memory of {setting.network}"):
        # The peak counter of a process never decreases, so each norm needs its own process.
        memory[norm] = apart(peak_memory, norm, setting)
        if args.largest and "bytes_limit" in stats:
            largest[norm] = apart(largest_batch, norm, setting)
    steps = {norm: Step(norm, setting) for norm in args.bar(args.norms, f"Compiling {setting.network}")}
    counts = {norm: repeats_for(step.run, args.seconds) for norm, step in steps.items()}
    runs = {norm: functools.partial(step.run, counts[norm]) for norm, step in steps.items()}
    times = interleave(runs, args.bar(range(args.rounds), f"Training {setting.network}"))
    return {
        norm: Cost(times[norm].wall / counts[norm], memory.get(norm, step.memory), largest.get(norm))
        for norm, step in steps.items()
    }


def share_of_norm(bare: np.ndarray, seconds: np.ndarray) -> str:
    """The percentage of the step that is saved without a norm."""
    value, low, high = ratio(bare, seconds)
    return "{:.0f} % ({:.0f}-{:.0f})".format(*(100 * (1 - part) for part in Interval(value, high, low)))


def rows(costs: dict[str, Cost], args: argparse.Namespace) -> Iterator[Sequence[str]]:
    """Table rows: one per norm."""
    bare, flax = costs.get(NO_NORM), costs.get(FLAX)
    for norm, (seconds, memory, largest) in costs.items():
        yield (
            norm,
            f"{1000 * np.median(seconds):.1f}",
            str(ratio(seconds, flax.seconds)) if flax else "-",
            share_of_norm(bare.seconds, seconds) if bare and norm != NO_NORM else "-",
            f"{memory / 1e9:.2f}" if memory >= 1e9 else f"{memory / 1e9:.3f}",
            f"{memory / flax.memory:.2f}" if flax else "-",
            *([str(largest or "-")] if args.largest else []),
        )


def records(found: dict[Setting, dict[str, Cost]]) -> list[dict[str, Any]]:
    """The costs in JSON format."""
    return [
        setting._asdict() | {"norm": norm} | cost._asdict() | {"seconds": cost.seconds.tolist()}
        for setting, costs in found.items()
        for norm, cost in costs.items()
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    default = SMALL if jax.default_backend() == "cpu" else LARGE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    dtypes = ["float32", "bfloat16"]
    dtype = "float32" if default is SMALL else "bfloat16"
    names = ", ".join(NETWORKS)
    parser.add_argument("--networks", choices=NETWORKS, default=list(NETWORKS), **several, help=names)
    parser.add_argument("--norms", choices=FORMS, default=NORMS, **several, help=", ".join(FORMS))
    parser.add_argument("--dtype", choices=dtypes, default=[dtype], **several, help=f"dtype of activations ({dtype})")
    parser.add_argument("--size", type=int, default=default["size"], help=f"height and width ({default['size']})")
    parser.add_argument("--width", type=int, default=default["width"], help=f"first features ({default['width']})")
    parser.add_argument("--batch", type=int, default=default["batch"], help=f"images per batch ({default['batch']})")
    parser.add_argument("--rounds", type=int, default=10, help="number of rounds (10)")
    parser.add_argument("--seconds", type=float, default=0.1, help="minimal time of a norm per round (0.1)")
    parser.add_argument("--largest", action="store_true", help="search for the largest batch; slow")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    add_progress_option(parser)
    args = parser.parse_args(argv)
    if min(args.size, args.width, args.batch, args.rounds) < 1:
        parser.error("--size, --width, --batch and --rounds must be 1 or more")
    args.bar = bars(args)
    return args


def share_compiled(folder: str) -> None:
    """Lets all processes share one compilation cache, unless the user has configured one."""
    if not jax.config.jax_compilation_cache_dir:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        jax.config.update("jax_compilation_cache_dir", folder)


def main(argv: Sequence[str] | None = None) -> dict[Setting, dict[str, Cost]]:
    """Runs the program; returns its measurements."""
    args, console = parse(argv), Console(highlight=False, markup=False)
    stats, found = memory_stats(), {}
    if args.largest and "bytes_limit" not in stats:
        console.print("--largest is skipped: this device does not report its memory.")
        args.largest = False
    with tempfile.TemporaryDirectory() as folder:
        if stats:
            share_compiled(folder)
        for network, dtype in itertools.product(args.networks, args.dtype):
            setting = Setting(network, dtype, args.size, args.width, args.batch)
            found[setting] = measure(setting, args)
            title = f"{network}, width {args.width}, {dtype}, {args.batch} images {args.size} x {args.size}"
            numbers = ["ms", "/ flax", "norm's share", "GB", "/ flax"] + ["largest batch"] * args.largest
            console.print(table(title, ["Norm"], numbers, rows(found[setting], args)))
    console.print("GB: " + ("peak memory of the device." if stats else "memory of the compiled step."))
    console.print(machine_line())
    write_json(args.json, records(found))
    return found


if __name__ == "__main__":
    main()
