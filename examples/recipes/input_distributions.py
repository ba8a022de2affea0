"""Plots how the distribution of every layer's input changes during training (internal covariate shift).

    python examples/recipes/input_distributions.py

It trains one network with normalization and one without. After each step it measures the input of each layer on a fixed
batch, and it plots the mean and standard deviation over the steps. `capture_moments` needs no change of the model, so
this works for any network with jaxbn's or Flax's BatchNorm layers.

Ioffe & Szegedy, Batch Normalization, 2015, section 4.1 and figure 1, plot quantiles of one unit. Whether batch
normalization helps because it stabilizes the inputs is disputed: Santurkar et al., How Does Batch Normalization Help
Optimization?, 2018.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from shared import SGD, Batch, Net, load, make_predict, show, take, train

import jaxbn.linen

WIDTHS = (64, 64, 64, 64)


class Record(NamedTuple):
    """Mean and standard deviation of one layer's input over the rows of a batch, per step and channel."""

    mean: np.ndarray  # [T, C]
    std: np.ndarray  # [T, C]


def record(net: Net, states: Iterable[jaxbn.linen.TrainState], batch: Batch) -> dict[str, Record]:
    """The recipe: the moments of every layer's input, after each step."""
    # Layers normalize with batch statistics, as in training. Layers of the plain network keep mean 0 and variance 1.
    measure = jax.jit(jaxbn.linen.capture_moments(make_predict(net), mode="batch" if net.normalize else "eval"))
    found = jax.device_get([measure(state.variables, batch)[1] for state in states])
    by_step = {path: [moments[path] for moments in found] for path in found[0]}
    return {
        path: Record(np.array([m.mean for m in steps]), np.sqrt([m.m2 / m.count for m in steps]))
        for path, steps in by_step.items()
    }


def draw(records: dict[str, dict[str, Record]], path: Path) -> None:
    """Draws one row of panels for each network, and one panel for each layer."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(len(records), len(WIDTHS), sharex=True, sharey=True, squeeze=False)
    for row, (name, layers) in zip(axes, records.items(), strict=True):
        for i, (ax, layer) in enumerate(zip(row, layers.values(), strict=True), 1):
            steps, mean = np.arange(1, len(layer.mean) + 1), layer.mean.mean(1)
            # Law of total variance: within channels plus between their means.
            std = np.sqrt((layer.std**2).mean(1) + layer.mean.var(1))
            band = ax.fill_between(steps, mean - std, mean + std, color="#56B4E9", alpha=0.5, linewidth=0)
            channel, *_ = ax.plot(steps, layer.mean[:, :8], color="0.35", linewidth=0.5)
            (centre,) = ax.plot(steps, mean, color="#0072B2", linewidth=1.8)
            ax.set_title(f"{name}, layer {i}", fontsize=10)
            ax.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("input of the layer")
    for ax in axes[-1]:
        ax.set_xlabel("training step")
    meanings = {
        centre: "mean of all channels",
        band: "plus and minus a standard deviation",
        channel: "mean of a channel",
    }
    figure.legend(meanings.keys(), meanings.values(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)


def main(epochs: int = 4, path: Path = Path("input_distributions.png")) -> dict[str, dict[str, Record]]:
    """Saves the plot; prints the std of the input of each layer, first -> last step; returns the measurements."""
    data, _ = load()
    batch = take(data, slice(0, 256))
    nets = {"normalized": Net(WIDTHS), "plain": Net(WIDTHS, normalize=False)}
    records = {name: record(net, train(SGD, data, epochs, net=net), batch) for name, net in nets.items()}
    rows = [
        [name, *(f"{layer.std[0].mean():.2f} -> {layer.std[-1].mean():.2f}" for layer in layers.values())]
        for name, layers in records.items()
    ]
    show(["std of the input", *records["plain"]], rows)
    draw(records, path)
    print(f"Saved {path}")
    return records


if __name__ == "__main__":
    main(path=Path(*sys.argv[1:2] or ["input_distributions.png"]))
