"""What to say of something that stands where variables or a model belong."""

from collections.abc import Mapping
from typing import Any

from jaxbn._src.inference.frozen import Frozen


def not_variables(given: Any) -> TypeError:
    """What is wrong with something that stands where a linen model's variables belong."""
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
        fix = "Pass what net.init(...) returned or training made of it; the module itself belongs in `call`: net.apply."
    elif callable(given):
        fix = "The order is (call, variables, batches); for an NNX model use jaxbn.nnx."
    else:
        fix = "Pass all that net.init(...) returned."
    return TypeError(
        f"A {_named(given)} was given where the variables of a linen model belong, which are a dict such as "
        f'{{"params": ..., "batch_stats": ...}}. {fix}'
    )


def not_a_model(given: Any) -> TypeError:
    """What is wrong with something that stands where an NNX model belongs."""
    if isinstance(given, Frozen):
        fix = "Put it into a model with jaxbn.nnx.install_frozen(model, frozen)."
    elif isinstance(given, type):
        fix = f"Pass an instance: {given.__name__}(..., rngs=nnx.Rngs(0))."
    elif hasattr(given, "apply") and hasattr(given, "init"):
        fix = "For a linen module and its variables use jaxbn.linen."
    elif isinstance(given, Mapping):
        fix = "For the variables of a linen model use jaxbn.linen; for a state of NNX pass nnx.merge(graphdef, state)."
    else:
        fix = "Pass an nnx.Module; of what nnx.split returned, nnx.merge(graphdef, state)."
    return TypeError(f"A {_named(given)} was given where an NNX model belongs. {fix}")


def _named(given: Any) -> str:
    return f"class, {given.__name__}," if isinstance(given, type) else type(given).__name__
