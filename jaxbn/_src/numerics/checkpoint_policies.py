"""Rematerialization policies for `jax.checkpoint`, `nn.remat` and `nnx.remat` that know normalization layers.

By default JAX saves everything that the backward pass reads: the inputs of convolutions, activations and
normalizations. The output of a normalization can be recomputed from its input and statistics with one read and no
convolution, so it is the cheapest to drop. Apply one of these policies to each block of a network:

    block = nn.remat(Block, policy=jaxbn.checkpoint_policies.save_norm_inputs)

The policies recognize the arrays of jaxbn's layers by the names below; you can build your own policies from them.
Layers of Flax have no names, and layers with `autodiff=True` or an untuned activation lack some.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

INPUT = "jaxbn_input"  # layers with an activation and no residual: inside a block
SUMMAND_INPUT = "jaxbn_summand_input"  # all other layers: their output is a sum of residuals, or is added to one
STATISTICS = "jaxbn_statistics"  # mean and 1/s of each layer, [C]
OUTPUT = "jaxbn_output"  # layers with residual=

Policy = Callable[..., Any]


def _save(*names: str) -> Policy:
    return jax.checkpoint_policies.save_only_these_names(*names)


# Recomputes neither convolutions nor sums of residuals.
save_norm_inputs_and_outputs: Policy = _save(INPUT, SUMMAND_INPUT, STATISTICS, OUTPUT)
# Recomputes no convolution.
save_norm_inputs: Policy = _save(INPUT, SUMMAND_INPUT, STATISTICS)
# Recomputes the last convolution of a block, and the convolution on its shortcut.
save_inner_norm_inputs: Policy = _save(INPUT, STATISTICS, OUTPUT)
# Recomputes the whole block, but neither statistics nor sums of residuals.
save_norm_statistics: Policy = _save(STATISTICS, OUTPUT)


def name_input(x: jax.Array, inner: bool) -> jax.Array:
    """Names the input of a layer."""
    return checkpoint_name(x, INPUT if inner else SUMMAND_INPUT)


def name_statistics(statistics: Any) -> Any:
    """Names the statistics of a layer; it must normalize with the returned ones."""
    return checkpoint_name(statistics, STATISTICS)


def name_output(y: jax.Array) -> jax.Array:
    """Names the output of a layer that adds a residual."""
    return checkpoint_name(y, OUTPUT)
