"""Handwritten digits: train with batch normalization, estimate the population statistics, evaluate and serve.

    python examples/digits.py

This trains a small convolutional network with ten BatchNorm layers for three epochs on the 8x8 digits of scikit-learn.
After each epoch the same parameters classify held-out digits with five choices of statistics:

    Batch statistics    each held-out batch is normalized with its own mean and variance, as in training
    Method ONE          the running averages of training (momentum 0.99, Flax's default)
    Method TWO          a statistics pass over the training digits with fixed parameters, which combines the moments of
                        the batches: pooled, as a mean of batches, or as a moving average

The program prints a table with a row per epoch and method, explains the gap in one line, diagnoses the network on
training batches, and saves a picture. Then it saves the network with pooled statistics, loads it in a fresh process,
and compares the predictions.

`--api nnx` uses Flax NNX instead of linen. With `--order class` each training batch holds a single digit; the
statistics passes of Method TWO still use mixed digits.
"""

import argparse
import dataclasses
import functools
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving

BATCH = 64
TRAIN, HELD_OUT = 21 * BATCH, 7 * BATCH  # full batches only, so that every function compiles once
MOMENTUM = 0.99
ORDERS = {"shuffled": "shuffled digits", "class": "one digit each"}
OWN, ONE, POOLED = "Batch statistics", "Method ONE: running averages", "Method TWO: pooled"
ESTIMATORS = {
    POOLED: jaxbn.pooled(),
    "Method TWO: mean of batches": jaxbn.mean_of_batches(),
    "Method TWO: moving average": jaxbn.moving_average(0.9),
}
LAYERS = [(16, 1)] * 5 + [(32, 2)] + [(32, 1)] * 4  # width and stride of each convolution

Batch = tuple[np.ndarray, np.ndarray]  # images [N, 8, 8, 1] and labels [N]
Scores = dict[str, float]  # held-out accuracy by method


class DigitNet(nn.Module):
    """Ten 3x3 convolutions with batch normalization, then global average pooling and a linear layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for width, stride in LAYERS:
            x = nn.Conv(width, (3, 3), strides=stride, use_bias=False)(x)
            x = jaxbn.linen.BatchNorm(use_running_average=not train, momentum=MOMENTUM, activation=nn.relu)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class NNXDigitNet(nnx.Module):
    """The same network in NNX; `train()` and `eval()` select the statistics."""

    def __init__(self, rngs: nnx.Rngs):
        self.convs, self.norms = nnx.List(), nnx.List()
        channels = 1
        for width, stride in LAYERS:
            self.convs.append(nnx.Conv(channels, width, (3, 3), strides=stride, use_bias=False, rngs=rngs))
            self.norms.append(jaxbn.nnx.BatchNorm(width, momentum=MOMENTUM, activation=jax.nn.relu, rngs=rngs))
            channels = width
        self.head = nnx.Linear(channels, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return self.head(x.mean((1, 2)))


OPTIMIZER = optax.adam(3e-3)


def loss_fn(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy; no metrics."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), {}


def make_steps(api: str, seed: int, estimator: jaxbn.Estimator) -> jaxbn.Steps:
    """Makes and compiles the functions of the training loop. All code that uses them is the same for linen and NNX."""
    if api == "linen":
        steps = jaxbn.linen.make_steps(DigitNet(), loss_fn, OPTIMIZER, inputs=images_of, estimator=estimator)
    else:
        net = NNXDigitNet(nnx.Rngs(seed))
        steps = jaxbn.nnx.make_steps(net, loss_fn, OPTIMIZER, inputs=images_of, estimator=estimator)
    return steps._replace(
        init=jax.jit(steps.init),
        train_step=jax.jit(steps.train_step, donate_argnums=0),
        postproc_step=jax.jit(steps.postproc_step),
        eval_step=jax.jit(steps.eval_step),
    )


def images_of(batch: Batch) -> np.ndarray:
    """The input of the network."""
    return batch[0]


def load(seed: int) -> tuple[Batch, Batch]:
    """Loads training and held-out digits: shuffled, stratified, with pixels scaled from 0..16 to 0..1."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    x, x_out, y, y_out = train_test_split(
        images, labels, train_size=TRAIN, test_size=HELD_OUT, stratify=labels, random_state=seed
    )
    return (x, y), (x_out, y_out)


def in_batches(images: np.ndarray, labels: np.ndarray) -> list[Batch]:
    """Cuts the data into full batches, in the given order."""
    starts = range(0, len(labels) - BATCH + 1, BATCH)
    return [(images[i : i + BATCH], labels[i : i + BATCH]) for i in starts]


def training_batches(data: Batch, order: str, rng: np.random.Generator) -> list[Batch]:
    """The batches of one epoch: shuffled digits, or a single digit per batch with the batches in random order."""
    images, labels = data
    groups = [np.arange(len(labels))] if order == "shuffled" else [np.flatnonzero(labels == d) for d in range(10)]
    # Batches are cut within each group, so with `--order class` no batch mixes digits.
    shuffled = [rng.permutation(rows) for rows in groups]
    batches = [batch for rows in shuffled for batch in in_batches(images[rows], labels[rows])]
    return [batches[i] for i in rng.permutation(len(batches))]


def train(steps: jaxbn.Steps, data: Batch, *, order: str, epochs: int, seed: int, progress: bool) -> Iterator[Any]:
    """Yields the state after each epoch."""
    rng, screen = np.random.default_rng(seed), Console(stderr=True)
    state = steps.init(jax.random.key(seed), in_batches(*data)[0])
    for epoch in range(1, epochs + 1):
        batches = training_batches(data, order, rng)
        for batch in track(batches, f"Training, epoch {epoch}", console=screen, transient=True, disable=not progress):
            state, _ = steps.train_step(state, batch)
        yield state


def postproc(steps: jaxbn.Steps, state: Any, batches: list[Batch]) -> tuple[jaxbn.Frozen, jaxbn.Report]:
    """Runs a statistics pass; returns the frozen network, and a report of the changes in each layer."""
    acc = steps.start(state, batches[0])
    for batch in batches:
        acc = steps.postproc_step(state, acc, batch)
    return steps.finalize(state, acc)


def predict(steps: jaxbn.Steps, frozen: jaxbn.Frozen, held_out: Batch) -> np.ndarray:
    """The predicted digits of the held-out images."""
    return np.concatenate([steps.eval_step(frozen, batch).argmax(-1) for batch in in_batches(*held_out)])


def evaluate(
    by_name: dict[str, jaxbn.Steps], state: Any, data: Batch, held_out: Batch
) -> tuple[Scores, jaxbn.Frozen, jaxbn.Report]:
    """Returns the held-out accuracy by method, the network with pooled statistics, and its report."""
    steps, labels = by_name[POOLED], held_out[1]
    batches = in_batches(*held_out)
    # A pass over one batch gives its batch statistics, in a form that `eval_step` accepts.
    own = [predict(steps, postproc(steps, state, [batch])[0], batch) for batch in batches]
    scores = {OWN: np.mean(np.concatenate(own) == labels)}
    scores[ONE] = np.mean(predict(steps, steps.finalize(state)[0], held_out) == labels)
    networks = {name: postproc(by_name[name], state, in_batches(*data)) for name in ESTIMATORS}
    scores |= {name: np.mean(predict(steps, frozen, held_out) == labels) for name, (frozen, _) in networks.items()}
    return {name: float(score) for name, score in scores.items()}, *networks[POOLED]


def without_start(frozen: jaxbn.Frozen, left: float) -> jaxbn.Frozen:
    """Removes the share `left` of the initial values; `momentum=jaxbn.constant(0.99, debias=True)` does it in training.

    The initial mean is 0 and the initial variance is 1.
    """

    def is_layer(node: Any) -> bool:
        return isinstance(node, dict) and "var" in node

    def fix(node: Any) -> Any:
        if not is_layer(node):
            return node
        return node | {"mean": node["mean"] / (1 - left), "var": (node["var"] - left) / (1 - left)}

    return dataclasses.replace(frozen, variables=jax.tree.map(fix, frozen.variables, is_leaf=is_layer))


def explain(steps: jaxbn.Steps, scores: list[Scores], state: Any, held_out: Batch, order: str) -> str:
    """Explains in one line where the gap comes from, or why there is no gap."""
    if order == "class":
        cause = "batches of one digit spoiled training; new statistics cannot help"
        return f"Why: {cause}: batch {scores[-1][OWN]:.2f}, pooled {scores[-1][POOLED]:.2f}."
    # After t steps the initial value has weight momentum^t in the running average.
    left = MOMENTUM ** int(state.step)
    share = f"{left:.0%} ({MOMENTUM}^{state.step}) of each running average is still its initial value"
    without = predict(steps, without_start(steps.finalize(state)[0], left), held_out)
    return f"Why: {share}; without it: {np.mean(without == held_out[1]):.2f}."


def diagnose(api: str, state: Any, batches: list[Batch]) -> jaxbn.Diagnosis:
    """Diagnoses the network with its running averages on these batches."""
    if api == "linen":
        # `diagnose` sets the statistics of each layer itself; the flag of the model does not matter.
        apply = functools.partial(DigitNet().apply, train=False)
        return jaxbn.linen.diagnose(lambda variables, batch: apply(variables, batch[0]), state.variables, batches)
    net = NNXDigitNet(nnx.Rngs(0))
    nnx.update(net, state.params, state.others)
    return jaxbn.nnx.diagnose(net, batches, call=lambda net, batch: net(batch[0]))


def serve(path: Path, api: str, seed: int) -> np.ndarray:
    """Runs `answer` in a fresh process, which gets only the file and the held-out digits."""
    command = [sys.executable, __file__, "--answer", str(path), "--api", api, "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return np.array(done.stdout.split(), np.int64)


def answer(path: Path, api: str, seed: int) -> np.ndarray:
    """Builds the model, loads the saved network, and classifies the held-out digits."""
    _, held_out = load(seed)
    images, _ = held_out
    if api == "linen":
        shapes = jax.eval_shape(lambda x: DigitNet().init(jax.random.key(0), x, train=False), images[:1])
        frozen = jaxbn.serving.load(path, like=shapes)
        logits = jax.jit(lambda variables, x: DigitNet().apply(variables, x, train=False))(frozen.variables, images)
    else:
        net = nnx.eval_shape(lambda: NNXDigitNet(nnx.Rngs(0)))
        logits = nnx.jit(lambda net, x: net(x))(jaxbn.nnx.install_frozen(net, jaxbn.serving.load(path)), images)
    return np.asarray(logits.argmax(-1))


def tabulate(scores: list[Scores], order: str) -> Table:
    """Makes a table with a row per epoch and method."""
    table = Table("Epoch", "Method", title=f"{HELD_OUT} held-out digits; training batches of {ORDERS[order]}")
    table.add_column("Held-out accuracy", justify="right")
    for epoch, row in enumerate(scores, 1):
        for name, score in row.items():
            table.add_row(str(epoch), name, f"{score:.3f}", style="bold" if name in (ONE, POOLED) else None)
        table.add_section()
    return table


def draw(scores: list[Scores], report: jaxbn.Report, order: str, path: Path) -> None:
    """Draws the accuracy per epoch (left), and the error of the running averages of each layer (right)."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(f"Handwritten digits, training batches of {ORDERS[order]}")
    left, right = figure.subplots(1, 2)
    draw_accuracy(left, scores)
    draw_distances(right, report)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.yaxis.grid(True, color="0.9")
        ax.set_axisbelow(True)
        ax.legend(framealpha=1, edgecolor="none")
    figure.savefig(path, dpi=150)


def draw_accuracy(ax: Axes, scores: list[Scores]) -> None:
    """Draws one line per method; the markers are shifted sideways, because several lines coincide."""
    epochs, colours = np.arange(1, len(scores) + 1), ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
    for i, (name, colour, marker) in enumerate(zip(scores[0], colours, "xos^D", strict=True)):
        x, y = epochs + 0.05 * (i - 2), [row[name] for row in scores]
        ax.plot(x, y, color=colour, marker=marker, markersize=7, linewidth=1.3, label=name)
    ax.axhline(0.1, color="0.4", linewidth=1, linestyle=":", label="guessing")
    ax.set(xticks=epochs[:: len(epochs) // 12 + 1], xlim=(0.7, len(epochs) + 0.3), ylim=(0, 1.03))
    ax.set(xlabel="epoch", ylabel="held-out accuracy", title="The same parameters under five statistics")


def draw_distances(ax: Axes, report: jaxbn.Report) -> None:
    """Draws two bars per layer: the errors of the running mean and of the running standard deviation."""
    layers, position = report.layers.values(), np.arange(1, len(report.layers) + 1)
    mean = [layer.mean_shift.mean() for layer in layers]
    std = [layer.std_shift.mean() for layer in layers]
    ax.bar(position - 0.2, mean, 0.36, color="#56B4E9", label="running mean, channel average")
    ax.bar(position + 0.2, std, 0.36, color="#E69F00", label="running std, channel average")
    ax.set(xticks=position, xlabel="normalized layer", ylabel="distance (population standard deviations)")
    ax.set_title("Method ONE: distance from the population statistics")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--order", choices=ORDERS, default="shuffled", help="order of the training digits (shuffled)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training digits (3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, initialization and order (0)")
    parser.add_argument("--api", choices=("linen", "nnx"), default="linen", help="API of Flax (linen)")
    parser.add_argument("--picture", type=Path, default="digits.png", metavar="PATH", help="picture file (digits.png)")
    parser.add_argument("--network", type=Path, default="digits.jaxbn", metavar="PATH", help="file (digits.jaxbn)")
    parser.add_argument("--answer", type=Path, metavar="PATH", help="only load this network and print its predictions")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    args = parser.parse_args(argv)
    if args.epochs < 1 or not 0 <= args.seed < 2**32:
        parser.error("--epochs must be 1 or more, and --seed 0 or more and below 2^32")
    if args.picture.suffix not in (".png", ".pdf", ".svg") or not args.picture.parent.is_dir():
        parser.error("--picture must end in .png, .pdf or .svg, and its folder must exist")
    if not args.network.parent.is_dir():
        parser.error("the folder of --network must exist")
    return args


def main(argv: Sequence[str] | None = None) -> list[Scores]:
    """Runs the program; returns the held-out accuracy by method for each epoch."""
    args, console, start = parse(argv), Console(highlight=False, markup=False), time.perf_counter()
    if args.answer:
        print(*answer(args.answer, args.api, args.seed))
        return []
    progress = not args.no_progress and Console(stderr=True).is_terminal
    data, held_out = load(args.seed)
    by_name = {name: make_steps(args.api, args.seed, estimator) for name, estimator in ESTIMATORS.items()}
    steps, scores = by_name[POOLED], []
    for state in train(steps, data, order=args.order, epochs=args.epochs, seed=args.seed, progress=progress):
        row, frozen, report = evaluate(by_name, state, data, held_out)
        scores.append(row)
    console.print(tabulate(scores, args.order))
    console.print(explain(steps, scores, state, held_out, args.order), soft_wrap=True)
    batches = training_batches(data, args.order, np.random.default_rng(args.seed))
    console.print(f"\n{diagnose(args.api, state, batches)}\n", soft_wrap=True)
    draw(scores, report, args.order, args.picture)
    jaxbn.serving.save(args.network, frozen)
    # The file must be enough: the fresh process sees neither the parameters nor the training data.
    same = predict(steps, frozen, held_out) == serve(args.network, args.api, args.seed)
    console.print(f"Saved {args.network}; in a fresh process {same.sum()} of {same.size} predictions are the same.")
    console.print(f"Saved {args.picture}; {time.perf_counter() - start:.0f} s, compilation included.", soft_wrap=True)
    return scores


if __name__ == "__main__":
    main()
