"""Shared by all recipes: handwritten digits, a small network and a training loop."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import jaxbn
import jaxbn.linen
import jaxbn.nnx

BATCH = 64
SGD = optax.sgd(0.1, momentum=0.9)

Batch = dict[str, np.ndarray]  # "x": f32[N, 64], "y": i32[N]


class Net(nn.Module):
    """Dense layers with batch normalization, and a linear output layer."""

    widths: tuple[int, ...] = (64, 32)
    momentum: float = 0.9  # these loops are short; the default 0.99 needs several hundred steps
    normalize: bool = True  # False: layers keep mean 0 and variance 1, so they only scale and shift

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for width in self.widths:
            x = nn.Dense(width)(x)
            stored = not (train and self.normalize)
            x = jaxbn.linen.BatchNorm(use_running_average=stored, momentum=self.momentum, activation=nn.relu)(x)
        return nn.Dense(10)(x)


class NNXNet(nnx.Module):
    """The same network in NNX; `train()` and `eval()` select the statistics."""

    def __init__(self, rngs: nnx.Rngs, widths: tuple[int, ...] = (64, 32)):
        self.denses, self.norms = nnx.List(), nnx.List()
        for before, width in zip((64, *widths), widths, strict=False):
            self.denses.append(nnx.Linear(before, width, rngs=rngs))
            self.norms.append(jaxbn.nnx.BatchNorm(width, momentum=0.9, activation=jax.nn.relu, rngs=rngs))
        self.head = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for dense, norm in zip(self.denses, self.norms, strict=True):
            x = norm(dense(x))
        return self.head(x)


NET = Net()


def make_predict(net: nn.Module) -> Callable[[Any, Batch], jax.Array]:
    """Returns a function that computes logits with the running statistics; `postproc` and `capture_moments` take it."""
    return jax.jit(lambda variables, batch: net.apply(variables, batch["x"], train=False))


predict = make_predict(NET)


def loss_fn(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy; no metrics."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), {}


def load() -> tuple[Batch, Batch]:
    """Loads training digits and held-out digits, with pixels scaled from 0..16 to 0..1."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    data = {"x": (x[order] / 16).astype(np.float32), "y": y[order].astype(np.int32)}
    return take(data, slice(0, 20 * BATCH)), take(data, slice(20 * BATCH, 28 * BATCH))


def take(data: Batch, rows: Any) -> Batch:
    """Selects rows of the data."""
    return jax.tree.map(lambda leaf: leaf[rows], data)


def in_batches(data: Batch, size: int = BATCH) -> list[Batch]:
    """Cuts the data into batches in its order; leaves out an incomplete last batch."""
    return [take(data, slice(start, start + size)) for start in range(0, len(data["y"]) - size + 1, size)]


@functools.cache  # so that the steps compile once per process
def make_steps(optimizer: optax.GradientTransformation, net: nn.Module) -> jaxbn.Steps:
    """Makes the functions of the training loop."""
    steps = jaxbn.linen.make_steps(net, loss_fn, optimizer, inputs=lambda batch: batch["x"])
    return steps._replace(train_step=jax.jit(steps.train_step))


def train(
    optimizer: optax.GradientTransformation, data: Batch, epochs: int, *, net: nn.Module = NET, seed: int = 0
) -> Iterator[jaxbn.linen.TrainState]:
    """Yields the state after each step; the seed is that of the initial parameters and of the order of the data."""
    steps, rng = make_steps(optimizer, net), np.random.default_rng(seed)
    state = steps.init(jax.random.key(seed), take(data, slice(0, BATCH)))
    for _ in range(epochs):
        for batch in in_batches(take(data, rng.permutation(len(data["y"])))):
            state, _ = steps.train_step(state, batch)
            yield state


def trained(data: Batch, epochs: int = 4) -> dict[str, Any]:
    """Trains `NET` and returns its variables, for recipes that start from a trained network."""
    *_, state = train(SGD, data, epochs)
    return state.variables


def accuracy(logits: jax.Array, data: Batch) -> float:
    """The share of digits that are classified correctly."""
    return float(np.mean(np.argmax(logits, -1) == data["y"]))


def compare(logits: dict[str, jax.Array], data: Batch) -> dict[str, float]:
    """Prints and returns the accuracy for each name."""
    found = {name: accuracy(output, data) for name, output in logits.items()}
    for name, value in found.items():
        print(f"{name:{max(map(len, found))}}   {value:.3f}")
    return found


def another_camera(data: Batch) -> Batch:
    """The same digits from a noisy camera with less contrast; gain and offset differ between pixels."""
    rng = np.random.default_rng(1)
    # A fixed gain and offset per pixel shift the input statistics but keep the digits readable.
    gain, offset = rng.uniform(0.2, 0.6, 64), rng.uniform(0.0, 0.4, 64)
    noise = rng.normal(0, 0.08, data["x"].shape)
    return data | {"x": (data["x"] * gain + offset + noise).astype(np.float32)}


def show(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table whose first column is text, and whose other columns are numbers."""
    table = Table(box=None, pad_edge=False, header_style="")
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)
