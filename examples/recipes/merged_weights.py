"""Merged weights (model soups): an average of two networks fails with averaged statistics, and works with its own.

    python examples/recipes/merged_weights.py

The two networks start from different weights. Before they are averaged, the hidden units of the second are permuted to
match those of the first. Matched units still differ, and their differences partly cancel in the average: the inputs of
the normalization layers lose variance, more with every layer. Averaged running statistics do not show this loss, so the
signal fades. REPAIR restores it. With BatchNorm, a statistics pass with the averaged weights is enough, because the
layers then give every channel the averaged scale and bias. A model soup, which averages networks that were fine-tuned
from the same weights, needs the pass too.

Jordan et al., REPAIR: REnormalizing Permuted Activations for Interpolation Repair, 2022.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment
from shared import SGD, Batch, Net, accuracy, in_batches, load, make_predict, show, train

import jaxbn.linen

NET = Net(widths=(64,) * 12)  # deep, since the loss of variance grows with depth
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the second network
predict = make_predict(NET)


def hidden_units(variables: Any, data: Batch) -> list[np.ndarray]:
    """The outputs of the normalization layers, [N, width] for each."""
    kept = NET.apply(variables, data["x"], train=False, capture_intermediates=is_norm, mutable=["intermediates"])
    layers = kept[1]["intermediates"]
    return [np.asarray(layers[f"BatchNorm_{i}"]["__call__"][0]) for i in range(len(NET.widths))]


def is_norm(module: Any, _: str) -> bool:
    """Whether the outputs of a module are kept."""
    return isinstance(module, jaxbn.linen.BatchNorm)


def match(a: Any, b: Any, data: Batch) -> list[np.ndarray]:
    """For each hidden layer, the units of b in the order of the units of a with which they correlate most."""
    orders = []
    for of_a, of_b in zip(hidden_units(a, data), hidden_units(b, data), strict=True):
        correlation = standardized(of_a).T @ standardized(of_b)
        orders.append(linear_sum_assignment(correlation, maximize=True)[1])
    return orders


def standardized(units: np.ndarray) -> np.ndarray:
    """The outputs of each unit with mean 0 and variance 1; units that are always 0 stay 0."""
    return (units - units.mean(0)) / (units.std(0) + 1e-6)


def permute(variables: Any, orders: Sequence[np.ndarray]) -> Any:
    """The same function with its hidden units in another order."""

    def permuted(path: Any, leaf: jax.Array) -> jax.Array:
        layer, name = (entry.key for entry in path[-2:])
        index = int(layer.rpartition("_")[2])
        if name == "kernel" and index > 0:
            leaf = leaf[orders[index - 1]]  # its inputs are the units of the layer before
        return leaf if index == len(orders) else leaf[..., orders[index]]

    return jax.tree.map_with_path(permuted, variables)


def merge(a: Any, b: Any, weight: float) -> Any:
    """The weighted average of all variables."""
    return jax.tree.map(lambda of_a, of_b: (1 - weight) * of_a + weight * of_b, a, b)


def repair(variables: Any, data: Batch) -> tuple[Any, jaxbn.Report]:
    """The recipe: the merged weights with their population statistics, and the report of the pass."""
    return jaxbn.linen.postproc(predict, variables, in_batches(data))


def main(epochs: int = 6) -> dict[float, tuple[float, float]]:
    """Prints and returns the held-out accuracy for each weight, with averaged statistics and with estimated ones."""
    data, held_out = load()
    a, b = ([*train(SGD, data, epochs, net=NET, seed=seed)][-1].variables for seed in (0, 1))
    b = permute(b, match(a, b, data))
    found, rows = {}, []
    for weight in WEIGHTS:
        merged = merge(a, b, weight)
        repaired, report = repair(merged, data)
        pair = [accuracy(predict(variables, held_out), held_out) for variables in (merged, repaired)]
        found[weight] = (pair[0], pair[1])
        *_, last = report.layers.values()
        std = np.median(np.sqrt(last.new_var / last.old_var))  # of the input, relative to the averaged statistics
        rows.append([f"{weight:.2f}", *(f"{value:.3f}" for value in pair), f"{std:.2f}"])
    show(["weight of the second", "averaged statistics", "own statistics", "std, last layer"], rows)
    return found


if __name__ == "__main__":
    main()
