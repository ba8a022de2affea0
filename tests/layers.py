"""Helpers for the tests of layers in linen and NNX: data, averages, and invalid inputs."""

import jax
import numpy as np
import pytest

import jaxbn

AVERAGES = {
    "debiased": jaxbn.constant(0.9, debias=True),
    "scheduled": jaxbn.scheduled(lambda step: step / (step + 1)),
    "cumulative": jaxbn.cumulative(),
    "horizon": jaxbn.horizon(100),
}
every_average = pytest.mark.parametrize("momentum", AVERAGES.values(), ids=AVERAGES.keys())


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


every_activation = pytest.mark.parametrize(
    "activation", [None, jax.nn.relu, jax.nn.leaky_relu, jax.nn.silu], ids=["none", "relu", "leaky relu", "silu"]
)

input_that_does_not_fit = pytest.mark.parametrize(
    "x, fields, arguments, message",
    [
        (normal(8, 5), {}, {}, "initialize anew for this input"),
        (normal(8, 4, 1), {}, {}, "name its feature axis with axis="),
        (normal(8, 4), {"axis": 2}, {}, r"give axes in \[-2, 2\)"),
        (normal(8, 4), {}, {"residual": normal(8, 1)}, "must have the shape of the input"),
        (normal(8, 4), {}, {"residual": normal(4)}, "must have the shape of the input"),
    ],
    ids=["features", "rank", "axis", "residual to broadcast", "residual of lower rank"],
)

batch_without_statistics = pytest.mark.parametrize(
    "x, arguments, message",
    [
        (normal(0, 4), {}, "Skip empty batches"),
        (normal(8, 0, 4), {}, "Skip empty batches"),
        (normal(1, 4), {}, "allow_single_value=True"),
        (normal(4), {}, "allow_single_value=True"),
        (normal(8, 4), {"mask": np.ones(8, bool)}, r"Pass mask.reshape\(\(8, 1\)\)"),
        (normal(8, 4), {"mask": np.ones((3, 4), bool)}, "Pass one that does"),
    ],
    ids=["no row", "no position", "one row", "no axis but the features", "mask of rows", "mask of other rows"],
)


def both(function, stock, ours):
    """Compares `function(BatchNorm)` of our layer with that of stock Flax."""
    with jax.numpy_dtype_promotion("standard"):
        expected = function(stock)
    return function(ours), expected
