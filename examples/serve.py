"""Serving: fold BatchNorm layers into convolutions, export the network as a program, and compare speed and outputs.

    python examples/digits.py
    python examples/serve.py

This loads the network that `digits.py` saved, folds its ten BatchNorm layers into the convolutions, and reports where
each layer was folded. It exports the folded network as a program: a file that any process with jaxbn can run on CPU,
CUDA or TPU, for any number of images, without the code of the model. A fresh process, which gets only that file and the
held-out digits, predicts. Then the program prints how folding changed the number of variables, the memory traffic of
the compiled networks, and the run time. The two networks are timed in alternation, so that background load affects both
alike; the intervals are 95 % confidence intervals of the median.

`--api nnx` uses a network that `digits.py --api nnx` saved.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from digits import DigitNet, NNXDigitNet
from digits import load as load_digits
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving

SIZES = (1, 64)  # images at a time
WARM_UP = 5  # runs that are not counted

# The complete code of a server.
SERVER = """
import sys
import jaxbn.serving
import numpy as np

program, images, answers = sys.argv[1:]
np.save(answers, jaxbn.serving.load_program(program)(np.load(images)))
assert "digits" not in sys.modules  # the code of the model is not needed
"""


class Network(NamedTuple):
    """A network in evaluation mode: `call` is exported, and the pure function `predict` is compiled and timed."""

    call: Callable[[Any, Any], jax.Array]
    variables: Any  # the first argument of `call`: a Frozen of linen, or an NNX model
    predict: Callable[[Any, Any], jax.Array]
    arrays: Any  # the first argument of `predict`


class Cost(NamedTuple):
    """The cost of a network for one batch size."""

    bytes: float  # read and written by the compiled program, as counted by XLA
    seconds: np.ndarray  # of each run


def load_linen(path: Path, example: np.ndarray) -> tuple[Network, Network, Any]:
    """Loads a linen network; returns it, the folded network, and the report of `fold`."""
    like = jax.eval_shape(lambda: DigitNet().init(jax.random.key(0), example, train=False))
    frozen = jaxbn.serving.load(path, like=like)

    def call(variables: Any, images: Any) -> jax.Array:
        return DigitNet().apply(variables, images, train=False)

    folded_call, folded, report = jaxbn.linen.fold(call, frozen, example)
    before = Network(call, frozen, call, frozen.variables)
    return before, Network(folded_call, folded, folded_call, folded.variables), report


def load_nnx(path: Path, example: np.ndarray) -> tuple[Network, Network, Any]:
    """Loads an NNX network; returns it, the folded network, and the report of `fold`."""
    model = jaxbn.nnx.install_frozen(nnx.eval_shape(lambda: NNXDigitNet(nnx.Rngs(0))), jaxbn.serving.load(path))
    folded, report = jaxbn.nnx.fold(model, example)

    def network(model: nnx.Module) -> Network:
        graph, state = nnx.split(model)
        return Network(
            lambda model, images: model(images),
            model,
            lambda state, images: nnx.merge(graph, state)(images),
            state,
        )

    return network(model), network(folded), report


def answer(program: Path, images: np.ndarray) -> np.ndarray:
    """The outputs of a fresh process, which gets only the program and the images."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "images.npy"), Path(folder, "answers.npy")
        np.save(asked, images)
        subprocess.run([sys.executable, "-c", SERVER, program, asked, answered], check=True)
        return np.load(answered)


def measure(networks: Sequence[Network], inputs: np.ndarray, *, rounds: int, progress: bool) -> list[Cost]:
    """Compiles the networks for these images and times them in alternation."""
    inputs = jax.device_put(inputs)
    compiled = [jax.jit(network.predict).lower(network.arrays, inputs).compile() for network in networks]
    seconds = np.empty((WARM_UP + rounds, len(networks)))
    screen, title = Console(stderr=True), f"Timing, {len(inputs)} at a time"
    for i in track(range(len(seconds)), title, console=screen, transient=True, disable=not progress):
        # Alternate the order, so that neither network always runs first.
        for j in np.roll(range(len(networks)), i):
            start = time.perf_counter()
            jax.block_until_ready(compiled[j](networks[j].arrays, inputs))
            seconds[i, j] = time.perf_counter() - start
    costs = zip(compiled, seconds[WARM_UP:].T, strict=True)
    return [Cost(one.cost_analysis()["bytes accessed"], times) for one, times in costs]


def tabulate(networks: Sequence[Network], costs: dict[int, list[Cost]]) -> Table:
    """Makes a table with a row per quantity: the trained network, the folded network, and their ratio."""
    table = Table("", title="The trained and the folded network in evaluation")
    for name in ("Trained", "Folded", "Ratio"):
        table.add_column(name, justify="right")
    count = [sum(leaf.size for leaf in jax.tree.leaves(network.arrays)) for network in networks]
    table.add_row("Variables", *(f"{n:,}" for n in count), f"{count[1] / count[0]:.3f}")
    for size, (before, after) in costs.items():
        cells = [f"{one.bytes:,.0f}" for one in (before, after)]
        table.add_row(f"Bytes, {images(size)}", *cells, f"{after.bytes / before.bytes:.3f}")
    for size, (before, after) in costs.items():
        cells = [median(1e6 * one.seconds, 0) for one in (before, after)]
        table.add_row(f"µs, {images(size)}", *cells, median(after.seconds / before.seconds, 2))
    return table


def images(count: int) -> str:
    """The number of images as text."""
    return "1 image" if count == 1 else f"{count} images"


def median(values: np.ndarray, digits: int) -> str:
    """The median and its 95 % confidence interval, as text.

    The number of values below the true median is binomial, with standard deviation sqrt(n) / 2, so the interval ends
    at two of the sorted values.
    """
    ordered, middle, reach = np.sort(values), len(values) / 2, 0.98 * math.sqrt(len(values))
    low, high = ordered[max(0, math.floor(middle - reach))], ordered[min(len(values) - 1, math.ceil(middle + reach))]
    return f"{np.median(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--api", choices=("linen", "nnx"), default="linen", help="API of the saved network (linen)")
    parser.add_argument("--network", type=Path, default="digits.jaxbn", metavar="PATH", help="file (digits.jaxbn)")
    parser.add_argument("--program", type=Path, default="digits.program", metavar="PATH", help="file to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of training, which selects the held-out digits (0)")
    parser.add_argument("--rounds", type=int, default=300, help="runs of each network to time (300)")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    args = parser.parse_args(argv)
    if not args.network.is_file():
        parser.error(f"{args.network} does not exist; create it with: python examples/digits.py --api {args.api}")
    if not args.program.parent.is_dir() or args.rounds < 1:
        parser.error("the folder of --program must exist, and --rounds must be 1 or more")
    return args


def main(argv: Sequence[str] | None = None) -> dict[int, list[Cost]]:
    """Runs the program; returns the costs of both networks by batch size."""
    args, console = parse(argv), Console(highlight=False, markup=False)
    progress = not args.no_progress and Console(stderr=True).is_terminal
    _, (digits, labels) = load_digits(args.seed)
    load = load_linen if args.api == "linen" else load_nnx
    before, after, report = load(args.network, digits[: max(SIZES)])
    console.print(f"{report}\n", soft_wrap=True)
    jaxbn.serving.export(args.program, after.call, after.variables, digits)

    # The unfolded network in this process is the reference for the exported program.
    trained = np.asarray(jax.jit(before.predict)(before.arrays, digits))
    served = answer(args.program, digits)
    same, off = trained.argmax(-1) == served.argmax(-1), np.abs(served - trained).max()
    costs = {size: measure([before, after], digits[:size], rounds=args.rounds, progress=progress) for size in SIZES}
    console.print(tabulate([before, after], costs))
    kilobytes, right = args.program.stat().st_size / 1e3, np.mean(served.argmax(-1) == labels)
    console.print(f"Saved {args.program}, {kilobytes:.0f} kB. A fresh process with only this file:", soft_wrap=True)
    console.print(f"{same.sum()} of {same.size} predictions equal those of the trained network; accuracy {right:.3f}.")
    console.print(f"Outputs are up to {np.abs(trained).max():.1f} and differ by at most {off:.1e}.")
    return costs


if __name__ == "__main__":
    main()
