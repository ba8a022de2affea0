"""The interface of a model library: all that jaxbn needs to know of linen or NNX. What runs on it is written once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jax.typing import ArrayLike

from jaxbn._src.framework.layer_paths import averaging_method, is_put_back, keyed, method_at
from jaxbn._src.framework.layers import LayerKind, Measured, Mode, Weights
from jaxbn._src.framework.method import filled, state_of
from jaxbn._src.framework.mixing import make_mixture
from jaxbn._src.framework.norm_layer import evaluating_method, kind_of, method_of
from jaxbn._src.methods.batch_norm import BatchNormState
from jaxbn._src.methods.protocol import State
from jaxbn._src.numerics.moments import Moments

Call = Callable[[Any, Any], Any]  # (model, batch) -> outputs, written by the user
Captured = Callable[[Any, Any], tuple[Any, Measured]]  # (model, batch) -> (outputs, what the layers measured)
Measure = Callable[[Any, Any], Measured]  # (arrays of a model, batch) -> what the layers measured


class ModelLayer(NamedTuple):
    """A normalization layer of a model."""

    statistics: Mapping[str, Any]  # by their names in Flax's layer
    # The layer, with the attributes of Flax's; None where the model does not tell, as the variables of linen do not.
    norm: Any = None

    @property
    def state(self) -> State:
        """The statistics as a state of the method, or of batch norm if the method is not known."""
        if self.norm is None:
            state: State = filled(BatchNormState, self.statistics)
            return state
        return state_of(evaluating_method(self.norm)(), self.statistics)

    def installed(self, path: str, moments: Moments) -> State:
        """The state with these moments installed; `path` is their key."""
        by_key = self.norm is None or is_put_back(path)
        transform = method_at(path, self.statistics) if by_key else evaluating_method(self.norm)()
        return transform.postproc(state_of(transform, self.statistics), moments)

    def averaged(self, path: str, moments: Moments, momentum: Any, samples: ArrayLike | None) -> State | None:
        """The state with its running averages updated once; None for a method without running averages."""
        by_key = self.norm is None
        transform = averaging_method(path, self.statistics, momentum) if by_key else method_of(self.norm)()
        state = state_of(transform, self.statistics)
        return None if transform.update is None else transform.update(state, moments, samples)


class Framework(NamedTuple):
    """How jaxbn reads, runs and rebuilds the models of one library.

    A model is the value that holds the statistics: all variables in linen, the module itself in NNX. No function
    changes the model that it is given. Each is defined in a module, so that a `Framework` can be hashed and compiled
    programs can be found again. The methods below the fields follow from them.
    """

    # (model): raises a TypeError for anything that is not a model of this library
    check: Callable[[Any], None]
    # (model) -> (structure, arrays): a static, hashable part and a pytree of arrays
    split: Callable[[Any], tuple[Any, Any]]
    # (structure, arrays) -> model: the inverse of split
    merge: Callable[[Any, Any], Any]
    # (call, *, mode, weights=None, examples=False) -> (model, batch) -> (outputs, Measured): the capture hook
    capture: Callable[..., Captured]
    # (model) -> every normalization layer by path; a ValueError if there is none
    layers: Callable[[Any], Mapping[str, ModelLayer]]
    # (model, states by path) -> a new model with these statistics
    with_states: Callable[[Any, Mapping[str, State]], Any]
    # (model) -> the variables that a frozen network holds, as nested dicts of arrays; of plain functions, their tree
    variables: Callable[[Any], Any]
    # (model) -> the paths of the learned parameters; None where they do not tell the layer
    params: Callable[[Any], Iterable[str] | None]

    def states(self, model: Any) -> dict[str, State]:
        """The state of every normalization layer by path."""
        return {path: layer.state for path, layer in self.layers(model).items()}

    def kinds(self, model: Any) -> dict[str, LayerKind]:
        """The kind of every layer by path; empty where the model does not tell."""
        return {path: kind_of(layer.norm) for path, layer in self.layers(model).items() if layer.norm is not None}


def capture_arrays(
    framework: Framework, structure: Any, call: Call, mode: Mode, weights: Weights | None, *, examples: bool = False
) -> Captured:
    """The capture of a call as a function of the arrays of the model, for `jax.jit`."""
    captured = framework.capture(call, mode=mode, weights=weights, examples=examples)
    return lambda arrays, batch: captured(framework.merge(structure, arrays), batch)


def measuring(call: Call, weights: Weights | None, framework: Framework, structure: Any, mode: Mode) -> Measure:
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
