"""The part of a capture that all frameworks share: names of layers in the traced program, and their normalization."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxbn._src import internals as _internals
from jaxbn._src.framework.called import CalledNorm, Operands
from jaxbn._src.framework.layer_paths import as_key
from jaxbn._src.framework.method import Method, name_of, operands_for
from jaxbn._src.framework.mixing import Mixture, as_prior, normalize_mixed
from jaxbn._src.framework.unknown_layers import all_served
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.numerics.normalize import statistics_of_input, without_padding
from jaxbn._src.tracing import records as _records
from jaxbn._src.tracing import sow as _sow

# The statistics with which layers normalize during a capture: of the batch, running ones, or as the model asks.
MODES = ("batch", "eval", "as_called")

# As "batch", but layers that the model runs in evaluation use their running statistics. Unlike "as_called" it never
# writes statistics.
HEEDED = "heeded"


class Staged(NamedTuple):
    """The mode of a capture that returns the record of each call, for consistent statistics.

    The layers normalize with their running statistics. Those at the paths `unsettled` use the statistics of the batch
    where their running statistics are NaN.
    """

    unsettled: frozenset[str] = frozenset()


# The modes of a capture: one of `MODES`, `HEEDED`, or one that carries values.
Mode = str | Mixture | Staged


# The statistics that every layer has; further ones depend on the method.
POPULATION = ("mean", "var")

# The usual learned parameters; a method may have more.
AFFINE = ("scale", "bias")

# batch -> weights of its examples, [N]
Weights = Callable[[Any], Any]


class LayerKind(NamedTuple):
    """The method and the epsilon of a layer."""

    method: str  # the name of its factory
    epsilon: float | None  # None: a traced value, or a method without

    @classmethod
    def of(cls, method: Method) -> "LayerKind":
        """The kind of a layer of this method."""
        epsilon = method.keywords.get("epsilon")
        return cls(name_of(method), None if epsilon is None or _internals.is_tracer(epsilon) else float(epsilon))


@dataclasses.dataclass(frozen=True)
class Layer:
    """The static tag of a sown value. It differs between layers and modes, so that compiled programs do too."""

    path: str
    shape: tuple[int, ...]  # of its statistics
    mode: Mode
    # Number of examples in a batch, for moments of the means of the examples; else None.
    examples: int | None = None
    # Set when the layer runs, and harvested with the moments. Not part of the comparison, because the harvested tag
    # must equal the one that was made before the run.
    method: Method | None = dataclasses.field(default=None, compare=False)
    # Likewise: whether the model runs the layer in evaluation; None: not known.
    evaluates: bool | None = dataclasses.field(default=None, compare=False)

    @property
    def size(self) -> int:
        """Number of flat positions."""
        return math.prod(self.shape)

    def positions(self) -> jax.Array:
        """The flat position of each statistic, i32[shape]."""
        return jnp.arange(self.size, dtype=jnp.int32).reshape(self.shape)

    def moments_from(self, collected: Mapping[Any, Moments]) -> Moments:
        """The collected moments of this layer in its shape; of count 0 if it was not reached."""
        flat = collected.get(self)
        if flat is None:
            return Moments(*(jnp.zeros(self.shape, jnp.float32) for _ in range(3)))
        return jax.tree.map(lambda part: part.reshape(self.shape), flat)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurements of one run of a model: a pytree."""

    moments: dict[str, Moments]  # of every layer, by path; of count 0 where it was not reached
    examples: dict[str, Moments]  # moments of the means of the examples, on request; of count 0 where unknown
    # Of the layers that were reached, under paths that carry the method.
    kinds: tuple[tuple[str, LayerKind], ...] = dataclasses.field(metadata={"static": True})
    # With examples: the moments of each call of layers that are called several times, [K, *shape].
    calls: dict[str, Moments] = dataclasses.field(default_factory=dict)
    # The layers that the model runs in evaluation in all their calls.
    held: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})
    # In the mode `Staged`: one for each call of a layer.
    records: tuple[_records.Record, ...] = ()

    @property
    def is_mixed(self) -> bool:
        """Whether the model runs some layers in evaluation and others in training."""
        return 0 < len(self.held) < len(self.kinds)


def measured(
    records: Sequence[_records.Record], whole: Mapping[Layer, jax.Array | None], *, calls: bool = False
) -> Measured:
    """Assembles the values harvested from a program; `whole` holds the positions of all statistics by layer.

    Raises:
        ValueError: If modules with running statistics ran, and none of them is a known layer.
    """
    records = all_served(records)
    # A layer sows two kinds of moments, see `sown`: those of the values have `examples=None` in their tag.
    values = {dataclasses.replace(layer, examples=None): index for layer, index in whole.items()}
    collected = _records.collect(records, {**whole, **values})
    by_layer = _records.by_layer(record for record in records if cast(Layer, record.layer).examples is None)
    reached = {layer.path: [cast(Layer, record.layer) for record in group] for layer, group in by_layer.items()}
    methods = {path: method for path, group in reached.items() if (method := group[-1].method) is not None}
    kinds = {as_key(path, method): LayerKind.of(method) for path, method in methods.items()}
    apart = {layer: _records.by_call(group, layer.size) for layer, group in by_layer.items()} if calls else {}
    return Measured(
        moments={layer.path: layer.moments_from(collected) for layer in values},
        examples={layer.path: layer.moments_from({} if layer.examples is None else collected) for layer in whole},
        kinds=tuple(kinds.items()),
        calls={
            layer.path: jax.tree.map(lambda part, layer=layer: part.reshape(-1, *layer.shape), part)
            for layer, part in apart.items()
            if part is not None
        },
        held=tuple(path for path, group in reached.items() if all(layer.evaluates for layer in group)),
        records=tuple(records) if any(isinstance(layer.mode, Staged) for layer in whole) else (),
    )


def sown(
    y: jax.Array, index: jax.Array, layer: Layer, moments: Moments, x: jax.Array, *, axis: Any, mask: Any
) -> jax.Array:
    """Sows the moments of a layer's input on its output, and on request those of the means of the examples.

    The latter do not exist if the leading axis of the input is not that of the examples, or for statistics of domains.
    """
    y = _sow.sow(y, index, moments, layer=dataclasses.replace(layer, examples=None))
    if layer.examples is None or x.shape[:1] != (layer.examples,) or 0 in _axes.split(x.ndim, axis).features:
        return y
    # Statistics of domains have one axis more than the features of the input.
    if index.shape != _axes.feature_shape(x.shape, axis):
        return y
    return _sow.sow(y, index, _moments.example_moments(x, axis=axis, mask=mask), layer=layer)


def count_examples(batch: Any) -> int | None:
    """Number of examples in a batch: the leading axis of its arrays; None if they differ."""
    leading = {leaf.shape[0] for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)}
    return leading.pop() if len(leading) == 1 else None


def example_weights(weights: Weights, batch: Any) -> jax.Array:
    """The weights of the examples of a batch, `[N]`."""
    given = jnp.asarray(weights(batch))
    if given.ndim != 1 or not (given.dtype == bool or jnp.isrealobj(given)):
        raise ValueError(f"weights(batch) must be one real number for each example, [N]; it is {jax.typeof(given)}.")
    return given


def carry_weights(weights: jax.Array, layer: Layer) -> jax.Array:
    """Broadcasts weights to `[*features, N]`, so that transformations slice them together with the statistics."""
    return jnp.broadcast_to(weights, (*layer.shape, *weights.shape))


def weigh(mask: Any, carried: jax.Array, x: jax.Array, path: str, axis: Any) -> jax.Array:
    """The weights of the examples, times the mask that the model passes to the layer, if any."""
    # `carry_weights` repeated the same weights for each statistic, so any of the copies will do.
    weights = carried.reshape(-1, carried.shape[-1])[0]
    if x.shape[:1] != weights.shape or 0 in _axes.split(x.ndim, axis).features:
        raise ValueError(
            f"There are weights for {weights.size} examples, but the input of {path!r} is {x.shape}: its leading axis "
            f"does not hold them. Leave weights out, and give the layers masks in the model."
        )
    weights = weights.reshape(-1, *(1,) * (x.ndim - 1))
    given, own = _axes.weights_like(mask, x), _axes.weights_like(weights, x)
    return weights if given is None or own is None else given.astype(jnp.float32) * own.astype(jnp.float32)


def merged(found: Measured, axis_name: _collectives.AxisName | None) -> Measured:
    """Merges the measurements of all devices of the axis; unchanged if the axis is not bound, as in shape tracing."""
    if axis_name is None or not _collectives.is_bound(axis_name):
        return found
    return dataclasses.replace(
        found, moments={path: _moments.merge_over(part, axis_name) for path, part in found.moments.items()}
    )


def check_mode(mode: str) -> None:
    """Raises a ValueError for an unknown mode."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is none of {', '.join(map(repr, MODES))}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slot:
    """A pytree that travels with the statistics of a layer while its calls are captured; the layer is static."""

    index: jax.Array  # i32, the flat positions of its statistics
    weights: jax.Array | None  # of the examples, as `carry_weights` laid them out
    layer: Layer = dataclasses.field(metadata={"static": True})


def captured_call(
    slot: Slot,
    method: Method,
    evaluates: bool | None,
    norm: CalledNorm,
    operands: Operands,
    plain: Callable[[], jax.Array],
) -> jax.Array:
    """The call of a layer during a capture: measures the input, normalizes as the mode says, and sows on the output.

    Args:
        slot: The layer, and what it carries.
        method: The method of the layer.
        evaluates: Whether the model runs the layer in evaluation; None: not known.
        norm: The functions and statistics of the layer.
        operands: The arguments of the call.
        plain: The call as the model makes it.

    Returns:
        The output.
    """
    layer, index = dataclasses.replace(slot.layer, method=method, evaluates=evaluates), slot.index
    x, mask, _, where = operands
    mask = mask if slot.weights is None else weigh(mask, slot.weights, x, layer.path, norm.axis)
    measure = norm.transform.measure
    moments = measure(x, **operands_for(measure, mask=mask, **where))
    heeded = "eval" if layer.evaluates else "batch"
    mode = heeded if layer.mode == HEEDED else layer.mode
    y = plain() if mode == "as_called" else normalize_as(mode, norm, moments, operands._replace(mask=mask))
    return sown(y, index, layer, moments, x, axis=norm.axis, mask=mask)


def normalize_as(mode: Mode, norm: CalledNorm, moments: Moments, operands: Operands) -> jax.Array:
    """Normalizes an input with moments `moments` in a mode other than "as_called".

    Mode "batch" uses the statistics that `postproc` makes of the moments of the batch, which is right for every method.
    Gradients flow through them.
    """
    if isinstance(mode, Mixture):
        return normalize_mixed(mode, norm, moments, operands)
    if mode == "eval" or (isinstance(mode, Staged) and norm.path not in mode.unsettled):
        return norm.apply(norm.running, operands)
    moments = norm.over_devices(moments)
    prior = as_prior(norm.running, moments)
    # postproc does not install statistics that are not finite, but the output of the layer must show them.
    finite = jnp.isfinite(moments.mean) & jnp.isfinite(moments.m2)
    prior = prior._replace(mean=jnp.where(finite, prior.mean, jnp.nan))
    state = norm.transform.postproc(prior, moments)
    if isinstance(mode, Staged):
        return norm.apply(jax.tree.map(_where_unsettled, norm.running, state), operands)
    with statistics_of_input(True):
        return norm.apply(state, operands._replace(x=without_padding(operands.x, operands.mask)))


def _where_unsettled(running: jax.Array, of_batch: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(running), of_batch, running.astype(of_batch.dtype))
