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

    They may be jitted (`train_step` with `donate_argnums=0`), or mapped by `pmap` and `shard_map` with the state, the
    accumulator and the frozen network the same on all devices.
    """

    # (rng, batch) -> state: initial parameters, statistics and optimizer state, one pytree
    init: Callable[[Any, Any], Any]
    # (state, batch, rng=None) -> (state, metrics): one step of the optimizer, with batch statistics
    train_step: Callable[..., tuple[Any, dict[str, jax.Array]]]
    # (state, batch) -> acc: an accumulator of population statistics that has seen nothing
    start: Callable[[Any, Any], Any]
    # (state, acc, batch) -> acc: one batch of the pass, with the parameters fixed
    postproc_step: Callable[[Any, Any, Any], Any]
    # (state, acc=None) -> (frozen, report): the network to use; of the running averages, without a report, for None
    finalize: Callable[..., Any]
    # (frozen, batch) -> outputs: fixed statistics, any batch size
    eval_step: Callable[[Any, Any], Any]


def arguments(inputs: Callable[[Any], Any], batch: Any) -> tuple[Any, ...]:
    """The positional arguments of the model: what `inputs` gives, or its parts if that is a tuple."""
    given = inputs(batch)
    return given if isinstance(given, tuple) else (given,)


def gradients(
    loss_of: Callable[[Any], tuple[jax.Array, tuple[dict[str, jax.Array], Any]]],
    params: Any,
    axis_name: AxisName | None,
) -> tuple[Any, dict[str, jax.Array], Any]:
    """Gradients and metrics, averaged over devices, and the third value of `params -> (loss, (metrics, others))`."""
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
    """Raises a ValueError for a state that is replicated, of which `finalize` wants one."""
    if jnp.ndim(step):
        raise_stacked(jnp.shape(step))


def step_if(taken: ArrayLike, new: _Tree, old: _Tree) -> _Tree:
    """The new state if the step was taken, and the old one if it was skipped, as where a loss scale made gradients inf.

    A skipped step must leave all of the state as it was: the statistics too, which have moved with the forward pass.
    Pure; may be jitted.

    Args:
        taken: A boolean, `[]`.
        new: Any pytree of arrays, such as a whole train state.
        old: One of the same structure. Of an NNX model, a copy made before the step: `nnx.state` gives the variables
            themselves, which move with it.

    Returns:
        `new` or `old`.

    Example:
        >>> old, new = {"mean": jnp.zeros(1)}, {"mean": jnp.ones(1)}
        >>> jaxbn.step_if(jnp.array(False), new, old)
        {'mean': Array([0.], dtype=float32)}
    """
    return jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, old)
