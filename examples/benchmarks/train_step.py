"""What a training step of a ResNet takes with each normalization, on the device that is there: time and memory.

    python examples/benchmarks/train_step.py

trains ResNet-18 and ResNet-50 by gradient descent on images that it makes, without a norm, with Flax's layers and with
jaxbn's: the networks and the norms of `compiled_cost.py`, of which "fused" has the ReLU and the sum of a block inside
the layer. All take turns, for `--rounds` rounds; `timing.py` says what ratios and their 95 % intervals are. Printed are

    ms            of a step
    / flax        the same in multiples of Flax's layer as it comes; below 1 is faster
    norm's share  how much of the step is the norm: what is left out of it without one
    memory        the most that the device held during steps of a fresh process, where it counts that; else arguments,
                  results and temporaries of the compiled step

`--largest` also searches the largest batch that a step can be made with, where the device says how much memory it has.
Images and networks are small on a CPU.
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

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or nothing is left for the processes of --largest

import jax  # noqa: E402  it reads the setting when it starts, and so do the next that import it
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
    """What is trained, but for the norm."""

    network: str
    dtype: str
    size: int  # height and width of an image
    width: int  # features of the first convolution
    batch: int


SMALL, LARGE = {"size": 64, "width": 16, "batch": 32}, {"size": 224, "width": 64, "batch": 256}


class Cost(NamedTuple):
    """Of a step with one norm."""

    seconds: np.ndarray  # [rounds]
    memory: int  # bytes
    largest: int | None  # batch


def values_like(shapes: Any) -> Any:
    """Numbers to start from: kernels as He et al. would draw them, scales and variances 1, all else 0."""
    rng = np.random.default_rng(0)

    def start(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if len(shape.shape) > 1:
            return jnp.asarray(rng.normal(0, np.sqrt(2 / np.prod(shape.shape[:-1])), shape.shape), shape.dtype)
        return jnp.full(shape.shape, path[-1].key in ("scale", "var"), shape.dtype)

    return jax.tree_util.tree_map_with_path(start, shapes)


class Step:
    """A training step that goes on from where it was."""

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
        """So many steps; gives the loss of the last, which may be under way."""
        loss = None
        for _ in range(count):
            self.variables, loss = self.compiled(self.variables, *self.data)
        return loss

    @property
    def memory(self) -> int:
        """Bytes by the compiler's account."""
        found = self.compiled.memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return held + found.temp_size_in_bytes


def memory_stats() -> dict[str, int]:
    """What the device counts of its memory; nothing on a CPU."""
    return jax.local_devices()[0].memory_stats() or {}


def peak_memory(norm: str, setting: Setting) -> int:
    """The most bytes that this process has held after three steps."""
    jax.block_until_ready(Step(norm, setting).run(3))
    return memory_stats()["peak_bytes_in_use"]


def fits(norm: str, setting: Setting, batch: int) -> bool:
    """Whether there is memory for steps with this batch."""
    try:
        jax.block_until_ready(Step(norm, setting._replace(batch=batch)).run(2))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return False
    return True


def search_largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest batch that fits, to one in sixteen: doubled until one does not, then halving what is between."""
    if not fits(start):
        return 0
    low = start
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batch(norm: str, setting: Setting) -> int:
    """The largest batch with which a step can be made."""
    return search_largest(functools.partial(fits, norm, setting), setting.batch)


def apart(function: Callable[[str, Setting], int], norm: str, setting: Setting) -> int:
    """Calls a function in a process of its own, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, norm, setting).result()


def measure(setting: Setting, args: argparse.Namespace) -> dict[str, Cost]:
    """Memory first, while this process holds none of it; then times, with all norms in turn."""
    stats, largest, memory = memory_stats(), {}, {}
    for norm in args.bar(args.norms if stats else [], f"Memory of {setting.network}"):
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
    """What of the time is not there without a norm, in percent."""
    value, low, high = ratio(bare, seconds)
    return "{:.0f} % ({:.0f}-{:.0f})".format(*(100 * (1 - part) for part in Interval(value, high, low)))


def rows(costs: dict[str, Cost], args: argparse.Namespace) -> Iterator[Sequence[str]]:
    """One for each norm."""
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
    """The same as JSON has it."""
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
    parser.add_argument("--dtype", choices=dtypes, default=[dtype], **several, help=f"of the activations ({dtype})")
    parser.add_argument("--size", type=int, default=default["size"], help=f"of an image ({default['size']})")
    parser.add_argument("--width", type=int, default=default["width"], help=f"first features ({default['width']})")
    parser.add_argument("--batch", type=int, default=default["batch"], help=f"images in a batch ({default['batch']})")
    parser.add_argument("--rounds", type=int, default=10, help="in which every norm runs once (10)")
    parser.add_argument("--seconds", type=float, default=0.1, help="that a norm runs for in a round, at least (0.1)")
    parser.add_argument("--largest", action="store_true", help="search the largest batch; takes long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    add_progress_option(parser)
    args = parser.parse_args(argv)
    if min(args.size, args.width, args.batch, args.rounds) < 1:
        parser.error("all numbers must be 1 or more")
    args.bar = bars(args)
    return args


def share_compiled(folder: str) -> None:
    """What one process has compiled the others read, unless they do already."""
    if not jax.config.jax_compilation_cache_dir:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        jax.config.update("jax_compilation_cache_dir", folder)


def main(argv: Sequence[str] | None = None) -> dict[Setting, dict[str, Cost]]:
    """Runs the program; returns what it measured."""
    args, console = parse(argv), Console(highlight=False, markup=False)
    stats, found = memory_stats(), {}
    if args.largest and "bytes_limit" not in stats:
        console.print("The largest batch is skipped: this device does not say how much memory it has.")
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
    console.print("Memory is " + ("what the device counted." if stats else "that of the compiled step."))
    console.print(machine_line())
    write_json(args.json, records(found))
    return found


if __name__ == "__main__":
    main()
