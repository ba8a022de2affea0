"""The parts of a training loop that all frameworks share, and a helper for loops that skip steps."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._src.framework.norm_layer import keeps_averages
from jaxbn._src.framework.processes import raise_stacked
from jaxbn._src.numerics.collectives import AxisName, as_names, make_varying, mean_over

_Tree = TypeVar("_Tree")


class Steps(NamedTuple):
    """Training, postproc and evaluation as functions, made by `make_steps`. All but `finalize` are pure.

    You may jit them (`train_step` with `donate_argnums=0`), or map them with `pmap` and `shard_map`, with the state,
    the accumulator and the frozen network replicated.
    """

    # (rng, batch) -> state: initial parameters, statistics and optimizer state, one pytree
    init: Callable[[Any, Any], Any]
    # (state, batch, rng=None) -> (state, metrics): one step of the optimizer, with batch statistics
    train_step: Callable[..., tuple[Any, dict[str, jax.Array]]]
    # (state, batch) -> acc: an empty accumulator of population statistics
    start: Callable[[Any, Any], Any]
    # (state, acc, batch) -> acc: one batch of the statistics pass, with the parameters fixed
    postproc_step: Callable[[Any, Any, Any], Any]
    # (state, acc=None) -> (frozen, report): the network to serve; with running averages and no report for None
    finalize: Callable[..., Any]
    # (frozen, batch) -> outputs: fixed statistics, any batch size
    eval_step: Callable[[Any, Any], Any]


def arguments(inputs: Callable[[Any], Any], batch: Any) -> tuple[Any, ...]:
    """The positional arguments of the model: the result of `inputs`, or its elements if it is a tuple."""
    given = inputs(batch)
    return given if isinstance(given, tuple) else (given,)


def gradients(
    loss_of: Callable[[Any], tuple[jax.Array, tuple[dict[str, jax.Array], Any]]],
    params: Any,
    axis_name: AxisName | None,
) -> tuple[Any, dict[str, jax.Array], Any]:
    """Gradients and metrics averaged over devices, and `others`, of `params -> (loss, (metrics, others))`."""
    # The parameters count as values of this device alone, so that the gradients are those of its rows however the batch
    # is spread.
    grads, (metrics, others) = jax.grad(loss_of, has_aux=True)(make_varying(params, axis_name))
    return *mean_over((grads, metrics), axis_name), others


def check_synchronized(path: str, layer: Any, axis_name: AxisName | None) -> None:
    """Raises a ValueError if the running averages of a layer would differ from device to device."""
    if keeps_averages(layer) and not set(as_names(axis_name)) <= set(as_names(layer.axis_name)):
        raise ValueError(
            f"{path!r} would keep running averages of the rows of its own device, and they would differ over "
            f"{axis_name!r}: it has axis_name={layer.axis_name!r}. Give the layer axis_name={axis_name!r}; or, of "
            f"jaxbn's layers, momentum=None, so that the statistics come from postproc."
        )


def check_whole(step: ArrayLike) -> None:
    """Raises a ValueError for a replicated state, where `finalize` expects a single replica."""
    if jnp.ndim(step):
        raise_stacked(jnp.shape(step))


def step_if(taken: ArrayLike, new: _Tree, old: _Tree) -> _Tree:
    """Selects the new state if a step was taken, and the old one if it was skipped, as with loss scaling.

    A skipped step must leave the whole state unchanged, including the statistics, which the forward pass has updated.
    Pure, and may be jitted.

    Args:
        taken: A boolean, `[]`.
        new: Any pytree of arrays, such as a train state.
        old: A pytree of the same structure. For an NNX model, pass a copy made before the step: `nnx.state` returns the
            variables themselves, which change with the model.

    Returns:
        `new` or `old`.

    Example:
        >>> old, new = {"mean": jnp.zeros(1)}, {"mean": jnp.ones(1)}
        >>> jaxbn.step_if(jnp.array(False), new, old)
        {'mean': Array([0.], dtype=float32)}
    """
    return jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, old)
