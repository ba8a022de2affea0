"""Run time of one batch normalization layer of jaxbn, Flax and other libraries on the local device.

    pip install ".[bench]" && python examples/benchmarks/layers.py

This times the layers of Flax (linen with fast and with safe variance, and NNX), of jaxbn, and of Haiku, Equinox, Keras
on JAX and PyTorch as far as they are installed. The inputs are those of layers of ResNet-50 and of a perceptron:

    train        forward and backward with batch statistics
    train-relu   the same, followed by a ReLU; "fused" is jaxbn's layer with `activation=jax.nn.relu`
    eval-relu    evaluation with the running averages, followed by a ReLU

For each input the layers are timed in alternation for `--rounds` rounds, each for at least `--seconds` per round.
`timing.py` documents the ratios and their 95 % intervals, `peers.py` how each library is called. A ratio below 1 is
faster than Flax. The last rows of a table are geometric means over the inputs.

On a GPU, "of copy" shows the minimal memory traffic (eight times the input in training, twice the input in evaluation)
as a share of the bytes that the device copies in the same time. It can exceed 1 if the input fits into a cache. Times
below about 50 microseconds measure the launch overhead; use a larger `--batch` there.
"""

import argparse
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from peers import FLAX_FAST, FLAX_SAFE, NAMES, Case, program_of
from rich.console import Console
from timing import (
    Times,
    add_progress_option,
    bars,
    copy_bandwidth,
    geometric_mean,
    interleave,
    machine_line,
    ratio,
    repeats_for,
    table,
    write_json,
)

# Inputs: the shape of an example, and the number of rows of the perceptron per image of the batch.
INPUTS = {
    "112x112x64": (112, 112, 64),
    "56x56x256": (56, 56, 256),
    "28x28x128": (28, 28, 128),
    "14x14x1024": (14, 14, 1024),
    "7x7x512": (7, 7, 512),
    "mlp 1024": (1024,),
}
MLP_ROWS = 64
WHAT = {"train": (False, True), "train-relu": (True, True), "eval-relu": (True, False)}  # (ReLU, backward)
# Minimal memory traffic in sizes of the input, by whether the layer trains: 3 forward plus 5 backward, or evaluation.
MOVES = {True: 8, False: 2}
BATCH = {"cpu": 4}
ALL = "mean"


class Group(NamedTuple):
    """The program and dtype of a table."""

    what: str
    dtype: str


Seconds = dict[str, np.ndarray]  # of one call, [rounds], by the name of the layer
Found = dict[Group, dict[str, Seconds]]  # by the name of the input


def case_of(group: Group, name: str, batch: int) -> Case:
    """The task of the layers for one input."""
    shape, (relu, train) = INPUTS[name], WHAT[group.what]
    rows = batch if len(shape) > 1 else MLP_ROWS * batch
    return Case((rows, *shape), group.dtype, relu, train)


def measure(case: Case, args: argparse.Namespace) -> Seconds:
    """Seconds per call of each layer, [rounds]."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *case.shape), np.float32)
    runs, counts = {}, {}
    for name in args.norms:
        program = program_of(name, case, x, dy)
        if program:
            # Short calls are repeated until a measurement is long compared with the resolution of the clock.
            counts[name] = repeats_for(program.run, args.seconds)
            runs[name] = functools.partial(program.run, counts[name])
    times: dict[str, Times] = interleave(runs, range(args.rounds))
    return {name: times[name].wall / counts[name] for name in runs}


def ratios_to(under: str, inputs: dict[str, Seconds], name: str) -> dict[str, np.ndarray]:
    """Ratios of the times of two layers on each input, [rounds]."""
    return {key: s[name] / s[under] for key, s in inputs.items() if name in s and under in s}


def rows(group: Group, inputs: dict[str, Seconds], args: argparse.Namespace) -> Iterator[Sequence[str]]:
    """Table rows: times and ratios for each input, and the means over the inputs."""
    unders = [under for under in (FLAX_FAST, FLAX_SAFE) if under in args.norms]
    for key, seconds in inputs.items():
        case = case_of(group, key, args.batch)
        size = math.prod(case.shape) * np.dtype(jax.numpy.dtype(case.dtype)).itemsize
        for name, taken in seconds.items():
            ratios = [str(ratio(taken, seconds[under])) for under in unders]
            # Bytes that any layer must move, per second, relative to a plain copy.
            share = MOVES[case.train] * size / np.median(taken) / args.bandwidth if args.bandwidth else 0
            yield key, name, f"{1000 * np.median(taken):.3f}", *ratios, *([f"{share:.2f}"] if share else [])
    for name in args.norms:
        means = [ratios_to(under, inputs, name) for under in unders]
        # A layer that is missing on some program has no mean.
        if all(means):
            numbers = [str(geometric_mean(list(found.values()))) for found in means]
            yield ALL, name, "", *numbers, *([""] if args.bandwidth else [])


def records(found: Found) -> Iterator[dict[str, Any]]:
    """The times of all rounds in JSON format."""
    for group, inputs in found.items():
        for key, seconds in inputs.items():
            for name, taken in seconds.items():
                yield group._asdict() | {"input": key, "norm": name, "seconds": taken.tolist()}


def plot(found: Found, args: argparse.Namespace, file: Path) -> None:
    """Plots the time of each layer relative to Flax's with its interval, one panel per table."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 3.2 * len(found)), layout="constrained")
    for axes, (group, inputs) in zip(figure.subplots(len(found), squeeze=False)[:, 0], found.items(), strict=True):
        names = [name for name in args.norms if ratios_to(FLAX_FAST, inputs, name)]
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        for i, name in enumerate(names):
            ratios = ratios_to(FLAX_FAST, inputs, name)
            shown = [geometric_mean([r]) for r in ratios.values()] + [geometric_mean(list(ratios.values()))]
            value, low, high = np.array(shown).T
            places = np.arange(len(shown)) + 0.8 * (i / len(names) - 0.5)
            axes.errorbar(places, value, [value - low, high - value], fmt="o", markersize=4, label=name)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(yscale="log", title=f"{group.what}, {group.dtype}", ylabel=f"time / time of {FLAX_FAST}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xticks(range(len(inputs) + 1), [*inputs, ALL])
        axes.set_xlabel(f"input (height x width x features), batch {args.batch}")
        axes.legend(fontsize="small", ncols=2, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file)


def installed(args: argparse.Namespace, console: Console) -> list[str]:
    """The layers whose packages are installed; prints a line about each other layer."""
    found, probe = [], np.zeros((2, 2), np.float32)
    for name in args.norms:
        try:
            program_of(name, Case(probe.shape, "float32", relu=True, train=False), probe, probe)
        except ImportError as error:
            console.print(f"{name} is skipped: {error}")
        else:
            found.append(name)
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--what", choices=WHAT, default=list(WHAT), **several, help=", ".join(WHAT))
    parser.add_argument("--dtype", choices=dtypes, default=dtypes, **several, help=", ".join(dtypes))
    parser.add_argument("--inputs", choices=INPUTS, default=list(INPUTS), **several, help=", ".join(INPUTS))
    parser.add_argument("--norms", choices=NAMES, default=NAMES, **several, help=", ".join(NAMES))
    batch = BATCH.get(jax.default_backend(), 256)
    parser.add_argument("--batch", type=int, default=batch, help=f"images per batch ({batch})")
    parser.add_argument("--rounds", type=int, default=20, help="number of rounds (20)")
    parser.add_argument("--seconds", type=float, default=0.01, help="minimal time of a layer per round (0.01)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the ratios to this file")
    add_progress_option(parser)
    args = parser.parse_args(argv)
    if min(args.batch, args.rounds) < 1:
        parser.error("--batch and --rounds must be 1 or more")
    if args.plot and FLAX_FAST not in args.norms:
        parser.error(f"--plot shows ratios to {FLAX_FAST}; add it to --norms")
    args.bar = bars(args)
    return args


def main(argv: Sequence[str] | None = None) -> Found:
    """Runs the program; returns the times in seconds."""
    args, console = parse(argv), Console(highlight=False, markup=False)
    args.norms = installed(args, console)
    args.bandwidth = copy_bandwidth() if jax.default_backend() == "gpu" else 0.0
    found: Found = {Group(what, dtype): {} for what in args.what for dtype in args.dtype}
    for group, key in args.bar([(group, key) for group in found for key in args.inputs], "Measuring"):
        found[group][key] = measure(case_of(group, key, args.batch), args)
    for group, inputs in found.items():
        unders = [f"/ {under}" for under in (FLAX_FAST, FLAX_SAFE) if under in args.norms]
        numbers = ["ms", *unders, *(["of copy"] if args.bandwidth else [])]
        title = f"{group.what}, {group.dtype}, batch {args.batch}, {args.rounds} rounds"
        console.print(table(title, ["Input", "Layer"], numbers, rows(group, inputs, args)))
    console.print(machine_line())
    if args.bandwidth:
        console.print(f"Copy bandwidth: {args.bandwidth / 1e9:.0f} GB/s.")
    write_json(args.json, list(records(found)))
    if args.plot:
        plot(found, args, args.plot)
    return found


if __name__ == "__main__":
    main()
