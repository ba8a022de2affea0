"""Errors for a wrong argument in the place of variables or of a model."""

from collections.abc import Mapping
from typing import Any

from jaxbn._src.inference.frozen import Frozen
from jaxbn._src.methods.protocol import holds_states


def not_variables(given: Any) -> TypeError:
    """Returns the error for an argument that is not the variables of a linen model."""
    if isinstance(given, Frozen):
        fix = "Pass frozen.variables."
    elif hasattr(given, "batch_stats") and hasattr(given, "params"):
        fix = 'Pass {"params": state.params, "batch_stats": state.batch_stats}.'
    elif hasattr(given, "params") and hasattr(given, "apply_fn"):
        fix = (
            "This train state has no statistics: keep batch_stats in a subclass, as jaxbn.linen.TrainState does, and "
            'pass {"params": state.params, "batch_stats": state.batch_stats}.'
        )
    elif hasattr(given, "apply") and hasattr(given, "init"):
        fix = "Pass the variables that net.init(...) or training returned; the module belongs in `call`: net.apply."
    elif holds_states(given):
        fix = "For a pytree with states of methods, as of plain functions, use jaxbn itself, such as jaxbn.postproc."
    elif callable(given):
        fix = "The order is (call, variables, batches); for an NNX model use jaxbn.nnx."
    else:
        fix = "Pass all variables that net.init(...) returned."
    return TypeError(
        f"Got a {_named(given)} instead of the variables of a linen model, a dict such as "
        f'{{"params": ..., "batch_stats": ...}}. {fix}'
    )


def not_a_model(given: Any) -> TypeError:
    """Returns the error for an argument that is not an NNX model."""
    if isinstance(given, Frozen):
        fix = "Put it into a model with jaxbn.nnx.install_frozen(model, frozen)."
    elif isinstance(given, type):
        fix = f"Pass an instance: {given.__name__}(..., rngs=nnx.Rngs(0))."
    elif hasattr(given, "apply") and hasattr(given, "init"):
        fix = "For a linen module and its variables use jaxbn.linen."
    elif holds_states(given):
        fix = "For a pytree with states of methods, as of plain functions, use jaxbn itself, such as jaxbn.postproc."
    elif isinstance(given, Mapping):
        fix = "For the variables of a linen model use jaxbn.linen; for an NNX state pass nnx.merge(graphdef, state)."
    else:
        fix = "Pass an nnx.Module, such as nnx.merge(graphdef, state)."
    return TypeError(f"Got a {_named(given)} instead of an NNX model. {fix}")


def _named(given: Any) -> str:
    return f"class, {given.__name__}," if isinstance(given, type) else type(given).__name__
