"""Quantization: estimate the statistics again once the weights are rounded to a few bits.

    python examples/recipes/quantized_weights.py

Rounding changes the mean and the variance of every layer's input, so the running statistics no longer match. A
statistics pass with the rounded weights corrects both; it needs no labels. With int8 the loss is small; with fewer bits
the pass matters. The last column is how far off the running means were. A part of it, the same in all rows, is that
running averages lag behind the training.

Sun et al., Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks, 2019 (a trained network
in 8 bits, after fine-tuning the statistics of batch normalization).
"""

from typing import Any

import jax
import jax.numpy as jnp
from shared import Batch, accuracy, in_batches, load, predict, show, trained

import jaxbn.linen

BITS = (8, 4, 3, 2)


def quantize(kernel: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The kernel as integers of so many bits, int8[..], and their scale: kernel = integers * scale."""
    most = 2 ** (bits - 1) - 1
    scale = abs(kernel).max() / most
    return jnp.round(kernel / scale).astype(jnp.int8), scale


def with_quantized_kernels(params: Any, bits: int) -> Any:
    """The parameters with kernels that are integers of so many bits, times a scale."""

    def rounded(path: Any, leaf: jax.Array) -> jax.Array:
        if path[-1].key != "kernel":
            return leaf
        integers, scale = quantize(leaf, bits)
        return integers.astype(leaf.dtype) * scale

    return jax.tree.map_with_path(rounded, params)


def recalibrate(variables: Any, data: Batch) -> tuple[Any, jaxbn.Report]:
    """The recipe: the quantized network with its own population statistics, and the report of the pass."""
    return jaxbn.linen.postproc(predict, variables, in_batches(data))


def main(epochs: int = 4) -> dict[int, tuple[float, float]]:
    """Prints and returns the held-out accuracy for each number of bits, before and after the statistics pass."""
    data, held_out = load()
    variables = trained(data, epochs)
    found, rows = {}, []
    for bits in BITS:
        quantized = variables | {"params": with_quantized_kernels(variables["params"], bits)}
        recalibrated, report = recalibrate(quantized, data)
        pair = [accuracy(predict(v, held_out), held_out) for v in (quantized, recalibrated)]
        found[bits] = (pair[0], pair[1])
        off = max(layer.mean_shift.max() for layer in report.layers.values())
        rows.append([f"int{bits}", *(f"{value:.3f}" for value in pair), f"{off:.2f} std"])
    show(["weights", "statistics of training", "own statistics", "largest mean shift"], rows)
    return found


if __name__ == "__main__":
    main()
