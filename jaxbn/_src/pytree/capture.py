"""The capture hook of plain JAX: the moments of the inputs of all normalization layers, without changes to the model.

It has three parts. Each state becomes a captured state: a NamedTuple with the same fields that also holds the flat
positions of the statistics. They are leaves of the same node, so that transformations slice both together, and the
static part of the node makes jit caches distinguish calls with and without a capture. The functions `train` and `eval`
of every transform leave calls with such a state to the state itself: it measures the input once, normalizes with the
statistics of the mode, and sows the moments on the output. `harvest` collects them.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxbn._src.framework.called import CalledNorm, Operands
from jaxbn._src.framework.framework import Call, with_moments
from jaxbn._src.framework.layers import (
    Layer,
    Measured,
    Weights,
    captured_call,
    carry_weights,
    check_mode,
    count_examples,
    example_weights,
    measured,
)
from jaxbn._src.framework.method import Method, evaluate
from jaxbn._src.framework.mixing import Mixture
from jaxbn._src.methods.captured import CapturedState
from jaxbn._src.methods.protocol import NormTransform, State
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.pytree.states import find_states, map_states, without_slots
from jaxbn._src.tracing import harvest as _harvest


def capture_moments(
    call: Call, *, mode: str = "batch", weights: Weights | None = None
) -> Callable[[Any, Any], tuple[Any, dict[str, _moments.Moments]]]:
    """Makes a function that also returns the moments of the input of every normalization layer of a plain JAX model.

    Use it for a loop of your own, or for moments in a loss; `postproc` is the ready-made loop. Pure, and may be jitted.
    Both results are differentiable, as :func:`jaxbn.linen.capture_moments` describes.

    Args:
        call: Runs the model, `(state, batch) -> outputs`, see :func:`jaxbn.postproc`.
        mode: The statistics that the layers normalize with, whether the model calls `train` or `eval`: `"batch"`,
            those of the batch; `"eval"`, those of the state; `"as_called"`, as the model calls them. Except in the
            last, the states that `train` returns are those that it was given.
        weights: `batch -> [N]`, booleans or real weights of the N examples along the leading axis of every layer's
            input, such as 0 for padding. They multiply the mask that the model passes to a layer.

    Returns:
        A function `(state, batch) -> (outputs, moments)`. `moments` maps the path of each state in the tree, such as
        `"blocks/0/norm"`, to `Moments` in the shape of its statistics; the count is 0 if the layer was not reached.

    Raises:
        ValueError: If `mode` is unknown; in the function, if there is no state of a method in the tree.

    Example:
        >>> bn = jaxbn.batch_norm()
        >>> params, state = bn.init(1)
        >>> call = lambda state, x: bn.eval(params, state["norm"], x)
        >>> _, moments = jaxbn.capture_moments(call)({"norm": state}, jnp.array([[1.0], [3.0]]))
        >>> float(moments["norm"].mean[0])
        2.0
    """
    check_mode(mode)
    return with_moments(capture(call, mode=mode, weights=weights))


def capture(
    call: Call, *, mode: str | Mixture, weights: Weights | None = None, examples: bool = False
) -> Callable[[Any, Any], tuple[Any, Measured]]:
    """The capture hook of the framework: as `capture_moments`, but returns all measurements."""

    def captured(tree: Any, batch: Any) -> tuple[Any, Measured]:
        count = count_examples(batch) if examples else None
        layers = {path: Layer(path, state.mean.shape, mode, count) for path, state in find_states(tree).items()}
        whole = {layer: layer.positions() for layer in layers.values()}
        per_example = None if weights is None else example_weights(weights, batch)

        def with_slot(path: str, state: Any) -> Any:
            layer = layers[path]
            carried = None if per_example is None else carry_weights(per_example, layer)
            cls: Any = type(state)
            return _captured_class(cls).made(tuple(state), layer, whole[layer], carried)

        outputs, records = _harvest.harvest(call)(map_states(with_slot, tree), batch)
        return without_slots(outputs), measured(records, whole, calls=examples)

    return captured


class _Captured(CapturedState):
    """A captured state; `_captured_class` mixes it with the class of the state. The last two are its further leaves."""

    plain_class: Any  # of the state
    layer: Layer
    index: jax.Array  # i32, in the shape of the mean
    weights: jax.Array | None  # of the examples, see `carry_weights`

    @classmethod
    def made(cls, leaves: Sequence[Any], layer: Layer, index: Any, weights: Any) -> Any:
        """A captured state of these statistics."""
        state: Any = tuple.__new__(cls, leaves)  # type: ignore[type-var]  # the classes in use derive from tuple
        state.layer, state.index, state.weights = layer, index, weights
        return state

    @property
    def plain(self) -> Any:
        """The state without the slot."""
        leaves: Any = self
        return tuple.__new__(self.plain_class, leaves)

    def _replace(self, **changes: Any) -> Any:
        return self._with(self.plain._replace(**changes))

    def _with(self, state: Any) -> Any:
        """Another state with the slot of this one."""
        return self.made(tuple(state), self.layer, self.index, self.weights)

    def run(self, transform: Any, name: str, params: Any, x: Any, operands: Mapping[str, Any]) -> Any:
        """The call of `train` or `eval` during a capture."""
        after = [self.plain]

        def as_called() -> Any:
            if name == "eval":
                return transform.eval(params, self.plain, x, **operands)
            y, after[0] = transform.train(params, self.plain, x, **operands)
            return y

        y = captured_call(
            dataclasses.replace(self.layer, method=method_of(transform), evaluates=name == "eval"),
            self.index,
            self.weights,
            _called_norm(transform, self.layer.path, params, self.plain),
            _operands(x, operands),
            as_called,
        )
        return y if name == "eval" else (y, self._with(after[0]))


@functools.cache
def _captured_class(cls: Any) -> Any:
    """The class of the captured states of a class of states, registered as a pytree."""
    made = type(f"Captured{cls.__name__}", (_Captured, cls), {"plain_class": cls})

    def flatten(state: Any) -> tuple[list[tuple[Any, Any]], Any]:
        named = [*zip(cls._fields, state, strict=True), ("index", state.index), ("weights", state.weights)]
        return [(jax.tree_util.GetAttrKey(name), leaf) for name, leaf in named], state.layer

    def unflatten(layer: Layer, leaves: Iterable[Any]) -> Any:
        *statistics, index, weights = leaves
        return made.made(statistics, layer, index, weights)  # type: ignore[attr-defined]  # of _Captured

    jax.tree_util.register_pytree_with_keys(made, flatten, unflatten)
    return made


def _called_norm(transform: NormTransform[Any, Any], path: str, params: Any, state: State) -> CalledNorm:
    normalize = functools.partial(evaluate, transform, params)
    settings = transform.settings
    return CalledNorm(path, transform, state, normalize, settings.axis, settings.axis_name, settings.axis_index_groups)


def _operands(x: Any, given: Mapping[str, Any]) -> Operands:
    # All others say which statistics a value belongs to.
    where = {name: value for name, value in given.items() if name not in ("mask", "residual")}
    return Operands(jax.numpy.asarray(x), given.get("mask"), given.get("residual"), where)


def method_of(transform: NormTransform[Any, Any]) -> Method:
    """The method of a transform, in the form in which layers of Flax tell theirs."""
    # A nested function is named after the factory that made it.
    name = getattr(inspect.unwrap(transform.train), "__qualname__", type(transform).__name__).split(".")[0]

    def make(**settings: Any) -> NormTransform[Any, Any]:
        return transform

    make.__name__ = name
    return Method(make, **vars(transform.settings))
