"""The interface of a model library: all that jaxbn needs to know of linen or NNX. What runs on it is written once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jaxbn._src.framework.layer_paths import keyed
from jaxbn._src.framework.layers import LayerKind, Measured, Weights
from jaxbn._src.framework.mixing import make_mixture
from jaxbn._src.methods.protocol import NormTransform, State
from jaxbn._src.numerics.moments import Moments

Call = Callable[[Any, Any], Any]  # (model, batch) -> outputs, written by the user
Captured = Callable[[Any, Any], tuple[Any, Measured]]  # (model, batch) -> (outputs, what the layers measured)
Measure = Callable[[Any, Any], Measured]  # (arrays of a model, batch) -> what the layers measured


class Framework(NamedTuple):
    """How jaxbn reads, runs and rebuilds the models of one library.

    A model is the value that holds the statistics: all variables in linen, the module itself in NNX. No function
    changes the model that it is given. Each is defined in a module, so that a `Framework` can be hashed and compiled
    programs can be found again.
    """

    # (model): raises a TypeError for anything that is not a model of this library
    check: Callable[[Any], None]
    # (model) -> (structure, arrays): a static, hashable part and a pytree of arrays
    split: Callable[[Any], tuple[Any, Any]]
    # (structure, arrays) -> model: the inverse of split
    merge: Callable[[Any, Any], Any]
    # (call, *, mode, weights=None, examples=False) -> (model, batch) -> (outputs, Measured): the capture hook
    capture: Callable[..., Captured]
    # (model) -> the state of every normalization layer by path; a ValueError if there is none
    states: Callable[[Any], dict[str, State]]
    # (model, paths) -> by path, the functions that install moments in a layer, and the state that they take
    installing: Callable[[Any, Iterable[str]], dict[str, tuple[NormTransform[Any, Any], State]]]
    # (model, paths, momentum) -> the same for the functions that update the running averages of a layer
    averaging: Callable[[Any, Iterable[str], Any], dict[str, tuple[NormTransform[Any, Any], State]]]
    # (model, states by path) -> a new model with these statistics
    with_states: Callable[[Any, Mapping[str, State]], Any]
    # (model) -> the kind of each layer by path; empty where the model does not tell
    kinds: Callable[[Any], dict[str, LayerKind]]
    # (model) -> the variables that a frozen network holds, as nested dicts of arrays
    variables: Callable[[Any], dict[str, Any]]
    # (model) -> the paths of the learned parameters
    params: Callable[[Any], Iterable[str]]


def capture_arrays(
    framework: Framework, structure: Any, call: Call, mode: str, weights: Weights | None, *, examples: bool = False
) -> Captured:
    """The capture of a call as a function of the arrays of the model, for `jax.jit`."""
    captured = framework.capture(call, mode=mode, weights=weights, examples=examples)
    return lambda arrays, batch: captured(framework.merge(structure, arrays), batch)


def measuring(call: Call, weights: Weights | None, framework: Framework, structure: Any, mode: str) -> Measure:
    """The measurements of one batch as a function of the arrays of the model; the `make` of a `Recipe`."""
    captured = capture_arrays(framework, structure, call, mode, weights)
    return lambda arrays, batch: captured(arrays, batch)[1]


def with_moments(captured: Captured) -> Callable[[Any, Any], tuple[Any, dict[str, Moments]]]:
    """The function that `capture_moments` returns."""

    def run(model: Any, batch: Any) -> tuple[Any, dict[str, Moments]]:
        outputs, found = captured(model, batch)
        return outputs, keyed(found.moments, dict(found.kinds))

    return run


def adapt(
    framework: Framework,
    call: Call,
    prior_count: float | None,
    example_weight: float | None,
    rule: str | None,
    weights: Weights | None,
) -> Call:
    """A call whose layers mix their running statistics with those of their input; see `jaxbn.linen.adapt`."""
    captured = framework.capture(call, mode=make_mixture(prior_count, example_weight, rule), weights=weights)
    return lambda model, batch: captured(model, batch)[0]
