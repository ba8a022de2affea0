"""What the hosts share of a capture: how a layer is named in the traced program, and what it normalizes with."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxbn._src import internals as _internals
from jaxbn._src.framework.layer_paths import as_key
from jaxbn._src.framework.method import Method, name_of, operands_for
from jaxbn._src.framework.mixing import CalledNorm, Mixture, as_prior, normalize_mixed
from jaxbn._src.framework.unknown_layers import all_served
from jaxbn._src.numerics import axes as _axes
from jaxbn._src.numerics import collectives as _collectives
from jaxbn._src.numerics import moments as _moments
from jaxbn._src.numerics.moments import Moments
from jaxbn._src.numerics.normalize import statistics_of_input, without_padding
from jaxbn._src.tracing import records as _records
from jaxbn._src.tracing import sow as _sow

# What layers normalize with while they are measured: the statistics of their batch, the stored ones, or as they are
# asked to.
MODES = ("batch", "eval", "as_called")

# As "batch", but for layers that the model asks for their stored statistics. It writes nothing, as "as_called" may.
HEEDED = "heeded"

# What every layer holds of the population; what else there is beside them, one method has and another does not.
POPULATION = ("mean", "var")

# What methods learn, as a rule; a method may learn more.
AFFINE = ("scale", "bias")

# batch -> weights of its examples, [N]
Weights = Callable[[Any], Any]


class LayerKind(NamedTuple):
    """What a layer does, as far as others need to know it."""

    method: str  # the name of its factory
    epsilon: float | None  # None: a traced value, or a method without

    @classmethod
    def of(cls, method: Method) -> "LayerKind":
        """The kind of a layer of this method."""
        epsilon = method.keywords.get("epsilon")
        return cls(name_of(method), None if epsilon is None or _internals.is_tracer(epsilon) else float(epsilon))


@dataclasses.dataclass(frozen=True)
class Layer:
    """What tells one layer's marks from another's; static, and different in each mode, so that programs are too."""

    path: str
    shape: tuple[int, ...]  # of its statistics
    mode: str | Mixture
    # How many examples a batch has, if the moments are those of the means of the examples.
    examples: int | None = None
    # Known only where the layer runs, from where the mark brings it out; it tells nothing apart.
    method: Method | None = dataclasses.field(default=None, compare=False)
    # Likewise: whether the model asks it for its stored statistics; None: nothing says so.
    asked_stored: bool | None = dataclasses.field(default=None, compare=False)

    @property
    def size(self) -> int:
        """Number of flat positions."""
        return math.prod(self.shape)

    def positions(self) -> jax.Array:
        """The flat position of each statistic, i32[shape]."""
        return jnp.arange(self.size, dtype=jnp.int32).reshape(self.shape)

    def moments_from(self, collected: Mapping[Any, Moments]) -> Moments:
        """This layer's moments out of what was collected, in its shape; of count 0 if it was not reached."""
        flat = collected.get(self)
        if flat is None:
            return Moments(*(jnp.zeros(self.shape, jnp.float32) for _ in range(3)))
        return jax.tree.map(lambda part: part.reshape(self.shape), flat)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """What one run of a model measured: a pytree."""

    moments: dict[str, Moments]  # of every layer, by path; of count 0 where it was not reached
    examples: dict[str, Moments]  # over the examples of their means, where they were asked for; also 0 where unknown
    # Of those reached, under paths that know the method.
    kinds: tuple[tuple[str, LayerKind], ...] = dataclasses.field(metadata={"static": True})
    # Where examples were asked for: of layers that are called several times each call by itself, [K, *shape].
    calls: dict[str, Moments] = dataclasses.field(default_factory=dict)
    # Of the layers reached, those which the model asks for their stored statistics in each call.
    held: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def is_mixed(self) -> bool:
        """Whether the model asks some layers for their stored statistics and others for those of the batch."""
        return 0 < len(self.held) < len(self.kinds)


def measured(records: Sequence[_records.Record], whole: Mapping[Layer, jax.Array], *, calls: bool = False) -> Measured:
    """What was harvested from a program into which the positions `whole` of its layers went.

    Raises:
        ValueError: If modules that keep running statistics ran, and none was a layer that is known.
    """
    records = all_served(records)
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
        held=tuple(path for path, group in reached.items() if all(layer.asked_stored for layer in group)),
    )


def marked(
    y: jax.Array, index: jax.Array, layer: Layer, moments: Moments, x: jax.Array, *, axis: Any, mask: Any
) -> jax.Array:
    """A layer's output, marked with the moments of its input, and of the means of its examples where they are wanted.

    An input whose leading axis is not that of the examples has none; nor have statistics of domains.
    """
    y = _sow.sow(y, index, moments, layer=dataclasses.replace(layer, examples=None))
    if layer.examples is None or x.shape[:1] != (layer.examples,) or 0 in _axes.split(x.ndim, axis).features:
        return y
    if index.shape != _axes.feature_shape(x.shape, axis):
        return y
    return _sow.sow(y, index, _moments.example_moments(x, axis=axis, mask=mask), layer=layer)


def count_examples(batch: Any) -> int | None:
    """Examples in a batch: the leading axis of its arrays; None if they differ."""
    leading = {leaf.shape[0] for leaf in jax.tree.leaves(batch) if getattr(leaf, "ndim", 0)}
    return leading.pop() if len(leading) == 1 else None


def example_weights(weights: Weights, batch: Any) -> jax.Array:
    """The weights of the examples of a batch, `[N]`."""
    given = jnp.asarray(weights(batch))
    if given.ndim != 1 or not (given.dtype == bool or jnp.isrealobj(given)):
        raise ValueError(f"weights(batch) must be one real number for each example, [N]; it is {jax.typeof(given)}.")
    return given


def carry_weights(weights: jax.Array, layer: Layer) -> jax.Array:
    """The weights `[*features, N]` as they go into a program beside a layer's statistics, and are cut as those are."""
    return jnp.broadcast_to(weights, (*layer.shape, *weights.shape))


def weigh(mask: Any, carried: jax.Array, x: jax.Array, path: str, axis: Any) -> jax.Array:
    """The mask of a layer's input: the weights of the examples, times the mask that the model gives, if it does."""
    weights = carried.reshape(-1, carried.shape[-1])[0]
    if x.shape[:1] != weights.shape or 0 in _axes.split(x.ndim, axis).features:
        raise ValueError(
            f"There are weights for {weights.size} examples, but the input of {path!r} is {x.shape}: its leading axis "
            f"does not hold them. Leave weights out, and give the layers masks in the model."
        )
    weights = weights.reshape(-1, *(1,) * (x.ndim - 1))
    given, own = _axes.weights_like(mask, x), _axes.weights_like(weights, x)
    return weights if given is None or own is None else given * own


def merged(found: Measured, axis_name: _collectives.AxisName | None) -> Measured:
    """What all devices of the axis measured together; as it is where there is no axis, as in tracing for shapes."""
    if axis_name is None or not _collectives.is_bound(axis_name):
        return found
    return dataclasses.replace(
        found, moments={path: _moments.merge_over(part, axis_name) for path, part in found.moments.items()}
    )


def check_mode(mode: str) -> None:
    """Raises a ValueError for a mode that does not exist."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is none of {', '.join(map(repr, MODES))}.")


def captured_call(
    layer: Layer,
    index: jax.Array,
    weights: jax.Array | None,
    norm: CalledNorm,
    arguments: tuple[jax.Array, Any, Any, dict[str, Any]],
    plain: Callable[[], jax.Array],
) -> jax.Array:
    """The call of a layer during a capture: measures the input, normalizes as the mode says, and marks the output.

    Args:
        layer: The layer, with its mode.
        index: The flat positions of its statistics.
        weights: Of the examples, as `carry_weights` laid them out; None: there are none.
        norm: What it takes to normalize for the layer.
        arguments: The input, the mask, the residual and other operands of the method.
        plain: The call as the model makes it.

    Returns:
        The output.
    """
    x, mask, residual, where = arguments
    mask = mask if weights is None else weigh(mask, weights, x, layer.path, norm.axis)
    measure = norm.transform.measure
    moments = measure(x, **operands_for(measure, mask=mask, **where))
    heeded = "eval" if layer.asked_stored else "batch"
    mode = heeded if layer.mode == HEEDED else layer.mode
    y = plain() if mode == "as_called" else normalize_as(mode, norm, moments, x, mask, residual, where)
    return marked(y, index, layer, moments, x, axis=norm.axis, mask=mask)


def normalize_as(
    mode: str | Mixture,
    norm: CalledNorm,
    moments: Moments,
    x: jax.Array,
    mask: Any,
    residual: Any,
    where: dict[str, Any],
) -> jax.Array:
    """What a layer makes of its input in a mode that says with what statistics; `moments` are those of the input.

    In mode "batch" they are what `postproc` makes of the batch's moments, which is right for every method, and
    gradients flow through them. An axis that is not there is left out: on one device the batch is all there is.
    """
    if isinstance(mode, Mixture):
        return normalize_mixed(mode, norm, moments, x, mask, residual, where)
    if mode == "eval":
        return norm.normalize(norm.stored, x, mask=mask, residual=residual, **where)
    if norm.axis_name is not None and _collectives.is_bound(norm.axis_name):
        moments = _moments.merge_over(moments, norm.axis_name, norm.axis_index_groups)
    prior = as_prior(norm.stored, moments)
    # Statistics that are not finite are not installed, but the output of a layer shows them.
    finite = jnp.isfinite(moments.mean) & jnp.isfinite(moments.m2)
    prior = prior._replace(mean=jnp.where(finite, prior.mean, jnp.nan))
    state = norm.transform.postproc(prior, moments)
    with statistics_of_input(True):
        return norm.normalize(state, without_padding(x, mask), mask=mask, residual=residual, **where)
