"""Handwritten digits: train with batch normalization, fix the population statistics, evaluate with them.

    python examples/digits.py

trains a small convolutional network with ten normalized layers for three epochs on the 8x8 digits that scikit-learn
bundles. After each epoch the same parameters classify held-out digits, normalized with five choices of statistics:

    Batch statistics    each held-out batch is normalized by its own mean and variance, as in training
    Method ONE          the running averages that were kept while training (momentum 0.99, Flax's default)
    Method TWO          `jaxbn.linen.postproc` sends the training digits through the network once more, its parameters
                        fixed, and combines their moments: pooled, by a mean of batches, or by a moving average

It prints a table with a row per epoch and method, says in one line where the gap comes from, and saves a picture. With
`--order class` each training batch holds a single digit; the passes of Method TWO see mixed digits all the same.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxbn
from jaxbn.linen import BatchNorm, capture_moments, postproc

BATCH = 64
TRAIN, HELD_OUT = 21 * BATCH, 7 * BATCH  # whole batches, so that every function compiles once
MOMENTUM = 0.99
ORDERS = {"shuffled": "shuffled digits", "class": "one digit each"}
OWN, ONE, POOLED = "Batch statistics", "Method ONE: running averages", "Method TWO: pooled"
ESTIMATORS = {
    POOLED: jaxbn.pooled(),
    "Method TWO: mean of batches": jaxbn.mean_of_batches(),
    "Method TWO: moving average": jaxbn.moving_average(0.9),
}

Variables = dict[str, Any]  # of a Flax module: params and batch_stats
Batch = tuple[np.ndarray, np.ndarray]  # images [N, 8, 8, 1] and labels [N]
Scores = dict[str, float]  # held-out accuracy by method


class DigitNet(nn.Module):
    """Ten 3x3 convolutions, each normalized, then global average pooling and a linear layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for width, stride in [(16, 1)] * 5 + [(32, 2)] + [(32, 1)] * 4:
            x = nn.Conv(width, (3, 3), strides=stride, use_bias=False)(x)
            x = BatchNorm(use_running_average=not train, momentum=MOMENTUM, activation=nn.relu)(x)
        return nn.Dense(10)(x.mean((1, 2)))


NET = DigitNet()
OPTIMIZER = optax.adam(3e-3)


@jax.jit
def train_step(variables: Variables, opt_state: optax.OptState, batch: Batch) -> tuple[Variables, optax.OptState]:
    """One step of Adam, with batch statistics; the running averages move on the way."""
    images, labels = batch

    def loss_of(params: Any) -> tuple[jax.Array, Variables]:
        logits, updates = NET.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    params = variables["params"]
    grads, updates = jax.grad(loss_of, has_aux=True)(params)
    steps, opt_state = OPTIMIZER.update(grads, opt_state)
    return {"params": optax.apply_updates(params, steps), **updates}, opt_state


@jax.jit
def predict(variables: Variables, batch: Batch) -> jax.Array:
    """The network in use: layers normalize with the statistics that the variables hold."""
    return NET.apply(variables, batch[0], train=False)


@jax.jit
def predict_with_own(variables: Variables, batch: Batch) -> jax.Array:
    """The same network, but layers normalize with the statistics of this batch."""
    logits, _ = capture_moments(predict, mode="batch")(variables, batch)
    return logits


def accuracy(classify: Callable[..., jax.Array], variables: Variables, data: Batch) -> float:
    """Fraction of digits that are classified correctly."""
    return float(np.mean([classify(variables, batch).argmax(-1) == batch[1] for batch in in_batches(*data)]))


def load(seed: int) -> tuple[Batch, Batch]:
    """Digits to train on and digits held out: shuffled, stratified, pixels scaled from 0..16 to 0..1."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    x, x_out, y, y_out = train_test_split(
        images, labels, train_size=TRAIN, test_size=HELD_OUT, stratify=labels, random_state=seed
    )
    return (x, y), (x_out, y_out)


def in_batches(images: np.ndarray, labels: np.ndarray) -> list[Batch]:
    """Cuts the data into whole batches, in the order given."""
    starts = range(0, len(labels) - BATCH + 1, BATCH)
    return [(images[i : i + BATCH], labels[i : i + BATCH]) for i in starts]


def training_batches(data: Batch, order: str, rng: np.random.Generator) -> list[Batch]:
    """One epoch: batches of shuffled digits, or batches of one digit each in random order."""
    images, labels = data
    groups = [np.arange(len(labels))] if order == "shuffled" else [np.flatnonzero(labels == d) for d in range(10)]
    shuffled = [rng.permutation(rows) for rows in groups]
    batches = [batch for rows in shuffled for batch in in_batches(images[rows], labels[rows])]
    return [batches[i] for i in rng.permutation(len(batches))]


def train(data: Batch, *, order: str, epochs: int, seed: int, progress: bool) -> Iterator[Variables]:
    """Yields the variables after each epoch."""
    rng, screen = np.random.default_rng(seed), Console(stderr=True)
    variables = jax.jit(NET.init, static_argnames="train")(jax.random.key(seed), data[0][:1], train=False)
    opt_state = OPTIMIZER.init(variables["params"])
    for epoch in range(1, epochs + 1):
        batches = training_batches(data, order, rng)
        for batch in track(batches, f"Training, epoch {epoch}", console=screen, transient=True, disable=not progress):
            variables, opt_state = train_step(variables, opt_state, batch)
        yield variables


def evaluate(variables: Variables, data: Batch, held_out: Batch, progress: bool) -> tuple[Scores, jaxbn.Report]:
    """Held-out accuracy by method, and what the pooled statistics changed in each layer."""
    scores = {OWN: accuracy(predict_with_own, variables, held_out), ONE: accuracy(predict, variables, held_out)}
    reports, batches = {}, in_batches(*data)
    for name, estimator in ESTIMATORS.items():
        # `predict` is the same function object each time, so that the pass compiles once for each estimator.
        fixed, reports[name] = postproc(predict, variables, batches, estimator=estimator, progress=progress)
        scores[name] = accuracy(predict, fixed, held_out)
    return scores, reports[POOLED]


def without_start(variables: Variables, left: float) -> Variables:
    """Takes what is `left` of the initial values out; `momentum=jaxbn.constant(0.99, debias=True)` keeps them out."""
    old = variables["batch_stats"]
    new = {k: {"mean": s["mean"] / (1 - left), "var": (s["var"] - left) / (1 - left)} for k, s in old.items()}
    return variables | {"batch_stats": new}


def explain(scores: list[Scores], variables: Variables, held_out: Batch, order: str) -> str:
    """One line on where the gap comes from, or on why there is nothing to gain."""
    if order == "class":
        cause = "batches of one digit spoilt the training, which no statistics undo"
        return f"Why: {cause}: batch {scores[-1][OWN]:.2f}, pooled {scores[-1][POOLED]:.2f}."
    steps = len(scores) * (TRAIN // BATCH)
    left = MOMENTUM**steps
    share = f"{left:.0%} ({MOMENTUM}^{steps}) of each running average is still its initial value"
    return f"Why: {share}; without it: {accuracy(predict, without_start(variables, left), held_out):.2f}."


def tabulate(scores: list[Scores], order: str) -> Table:
    """A row per epoch and method."""
    table = Table("Epoch", "Method", title=f"{HELD_OUT} held-out digits; training batches of {ORDERS[order]}")
    table.add_column("Held-out accuracy", justify="right")
    for epoch, row in enumerate(scores, 1):
        for name, score in row.items():
            table.add_row(str(epoch), name, f"{score:.3f}", style="bold" if name in (ONE, POOLED) else None)
        table.add_section()
    return table


def draw(scores: list[Scores], report: jaxbn.Report, order: str, path: Path) -> None:
    """Left: accuracy per epoch. Right: how far off the running averages are, layer by layer."""
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
    """A line per method; markers stand side by side, because several lines lie on each other."""
    epochs, colours = np.arange(1, len(scores) + 1), ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
    for i, (name, colour, marker) in enumerate(zip(scores[0], colours, "xos^D", strict=True)):
        x, y = epochs + 0.05 * (i - 2), [row[name] for row in scores]
        ax.plot(x, y, color=colour, marker=marker, markersize=7, linewidth=1.3, label=name)
    ax.axhline(0.1, color="0.4", linewidth=1, linestyle=":", label="guessing")
    ax.set(xticks=epochs[:: len(epochs) // 12 + 1], xlim=(0.7, len(epochs) + 0.3), ylim=(0, 1.03))
    ax.set(xlabel="epoch", ylabel="held-out accuracy", title="The same parameters under five statistics")


def draw_distances(ax: Axes, report: jaxbn.Report) -> None:
    """Two bars per layer: how far the running mean and the running standard deviation are off."""
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
    parser.add_argument("--order", choices=ORDERS, default="shuffled", help="of the training digits (shuffled)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training digits (3)")
    parser.add_argument("--seed", type=int, default=0, help="of split, initialization and order (0)")
    parser.add_argument("--picture", type=Path, default="digits.png", metavar="PATH", help="file to draw (digits.png)")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bars")
    args = parser.parse_args(argv)
    if args.epochs < 1 or not 0 <= args.seed < 2**32:
        parser.error("--epochs must be 1 or more, and --seed 0 or more and below 2^32")
    if args.picture.suffix not in (".png", ".pdf", ".svg") or not args.picture.parent.is_dir():
        parser.error("--picture must end in .png, .pdf or .svg, and its folder must exist")
    return args


def main(argv: Sequence[str] | None = None) -> list[Scores]:
    """Runs the program; returns the held-out accuracy by method, for each epoch."""
    args, console, start = parse(argv), Console(highlight=False, markup=False), time.perf_counter()
    progress = not args.no_progress and Console(stderr=True).is_terminal
    data, held_out = load(args.seed)
    scores = []
    for variables in train(data, order=args.order, epochs=args.epochs, seed=args.seed, progress=progress):
        row, report = evaluate(variables, data, held_out, progress)
        scores.append(row)
    console.print(tabulate(scores, args.order))
    console.print(explain(scores, variables, held_out, args.order), soft_wrap=True)
    draw(scores, report, args.order, args.picture)
    console.print(f"Saved {args.picture}; {time.perf_counter() - start:.0f} s, compilation included.", soft_wrap=True)
    return scores


if __name__ == "__main__":
    main()
