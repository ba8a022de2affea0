"""Policies for `jax.checkpoint`, `nn.remat` and `nnx.remat`: what normalization layers keep for the backward pass.

By default everything that the backward pass reads is kept: inputs of convolutions, of activations, of normalizations.
What a normalization gives can be computed again from its input and its statistics at the cost of one read, without any
convolution, and so is the first thing to let go. Put one of these around each block of a network:

    block = nn.remat(Block, policy=jaxbn.checkpoint_policies.save_norm_inputs)

They know what jaxbn's layers keep by the names below, with which policies of your own can be written. Layers of Flax,
and those with `autodiff=True` or an activation that is not tuned, have no names, or not for all that they keep.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

INPUT = "jaxbn_input"  # of layers with an activation and no residual, which are inside a block
SUMMAND_INPUT = "jaxbn_summand_input"  # of the other layers, whose result is a sum of residuals, or goes into one
STATISTICS = "jaxbn_statistics"  # mean and 1/s of each layer, [C]
OUTPUT = "jaxbn_output"  # of layers with residual=

Policy = Callable[..., Any]


def _save(*names: str) -> Policy:
    return jax.checkpoint_policies.save_only_these_names(*names)


# No convolution is computed again, nor any sum of residuals.
save_norm_inputs_and_outputs: Policy = _save(INPUT, SUMMAND_INPUT, STATISTICS, OUTPUT)
# No convolution is computed again.
save_norm_inputs: Policy = _save(INPUT, SUMMAND_INPUT, STATISTICS)
# The last convolution of a block is computed again, and one on its shortcut.
save_inner_norm_inputs: Policy = _save(INPUT, STATISTICS, OUTPUT)
# All of a block is computed again, but nothing is summed twice.
save_norm_statistics: Policy = _save(STATISTICS, OUTPUT)


def name_input(x: jax.Array, inner: bool) -> jax.Array:
    """Marks the input of a layer."""
    return checkpoint_name(x, INPUT if inner else SUMMAND_INPUT)


def name_statistics(statistics: Any) -> Any:
    """Marks what a layer normalizes with; it must be what comes out that it then does so with."""
    return checkpoint_name(statistics, STATISTICS)


def name_output(y: jax.Array) -> jax.Array:
    """Marks the output of a layer that adds a residual."""
    return checkpoint_name(y, OUTPUT)
