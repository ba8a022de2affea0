"""Pruning: estimate the statistics again once the smallest weights are zero; no labels and no training needed.

    python examples/recipes/pruned_weights.py

The layers behind a pruned kernel get smaller inputs, while the running statistics are those of the whole network. A
statistics pass with the pruned weights recovers most of the accuracy, before any fine-tuning. The last column is the
standard deviation of a layer's input relative to that before pruning: of the median channel, in the layer that lost
most.

Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015 (pruning by magnitude); Li et al.,
EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning, 2020 (statistics after pruning).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from shared import Batch, accuracy, in_batches, load, predict, show, trained

import jaxbn.linen

PRUNED = (0.0, 0.5, 0.7, 0.8, 0.9)


def prune(params: Any, share: float) -> Any:
    """Sets this share of the weights of each kernel to zero, the smallest ones."""

    def pruned(path: Any, leaf: jax.Array) -> jax.Array:
        return jnp.where(abs(leaf) < jnp.quantile(abs(leaf), share), 0, leaf) if path[-1].key == "kernel" else leaf

    return jax.tree.map_with_path(pruned, params)


def recalibrate(variables: Any, data: Batch) -> tuple[Any, jaxbn.Report]:
    """The recipe: the pruned network with its own population statistics, and the report of the pass."""
    return jaxbn.linen.postproc(predict, variables, in_batches(data))


def main(epochs: int = 4) -> dict[float, tuple[float, float]]:
    """Prints and returns the held-out accuracy for each share, before and after the statistics pass."""
    data, held_out = load()
    variables = trained(data, epochs)
    found, rows = {}, []
    for share in PRUNED:
        pruned = variables | {"params": prune(variables["params"], share)}
        recalibrated, report = recalibrate(pruned, data)
        pair = [accuracy(predict(v, held_out), held_out) for v in (pruned, recalibrated)]
        found[share] = (pair[0], pair[1])
        std = min(np.sqrt(np.median(layer.new_var / layer.old_var)) for layer in report.layers.values())
        rows.append([f"{share:.0%}", *(f"{value:.3f}" for value in pair), f"{std:.2f}"])
    show(["weights pruned", "statistics of training", "own statistics", "smallest std ratio"], rows)
    return found


if __name__ == "__main__":
    main()
